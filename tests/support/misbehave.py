"""The `megasft` command with a fault in it.

In the step after `[tags] fault_after` steps (1 by default) rank 1 does what `[tags] fault` of the run file says, unless
the launcher has begun the job again.
"""

import logging
import os
import signal
import time
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


def be_stopped() -> None:
    """Not even its other threads run on."""
    os.kill(os.getpid(), signal.SIGSTOP)


def hang() -> None:
    """Wait for what rank 0 never sends, while it waits in a collective: no rank comes back to Python."""
    torch.distributed.recv(torch.zeros(1), 0)


def sleep() -> None:
    time.sleep(1000)


FAULTS = {"fail": fail, "be killed": be_killed, "be stopped": be_stopped, "hang": hang, "sleep": sleep}


def misbehaving(trainer: Trainer) -> dict:
    tags, again = trainer.config.tags, os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    fault = tags.get("fault")
    if fault == "dawdle":  # so that there is time for a fault from outside
        time.sleep(0.2)
    elif fault and not again and trainer.topology.rank == 1 and trainer.step == tags.get("fault_after", 1):
        FAULTS[fault]()
    return train_step(trainer)


Trainer.train_step = misbehaving

if __name__ == "__main__":
    main()
