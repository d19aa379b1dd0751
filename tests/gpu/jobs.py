"""Whole jobs of a tiny model through the command: killed, stopped, hanging, repeated, and what comes out of them."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import load_file

from tests.gpu.place import Place
from tests.support.world import make_world

ROOT = Path(__file__).parents[2]
LIMIT = 400.0  # seconds of one command
MISBEHAVE = str(ROOT / "tests" / "support" / "misbehave.py")
COUNTED = str(ROOT / "tests" / "gpu" / "counted.py")
# Where the host waits for the device in a step: sums of the loss, the gradient's norm, and copies to the device of the
# micro batches after it (tests/cuda_path holds the step to these).
WAITS = {"megasft/train/forward_backward.py", "megasft/data/micro_batches.py", "megatron/core/optimizer/clip_grads.py"}


class Job:
    """A tiny job in `folder` on all ranks of the place, up to two: bf16 on GPUs, fp32 on CPUs."""

    def __init__(self, place: Place, name: str, steps: int = 6) -> None:
        self.folder = place.folder / name
        self.folder.mkdir(parents=True)
        self.ranks = min(2, place.ranks)
        self.run_file = make_world(self.folder, tensor=self.ranks, steps=steps)
        self.settings = [
            f"hyperparameters.parallelism.bf16={str(place.device == 'cuda').lower()}",
            "job.deterministic=true",
        ]
        self.environment = os.environ | {"OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(self.folder / "cache")}

    def start(self, *settings: str, command: Sequence[str] = ("-m", "megasft")) -> subprocess.Popen:
        """Begin `megasft train` in a session of its own."""
        sets = [argument for setting in (*self.settings, *settings) for argument in ("--set", setting)]
        words = [sys.executable, *command, "train", "--config", str(self.run_file), *sets]
        return subprocess.Popen(
            words, cwd=ROOT, env=self.environment, start_new_session=True, stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def train(self, *settings: str, **more: Sequence[str]) -> tuple[int, str]:
        """(exit code, what it said) of `megasft train`."""
        return self.end(self.start(*settings, **more))

    def end(self, process: subprocess.Popen) -> tuple[int, str]:
        """Wait for a job; one that outlives the limit is killed."""
        try:
            _, said = process.communicate(timeout=LIMIT)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        return process.returncode, said

    def losses(self) -> list[float]:
        """The loss of each step so far."""
        path = self.folder / "run" / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [record["loss"] for record in map(json.loads, lines) if record["kind"] == "train"]

    def wait_for(self, steps: int, process: subprocess.Popen) -> None:
        """Until so many steps are recorded, or the job has ended."""
        while len(self.losses()) < steps and process.poll() is None:
            time.sleep(0.1)

    def adapter(self) -> dict:
        """The tensors it ended in."""
        return load_file(self.folder / "run" / "adapter" / "adapter_model.safetensors")


def _same_end(place: Place, what: str, job: Job, other: Job) -> None:
    place.equal(f"{what}: losses", job.losses(), other.losses())
    mine, theirs = job.adapter(), other.adapter()
    differ = sum(not value.equal(theirs[name]) for name, value in mine.items())
    place.note(
        f"{what}: {len(mine)} tensors of the adapter", f"{differ} differ", "0", differ == 0 and len(mine) == len(theirs)
    )


def resume(place: Place) -> None:
    """A job that is killed and a job that is asked to stop end, resumed, as one that ran through, bit for bit."""
    whole = Job(place, "whole")
    place.equal("a job that runs through: exit code", whole.train()[0], 0)
    for name, number, code in (("killed", signal.SIGKILL, -signal.SIGKILL), ("stopped", signal.SIGTERM, 130)):
        job = Job(place, name)
        process = job.start("tags.fault=dawdle", command=[MISBEHAVE])
        job.wait_for(3, process)
        (os.killpg if number == signal.SIGKILL else os.kill)(process.pid, number)
        place.equal(f"{name}: exit code", job.end(process)[0], code)
        place.equal(f"{name}: exit code of the resumed job", job.train()[0], 0)
        _same_end(place, name, job, whole)


def counts(place: Place) -> None:
    """A step launches kernels and waits for them where it may."""
    job = Job(place, "counts")
    place.equal("exit code", job.train(command=[COUNTED])[0], 0)
    note_counts(place, job.folder / "run", None)


def note_counts(place: Place, run: Path, launches: int | None) -> None:
    """Compare what `counted.py` has left in a run's folder; `launches`: of a micro batch, as counted without a GPU."""
    found = json.loads((run / "counts.json").read_text())
    batches, waits = found["micro_batches"], found["waits"]
    place.note("micro batches of the step", batches, "1 or more", batches > 0)
    other = {where: times for where, times in waits.items() if not where.rpartition(":")[0].endswith(tuple(WAITS))}
    place.note("the host waits for the GPU elsewhere than it may", other or waits, "nowhere", not other)
    if place.device == "cuda":
        each = found["launches"] / batches
        expected = "recorded" if launches is None else f"at most 1.25 x {launches}"
        place.note("kernels for each micro batch", round(each), expected, 0 < each <= 1.25 * (launches or each))


