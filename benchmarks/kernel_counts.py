"""What a GPU would run in a step of Qwen3-Coder-30B-A3B's shape, counted on fake CUDA tensors, without a GPU.

    python benchmarks/kernel_counts.py          # the committed settings
    python benchmarks/kernel_counts.py --tp 1 --tokens 16384 --packed 4 --recompute selective --gpu H100 --costliest 15
    python benchmarks/kernel_counts.py --write  # into kernel_counts.json, which a test compares exactly

megasft's own step runs, of one micro batch on one rank, with models of one and two layers: their difference is a layer.
Counted are launches of kernels, bytes that they read and write, their FLOPs, waits of the host, collectives and what
they send, and memory. The roofline gives each kernel the larger of its bytes over the memory's bandwidth and its FLOPs
over the rate of the GPU's data sheet; launches, collectives and all that a kernel falls short of are not in it. Nothing
here is a measurement.
"""

import argparse
import json
import sys
import warnings
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

if not sys.warnoptions:
    warnings.simplefilter("ignore")

sys.path.insert(0, str(Path(__file__).parents[1]))  # the fake GPU is the tests'

from megasft.config.values import Recompute
from megasft.model.flops import step_flops
from megasft.plan.devices import GPUS
from tests.support.fake_cuda.walk import RECOMPUTE, Walk, qwen3_30b, settings
from tests.support.fake_cuda.watch import Counts

FIGURES = Path(__file__).with_suffix(".json")
LAYERS = 48


@dataclass(frozen=True)
class Setting:
    """One rank of `world` GPUs. tokens: of the micro batch, in `packed` conversations of one length."""

    world: int = 4
    tp: int = 2
    ep: int = 1
    etp: int = 0
    tokens: int = 4096
    packed: int = 1
    dropout: float = 0.05
    recompute: Recompute = True
    quant: bool = False
    dispatcher: str = "auto"
    experts: int = 128

    @property
    def length(self) -> int:
        """Tokens of a conversation."""
        return self.tokens // self.packed


COMMITTED = {
    "reference job, TP=2 x DP=2": Setting(),
    "reference job in 4 bits": Setting(quant=True),
    "TP=1 x DP=4 without recomputation": Setting(tp=1, recompute=False),
    "TP=1 x DP=4, 16,384 packed tokens": Setting(tp=1, tokens=16384, packed=4),
    "EP=4, all-to-all": Setting(tp=1, ep=4),
    "reference job, selective recomputation": Setting(recompute="selective"),
}


def count(walk: Walk, setting: Setting, layers: int) -> Counts:
    """Of the forward and backward of one micro batch."""
    run_file = settings(
        setting.tp, setting.ep, setting.etp, 1, setting.length, 1, setting.dropout, setting.recompute, setting.quant,
        setting.dispatcher,
    )  # fmt: skip
    run_file["hyperparameters"]["per_device_batch"] = setting.packed
    rows = setting.world // setting.tp * setting.packed
    model = qwen3_30b(layers, num_experts=setting.experts)
    with walk.job(model, run_file, [setting.length] * rows, setting.world) as job:
        job.train_step()
        counts = job.phases["compute"]
        counts.peak -= job.before
    return counts


@dataclass
class Figures:
    """Counts of a part of the step. kernels: by operator; ran: how often (operator, bytes, FLOPs) did."""

    ran: Counter[tuple[str, int, int]]
    syncs: Counter[str]
    sent: Counter[str]
    peak: int

    @classmethod
    def of(cls, counts: Counts) -> "Figures":
        """All of them."""
        syncs = Counter({f"{what} at {where.rpartition(':')[0]}": n for (what, where), n in counts.syncs.items()})
        return cls(counts.ran, syncs, Counter({f"{kind} over {group}": n for (group, kind), n in counts.sent.items()}),
                   counts.peak)  # fmt: skip

    def minus(self, other: "Figures", times: int = 1) -> "Figures":
        """What is more here."""

        def less(a: Counter, b: Counter) -> Counter:
            return Counter({key: n for key in a | b if (n := a[key] - times * b[key])})

        return Figures(
            less(self.ran, other.ran), less(self.syncs, other.syncs), less(self.sent, other.sent),
            self.peak - times * other.peak,
        )  # fmt: skip

    @property
    def kernels(self) -> Counter[str]:
        """Launches by operator."""
        return Counts(self.ran).kernels

    def seconds(self, gpu: str) -> Counter[str]:
        """The roofline, by operator."""
        found: Counter[str] = Counter()
        for (name, size, flops), n in self.ran.items():
            found[name] += n * max(size / GPUS[gpu].hbm, flops / GPUS[gpu].flops)  # type: ignore[assignment]
        return found

    def summary(self) -> dict[str, Any]:
        """For `kernel_counts.json`: numbers that are exact."""
        counts = Counts(self.ran)
        return {
            "kernels": self.kernels.total(), "bytes": counts.bytes.total(), "flops": counts.flops.total(),
            "host waits": dict(sorted(self.syncs.items())), "sent": dict(sorted(self.sent.items())), "peak": self.peak,
            "kernels by operator": dict(sorted(self.kernels.items())),
        }  # fmt: skip


