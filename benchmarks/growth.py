"""How a step grows with sequence length, experts, layers and ranks: fitted exponents beside those of theory.

    python benchmarks/growth.py --svg docs/images/growth.svg            # a GPU's step, counted (10 minutes)
    python benchmarks/growth.py --cpu --svg docs/images/growth_cpu.svg  # a real step on one thread, timed (3 minutes)
    python benchmarks/growth.py --flat FILE                             # layers that a test compares

Counted as `kernel_counts.py` does, on fake CUDA tensors: launches, bytes, FLOPs and collectives of a layer, forward and
backward of one micro batch on one rank; its roofline, and the memory of all 48 layers at the peak. An exponent is the
slope of a figure over an axis, both as logarithms, by least squares; beside it the slope at the axis' end, where
constant parts weigh least. Theory says what that slope may be at most.
"""

import argparse
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

if not sys.warnoptions:
    warnings.simplefilter("ignore")

import torch
from loglog import Panel, picture, slope
from workload import PRESETS, Shape, Workload

GPU = "H200"
SLACK = 0.05  # of an exponent above theory: sizes are rounded to blocks


@dataclass(frozen=True)
class Axis:
    """What changes, its places, and the exponents that theory gives to the figures at the axis' end, at most."""

    title: str
    field: str
    places: Sequence[int]
    theory: dict[str, float]


Curves = list[tuple[Axis, dict[str, list[float]]]]  # for each axis, the figures at its places


# --- counted ----------------------------------------------------------------------------------------------------------


def _theory(*exponents: float) -> dict[str, float]:
    """Of these figures, in this order."""
    names = ("launches", "GB moved", "TFLOP of products", "TFLOP of attention", "roofline, ms", "peak, GiB", "MB sent")
    return dict(zip(names, exponents, strict=True))


# A rank's launches depend on the topology alone. What a rank of TP > 1 gathers is the whole micro batch, what EP sends
# are the copies of its tokens, and gradients are as large whatever number of ranks adds them: none grows with ranks.
COUNTED = (
    Axis("sequence length", "tokens", [2**i for i in range(9, 17)],
         _theory(0, 1, 1, 2, 2, 1, 1) | {"launches outside layers": 1}),
    Axis("experts, top-8", "experts", [8, 16, 32, 64, 128, 256], _theory(0, 1, 0, 0, 1, 1, 1)),
    Axis("layers, the whole micro batch", "layers", [1, 2, 4, 8, 16, 32, 48], _theory(1, 1, 1, 1, 1, 1, 1)),
    Axis("TP ranks", "tp", [1, 2, 4], _theory(0, 0, -0.9, -1, 0, 0, 0)),
    Axis("EP ranks", "ep", [1, 2, 4, 8, 16], _theory(0, 0, 0, 0, 0, 0, 0)),
    Axis("DP ranks", "dp", [1, 2, 4, 8, 16, 64], _theory(0, 0, 0, 0, 0, 0, 0)),
)  # fmt: skip


def counted() -> Curves:
    """All of COUNTED; of layers the whole micro batch, of the other axes one layer of 48."""
    import kernel_counts

    walk = kernel_counts.begin()
    found = []
    for axis in COUNTED:
        rows = []
        for place in axis.places:
            row = {}
            if axis.field == "layers":
                part = kernel_counts.Figures.of(kernel_counts.count(walk, kernel_counts.Setting(), place))
                peak = part.peak
            else:
                part, rest = kernel_counts.measure(walk, _setting(axis.field, place))
                peak = rest.peak + kernel_counts.LAYERS * part.peak
                row["launches outside layers"] = float(rest.kernels.total())
            counts = kernel_counts.Counts(part.ran)
            attention = sum(n for name, n in counts.flops.items() if "attention" in name)
            rows.append(row | {
                "launches": float(part.kernels.total()), "GB moved": counts.bytes.total() / 1e9,
                "TFLOP of products": (counts.flops.total() - attention) / 1e12, "TFLOP of attention": attention / 1e12,
                "roofline, ms": 1e3 * part.seconds(GPU).total(), "peak, GiB": peak / 2**30,
                "MB sent": part.sent.total() / 1e6,
            })  # fmt: skip
        found.append((axis, {name: [row[name] for row in rows] for name in axis.theory}))
    return found


def _setting(field: str, place: int) -> Any:
    """The reference job with another length or number of experts; of ranks, as many as are named, and no others."""
    from kernel_counts import Setting

    changes: dict[str, Any] = {
        "tp": {"world": place, "tp": place}, "ep": {"world": place, "tp": 1, "ep": place},
        "dp": {"world": place, "tp": 1},
    }.get(field, {field: place})  # fmt: skip
    return replace(Setting(), **changes)


