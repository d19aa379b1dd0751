"""Qwen3-MoE as a megatron-core model: settings, layers, loss head and Hugging Face weights."""