def begin() -> Walk:
    """For this process. Its first job also makes what lasts, such as tables on the device."""
    walk = Walk()
    count(walk, Setting(quant=True), 1)
    return walk


def measure(walk: Walk, setting: Setting) -> tuple[Figures, Figures]:
    """(a layer, the rest of the micro batch)."""
    one, two = (Figures.of(count(walk, setting, layers)) for layers in (1, 2))
    layer = two.minus(one)
    return layer, one.minus(layer)


def show(name: str, setting: Setting, layer: Figures, rest: Figures, gpu: str, costliest: int) -> None:
    """Print a layer's figures, the roofline of the whole model and the operators that cost most."""
    counts, seconds = Counts(layer.ran), layer.seconds(gpu)
    total = LAYERS * seconds.total() + rest.seconds(gpu).total()
    lora = frozenset({"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"})
    work = step_flops(qwen3_30b(), lora, 16, setting.tokens, setting.tokens, setting.tokens * setting.length, False)
    mfu = work.model / setting.tp / total / GPUS[gpu].flops
    print(f"{name}: {setting.tokens:,} tokens, one layer of {LAYERS}, forward and backward of one micro batch")
    print(
        f"  {layer.kernels.total()} kernels, {counts.bytes.total() / 1e9:.2f} GB, "
        f"{counts.flops.total() / 1e12:.2f} TFLOP, {layer.syncs.total()} host waits, "
        f"{layer.sent.total() / 1e6:.1f} MB sent, {layer.peak / 2**20:.0f} MiB more at the peak"
    )
    print(
        f"  roofline on {gpu}: {1e3 * seconds.total():.2f} ms a layer, {1e3 * total:.0f} ms the micro batch, "
        f"which would be {100 * mfu:.0f} % MFU"
    )
    for what, n in layer.syncs.items():
        print(f"  waits {n} times: {what}")
    kernels = layer.kernels
    for operator, cost in seconds.most_common(costliest):
        print(f"  {1e3 * cost:8.3f} ms {kernels[operator]:4} x {operator:34} {counts.bytes[operator] / 1e9:6.2f} GB")


def main() -> None:
    """Count what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for field, default in asdict(Setting()).items():
        if field == "recompute":
            parser.add_argument("--recompute", choices=RECOMPUTE)
        elif isinstance(default, bool):
            parser.add_argument(f"--{field}", action=argparse.BooleanOptionalAction, default=None)
        else:
            parser.add_argument(f"--{field}", type=type(default))
    parser.add_argument("--gpu", choices=GPUS, default="H200")
    parser.add_argument("--costliest", type=int, default=5, help="operators to list")
    parser.add_argument("--write", action="store_true", help=f"the committed settings, into {FIGURES.name}")
    parser.add_argument("--json", metavar="FILE", help="the same, into a file")
    given = parser.parse_args()
    given.recompute = RECOMPUTE[given.recompute] if given.recompute else None
    changed = {field: value for field in asdict(Setting()) if (value := getattr(given, field)) is not None}
    if changed.get("tokens", 4096) % changed.get("packed", 1):
        parser.error("--tokens must be a multiple of --packed")
    walk, found = begin(), {}
    for name, setting in ({"as asked": Setting(**changed)} if changed else COMMITTED).items():
        layer, rest = measure(walk, setting)
        found[name] = {"a layer": layer.summary(), "the rest": rest.summary()}
        if not given.json:
            show(name, setting, layer, rest, given.gpu, given.costliest)
    if given.write or given.json:
        Path(given.json or FIGURES).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
