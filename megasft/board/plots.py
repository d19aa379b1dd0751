"""Which plots there are, for the live page and the report alike."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

from megasft.config.measures import SCORES


@dataclass(frozen=True)
class Plot:
    """One plot.

    Attributes:
        keys: columns `kind.name`, or a prefix `kind.name.` for all that begin with it, each with its label. Where a run
            has none of them the plot is not shown.
        form: `runs`: a line per run and key. `parts`: of one run, a line per key. `stack`: of one run, stacked.
        scale: what a shown number is multiplied with.
        from_zero: whether its axis begins at 0.
        exact: never smoothed.
    """

    id: str
    group: str
    title: str
    unit: str
    keys: dict[str, str]
    form: Literal["runs", "parts", "stack"] = "runs"
    scale: float = 1.0
    logarithmic: bool = False
    from_zero: bool = False
    exact: bool = False


def _one(kind_name: str, label: str = "") -> dict[str, str]:
    return {kind_name: label}


PLOTS = (
    Plot("loss", "Quality", "Loss", "nats", {"train.loss": "train", "validation.loss": "validation"}),
    Plot(
        "accuracy",
        "Quality",
        "Token accuracy",
        "%",
        {"train.token_accuracy": "train", "validation.token_accuracy": "validation"},
        scale=100,
    ),
    Plot("perplexity", "Quality", "Validation perplexity", "", _one("validation.perplexity"), exact=True),
    Plot(
        "answers",
        "Quality",
        "Answers to validation conversations",
        "%",
        {f"validation.{name}": name.replace("_", " ") for name in SCORES},
        "parts",
        scale=100,
        exact=True,
    ),
    Plot("lr", "Optimization", "Learning rate", "", _one("train.lr"), exact=True),
    Plot("grad_norm", "Optimization", "Gradient norm", "", _one("train.grad_norm"), logarithmic=True),
    Plot("norm_a", "Adapters", "Norm of A", "", _one("norms.parameters.lora_A."), "parts"),
    Plot("norm_b", "Adapters", "Norm of B", "", _one("norms.parameters.lora_B."), "parts"),
    Plot("update_a", "Adapters", "Update of A", "", _one("norms.updates.lora_A."), "parts", logarithmic=True),
    Plot("update_b", "Adapters", "Update of B", "", _one("norms.updates.lora_B."), "parts", logarithmic=True),
    Plot(
        "tokens_per_second", "Speed", "Tokens per second", "tokens/s", _one("train.tokens_per_second"), from_zero=True
    ),
    Plot(
        "per_device",
        "Speed",
        "Tokens per second and device",
        "tokens/s",
        _one("train.tokens_per_second_per_device"),
        from_zero=True,
    ),
    Plot("mfu", "Speed", "Model FLOP/s utilization (MFU)", "%", _one("train.mfu"), scale=100, from_zero=True),
    Plot(
        "flops",
        "Speed",
        "Model FLOP/s per device",
        "TFLOP/s",
        _one("train.model_flops_per_second"),
        scale=1e-12,
        from_zero=True,
    ),
    Plot(
        "split",
        "Speed",
        "Step time",
        "s",
        {
            "train.data_wait": "wait for data",
            "train.compute_seconds": "forward + backward",
            "train.reduce_seconds": "gradient reduction",
            "train.optimizer_seconds": "optimizer",
            "train.checkpoint_seconds": "checkpoint",
            "train.other_seconds": "other",
        },
        "stack",
        from_zero=True,
    ),
    Plot(
        "tokens",
        "Speed",
        "Tokens of a step",
        "tokens",
        {"train.tokens": "all", "train.supervised_tokens": "supervised"},
        from_zero=True,
    ),
    Plot("padding", "Speed", "Padding", "%", _one("train.padding_share"), scale=100, from_zero=True),
    Plot(
        "memory",
        "Devices",
        "Memory, of the rank with the most",
        "GiB",
        {
            "train.memory_allocated": "allocated",
            "train.memory_reserved": "reserved",
            "train.memory_peak": "peak",
            "train.rss": "resident (host)",
        },
        "parts",
        scale=2**-30,
        from_zero=True,
    ),
    Plot(
        "utilization",
        "Devices",
        "GPU utilization, mean of ranks",
        "%",
        _one("devices.utilization"),
        scale=100,
        from_zero=True,
    ),
    Plot("power", "Devices", "GPU power, mean of ranks", "W", _one("devices.power"), from_zero=True),
    Plot("temperature", "Devices", "GPU temperature, mean of ranks", "°C", _one("devices.temperature")),
    Plot("cpu", "Devices", "CPU per rank, 100% is a core", "%", _one("devices.cpu_percent"), from_zero=True),
    Plot(
        "imbalance",
        "Experts",
        "Busiest expert over the mean",
        "",
        {"train.expert_imbalance": "mean of layers", "train.expert_imbalance_worst": "worst layer"},
    ),
    Plot("dropped", "Experts", "Dropped by capacity", "%", _one("train.dropped"), scale=100, from_zero=True),
    Plot("balance", "Experts", "Load-balancing loss", "", _one("train.balance_loss")),
)


def resolve(plot: Plot, known: set[str]) -> dict[str, str]:
    """The columns of a plot that a run with the columns `known` has, and their labels."""
    found: dict[str, str] = {}
    for key, label in plot.keys.items():
        if key.endswith("."):
            found |= {name: name.removeprefix(key) for name in sorted(known) if name.startswith(key)}
        elif key in known:
            found[key] = label
    return found


def chosen(ids: list[str]) -> list[Plot]:
    """The plots of these ids; unknown ones are left out."""
    return [plot for plot in PLOTS if plot.id in ids]


def described() -> list[dict[str, Any]]:
    """For the page."""
    return [asdict(plot) for plot in PLOTS]
