"""A Hugging Face checkpoint into this rank's storage: each rank reads the slices it keeps and nothing else."""

from pathlib import Path

from megasft.model.hf_checkpoint import Checkpoint
from megasft.model.quantized_base import QuantizedCheckpoint
from megasft.model.qwen3_moe import Qwen3Moe
from megasft.quant.weight import Slot
from megasft.storage.safetensors import RELEASE_BYTES


def load_base(model: Qwen3Moe, folder: str | Path, quantized: QuantizedCheckpoint | None = None) -> None:
    """Fill this rank's base weights from the checkpoint in `folder`, converting to the model's dtype; those that the
    model keeps in 4 bits from `quantized`. Memory holds no more than the model and what of a file was touched last.

    Raises UserError naming any tensor that is missing, surplus or of another shape, before a weight is read.
    """
    checkpoint = Checkpoint(folder)
    plan = [(shard, *checkpoint.locate(shard)) for shard in model.base_shards()]
    checkpoint.refuse_surplus(model.hf_config)
    touched = 0
    for shard, name, index in plan:
        if isinstance(shard.local, Slot):
            assert quantized is not None, "the model is in 4 bits: model.quantized_base.prepare first"
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
