"""What is refused before ranks are launched: what needs no rank, the GPUs, and all of it without a launch."""
