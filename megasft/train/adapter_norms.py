"""Norms of A and B and of their updates by kind of layer, from the optimizer's fp32 states.

Every element has one owner among the ranks of a data-parallel group, so each counts once; of a factor that tensor
parallel ranks replicate, the first of them counts. An update is taken from Adam's moments after it: lr * m / (1 - b1^t)
/ (sqrt(v / (1 - b2^t)) + eps), and decoupled weight decay; nothing of the weights before is kept.
"""

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor

from megasft.config.schema import HyperparameterSettings
from megasft.config.values import LINEAR_LAYERS
from megasft.lora.sharded import ShardedLinear
from megasft.model.qwen3_moe import Qwen3Moe
from megasft.storage.shards import leaf
from megasft.train.optimizer import STATES, Owned, owned

FACTORS = ("lora_A", "lora_B")
KEYS = [(what, factor, kind) for what in ("parameters", "updates") for factor in FACTORS for kind in LINEAR_LAYERS]

CHUNK = 2**24  # elements whose updates are in memory together

Key = tuple[str, str, str]  # ("parameters" or "updates", factor, kind)
Period = list[tuple[str, str, int]]  # (factor, kind, elements) that repeat along a flattened parameter


class AdapterNorms:
    """Finds the sums of squares on this rank; their sums over all ranks make the norms."""

    def __init__(self, model: Qwen3Moe, optimizer: MegatronOptimizer, hyper: HyperparameterSettings) -> None:
        self._optimizer, self._hyper = optimizer, hyper
        self._periods: dict[Any, Period] = {}
        for module in model.modules():
            if isinstance(module, ShardedLinear) and module.adapted:
                self._periods |= _periods(module)
        self.kinds = [kind for kind in LINEAR_LAYERS if kind in model.lora.targets]

    def squares(self, rate: float, updates: int) -> list[float]:
        """Of each of KEYS, after the `updates`-th step of Adam with learning rate `rate`. Waits once for the device."""
        norms: list[tuple[Key, Tensor]] = []
        squares: list[tuple[Key, Tensor]] = []
        for parts in self._chunks():
            masters = [part.states["master"] for part in parts]
            for what, values in (("parameters", masters), ("updates", self._updates(parts, rate, updates))):
                single, keys = [], []
                for part, value in zip(parts, values, strict=True):
                    period = self._periods[part.parameter]
                    if len(period) > 1:
                        squares += [((what, *key), square) for key, square in _squares(value, part.start, period)]
                    else:
                        single.append(value)
                        keys.append((what, *period[0][:2]))
                if single:
                    norms += zip(keys, torch._foreach_norm(single, 2, torch.float64), strict=True)
        totals = dict.fromkeys(KEYS, 0.0)
        if found := [*norms, *squares]:
            numbers = torch.stack([number for _, number in found]).tolist()  # summed on the host: thousands of numbers
            for i, ((key, _), number) in enumerate(zip(found, numbers, strict=True)):
                totals[key] += number**2 if i < len(norms) else number
        return list(totals.values())

    def of(self, totals: list[float]) -> dict[str, Any]:
        """The norms, for a line of metrics, from the sums of `squares` over all ranks."""
        norms = {key: total**0.5 for key, total in zip(KEYS, totals, strict=True)}
        return {
            what: {factor: {kind: norms[what, factor, kind] for kind in self.kinds} for factor in FACTORS}
            for what in ("parameters", "updates")
        }

    def _chunks(self) -> Iterator[list[Owned]]:
        """What this rank counts, in lists of some CHUNK elements."""
        chunk: list[Owned] = []
        for part in owned(self._optimizer):
            if part.parameter in self._periods:
                chunk.append(part)
                if sum(one.end - one.start for one in chunk) >= CHUNK:
                    yield chunk
                    chunk = []
        if chunk:
            yield chunk

    def _updates(self, parts: list[Owned], rate: float, updates: int) -> list[Tensor]:
        """What the last step added to the master weights, times -1: fp32, flat."""
        hyper = self._hyper
        master, moment, square = ([part.states[name] for part in parts] for name in STATES)
        bias, bias_root = 1 - hyper.adam_beta1**updates, (1 - hyper.adam_beta2**updates) ** 0.5
        roots = torch._foreach_sqrt(square)
        torch._foreach_add_(roots, hyper.adam_eps * bias_root)
        added = torch._foreach_div(moment, roots)
        torch._foreach_mul_(added, rate * bias_root / bias)
        decay = rate * hyper.weight_decay
        if decay not in (0, 1):  # 1 leaves nothing of the weights before, so Adam's part alone counts
            before = torch._foreach_add(master, added)  # times 1 - decay
            torch._foreach_add_(added, before, alpha=decay / (1 - decay))
        return list(added)


def _periods(module: ShardedLinear) -> dict[Any, Period]:
    """What the parameters of a layer consist of, left out where another rank counts them."""
    here: Any = module  # LoraLinear and GroupedLoraLinear name their factors alike
    kinds, found = [leaf(name) for name in module.adapted], {}
    each = here.lora_A.shape[-2] * here.lora_A.shape[-1] // len(kinds)
    if module.mode == "row" or module.rank == 0:
        found[here.lora_A] = [("lora_A", kind, each) for kind in kinds]
    if module.mode == "column" or module.rank == 0:
        found |= {here.lora_B[kind]: [("lora_B", kind, here.lora_B[kind].numel())] for kind in kinds}
    return found


def _squares(values: Tensor, start: int, period: Period) -> list[tuple[tuple[str, str], Tensor]]:
    """Sums of squares, fp64, of each (factor, kind) in `values`, which begin at element `start` of the parameter."""
    each, n = period[0][2], len(period)
    head = min(-start % each, len(values))
    whole = (len(values) - head) // each
    pieces = [(start // each, _square(values[:head]))] if head else []
    first = (start + head) // each
    if whole:
        rows = values[head : head + whole * each].view(whole, each)
        squares = rows.square().sum(1).double()  # rows are short; their sum is pairwise, so fp32 does
        pieces += [(first + i, squares[i::n].sum()) for i in range(min(n, whole))]
    if (tail := head + whole * each) < len(values):
        pieces.append((first + whole, _square(values[tail:])))
    return [(period[number % n][:2], square) for number, square in pieces]


def _square(values: Tensor) -> Tensor:
    return values.square().sum().double()
