"""PEFT adapters: reading and writing files, their layouts, merging into the base."""
