"""A frozen base in 4 bits (QLoRA, Dettmers et al. 2023, https://arxiv.org/abs/2305.14314)."""
