"""Launching the ranks of a job on this machine, as torchrun does, and ending as a command should."""

import os
import sys

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from megasft.config import RunConfig, resolve_topology
from megasft.job import check_before_launch


def launch(config: RunConfig, ranks: int) -> None:
    """Run `worker.work` in `ranks` processes; exits with the first failed rank's code if one fails."""
    resolve_topology(config.data.topology, ranks)
    check_before_launch(config)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    launch_config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=ranks, rdzv_backend="c10d", rdzv_endpoint="127.0.0.1:0",
        run_id="megasft", max_restarts=0, start_method="spawn", monitor_interval=0.2,
    )  # fmt: skip
    try:
        elastic_launch(launch_config, _work)(config)
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        sys.exit(failure.exitcode if failure.exitcode > 0 else 1)
    except KeyboardInterrupt:
        sys.exit(130)


def _work(config: RunConfig) -> None:
    from megasft.worker import work

    work(config)
