"""LoRA adds no collectives: a layer with adapters issues those of the frozen layer.

Each of a token's choices is an expert and a weight, 4 bytes each; with dropout the token's place goes along, 8 bytes.
"""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megasft.config.values import LINEAR_LAYERS
from megasft.lora.dropout import Draw
from megasft.model.batch import Segments
from tests.parity.reference import random_model, tiny_config
from tests.support import on_ranks

SEGMENTS = [9, 15]
T, H, K, FP32 = sum(SEGMENTS), 64, 3, 4


class Collectives(TorchDispatchMode):
    """Counts c10d calls and the bytes of the larger side of each: the gathered output, or the input to scatter."""

    SIDES = {"_allgather_base_": 0, "_reduce_scatter_base_": 1, "allreduce_": 0, "alltoall_base_": 1}

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[tuple[str, int]] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            name = func._schema.name.removeprefix("c10d::")
            if name != "barrier":
                tensor = args[self.SIDES[name]]  # an unknown collective is a KeyError: the test must learn of it
                tensor = tensor[0] if isinstance(tensor, list) else tensor
                self.seen[name, tensor.numel() * tensor.element_size()] += 1
        return func(*args, **(kwargs or {}))


def count_in_layer(settings, layer: int, adapted: bool):
    """(forward, backward) collectives of one layer."""
    _, topology, model = on_ranks.start(settings)
    if not adapted:
        from megasft.model.load_base import load_base
        from megasft.model.qwen3_moe import build_model

        model = build_model(model.hf_config, topology, None, torch.float32, recompute=False)
        load_base(model, settings["job"]["model"])
    segments = Segments.of(SEGMENTS, torch.device("cpu"))
    segments.draw = Draw(1, torch.arange(T))
    torch.manual_seed(topology.rank)
    x = torch.randn(T // topology.sizes.tensor, 1, H, requires_grad=True)
    cos_sin = torch.cat(model.rotary(segments.positions(x.device), x.dtype))
    with Collectives() as forward:
        y, _ = model.decoder.layers[layer](x, None, rotary_pos_emb=cos_sin, packed_seq_params=segments)
    with Collectives() as backward:
        y.backward(torch.randn_like(y))
    trained = [p for p in model.decoder.layers[layer].parameters() if p.requires_grad]
    assert bool(trained) == adapted
    assert all(p.grad is not None and p.grad.any() for p in trained)
    return forward.seen, backward.seen


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    random_model(tiny_config()).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("tensor", [2, 4])
@pytest.mark.parametrize("layer", [0, 1], ids=["sparse", "dense"])
def test_an_adapted_layer_issues_the_collectives_of_the_frozen_layer(ranks, base, tensor, layer, tmp_path):
    def settings(dropout):
        return {
            # Zero B would hide a missing path of backward; initial adapters have it, so these start from random ones.
            "job": {"model": base, "output_dir": str(tmp_path), "init_adapter": adapter},
            "lora": {"r": 4, "dropout": dropout, "target_modules": list(LINEAR_LAYERS)},
            "data": {"topology": {"tensor_parallel": tensor, "expert_tensor_parallel": tensor}},
            "hyperparameters": {"parallelism": {"bf16": False, "activation_checkpointing": False}},
        }

    adapter = str(random_peft_adapter(tmp_path / "adapter"))
    for dropout, adapted in ((0.0, False), (0.0, True), (0.1, True)):
        expected = collectives_of_layer(sparse=layer == 0, dropout=bool(dropout))
        found = ranks(tensor, count_in_layer, settings(dropout), layer, adapted)
        assert len(found) == tensor
        for of_rank in found:
            assert of_rank == expected, f"dropout {dropout}, adapted: {adapted}"


def collectives_of_layer(sparse: bool, dropout: bool):
    """(forward, backward) of any rank."""
    tokens = T * H * FP32
    # gather and reduce-scatter around attention and around the MLP or the experts, and the reverse in backward
    around = Counter({("_allgather_base_", tokens): 2, ("_reduce_scatter_base_", tokens): 2})
    if not sparse:
        return around, around
    choices, weights = T * (2 * K * FP32 + 8 * dropout), T * K * FP32
    return around + Counter({("_allgather_base_", choices): 1}), around + Counter(
        {("_reduce_scatter_base_", weights): 1}
    )


def random_peft_adapter(folder):
    from tests.parity.reference import random_adapter, write_adapter

    return write_adapter(random_adapter(tiny_config(), 4, frozenset(LINEAR_LAYERS)), folder, 4, 32.0)
