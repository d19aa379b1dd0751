"""What a run's metrics cost, as a share of its steps.

    python tools/make_demo.py --out demo      # once
    torchrun --nproc-per-node 4 benchmarks/metrics_cost.py [--config configs/demo.toml] [--steps 40]

Trains as the run file says, and times on rank 0 what makes and writes
them. Ranks meet before it, so that waiting for a slower rank, which a step does anyway, does not count.
"""

import argparse
import statistics
import sys
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from typing import Any

if not sys.warnoptions:
    warnings.simplefilter("ignore")

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
    options = parser.parse_args()
    seconds: dict[str, list[float]] = defaultdict(list)

    def timed(name: str, do: Callable[..., Any], meet: bool = False) -> Callable[..., Any]:
        def wrapped(*args: Any, **named: Any) -> Any:
            if meet:
                dist.barrier()
            started = time.perf_counter()
            try:
                return do(*args, **named)
            finally:
                seconds[name].append(time.perf_counter() - started)

        return wrapped

    def watch(trainer: Trainer) -> None:
        observer = trainer.observer
        end = observer.clock.end

        def met() -> tuple[float, dict[str, float]]:
            """The end of the step's clock; its seconds are the step's."""
            found = end()
            seconds["step"].append(found[0])
            return found

        observer.clock.end = met  # type: ignore[method-assign]
        observer.stepped = timed("metrics", observer.stepped, meet=True)  # type: ignore[method-assign]
        observer._norms.squares = timed("norms", observer._norms.squares)  # type: ignore[method-assign]
        observer.log.record = timed("writing", observer.log.record)  # type: ignore[method-assign]
        observer._monitor.sample = timed("sample", observer._monitor.sample)  # type: ignore[method-assign]

    with tempfile.TemporaryDirectory() as folder:
        settings = [f"hyperparameters.max_steps={options.steps}", "training.validation.enabled=false"]
        config = load_config(options.config, [*settings, f"job.output_dir={folder}/run"], None)
        job.run(config, watch)
        if dist.get_rank():
            dist.barrier()
            return
        steps, metrics = seconds["step"][WARM_UP:], seconds["metrics"][WARM_UP:]
        each = {name: sum(values) / len(seconds["step"]) for name, values in seconds.items()}
        sampling = statistics.median(seconds["sample"]) / SAMPLE_SECONDS if seconds["sample"] else 0.0
        print(f"step                    {1e3 * statistics.median(steps):8.1f} ms (median of {len(steps)})")
        print(f"metrics of a step       {1e3 * statistics.median(metrics):8.2f} ms (median)")
        print(f"  norms                 {1e3 * each['norms']:8.2f} ms (mean)")
        print(f"  lines, TensorBoard    {1e3 * each['writing']:8.2f} ms (mean)")
        print(f"sampling in a thread    {100 * sampling:8.3f} % of its time")
        print(f"metrics of all steps    {100 * sum(metrics) / sum(steps):8.2f} % of their time")
        dist.barrier()


if __name__ == "__main__":
    main()
