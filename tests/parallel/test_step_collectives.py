"""A complete step sends exactly what the formulas of `step_traffic` say, over the groups they name."""

import pytest

from tests.parallel.invariance import Case
from tests.parallel.step_traffic import measured_and_expected
from tests.parity.reference import random_model, tiny_config
from tests.support import on_ranks

R = 4
LENGTHS = [19, 7, 30, 11, 4, 23, 16, 9]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    random_model(tiny_config(num_hidden_layers=4)).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("case", "recompute", "coefficient"),
    [
        (Case(2), True, 0.0),
        (Case(2, tensor=2), True, 0.0),
        (Case(2, tensor=2, expert_tensor=2), True, 0.0),
        (Case(2, tensor=2, expert_tensor=2), False, 0.0),
        (Case(2, tensor=2, expert_tensor=2), "selective", 0.0),
        (Case(2, tensor=2, expert=2), True, 0.1),
        (Case(2, expert=2, batch=2), True, 0.0),
        (Case(2, pipeline=2), True, 0.0),
        (Case(4, tensor=2, expert=2), True, 0.0),
        (Case(4, tensor=2, expert_tensor=2, batch=2), True, 0.0),
        (Case(4, tensor=4, expert=2, expert_tensor=2, dispatcher="allgather"), True, 0.0),
        (Case(4, tensor=2, pipeline=2, expert=2), True, 0.1),
    ],
    ids=str,
)
def test_a_step_sends_the_bytes_of_the_formulas_over_the_right_groups(
    ranks, base, tmp_path, case, recompute, coefficient
):
    check(ranks, base, tmp_path, case, recompute, coefficient)


@pytest.mark.parametrize("case", [Case(2, tensor=2, expert_tensor=2), Case(2, tensor=2, expert=2)], ids=str)
def test_so_it_does_in_bf16_with_dropout(ranks, base, tmp_path, case):
    check(ranks, base, tmp_path, case, bf16=True, dropout=0.1)


def check(ranks, base, tmp_path, case, recompute=True, coefficient=0.0, bf16=False, dropout=0.0):
    settings = {
        "job": {"model": base, "output_dir": str(tmp_path)},
        "lora": {"r": R, "dropout": dropout, "target_modules": ["all-linear", "gate"]},
        "data": {"topology": {
            "tensor_parallel": case.tensor, "expert_parallel": case.expert, "expert_tensor_parallel": case.expert_tensor,
            "pipeline_parallel": case.pipeline,
        }},
        "hyperparameters": {
            "per_device_batch": case.batch, "gradient_accumulation_steps": 4 // (case.data * case.batch),
            "router_aux_loss_coef": coefficient, "max_steps": 5,
            "parallelism": {"bf16": bf16, "activation_checkpointing": recompute, "token_dispatcher": case.dispatcher},
        },
    }  # fmt: skip
    answers = ranks(case.ranks, measured_and_expected, settings, on_ranks.random_samples(203, LENGTHS))
    sent = {True: 0, False: 0}
    for (calls, sizes), (expected_calls, expected_sizes) in answers:
        assert calls == expected_calls
        # What comes back from experts depends on which were chosen; over all ranks as much comes back as was sent.
        sent[True] += sizes.pop(("ep", "all-to-all"), 0)
        sent[False] += expected_sizes.pop(("ep", "all-to-all"), 0)
        assert sizes == expected_sizes
    assert sent[True] == sent[False]
    assert bool(sent[True]) == (case.expert > 1 and case.dispatcher == "auto")
