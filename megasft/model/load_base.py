"""Load a Hugging Face checkpoint into this rank's base weights. Each rank reads only the slices it keeps."""

from pathlib import Path

from megasft.model.hf_checkpoint import Checkpoint
from megasft.model.quantized_base import QuantizedCheckpoint
from megasft.model.qwen3_moe import Qwen3Moe
from megasft.quant.weight import Slot
from megasft.storage.safetensors import RELEASE_BYTES


def load_base(model: Qwen3Moe, folder: str | Path, quantized: QuantizedCheckpoint | None = None) -> None:
    """Load this rank's base weights from the checkpoint in `folder` and convert them to the model's dtype. Weights that
    the model keeps in 4 bits come from `quantized`. Memory holds the model and the file pages touched last.

    Raises UserError naming any tensor that is missing, surplus or has another shape, before any weight is read.
    """
    checkpoint = Checkpoint(folder)
    plan = [(shard, *checkpoint.locate(shard)) for shard in model.base_shards()]
    checkpoint.refuse_surplus(model.hf_config)
    touched = 0
    for shard, name, index in plan:
        if isinstance(shard.local, Slot):
            assert quantized is not None, "a 4-bit model needs `quantized`: call model.quantized_base.prepare first"
            matrix = quantized.matrix(shard.name)
            shard.local.fill(matrix)
            touched += sum(tensor.nbytes for tensor in matrix.values())
        else:
            shard.local.copy_(checkpoint.read(name, index))
            touched += shard.local.nbytes
        if touched >= RELEASE_BYTES:
            checkpoint.release()
            if quantized:
                quantized.release()
            touched = 0