def flat(file: Path) -> None:
    """Write what a layer of the reference job launches and moves with more tokens, with fewer experts, after others."""
    import kernel_counts

    walk = kernel_counts.begin()
    found = {"16,384 tokens": kernel_counts.measure(walk, kernel_counts.Setting(tokens=16384))[0]}
    few = kernel_counts.Setting(experts=8)
    one, two, three = (kernel_counts.Figures.of(kernel_counts.count(walk, few, layers)) for layers in (1, 2, 3))
    found |= {"8 experts": two.minus(one), "8 experts, a third layer": three.minus(two)}
    file.write_text(json.dumps({name: layer.summary() for name, layer in found.items()}, indent=1) + "\n")


# --- timed ------------------------------------------------------------------------------------------------------------

BASE = replace(PRESETS["small"], layers=2, vocabulary=1024)
TIMED = (
    Axis("sequence length", "length", [128, 256, 512, 1024, 2048], {"CPU seconds": 2, "MiB within a step": 1}),
    Axis("experts, top-4", "experts", [8, 16, 32, 64, 128], {"CPU seconds": 1, "MiB within a step": 1}),
    Axis("layers", "layers", [1, 2, 4, 8], {"CPU seconds": 1, "MiB within a step": 1}),
)


def timed(steps: int) -> Curves:
    """All of TIMED: the fastest of `steps` steps, the FLOPs of the model, and the memory that a step takes."""
    from megasft.config.schema import RunConfig
    from megasft.distributed.topology import leave_world
    from megasft.job import initialize

    torch.set_num_threads(1)
    topology = initialize(RunConfig.from_dict(Workload(BASE, "fp32", steps, 1).settings(".")))
    found = []
    for axis in TIMED:
        rows = [_step(replace(BASE, **{axis.field: place}), steps, topology) for place in axis.places]
        found.append((axis, {name: [row[name] for row in rows] for name in rows[0]}))
    leave_world()
    return found


def _step(shape: Shape, steps: int, topology: Any) -> dict[str, float]:
    """A real training step in fp32."""
    from machine import peak_of_body

    from megasft.config.schema import RunConfig
    from megasft.job import build_model
    from megasft.train.trainer import Trainer

    workload, seconds = Workload(shape, "fp32", steps, warmup=2), []
    with tempfile.TemporaryDirectory() as folder:
        workload.write_model(Path(folder))
        config = RunConfig.from_dict(workload.settings(folder))
        trainer = Trainer(config, topology, build_model(config, topology), workload.samples(steps + 3, 1))
    for _ in range(workload.warmup + steps):
        started = time.process_time()
        trainer.train_step()
        seconds.append(time.process_time() - started)
    with peak_of_body() as peak:
        trainer.train_step()
    return {
        "CPU seconds": min(seconds[workload.warmup :]), "model GFLOP": workload.flops(1).model / 1e9,
        "MiB within a step": (peak.bytes or 0) / 2**20,
    }  # fmt: skip


# --- both -------------------------------------------------------------------------------------------------------------


def show(axis: Axis, figures: dict[str, list[float]]) -> bool:
    """Print a table of an axis, as Markdown; whether nothing grows faster than theory."""
    print(f"\n| {axis.title} | {' | '.join(f'{place:,}' for place in axis.places)} | exponent | at the end | theory |")
    print("| --- " * (len(axis.places) + 4) + "|")
    # From two ranks on: one launches no collective.
    first = 1 if axis.field in ("tp", "ep", "dp") else 0
    good = True
    for name, values in figures.items():
        last, theory = slope(axis.places[-2:], values[-2:]), axis.theory.get(name)
        faster = theory is not None and last > theory + SLACK
        good &= not faster
        cells = [f"{value:,.4g}" for value in values]
        cells += [f"{slope(axis.places[first:], values[first:]):.2f}", f"{last:.2f}{' FASTER' if faster else ''}"]
        print(f"| {name} | {' | '.join(cells)} | {'' if theory is None else f'{theory:g}'} |")
    return good


def main() -> None:
    """Print the tables, and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="time real steps instead of counting a GPU's")
    parser.add_argument("--steps", type=int, default=5, help="timed steps at each place, with --cpu")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="the curves, on logarithmic axes")
    parser.add_argument("--flat", type=Path, metavar="FILE", help="layers that a test compares, as JSON, and stop")
    given = parser.parse_args()
    if given.flat:
        flat(given.flat)
        return
    found = timed(given.steps) if given.cpu else counted()
    good = [show(axis, figures) for axis, figures in found]
    if given.svg:
        given.svg.write_text(picture([Panel(axis.title, axis.places, figures) for axis, figures in found]))
    if not all(good):
        sys.exit("something grows faster than theory")


if __name__ == "__main__":
    main()
