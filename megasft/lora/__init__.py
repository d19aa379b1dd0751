"""LoRA layers, sharded like their base layers."""
