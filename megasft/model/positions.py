"""How long a sample may be for a model: the positions that its rotary embeddings were made for."""

import json
from pathlib import Path
from typing import Any


def longest_input(folder: str | Path) -> int | None:
    """Tokens of the longest sample that the model in `folder` was made for; None where its config.json does not say.

    As vLLM works it out: YaRN stretches `original_max_position_embeddings` by its factor, linear scaling
    `max_position_embeddings`; of the others `max_position_embeddings` already counts the stretched ones. Dual chunk
    attention stretches nothing here: transformers and megasft compute such a model with full attention.
    """
    try:
        config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
        return _longest(config)
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return None


def _longest(config: dict[str, Any]) -> int | None:
    positions = config.get("max_position_embeddings")
    if not isinstance(positions, int):
        return None
    # of both, transformers takes the second
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    chunks = config.get("dual_chunk_attention_config") or {}
    positions = min(positions, chunks.get("original_max_position_embeddings") or positions)
    kind, factor = rope.get("rope_type", rope.get("type", "default")), float(rope.get("factor") or 1.0)
    if kind == "yarn":
        return max(int((rope.get("original_max_position_embeddings") or positions) * factor), positions)
    return int(positions * factor) if kind == "linear" else positions
