"""What the checks found, as markdown and JSON, and what that says of the README's claims."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

Status = Literal["passed", "failed", "not run"]


@dataclass
class Measured:
    """One comparison: `expected` is the value, or the bound, that `got` was held against."""

    what: str
    got: str
    expected: str
    passed: bool


@dataclass
class Outcome:
    """What became of a check. `reason` says why it was not run, or why it failed beside its comparisons."""

    name: str
    status: Status
    seconds: float = 0.0
    reason: str = ""
    measured: list[Measured] = field(default_factory=list)

    @classmethod
    def of_json(cls, text: str) -> "Outcome":
        values = json.loads(text)
        return cls(**(values | {"measured": [Measured(**one) for one in values["measured"]]}))


class NeedsMore(Exception):
    """The check cannot run here: what it needs, such as "a GPU"."""


# Claims of README.md, word for word, and the checks that bear them out.
CLAIMS: dict[str, tuple[str, ...]] = {
    "each has an adapter of its own": ("model", "adapter"),
    "Tensor, sequence, expert, expert-tensor, pipeline and data parallel": ("topologies",),
    "losses and adapters do not depend on the topology": ("topologies",),
    "LoRA adds no collective": ("traffic",),
    "**QLoRA over all experts**, in bitsandbytes' NF4": ("nf4", "qlora"),
    "bitwise reproducible resuming": ("resume",),
    "a watchdog that names the rank that hangs": ("hang",),
    "The same code runs on CPUs with gloo": (
        "grouped_mm",
        "attention",
        "dropout",
        "adapters",
        "routing",
        "queries",
        "model",
    ),
    "The reference job is Qwen3-Coder-30B-A3B-Instruct on 4 x H200 (TP=2 x DP=2)": ("reference",),
}


def verdict(checks: Sequence[str], outcomes: dict[str, Outcome]) -> str:
    """ "confirmed", "refuted" or "not run", from the outcomes of a claim's checks."""
    found = [outcomes[name].status if name in outcomes else "not run" for name in checks]
    if "failed" in found:
        return "refuted"
    return "not run" if "not run" in found else "confirmed"


def write(folder: Path, machine: dict[str, Any], outcomes: Sequence[Outcome]) -> Path:
    """Write report.md and report.json into `folder`; returns the path of the first."""
    by_name = {outcome.name: outcome for outcome in outcomes}
    claims = {claim: verdict(checks, by_name) for claim, checks in CLAIMS.items()}
    folder.mkdir(parents=True, exist_ok=True)
    whole = {"machine": machine, "claims": claims, "checks": [asdict(outcome) for outcome in outcomes]}
    (folder / "report.json").write_text(json.dumps(whole, indent=1) + "\n")
    lines = ["# megasft: acceptance", "", *(f"- {name}: {value}" for name, value in machine.items()), ""]
    lines += ["## Claims of README.md", "", "| claim | here | by |", "| --- | --- | --- |"]
    on = "" if machine["device"] == "cuda" else ", on CPUs"
    lines += [
        f"| {claim} | {said if said == 'not run' else said + on} | {', '.join(CLAIMS[claim])} |"
        for claim, said in claims.items()
    ]
    lines += ["", "## Checks", "", "| check | result | seconds | |", "| --- | --- | --- | --- |"]
    lines += [f"| {one.name} | {one.status} | {one.seconds:.0f} | {_cell(one.reason)} |" for one in outcomes]
    for one in outcomes:
        if one.measured:
            lines += ["", f"### {one.name}", "", "| | got | expected | |", "| --- | --- | --- | --- |"]
            lines += [
                f"| {_cell(m.what)} | {_cell(m.got)} | {_cell(m.expected)} | {'ok' if m.passed else '**failed**'} |"
                for m in one.measured
            ]
    path = folder / "report.md"
    path.write_text("\n".join(lines) + "\n")
    return path


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "/")
