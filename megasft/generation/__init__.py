"""Looking at what a model answers, with its adapter, under any topology; not for serving."""
