"""A run resumes on the base, in the precision and with the LoRA settings it was trained with, or is told what would work."""

import re
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


NEW_RUN = r"; set it so, or start a new run \(set another \[job\] output_dir, or pass --resume never\)"


@pytest.mark.parametrize(("then", "now", "said"), [
    ({"lora": {"r": 4}}, {"lora": {"r": 8}}, "[lora] r = 8: checkpoint was trained with 4"),
    ({}, {"lora": {"alpha": 7.0}}, "[lora] alpha = 7.0: checkpoint was trained with 32.0"),
    ({}, {"lora": {"target_modules": ["q_proj"]}}, "[lora] target_modules = q_proj: checkpoint was trained with all-linear"),
    ({"lora": {"target_modules": ["gate", "q_proj"]}}, {}, "[lora] target_modules = all-linear: checkpoint was trained with gate, q_proj"),
])  # fmt: skip
def test_another_shape_of_adapter_is_not_told_to_start_from_the_old_one(then, now, said):
    old, new = RunConfig.from_dict(then), RunConfig.from_dict(now)
    with pytest.raises(UserError, match=f"^{re.escape(said)}.*{NEW_RUN}$"):
        refuse_changes(identity(old, "b", 1), identity(new, "b", 1), new, Path("checkpoint"))


def test_another_seed_may_start_from_the_old_adapter():
    old, new = RunConfig.from_dict({}), RunConfig.from_dict({"job": {"seed": 1}})
    with pytest.raises(
        UserError, match=f"seed = 1: .*{NEW_RUN}, from this adapter with .* init_adapter = 'checkpoint'$"
    ):
        refuse_changes(identity(old, "b", 1), identity(new, "b", 1), new, Path("checkpoint"))
