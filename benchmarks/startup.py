"""How long a user waits: from the command to the first step of the demo, and what importing costs.

    python tools/make_demo.py --out demo      # once
    python benchmarks/startup.py [--rounds 3] [--launchers megasft torchrun] [--config configs/demo.toml]

Prints medians over the rounds. The first step is the time of the first `train` line of metrics.jsonl; CPU seconds are
those of all processes of the command until it has ended. The token cache is warm after the first round, which is not
counted.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
COMMANDS = {
    "megasft": [str(BIN / "megasft"), "train"],
    "torchrun": [str(BIN / "torchrun"), "--nproc-per-node", "4", str(ROOT / "tools" / "train.py")],
}
IMPORTS = {
    "import torch": "import torch",
    "what a rank imports": "from megasft.commands.app import import_rank; import_rank()",
    "megasft --help": "import sys; sys.argv = ['megasft', '--help']; from megasft.cli import main; main()",
}


def children_seconds() -> float:
    """CPU seconds of all child processes that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def import_seconds(code: str) -> float:
    """CPU seconds of a fresh interpreter that runs `code`."""
    before = children_seconds()
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], env=environment, capture_output=True, check=False)
    return children_seconds() - before


def first_step(launcher: str, config: str) -> tuple[float, float]:
    """(seconds to the first step, CPU seconds of the whole command) of a run of one step."""
    with tempfile.TemporaryDirectory() as folder:
        settings = [f"job.output_dir={folder}/run", "hyperparameters.max_steps=1", "training.validation.enabled=false"]
        command = [*COMMANDS[launcher], "--config", config, *(part for one in settings for part in ("--set", one))]
        before, started = children_seconds(), time.time()
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(done.stderr)
        records = map(json.loads, (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines())
        stepped = next(record["time"] for record in records if record["kind"] == "train")
        return stepped - started, children_seconds() - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--launchers", nargs="+", choices=[*COMMANDS], default=[*COMMANDS])
    parser.add_argument("--config", default="configs/demo.toml")
    args = parser.parse_args()
    for name, code in IMPORTS.items():
        print(f"{name:<22}{statistics.median(import_seconds(code) for _ in range(args.rounds)):6.2f} CPU s")
    for launcher in args.launchers:
        measured = [first_step(launcher, args.config) for _ in range(args.rounds + 1)][1:]
        wall, cpu = (statistics.median(values) for values in zip(*measured, strict=True))
        print(f"{launcher:<22}{wall:6.1f} s to the first step, {cpu:6.1f} CPU s for the whole command")


if __name__ == "__main__":
    main()
