"""Load a Hugging Face checkpoint into this rank's base weights. Each rank reads only the slices it keeps."""

import contextlib
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from megasft.messages import UserError, say_once
from megasft.model.hf_checkpoint import Checkpoint
from megasft.model.quantized_base import QuantizedCheckpoint
from megasft.model.qwen3_moe import Qwen3Moe
from megasft.quant.weight import Slot
from megasft.storage.safetensors import RELEASE_BYTES, all_finite

REPORT_SECONDS = 10.0


def load_base(model: Qwen3Moe, folder: str | Path, quantized: QuantizedCheckpoint | None = None) -> None:
    """Load this rank's base weights from the checkpoint in `folder` and convert them to the model's dtype. Weights that
    the model keeps in 4 bits come from `quantized`. Memory holds the model and the file pages touched last.

    Rank 0 shows the progress. Raises UserError naming any tensor that is missing, surplus or has another shape, before
    any weight is read, and one that holds NaN or infinite values.
    """
    checkpoint = Checkpoint(folder)
    plan = [(shard, *checkpoint.locate(shard)) for shard in model.base_shards()]
    checkpoint.refuse_surplus(model.hf_config)
    sizes = [math.prod(part.stop - part.start for part in shard.index) for shard, _, _ in plan]
    touched = 0
    with _progress(str(folder), sum(sizes)) as report:
        for (shard, name, index), size in zip(plan, sizes, strict=True):
            if isinstance(shard.local, Slot):
                assert quantized is not None, "a 4-bit model needs `quantized`: call model.quantized_base.prepare first"
                matrix = quantized.matrix(shard.name)
                shard.local.fill(matrix)
                touched += sum(tensor.nbytes for tensor in matrix.values())
            else:
                shard.local.copy_(checkpoint.read(name, index))
                if not all_finite(shard.local):
                    raise UserError(
                        f"{checkpoint.files[name]}: tensor {name!r} holds values that are not finite; repair the "
                        "checkpoint, or download or copy the model again"
                    )
                touched += shard.local.nbytes
            report(size)
            if touched >= RELEASE_BYTES:
                checkpoint.release()
                if quantized:
                    quantized.release()
                touched = 0


@contextlib.contextmanager
def _progress(folder: str, total: int) -> Iterator[Callable[[int], None]]:
    """A function to call with the number of weights read: rank 0 shows a bar on a terminal, elsewhere it prints a line
    every REPORT_SECONDS.
    """
    if os.environ.get("RANK", "0") == "0" and sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        columns = (TextColumn("loading weights"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("loading weights", total=total)
            yield lambda size: bar.advance(task, size)
        return
    done, last = 0, time.monotonic()

    def report(size: int) -> None:
        nonlocal done, last
        done += size
        if time.monotonic() - last >= REPORT_SECONDS:
            last = time.monotonic()
            say_once(f"{folder}: {done / total:.0%} of rank 0's {total / 1e9:.2f} billion weights loaded")

    yield report
