"""What a GPU would run is run on fake CUDA tensors: every line, with the checks that CUDA's kernels make."""

import inspect
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from megasft.config.parallelism import choose_dispatcher, resolve_topology
from megasft.config.schema import RunConfig
from megasft.plan.memory import memory
from megasft.plan.state import state_bytes
from megasft.plan.traffic import StepTraffic
from tests.cuda_path.cases import CASES, in_a_process

by_case = pytest.mark.parametrize("case", CASES, ids=str)
BY_NAME = {case.name: case for case in CASES}


@pytest.fixture(scope="module")
def walked(tmp_path_factory):
    """What each case counted. They share a process of their own, which pretends to have a GPU."""
    return in_a_process(tmp_path_factory.mktemp("walk") / "counts")


@by_case
def test_a_step_and_a_checkpoint_run(walked, case):
    """No host tensor meets one of the device, and every operand is such that CUDA's kernels take it (see `watch`)."""
    assert not walked[case.name].error, walked[case.name].error
    assert walked[case.name].phases["compute"].kernels.total() > 200


# Where the host waits for the device between the first layer and the end of backward: in a layer (each forward of it), in
# a micro batch, in a step.
SPLITS = ("synchronize", "megatron/core/transformer/moe/token_dispatcher.py")  # of an all-to-all: what goes where
COPIES = ("local_scalar_dense", "megasft/model/dispatch.py")  # of tokens, where the host cannot know how many
SUMS = ("copy cuda to cpu", "megasft/train/forward_backward.py")  # the loss and the experts' counts
P2P = "megatron/core/pipeline_parallel/p2p_communication.py"
BALANCE = "megasft/train/expert_load.py"


def allowed_syncs(case, sizes, dispatcher):
    """Counter of (what, file) for one step of one micro batch and two layers."""
    forwards = 1 if case.changes.get("recompute") is False else 2
    layers = 2 // sizes.pipeline * forwards * (case.changes.get("accumulation", 1))
    allowed = Counter({SUMS: 1})
    if dispatcher == "alltoall" and sizes.expert * sizes.expert_tensor > 1:
        allowed[SPLITS] = layers
    if dispatcher == "allgather" and (sizes.expert > 1 or "expert_capacity_factor" in case.hyper):
        allowed[COPIES] = layers
    if sizes.pipeline > 1:
        allowed |= {("synchronize", P2P): 4, ("tolist", P2P): 1, ("copy cpu to cuda", P2P): 1}
    if "router_aux_loss_coef" in case.hyper:
        allowed |= {("local_scalar_dense", BALANCE): 1, ("copy cpu to cuda", BALANCE): 1}
    return allowed


@by_case
def test_the_host_waits_for_the_device_nowhere_else(walked, case):
    counts = walked[case.name].phases["compute"]
    found = Counter()
    for (what, where), times in counts.syncs.items():
        found[what, where.rpartition(":")[0]] += times
    assert found == allowed_syncs(case, *topology_of(case))


@by_case
def test_a_micro_batch_is_made_without_asking_the_device(walked, case):
    """Which positions the loss looks at, and how many, is known on the host."""
    asked = {(what, where) for what, where in walked[case.name].phases["batch"].syncs if what != "copy cpu to cuda"}
    assert all(what == "synchronize" and where.startswith("megasft/host.py") for what, where in asked), asked


@by_case
def test_its_collectives_are_those_of_the_formulas_that_hold_on_cpus(walked, case):
    """`StepTraffic`, which `tests/parallel/test_step_collectives.py` compares with ranks that send."""
    found, job = walked[case.name], case.job()
    uneven = job.dispatcher == "alltoall" and job.sizes.expert_tensor > 1
    expected = StepTraffic(job, uneven, recorded=False).of(found.made)  # of the device's tensors
    calls, sent = Counter(), Counter()
    for phase in ("compute", "update"):
        calls += found.phases[phase].calls
        sent += found.phases[phase].sent
    assert calls == expected.calls
    if not case.without_rows and not expected.uneven:
        assert sent == expected.bytes


@by_case
def test_grouped_products_come_in_the_two_layouts_that_take_groups_of_any_length(walked, case):
    layouts = walked[case.name].phases["compute"].grouped
    assert set(layouts) == (set() if case.without_rows else {"rows x column-major experts", "rows x row-major experts"})


