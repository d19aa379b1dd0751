"""What tests share: ranks, a tiny job on disk, commands that fail on purpose."""
