"""Files and folders: memory-mapped safetensors, folders that appear complete, disk caches, shards of tensors."""
