"""PEFT adapters: files in and out, their layouts, merging into the base."""