def hang(place: Place) -> None:
    """A rank that stops, one that hangs in a collective, and SIGTERM while the others wait in it: named and ended."""
    place.need(2)
    for fault, named in (("be stopped", r": rank 1 \(.* has not reported"), ("hang", r"rank 1 in recv")):
        job = Job(place, fault.replace(" ", "-"))
        code, said = job.train(f"tags.fault={fault!r}", "job.timeout_minutes=0.1", command=[MISBEHAVE])
        line = next((line for line in said.splitlines() if line.startswith("megasft: ")), said[-300:])
        place.note(
            f"rank 1 is to {fault}: the line",
            line,
            f"exit code 1 and {named}",
            code == 1 and re.search(named, line) is not None,
        )
    job = Job(place, "sigterm")
    process = job.start("tags.fault=hang", "tags.fault_after=2", command=[MISBEHAVE])
    job.wait_for(2, process)
    time.sleep(2)  # the other rank is in the collective now
    os.kill(process.pid, signal.SIGTERM)
    code, said = job.end(process)
    place.note(
        "SIGTERM inside a collective", f"exit code {code}: {said.splitlines()[-1:]}", "exit code 130", code == 130
    )


def deterministic(place: Place) -> None:
    """Two deterministic runs are bitwise equal."""
    first, second = Job(place, "first"), Job(place, "second")
    for job in (first, second):
        place.equal("exit code", job.train()[0], 0)
    _same_end(place, "the second run", second, first)


def across(place: Place) -> None:
    """A checkpoint of the GPU is resumed on CPUs, within rounding, and one of CPUs on the GPU."""
    place.need(gpu=True)
    whole = Job(place, "whole")
    whole.settings[0] = "hyperparameters.parallelism.bf16=false"
    place.equal("on the GPU: exit code", whole.train()[0], 0)
    for name, devices in (
        ("GPU, then CPU", ("", "compute.gpu_count=0")),
        ("CPU, then GPU", ("compute.gpu_count=0", "")),
    ):
        job = Job(place, name.replace(", ", "-"))
        job.settings[0] = whole.settings[0]
        for steps, device in zip((3, 6), devices, strict=True):
            place.equal(
                f"{name}: exit code", job.train(f"hyperparameters.max_steps={steps}", *filter(None, [device]))[0], 0
            )
        worst = max(abs(a / b - 1) for a, b in zip(job.losses(), whole.losses(), strict=True))
        place.at_most(f"{name}: losses, relative", worst, 1e-4)


def adapter(place: Place) -> None:
    """transformers + peft load what a job leaves and find its validation loss; generate, evaluate, export and merge take it."""
    job = Job(place, "job")
    place.equal("exit code", job.train()[0], 0)
    run = str(job.folder / "run")
    check = [
        str(ROOT / "tools/check_adapter.py"),
        str(job.folder / "model"),
        f"{run}/adapter",
        str(job.folder / "validation.jsonl"),
        "--run-dir",
        run,
    ]
    for what, words in (
        ("transformers + peft find the validation loss", check),
        ("generate", ["-m", "megasft", "generate", run, "--prompt", "what comes after 3?", "--max-new-tokens", "8"]),
        ("evaluate", ["-m", "megasft", "evaluate", run, "--generate", "2", "--max-new-tokens", "8"]),
        ("export", ["-m", "megasft", "export", run, str(job.folder / "fused"), "--layout", "fused"]),
        ("merge", ["-m", "megasft", "merge", run, str(job.folder / "merged")]),
        ("generate from the merged model", ["-m", "megasft", "generate", str(job.folder / "merged"), "--prompt", "3", "--max-new-tokens", "8"]),
    ):  # fmt: skip
        done = subprocess.run(
            [sys.executable, *words], cwd=ROOT, env=job.environment, capture_output=True, text=True, timeout=LIMIT
        )
        last = (done.stdout.splitlines() or done.stderr.splitlines() or [""])[-1]
        place.note(what, f"exit code {done.returncode}: {last}"[:200], "exit code 0", done.returncode == 0)
