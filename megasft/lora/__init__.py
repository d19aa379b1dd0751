"""Low-rank adapters on every linear layer, sharded as their base layer is."""
