"""What the first person with GPUs runs: `tools/gpu_acceptance.sh`, or `--cpu` for the same checks on CPUs.

The checks are in the order in which things would break. Each runs in a process of its own with a time limit, so that a
crash or a hang does not end the report. Writes report.md and report.json; the exit code is 0 if nothing failed.
"""

import argparse
import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from tests.gpu import report
from tests.gpu.report import NeedsMore, Outcome

ROOT = Path(__file__).parents[2]


class Check(NamedTuple):
    """A function of a Place in a module of tests.gpu, and the seconds it may take."""

    place: str
    seconds: int

    def run(self, place: object) -> None:
        module, _, name = self.place.partition(".")
        getattr(importlib.import_module(f"tests.gpu.{module}"), name)(place)


CHECKS = {
    "environment": Check("environment.environment", 300),
    "grouped_mm": Check("kernels.grouped", 300),
    "nf4": Check("kernels.four_bits", 300),
    "attention": Check("kernels.attention", 300),
    "dropout": Check("kernels.dropout", 300),
    "adapters": Check("kernels.adapters", 300),
    "routing": Check("kernels.routing", 300),
    "queries": Check("kernels.queries", 300),
    "layer": Check("parity.layer", 600),
    "model": Check("parity.model", 600),
    "collectives": Check("parity.collectives", 600),
    "topologies": Check("parity.topologies", 1800),
    "traffic": Check("parity.traffic", 600),
    "qlora": Check("parity.qlora", 600),
    "counts": Check("jobs.counts", 1200),
    "across": Check("jobs.across", 2400),
    "resume": Check("jobs.resume", 2400),
    "hang": Check("jobs.hang", 1800),
    "deterministic": Check("jobs.deterministic", 1200),
    "adapter": Check("jobs.adapter", 1800),
    "large": Check("large.large", 3600),
    "presets": Check("large.presets", 7200),
    "reference": Check("large.reference", 3600),
    "vllm": Check("large.vllm", 3600),
}


def main() -> None:
    """Run the checks that are asked for, and write the report."""
    arguments = _arguments()
    if arguments.cpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before any process imports torch
    if arguments.inside:
        _inside(arguments)
        return
    machine = _machine(arguments)
    print(", ".join(f"{name} {value}" for name, value in machine.items()), flush=True)
    outcomes = []
    for name in arguments.only or CHECKS:
        outcomes.append(_outside(name, arguments, machine["ranks"]))
        one = outcomes[-1]
        failed = "; ".join(f"{m.what}: {m.got}, expected {m.expected}" for m in one.measured if not m.passed)
        print(f"{one.name:<14}{one.status:<9}{one.seconds:6.0f} s  {one.reason or failed}"[:400], flush=True)
        report.write(arguments.out, machine, outcomes)  # after each: a report there is, whatever comes next
    print(f"report: {arguments.out / 'report.md'}")
    sys.exit(any(one.status == "failed" for one in outcomes))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tools/gpu_acceptance.sh", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cpu", action="store_true", help="run on CPUs, with four ranks; what needs a GPU says so")
    parser.add_argument(
        "--model", metavar="FOLDER", help="Qwen3-Coder-30B-A3B-Instruct, a folder or hub id, for the large checks"
    )
    parser.add_argument("--only", nargs="+", choices=CHECKS, metavar="CHECK", help=f"of: {', '.join(CHECKS)}")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/acceptance"), metavar="FOLDER", help="default: runs/acceptance"
    )
    parser.add_argument("--inside", nargs=3, help=argparse.SUPPRESS)  # check, ranks, file: run it in this process
    return parser.parse_args()


def _machine(arguments: argparse.Namespace) -> dict:
    """The device, its ranks and what the report says of them. Exits where there is no GPU."""
    from tests.gpu.environment import machine
    from tests.gpu.place import Place

    if arguments.cpu:
        return machine(Place("cpu", 4, Path()))
    from megasft import host

    if not host.CUDA:
        sys.exit(f"torch sees no GPU: {host.why_no_gpu()}; --cpu runs what CPUs can")
    return machine(Place("cuda", host.gpus(), Path()))


def _outside(name: str, arguments: argparse.Namespace, ranks: int) -> Outcome:
    """Run a check in a process of its own, and end all processes that it leaves."""
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix=f"megasft-{name}-", ignore_cleanup_errors=True) as folder:
        answer = Path(folder) / "outcome.json"
        words = [sys.executable, "-m", "tests.gpu.acceptance", "--inside", name, str(ranks), str(answer)]
        words += ["--cpu"] * arguments.cpu + (["--model", arguments.model] if arguments.model else [])
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        log = Path(folder) / "log"
        with log.open("w") as out:
            process = subprocess.Popen(words, env=environment, stdout=out, stderr=out, start_new_session=True)
            try:
                process.wait(CHECKS[name].seconds)
                reason = f"the process ended with {process.returncode}: {log.read_text()[-500:]}"
            except subprocess.TimeoutExpired:
                reason = f"no result within {CHECKS[name].seconds} s: {log.read_text()[-500:]}"
            finally:
                _end(process)
        outcome = Outcome.of_json(answer.read_text()) if answer.exists() else Outcome(name, "failed", reason=reason)
    outcome.seconds = time.monotonic() - begun
    return outcome


def _end(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _inside(arguments: argparse.Namespace) -> None:
    """Run one check here and write its outcome."""
    from tests.gpu.place import Place

    name, ranks, answer = arguments.inside
    place = Place("cpu" if arguments.cpu else "cuda", int(ranks), Path(answer).parent / "files", arguments.model)
    place.folder.mkdir()
    outcome = Outcome(name, "passed", measured=place.measured)
    try:
        CHECKS[name].run(place)
        if not all(one.passed for one in place.measured):
            outcome.status = "failed"
    except NeedsMore as needs:
        outcome.status, outcome.reason = "not run", f"needs {needs}"
    except BaseException as error:
        outcome.status = "failed"
        outcome.reason = f"{''.join(traceback.format_exception_only(error)).strip()[-800:]} (last: {_last_line(error)})"
    Path(answer).write_text(json.dumps(asdict(outcome)))
    sys.stdout.flush()
    os._exit(0)  # process groups and pools that an error has left must not hold it


def _last_line(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if str(ROOT) in frame.filename] or frames
    return f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "?"


if __name__ == "__main__":
    main()
