"""What a run's metrics cost, as a share of its steps.

    python tools/make_demo.py --out demo      # once
    python benchmarks/metrics_cost.py [--ranks 4] [--config configs/demo.toml] [--steps 40]

Trains as the run file says, and times on rank 0 what makes and writes them. Ranks meet before it, so that waiting for a
slower rank, which a step does anyway, does not count. Where ranks share cores they still wait for each other within it;
their CPU time does not depend on that.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from typing import Any

if not sys.warnoptions:
    warnings.simplefilter("ignore")

import torch
import torch.distributed as dist

from megasft import job
from megasft.config.schema import load_config
from megasft.train.device_monitor import SAMPLE_SECONDS
from megasft.train.trainer import Trainer

WARM_UP = 5  # steps that do not count


def main() -> None:
    """Run it and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/demo.toml")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--ranks", type=int, default=4)
    options = parser.parse_args()
    if "RANK" not in os.environ:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(options.ranks)]
        sys.exit(subprocess.run([*launcher, *sys.argv], check=False).returncode)
    seconds: dict[str, list[float]] = defaultdict(list)

    def timed(name: str, do: Callable[..., Any], meet: bool = False) -> Callable[..., Any]:
        def wrapped(*args: Any, **named: Any) -> Any:
            if meet:
                dist.barrier()
            started, worked = time.perf_counter(), time.process_time()
            try:
                return do(*args, **named)
            finally:
                seconds[name].append(time.perf_counter() - started)
                seconds[f"{name}, work"].append(time.process_time() - worked)

        return wrapped

    def watch(trainer: Trainer) -> None:
        observer = trainer.observer
        trainer.train_step = timed("step", trainer.train_step)  # type: ignore[method-assign]
        observer.stepped = timed("metrics", observer.stepped, meet=True)  # type: ignore[method-assign]
        observer._norms.squares = timed("norms", observer._norms.squares)  # type: ignore[method-assign]
        observer.log.record = timed("writing", observer.log.record)  # type: ignore[method-assign]
        observer._monitor.sample = timed("sample", observer._monitor.sample)  # type: ignore[method-assign]

    with tempfile.TemporaryDirectory() as folder:
        settings = [f"hyperparameters.max_steps={options.steps}", "training.validation.enabled=false"]
        config = load_config(options.config, [*settings, f"job.output_dir={folder}/run"], None)
        job.run(config, watch)
        work = torch.tensor([sum(seconds[f"{name}, work"][WARM_UP:]) for name in ("metrics", "step")])
        dist.all_reduce(work)
        if dist.get_rank() == 0:
            steps, metrics = seconds["step"][WARM_UP:], seconds["metrics"][WARM_UP:]
            sampling = statistics.median(seconds["sample"]) / SAMPLE_SECONDS if seconds["sample"] else 0.0
            print(f"step                  {1e3 * statistics.median(steps):8.1f} ms (medians of {len(steps)})")
            print(f"metrics of a step     {1e3 * statistics.median(metrics):8.2f} ms, with waits for a shared core")
            print(f"  norms               {1e3 * statistics.median(seconds['norms'][WARM_UP:]):8.2f} ms")
            print(f"  each line           {1e3 * statistics.median(seconds['writing'][WARM_UP:]):8.2f} ms")
            print(f"metrics of all steps  {100 * sum(metrics) / sum(steps):8.2f} % of their time")
            print(f"                      {100 * float(work[0] / work[1]):8.2f} % of the CPU time of all ranks in them")
            print(f"device monitor        {100 * sampling:8.3f} % of a core")
        dist.barrier()


if __name__ == "__main__":
    main()
