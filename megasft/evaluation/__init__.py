"""Losses and answers on held-out conversations, and what they say of an adapter."""
