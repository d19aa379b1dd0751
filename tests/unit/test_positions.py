"""How long a sample may be for a model, with its rope scaling."""

import json

import pytest

from megasft.model.positions import longest_input


@pytest.mark.parametrize(
    ("config", "positions"),
    [
        ({"max_position_embeddings": 40960}, 40960),
        ({"max_position_embeddings": 40960, "rope_scaling": None}, 40960),
        ({"max_position_embeddings": 40960, "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}}, 131072),
        ({"max_position_embeddings": 131072, "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}}, 131072),
        ({"max_position_embeddings": 4096, "rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, 8192),
        ({"max_position_embeddings": 4096, "rope_scaling": {"type": "linear", "factor": 2.0}}, 8192),
        ({"max_position_embeddings": 131072, "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192}}, 131072),
        ({}, None),
        ([], None),
    ],
)  # fmt: skip
def test_positions_are_counted_with_their_scaling(tmp_path, config, positions):
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert longest_input(tmp_path) == positions


def test_a_folder_without_a_configuration_says_nothing(tmp_path):
    assert longest_input(tmp_path) is None
