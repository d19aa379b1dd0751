"""Memory and speed of `megasft merge` on a checkpoint larger than its memory limit.

    python benchmarks/merge.py [--layers 5] [--fused] [--folder DIR]

Makes a bf16 checkpoint with layers of Qwen3-30B-A3B's shape (1.24 GB each, and 1.24 GB for embedding and head) and an
adapter of rank 16 on all of them, merges them in a separate process, and prints that process's peak resident memory
and the megabytes of checkpoint that it writes per second, fsync included. All files are in a temporary folder, which
needs twice the checkpoint's size, and are deleted afterwards.
"""

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer

from megasft.adapters.adapter_file import AdapterWriter
from megasft.storage.safetensors import TensorFileWriter, TensorSpec

HIDDEN, HEADS, KV_HEADS, HEAD, EXPERTS, INNER, VOCABULARY, RANK = 2048, 32, 4, 128, 128, 768, 151936, 16
ATTENTION = {"q_proj": HEADS * HEAD, "k_proj": KV_HEADS * HEAD, "v_proj": KV_HEADS * HEAD}


def main(
    layers: Annotated[int, typer.Option(min=1)] = 5,
    fused: Annotated[bool, typer.Option(help="all experts of a layer in one tensor, base and adapter")] = False,
    folder: Annotated[Path | None, typer.Option(help="where to make the temporary folder")] = None,
) -> None:
    """Measure one merge."""
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        base, adapter, out = (Path(temporary) / name for name in ("base", "adapter", "merged"))
        largest = write_base(base, layers, fused)
        write_adapter(adapter, layers, fused)
        size = sum(path.stat().st_size for path in base.glob("*.safetensors"))
        command = [sys.executable, "-c", "from megasft.cli import main; main()", "merge"]
        command += [str(adapter), str(out), "--model", str(base)]
        start = time.perf_counter()
        process = subprocess.Popen(command)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        if status:
            raise SystemExit(f"the merge ended with status {status}")
        merged = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    layout = "fused" if fused else "per-expert"
    print(f"checkpoint   {size / 1e9:.2f} GB, {layout} experts, largest tensor {largest / 1e9:.2f} GB")
    print(f"merged       {merged / 1e9:.2f} GB in {seconds:.1f} s, {merged / 1e6 / seconds:.0f} MB/s")
    print(f"peak memory  {usage.ru_maxrss / 2**20:.2f} GiB resident; the limit is 2 GiB and the largest tensor")


def linears(layer: int) -> Iterator[tuple[str, int, int]]:
    """Name, outputs and inputs of every linear module in a layer."""
    path = f"model.layers.{layer}"
    for name, outputs in ATTENTION.items():
        yield f"{path}.self_attn.{name}", outputs, HIDDEN
    yield f"{path}.self_attn.o_proj", HIDDEN, HEADS * HEAD
    yield f"{path}.mlp.gate", EXPERTS, HIDDEN
    for e in range(EXPERTS):
        yield f"{path}.mlp.experts.{e}.gate_proj", INNER, HIDDEN
        yield f"{path}.mlp.experts.{e}.up_proj", INNER, HIDDEN
        yield f"{path}.mlp.experts.{e}.down_proj", HIDDEN, INNER


def write_base(folder: Path, layers: int, fused: bool) -> int:
    """Write one file per layer; return the bytes of the largest tensor."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3_moe", "dtype": "bfloat16"}))
    files: dict[str, dict[str, tuple[int, ...]]] = {}
    files["ends"] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN), "lm_head.weight": (VOCABULARY, HIDDEN)}
    for i in range(layers):
        shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": (n, k) for name, n, k in linears(i)}
        if fused:
            experts = f"model.layers.{i}.mlp.experts"
            shapes = {name: shape for name, shape in shapes.items() if ".experts." not in name}
            shapes[f"{experts}.gate_up_proj"] = (EXPERTS, 2 * INNER, HIDDEN)
            shapes[f"{experts}.down_proj"] = (EXPERTS, HIDDEN, INNER)
        files[f"layer{i}"] = shapes
    weight_map, largest = {}, 0
    for file, shapes in files.items():
        specs = {name: TensorSpec(torch.bfloat16, shape) for name, shape in shapes.items()}
        writer = TensorFileWriter(folder / f"{file}.safetensors", specs)
        for name, spec in specs.items():
            fill(writer, name)
            weight_map[name] = f"{file}.safetensors"
            largest = max(largest, spec.nbytes)
        writer.close()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return largest


def write_adapter(folder: Path, layers: int, fused: bool) -> None:
    shapes = {}
    for i in range(layers):
        for name, n, k in linears(i):
            shapes[f"{name}.lora_A.weight"], shapes[f"{name}.lora_B.weight"] = (RANK, k), (n, RANK)
    writer = AdapterWriter(folder, shapes, torch.float32, RANK, 32, "fused" if fused else "per-expert", "")
    for name, shape in shapes.items():
        writer.put(name, ..., NOISE[: math.prod(shape)].view(shape) * 0.01)
    writer.finish()


NOISE = torch.randn(2**24, generator=torch.Generator().manual_seed(0))


def fill(writer: TensorFileWriter, name: str) -> None:
    """Write random values that repeat, because drawing gigabytes would take longer than merging them."""
    shape = writer.specs[name].shape
    rows = NOISE.numel() // shape[-1] if len(shape) == 2 else 1
    for start in range(0, shape[0], rows):
        count = min(rows, shape[0] - start)
        value = NOISE[: count * math.prod(shape[1:])].view(count, *shape[1:])
        writer.write(name, (slice(start, start + count),), value)


if __name__ == "__main__":
    typer.run(main)
