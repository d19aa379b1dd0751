"""A complete step sends exactly what the formulas of `step_traffic` say, over the groups they name."""

from collections import Counter

import pytest
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from megasft.config.parallelism import choose_dispatcher
from megasft.train.trainer import Trainer
from tests.parallel.invariance import Case
from tests.parallel.step_traffic import StepTraffic
from tests.parity.reference import random_model, tiny_config
from tests.support import on_ranks

R = 4
LENGTHS = [19, 7, 30, 11, 4, 23, 16, 9]
GROUPS = {
    "default_pg": "world",
    "TENSOR_MODEL_PARALLEL_GROUP": "tp",
    "PIPELINE_MODEL_PARALLEL_GROUP": "pp",
    "DATA_PARALLEL_GROUP_WITH_CP": "dp",
    "EXPERT_MODEL_PARALLEL_GROUP": "ep",
    "EXPERT_TENSOR_PARALLEL_GROUP": "expert tp",
    "EXPERT_TENSOR_AND_MODEL_PARALLEL_GROUP": "expert tp x ep",
    "EXPERT_DATA_PARALLEL_GROUP": "expert dp",
    "INTRA_DISTRIBUTED_OPTIMIZER_INSTANCE_GROUP": "norm",
}
# An unknown collective or group is a KeyError: the test must learn of it.
KINDS = {
    "_allgather_base_": "all-gather",
    "allgather_into_tensor_coalesced_": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
    "reduce_scatter_tensor_coalesced_": "reduce-scatter",
    "allreduce_": "all-reduce",
    "alltoall_base_": "all-to-all",
    "broadcast_": "broadcast",
    "send": "send",
    "recv_": "receive",
}


class Traffic(TorchDispatchMode):
    """Calls and bytes of collectives by (group, kind), counted as `StepTraffic` counts them."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[tuple[str, str]] = Counter()
        self.bytes: Counter[tuple[str, str]] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            kind = KINDS[func._schema.name.removeprefix("c10d::")]
            sides, group = [], None
            for value, spec in zip(args, func._schema.arguments, strict=False):
                if "ProcessGroup" in str(spec.type):
                    group = dist.ProcessGroup.unbox(value)
                elif "Tensor" in str(spec.type) and value is not None:
                    tensors = value if isinstance(value, list) else [value]
                    sides.append(sum(tensor.numel() * tensor.element_size() for tensor in tensors))
            if group.size() > 1:
                key = GROUPS[group.group_desc], kind
                self.calls[key] += 1
                self.bytes[key] += sides[1] if kind == "all-to-all" else max(sides)
        return func(*args, **(kwargs or {}))


def measured_and_expected(settings, samples):
    """((calls, bytes) of this rank's second step, the same by formula)."""
    config, topology, model = on_ranks.start(settings)
    trainer = Trainer(config, topology, model, on_ranks.as_samples(samples))
    trainer.train_step()
    compute, seen = trainer._compute, []

    def spied(batches, training):
        seen.extend((len(batch.tokens), int((batch.labels >= 0).sum())) for batch in batches)
        return compute(batches, training)

    trainer._compute = spied
    with Traffic() as traffic:
        trainer.train_step()
    parallelism = config.hyperparameters.parallelism
    formulas = StepTraffic(
        model.hf_config,
        topology.sizes,
        topology.groups.pp.rank(),
        R,
        choose_dispatcher(parallelism.token_dispatcher, topology.sizes),
        forwards=1 + parallelism.activation_checkpointing,
        counts_first=bool(config.hyperparameters.router_aux_loss_coef),
    ).of(seen)
    return (traffic.calls, traffic.bytes), (formulas.calls, formulas.bytes)


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
    settings = {
        "job": {"model": base, "output_dir": str(tmp_path)},
        "lora": {"r": R, "dropout": 0.0, "target_modules": ["all-linear", "gate"]},
        "data": {"topology": {
            "tensor_parallel": case.tensor, "expert_parallel": case.expert, "expert_tensor_parallel": case.expert_tensor,
            "pipeline_parallel": case.pipeline,
        }},
        "hyperparameters": {
            "per_device_batch": case.batch, "gradient_accumulation_steps": 4 // (case.data * case.batch),
            "router_aux_loss_coef": coefficient, "max_steps": 5,
            "parallelism": {"bf16": False, "activation_checkpointing": recompute, "token_dispatcher": case.dispatcher},
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
