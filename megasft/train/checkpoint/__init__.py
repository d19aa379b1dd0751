"""Checkpoints of a run: the folder, the optimizer shards in it, writing in the background, resuming."""
