"""Files and folders: safetensors in place, folders that appear complete, caches, a rank's part of a tensor."""