def test_a_rank_without_rows_runs_no_grouped_product_and_has_gradients_all_the_same(walked):
    for name in ("tp2-ep2, no row", "tp2-ep2, all-gather, no row"):
        assert not walked[name].error
        assert "aten::_grouped_mm" not in walked[name].phases["compute"].kernels


def test_a_4_bit_layer_is_dequantized_once_for_each_product(walked):
    """Two linear layers of attention and two of the experts in each layer, forward, again forward, and backward."""
    for name in ("4-bit tp2-dp2", "4-bit tp2-ep2"):
        counts = walked[name].phases["compute"]
        assert counts.kernels["bitsandbytes::dequantize_4bit"] == 2 * (4 * 3 - (name == "4-bit tp2-dp2"))
        assert counts.kernels["aten::_grouped_mm"] == walked[name.removeprefix("4-bit ")].phases[
            "compute"
        ].kernels["aten::_grouped_mm"] // BY_NAME[name.removeprefix("4-bit ")].changes.get("accumulation", 1)  # fmt: skip


def test_nothing_is_summed_by_atomics(walked):
    for found in walked.values():
        for name in ("scatter_add", "scatter_add_", "index_add", "index_add_"):
            assert f"aten::{name}" not in found.phases["compute"].kernels


@by_case
def test_what_stays_in_memory_is_what_the_plan_says_to_the_byte(walked, case):
    """Frozen weights, adapters, their gradients in fp32, and for each element of a rank's share master and two moments."""
    assert walked[case.name].state == state_bytes(case.job())


@by_case
def test_the_peak_is_within_5_percent_of_the_plan(walked, case):
    found = walked[case.name]
    tokens, supervised = max(found.made)
    job = replace(case.job(), tokens=tokens, supervised=supervised)
    if case.without_rows:
        job = replace(job, imbalance=0.0)
    planned, moments = memory(job), 0
    if case.steps == 1:  # Adam makes its two moments, of the three optimizer states, at the end of the first step
        moments = planned.state["optimizer states"] * 2 // 3
    peaks = {
        name: planned.between_steps
        + sum(needed.values())
        - (moments if name not in ("optimizer", "norms of a logged step") else 0)
        for name, needed in planned.moments.items()
    }
    if case.rank % case.changes.get("tp", 1):  # the norms of what all tensor ranks have are left to the first
        norms = peaks.pop("norms of a logged step")
        assert max(peaks.values()) / 1.05 <= found.peak <= max(norms, *peaks.values()) * 1.05
        return
    assert max(peaks.values()) == pytest.approx(found.peak, rel=0.05)


def test_memory_between_steps_is_state_and_little_else(walked):
    """The rest: each tensor's rounding to 512 bytes, counts of the routers, the next micro batches."""
    for name, found in walked.items():
        rest = found.live - sum(found.state.values())
        assert 0 <= rest < 2**18, name


def topology_of(case):
    """Sizes and dispatcher."""
    config = RunConfig.from_dict(case.settings("/tmp"))
    sizes = resolve_topology(config.data.topology, case.world)
    return sizes, choose_dispatcher(config.hyperparameters.parallelism.token_dispatcher, sizes)


def test_attention_is_called_as_megatron_core_declares_it():
    """The stand-in takes what Transformer Engine's class in megatron-core takes, by name and in this order."""
    import ast

    import megatron.core.extensions

    from tests.support.fake_cuda.process import Attention

    source = (Path(megatron.core.extensions.__file__).parent / "transformer_engine.py").read_text()
    found = next(
        node for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ClassDef) and node.name == "TEDotProductAttention"
    )  # fmt: skip
    for method in ("__init__", "forward"):
        declared = next(f for f in found.body if isinstance(f, ast.FunctionDef) and f.name == method).args
        names = [argument.arg for argument in declared.args + declared.kwonlyargs]
        required = names[: len(declared.args) - len(declared.defaults)]
        ours = list(inspect.signature(getattr(Attention, method)).parameters)
        assert set(ours) <= set(names)
        positional = ours if method == "forward" else ours[:5]
        assert [name for name in names if name in positional] == positional
        assert set(required) <= set(ours)
