"""How layers are shared out between pipeline stages."""

import pytest

from megasft.model.shape import stage_layers


@pytest.mark.parametrize(
    ("layers", "stages", "want"),
    [
        (48, 1, [48]),
        (48, 4, [12, 12, 12, 12]),
        (94, 4, [23, 24, 24, 23]),  # Qwen3-235B-A22B
        (94, 2, [47, 47]),
        (62, 4, [15, 16, 16, 15]),  # Qwen3-Coder-480B-A35B
        (7, 2, [4, 3]),
        (5, 4, [2, 1, 1, 1]),
        (4, 4, [1, 1, 1, 1]),
    ],
)
def test_stages_between_embedding_and_head_have_more_layers(layers, stages, want):
    assert stage_layers(layers, stages) == want


def test_every_stage_has_a_layer_and_every_layer_a_stage():
    for layers in range(1, 40):
        for stages in range(1, layers + 1):
            found = stage_layers(layers, stages)
            assert (len(found), sum(found)) == (stages, layers)
            assert min(found) >= 1
            assert len(set(found[1:-1])) <= 1, "megatron-core wants the middle stages alike"
            share = -(-layers // stages)
            room = (
                layers - share * (stages - 2) >= 2
            )  # middle stages with so many leave one for the first and last each
            assert not room or max(found) == share, (layers, stages, found)
