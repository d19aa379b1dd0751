"""The `megasft` command with a fault in it.

In the step after `[tags] fault_after` steps (1 by default) rank 1 does what `[tags] fault` of the run file says, unless
the launcher has begun the job again.
"""

import logging
import os
import signal
import warnings

warnings.filterwarnings("ignore")  # of megatron-core; the command would do so itself, but imports it later
logging.disable(logging.WARNING)

import torch

from megasft.cli import main
from megasft.train.trainer import Trainer

train_step = Trainer.train_step


def fail() -> None:
    raise RuntimeError("the fault of rank 1")


def be_killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def hang() -> None:
    """Wait for what rank 0 never sends, while it waits in a collective: no rank comes back to Python."""
    torch.distributed.recv(torch.zeros(1), 0)


def misbehaving(trainer: Trainer) -> dict:
    tags, again = trainer.config.tags, os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    fault = tags.get("fault")
    if fault and not again and trainer.topology.rank == 1 and trainer.step == tags.get("fault_after", 1):
        {"fail": fail, "be killed": be_killed, "hang": hang}[fault]()
    return train_step(trainer)


Trainer.train_step = misbehaving

if __name__ == "__main__":
    main()
