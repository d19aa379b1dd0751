"""Training: optimizer, schedule, loop, evaluation, checkpoints and metrics."""
