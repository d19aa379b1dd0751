"""A run does not resume with another precision of its base unless allowed."""

from pathlib import Path

import pytest

from megasft.config.schema import RunConfig
from megasft.messages import UserError
from megasft.train.checkpoint.resume import identity, refuse_changes


@pytest.mark.parametrize(("then", "now", "said"), [
    ({}, {"training": {"use_qlora": True}}, "[training] use_qlora = True: .* was trained with False"),
    ({"training": {"use_qlora": True}}, {}, "[training] use_qlora = False: .* was trained with True"),
    ({"training": {"use_qlora": True}}, {"training": {"use_qlora": True}, "quant": {"block_size": 128}},
     "[quant] block_size = 128: .* was trained with 64"),
])  # fmt: skip
def test_another_precision_of_the_base_is_refused(then, now, said):
    old, new = RunConfig.from_dict(then), RunConfig.from_dict(now)
    with pytest.raises(UserError, match=said.replace("[", r"\[")):
        refuse_changes(identity(old, "b", 1), identity(new, "b", 1), new, Path("checkpoint"))


def test_unused_quant_settings_do_not_prevent_resuming():
    old, new = RunConfig.from_dict({}), RunConfig.from_dict({"quant": {"block_size": 128}})
    refuse_changes(identity(old, "b", 1), identity(new, "b", 1), new, Path("checkpoint"))
