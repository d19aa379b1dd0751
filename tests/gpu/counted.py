"""The `megasft` command, which counts on rank 0 what its third step asks of the GPU, in `counts.json` of the run's folder.

{"micro_batches": int, "launches": kernels, "copies": copies and fills, "waits": {"file:line": times}}: kernels as
torch.profiler sees them on the device; waits as torch reports where the host asks the device for a value. Explicit
`torch.cuda.synchronize()`, of which a step has two for its clock, is not among them. On CPUs all are 0.
"""

import json
import warnings
from collections import Counter
from pathlib import Path

import torch
from torch.autograd import DeviceType

from megasft.cli import main
from megasft.train.trainer import Trainer

STEP = 2  # those before compile kernels and fill caches
train_step = Trainer.train_step


def counting(trainer: Trainer) -> dict:
    if trainer.step != STEP or trainer.topology.rank:
        return train_step(trainer)
    before = trainer.progress._micro_batches
    with warnings.catch_warnings(record=True) as told, torch.profiler.profile() as profile:
        warnings.simplefilter("always")
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("warn")
        try:
            record = train_step(trainer)
        finally:
            if torch.cuda.is_available():
                torch.cuda.set_sync_debug_mode("default")
    on_device = [event.name for event in profile.events() or [] if event.device_type == DeviceType.CUDA]
    copies = sum(name.startswith(("Memcpy", "Memset")) for name in on_device)
    waits = Counter(f"{one.filename}:{one.lineno}" for one in told if "synchroniz" in str(one.message))
    counts = {
        "micro_batches": trainer.progress._micro_batches - before,
        "launches": len(on_device) - copies,
        "copies": copies,
        "waits": waits,
    }
    (Path(trainer.config.job.output_dir) / "counts.json").write_text(json.dumps(counts))
    return record


Trainer.train_step = counting  # type: ignore[method-assign]

if __name__ == "__main__":
    main()
