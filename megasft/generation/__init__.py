"""Generate with a model and its adapter, under any topology: for looking at results, not for serving."""
