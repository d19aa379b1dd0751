"""Sizes of the parallel groups: resolve the run file's topology on a number of ranks, or suggest ones that fit."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from math import gcd, lcm, log2, prod
from typing import Annotated

from pydantic import Field

from megasft.config.toml import Section
from megasft.messages import UserError

Size = Annotated[int, Field(ge=1, lt=2**31)]


class TopologySettings(Section):
    """`[data.topology]`: sizes of the parallel groups. What is left out is derived from the rest and the ranks."""

    tensor_parallel: Size | None = None  # default 1
    data_parallel: Size | None = None  # default: ranks / (tensor_parallel x pipeline_parallel)
    expert_parallel: Size | None = None  # default 1
    # default 1: experts are not cut, which is faster where they fit (`megasft plan --search`)
    expert_tensor_parallel: Size | None = None
    pipeline_parallel: Size | None = None  # default 1


@dataclass(frozen=True)
class TopologySizes:
    """Sizes of the parallel groups, as in megatron-core. The same world is split in two ways: outside the experts into
    tensor * pipeline * data ranks, for the experts into expert_tensor * expert * pipeline * expert-data ranks.
    """

    tensor: int
    pipeline: int
    data: int
    expert: int
    expert_tensor: int


def resolve_topology(topology: TopologySettings, world_size: int) -> TopologySizes:
    """The sizes on the `world_size` ranks that were launched. Raises UserError naming topologies that fit."""
    try:
        return fit(topology, world_size)
    except ValueError as error:
        asked = asked_ranks(topology)
        launch = f", or run `torchrun --nproc-per-node {asked}`" if asked and asked != world_size else ""
        ranks = "1 rank" if world_size == 1 else f"{world_size} ranks"
        raise UserError(f"launched {ranks}, but [data.topology] {error}{launch}") from None


def remedies(topology: TopologySettings, ranks: int, usable: Callable[[TopologySizes], bool]) -> list[str]:
    """Options of `megasft train` that help if a topology does not fit `ranks` ranks: another number of ranks or another
    topology on the same number, nearest first. All of them are `usable` with the model.
    """
    sizes, asked = derive(topology), asked_ranks(topology)
    unit = lcm(sizes.tensor * sizes.pipeline, sizes.expert * sizes.expert_tensor * sizes.pipeline)
    below = ranks // unit * unit
    numbers = [number for number in ([asked] if asked else [below, below + unit]) if number]
    options = [f"--ranks {number}" for number in numbers if usable(derive(topology, number))]
    return options + [f'--set "data.{written}"' for written in _nearest(topology, ranks, usable)[:2]]


def choose_dispatcher(asked: str, sizes: TopologySizes) -> str:
    """The token dispatcher: "alltoall" or "allgather"; for `asked` "auto", the one that sends less.

    All-to-all sends each token to the experts it chose, in any numbers. All-gather needs the same number of tokens on
    all ranks that share the experts, so these must lie within one tensor-parallel group, and shapes must not vary
    between pipeline stages. If experts are split over ranks (expert-tensor parallel only), all-gather sends less, by
    the factor num_experts_per_tok. Raises ValueError with the rest of a sentence that names the setting.
    """
    experts = f"expert_parallel {sizes.expert} x expert_tensor_parallel {sizes.expert_tensor}"
    within_tensor_group = sizes.tensor % (sizes.expert * sizes.expert_tensor) == 0
    if asked == "allgather" and not within_tensor_group:
        raise ValueError(
            "needs the ranks that share the experts within one tensor-parallel group, "
            f"but {experts} does not divide tensor_parallel {sizes.tensor}"
        )
    if asked == "allgather" and sizes.pipeline > 1:
        raise ValueError(f"needs pipeline_parallel = 1, not {sizes.pipeline}: the length of micro batches varies")
    if asked == "auto":
        return "allgather" if within_tensor_group and sizes.expert == 1 and sizes.pipeline == 1 else "alltoall"
    return asked


def asked_ranks(topology: TopologySettings) -> int | None:
    """The number of ranks that a topology fixes; None if data parallelism takes all ranks that are launched."""
    if topology.data_parallel is None:
        return None
    return (topology.tensor_parallel or 1) * (topology.pipeline_parallel or 1) * topology.data_parallel


def fit(topology: TopologySettings, ranks: int) -> TopologySizes:
    """The sizes on `ranks` ranks. Raises ValueError with the rest of a sentence that begins "[data.topology] "."""
    sizes = derive(topology, ranks)
    if asks := _misfit(sizes, ranks, fills_world=topology.data_parallel is None):
        raise ValueError(f"asks for {asks}; set [data] {' or '.join(_nearest(topology, ranks))}")
    return sizes


def derive(topology: TopologySettings, ranks: int = 1) -> TopologySizes:
    """All sizes, from those that are set. Does not check that they fit `ranks`; `data` may be 0 if they do not."""
    tensor, pipeline = topology.tensor_parallel or 1, topology.pipeline_parallel or 1
    data = topology.data_parallel or ranks // (tensor * pipeline)
    expert = topology.expert_parallel or 1
    return TopologySizes(tensor, pipeline, data, expert, topology.expert_tensor_parallel or 1)


def _misfit(sizes: TopologySizes, ranks: int, fills_world: bool) -> str | None:
    """The number of ranks that the sizes need, in words, or None if `ranks` fits."""
    dense = {"tensor_parallel": sizes.tensor, "pipeline_parallel": sizes.pipeline}
    if not fills_world:
        dense["data_parallel"] = sizes.data
    experts = {
        "expert_tensor_parallel": sizes.expert_tensor,
        "expert_parallel": sizes.expert,
        "pipeline_parallel": sizes.pipeline,
    }
    for factors, exactly in ((dense, not fills_world), (experts, False)):
        size = prod(factors.values())
        if ranks != size if exactly else ranks % size:
            spelled = " x ".join(f"{name} {factor}" for name, factor in factors.items())
            return f"{'' if exactly else 'a multiple of '}{size} ({spelled})"
    return None


def _nearest(
    topology: TopologySettings, ranks: int, usable: Callable[[TopologySizes], bool] = lambda _: True
) -> list[str]:
    """Up to three topologies that fit, as TOML, nearest first (fewest halvings).

    Sizes other than data_parallel are divisors of the requested ones, because a model that a size can shard can also be
    sharded by its divisors.
    """
    asked = topology.model_dump(exclude_none=True)
    free = {name: size for name, size in asked.items() if name != "data_parallel"}

    def distance(sizes: dict[str, int]) -> float:
        return sum(abs(log2(sizes[name] / size)) for name, size in asked.items())

    fitting = []
    for chosen in product(*(_divisors(size, ranks) for size in free.values())):
        candidate = dict(zip(free, chosen, strict=True))
        sizes = derive(TopologySettings(**candidate), ranks)
        candidate["data_parallel"] = sizes.data
        if not _misfit(sizes, ranks, fills_world=True) and usable(sizes):
            fitting.append(candidate)
    written = [name for name in TopologySettings.model_fields if name == "data_parallel" or name in free]
    return [
        f"topology = {{{', '.join(f'{name} = {sizes[name]}' for name in written)}}}"
        for sizes in sorted(fitting, key=distance)[:3]
    ]


def _divisors(size: int, ranks: int) -> list[int]:
    """The divisors of `size` that divide `ranks` too."""
    both = gcd(size, ranks)
    return [divisor for divisor in range(1, both + 1) if both % divisor == 0]
