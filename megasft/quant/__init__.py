"""The frozen 4-bit base of QLoRA (Dettmers et al. 2023, https://arxiv.org/abs/2305.14314)."""
