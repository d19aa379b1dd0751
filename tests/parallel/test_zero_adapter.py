"""An adapter that changes nothing is known as such on every rank, wherever its parts lie."""

import pytest
import torch.distributed as dist

from megasft.adapters.model_io import is_zero
from tests.support.on_ranks import start
from tests.support.world import make_world


def zero_where_only_one_rank_learned(settings, learned):
    """What `is_zero` says on this rank if one element of one B of rank `learned` is not zero."""
    _, _, model = start(settings)
    if dist.get_rank() == learned:
        shard = [shard for shard in model.adapter_shards() if shard.name.endswith("lora_B.weight")][-1]
        shard.local.flatten()[-1] = 1e-30
    return is_zero(model)


@pytest.mark.parametrize(("learned", "zero"), [(None, True), (1, False)])
def test_an_adapter_is_zero_if_every_b_is_on_all_ranks(ranks, tmp_path, learned, zero):
    make_world(tmp_path, tensor=2)
    settings = {"job": {"model": str(tmp_path / "model")}, "data": {"topology": {"tensor_parallel": 2}}}
    settings["hyperparameters"] = {"parallelism": {"bf16": False}}
    assert ranks(2, zero_where_only_one_rank_learned, settings, learned) == [zero, zero]
