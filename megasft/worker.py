"""One rank of a training job: runs it, and ends it so that the first error is told once and nobody hangs."""

import os
import signal
import sys
import traceback
from typing import NoReturn

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from megasft import job, topology
from megasft.config import RunConfig
from megasft.errors import UserError
from megasft.train.trainer import Summary

INTERRUPTED, REFUSED, FAILED = 130, 2, 1


def work(config: RunConfig) -> None:
    """Run the job as the rank that the environment names; exits the process unless it succeeds.

    Exit codes: 0 done, 2 refused (a user's mistake), 130 interrupted, 1 failed.
    """
    # torch reads the number of threads at import; torchrun sets one a rank, and more on few cores only fight.
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        summary = job.run(config)
    except UserError as error:
        _end(REFUSED, str(error))
    except KeyboardInterrupt:
        _end(INTERRUPTED, f"interrupted; adapters saved so far are under {config.job.output_dir}")
    except BaseException as error:
        traceback_text = "".join(traceback.format_exception(error))
        _end(FAILED, f"rank {os.environ.get('RANK', 0)} failed: {error!r}", traceback_text)
    if dist.get_rank() == 0:
        print_summary(summary, config)
    topology.stop()


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def _end(code: int, message: str, details: str = "") -> NoReturn:
    """Say why, unless another rank has, and leave at once: peers may wait in a collective, so nothing is torn down."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if _first_to_tell():
        print(f"{details}megasft: {message}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _first_to_tell() -> bool:
    """Whether no other rank has reported an error: the rendezvous store takes the first."""
    rank = os.environ.get("RANK", "0")
    if not dist.is_initialized():
        return rank == "0"
    try:
        store = dist.distributed_c10d._get_default_store()
        return store.compare_set("megasft/first-error", "", rank).decode() == rank
    except Exception:  # the store's host may be gone already; two voices are better than none
        return True


def print_summary(summary: Summary, config: RunConfig) -> None:
    """What a finished run reports."""
    table = Table(title="megasft: done", show_header=False, title_justify="left")
    rows = [
        ("steps", f"{summary.steps:,}"),
        ("training loss, mean of the last 10 steps", f"{summary.train_loss:.4f}"),
        ("validation loss", "not measured" if summary.validation_loss is None else f"{summary.validation_loss:.6f}"),
        ("best validation loss", "" if summary.best_validation_loss is None else f"{summary.best_validation_loss:.6f}"),
        ("tokens", f"{summary.tokens:,} ({summary.tokens / max(summary.seconds, 1e-9):,.0f} a second over the whole run)"),
        ("time", f"{summary.seconds:,.1f} s"),
        ("peak memory of rank 0", f"{summary.peak_memory_bytes / 2**30:.2f} GiB"),
        ("adapter", f"{config.job.output_dir}/adapter"),
    ]
    for name, value in rows:
        if value:
            table.add_row(name, value)
    Console().print(table)


torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
