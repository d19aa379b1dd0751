"""Figures of the 4-bit base: kernel speed, bytes, loading, and the change of the logits.

    python benchmarks/quant.py speed    # quantize and dequantize, against bitsandbytes and a plain copy
    python benchmarks/quant.py bytes    # bytes per weight of Qwen3-30B-A3B's layers on a rank, and the formula
    python benchmarks/quant.py load     # seconds and memory of a first and of later starts, on layers of that shape
    python benchmarks/quant.py kl demo/model --text demo/data/validation.jsonl    # logits against the bf16 base

Speeds are in GB/s of bf16 weights. The compared functions alternate in one process; figures are medians.
"""

import json
import logging
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

if not sys.warnoptions:  # `python -W default` shows the warnings of other libraries
    warnings.simplefilter("ignore")

import torch
import typer
from machine import describe, peak_of_body
from merge import fill
from rich.console import Console
from rich.table import Table
from torch import Tensor
from workload import Shape

from megasft import host, job
from megasft.config.schema import QuantSettings, RunConfig
from megasft.model.batch import IGNORED, MicroBatch, Segments
from megasft.model.hf_config import read_config
from megasft.model.load_base import load_base
from megasft.model.quantized_base import QuantizedCheckpoint, prepare, quantized_layers
from megasft.model.qwen3_moe import build_model
from megasft.quant import kernels, nf4
from megasft.quant.weight import QuantizedWeight
from megasft.storage.disk_cache import default_cache_dir
from megasft.storage.safetensors import TensorFileWriter, TensorSpec
from megasft.storage.shards import part

app = typer.Typer(help=__doc__, add_completion=False)
SETTINGS = QuantSettings()


def full_shape(layers: int) -> Shape:
    """Layers of Qwen3-30B-A3B."""
    return Shape(2048, layers, 32, 4, 128, 128, 8, 768, 151936, conversations=1, length=256)


@app.command()
def speed(
    turns: Annotated[int, typer.Option(min=3)] = 9,
    threads: Annotated[int, typer.Option(min=1)] = 1,
    experts: Annotated[int, typer.Option(min=1, help="experts whose gate and up are quantized together")] = 16,
) -> None:
    """Speed of quantizing and dequantizing."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import bitsandbytes.functional as bnb

    torch.set_num_threads(threads)
    n, k = 2 * 768 * experts, 2048
    matrix = (torch.randn(n, k, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    codes, state = bnb.quantize_4bit(matrix, blocksize=64, quant_type="nf4", compress_statistics=True)
    weight = QuantizedWeight(experts, {"gate_up": (n // experts, slice(0, n // experts))}, k, slice(0, k),
                             torch.bfloat16, SETTINGS)  # fmt: skip
    for e, piece in enumerate(matrix.chunk(experts)):
        weight.slot(e, "gate_up").fill(nf4.quantize(piece, SETTINGS, "matrix"))
    scales = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
    out, few = torch.empty_like(matrix), matrix[: n // experts]

    def all_experts() -> None:
        for e in range(experts):
            weight.dequantize(e, e + 1)

    print(json.dumps(describe("bf16", 1)))
    _table(
        "dequantize, GB/s",
        {
            "megasft, one expert at a time, workspace": (all_experts, matrix.nbytes),
            "megasft, all experts at once, workspace": (lambda: weight.dequantize(0, experts), matrix.nbytes),
            "megasft, kernel alone": (lambda: kernels.dequantize_nf4(codes, scales, out, 64), matrix.nbytes),
            "bitsandbytes.functional.dequantize_4bit": (lambda: bnb.dequantize_4bit(codes, state), matrix.nbytes),
            "torch look-up of bytes in fp32 pairs": (lambda: _look_up(codes, scales, out), matrix.nbytes),
            "copy of the bf16 (limit)": (lambda: out.copy_(matrix), matrix.nbytes),
        },
        turns,
    )
    _table(
        "quantize, GB/s",
        {
            "megasft, bf16": (lambda: nf4.quantize(few, SETTINGS, "matrix"), few.nbytes),
            "megasft, without the table (as for fp32)": (lambda: nf4._quantize_by_rule(few.view(-1, 64)), few.nbytes),
            "bitsandbytes.functional.quantize_4bit": (
                lambda: bnb.quantize_4bit(few, blocksize=64, quant_type="nf4", compress_statistics=True), few.nbytes,
            ),
        },
        turns,
    )  # fmt: skip


def _look_up(codes: Tensor, scales: Tensor, out: Tensor, rows: int = 256) -> None:
    """The fastest implementation we found with torch operators."""
    byte = torch.arange(256)
    pairs = torch.stack([nf4.NF4[byte >> 4], nf4.NF4[byte & 15]], 1).contiguous().view(torch.int64).view(-1)
    codes, scales = codes.view(out.shape[0], -1), scales.view(out.shape[0], -1, 1)
    for at in (slice(i, i + rows) for i in range(0, out.shape[0], rows)):
        found = pairs.index_select(0, codes[at].flatten().int()).view(torch.float32)
        out[at] = found.view(*scales[at].shape[:2], -1).mul_(scales[at]).view(-1, out.shape[1])


def _table(title: str, sides: dict[str, tuple[Callable[[], Any], int]], turns: int) -> None:
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(turns + 1):
        for name, (run, _) in sides.items():
            started = time.perf_counter()
            run()
            if turn:  # the first turn creates buffers and tables
                seconds[name].append(time.perf_counter() - started)
    table = Table("", title, "quartiles")
    for name, (_, size) in sides.items():
        low, middle, high = (size / 1e9 / s for s in reversed(statistics.quantiles(seconds[name], n=4)))
        table.add_row(name, f"{middle:.2f}", f"{low:.2f} to {high:.2f}")
    Console(width=100).print(table)


@app.command("bytes")
def bytes_() -> None:
    """Bytes per weight on a rank."""
    table = Table("topology", "double", "bytes per weight", "formula", "difference")
    config = full_shape(1).hf_config()
    (stacks,) = quantized_layers(config)
    for tensor, expert, expert_tensor in ((1, 1, 1), (2, 1, 2), (4, 1, 4), (2, 2, 1), (4, 4, 1), (4, 2, 2)):
        for double in (True, False):
            settings = QuantSettings(double=double)
            used = weights = 0
            for name, (experts, n, k) in stacks:
                size = expert_tensor if experts > 1 else tensor
                split = name.rpartition(".")[2] in ("o_proj", "down_proj")
                rows, inputs = (slice(0, n), part(k, 0, size)) if split else (part(n, 0, size), slice(0, k))
                held = experts // expert if experts > 1 else 1
                weight = QuantizedWeight(held, {name: (n, rows)}, k, inputs, torch.bfloat16, settings)
                used += weight.nbytes
                weights += math.prod(weight.shape)
            formula = nf4.bytes_per_weight(settings)
            table.add_row(f"tp{tensor} ep{expert} etp{expert_tensor}", str(double), f"{used / weights:.5f}",
                          f"{formula:.5f}", f"{used / weights / formula - 1:+.3%}")  # fmt: skip
    Console().print(table)


@app.command()
def load(
    layers: Annotated[int, typer.Option(min=1, help="0.64 GB of memory each, and 1.2 GB of disk")] = 1,
    folder: Annotated[Path | None, typer.Option(help="where to make the temporary folder")] = None,
) -> None:
    """Seconds and memory of a first start and of later ones, each in a separate process.

    The last starts read from the disk, after dropping the files from the kernel's page cache. They alternate with a
    plain read of the same files, because the host of a virtual machine may have its own cache, which the first read
    fills.
    """
    table = Table("start", "cache s", "fill s", "GB/s", "cache, peak MiB", "fill, peak MiB", "model MiB", "largest MiB")
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        model, cache = Path(temporary) / "model", Path(temporary) / "cache"
        largest = write_checkpoint(model, layers)
        for start in ("first", "second", *2 * ("plain read, disk", "from the disk")):
            if start not in ("first", "second"):
                drop_from_memory(Path(temporary))
            if start == "plain read, disk":
                read, seconds = plain_read([path for path in cache.rglob("*.safetensors") if path.is_file()])
                table.add_row(start, "", f"{seconds:.1f}", f"{read / seconds / 1e9:.2f}", "", "", "", "")
                continue
            command = [sys.executable, __file__, "load-once", str(model), str(cache)]
            found = json.loads(
                subprocess.run(command, check=True, capture_output=True, text=True).stdout.split("\n")[-2]
            )
            table.add_row(start, f"{found['cache_seconds']:.1f}", f"{found['fill_seconds']:.1f}",
                          f"{found['model'] / found['fill_seconds'] / 1e9:.2f}",
                          *(f"{found[key] / 2**20:,.0f}" for key in ("cache_peak", "fill_peak", "model")),
                          f"{largest / 2**20:,.0f}")  # fmt: skip
    Console(width=110).print(table)
    print("Peaks are beyond the memory in use before; the limit is the model and two of the largest tensors.")


def drop_from_memory(folder: Path) -> None:
    """Drop all files in the folder from the page cache, so that the next read comes from the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def plain_read(paths: list[Path]) -> tuple[int, float]:
    """Bytes of the files, and the seconds to read them sequentially."""
    buffer, total, started = bytearray(2**24), 0, time.perf_counter()
    for path in paths:
        with open(path, "rb", buffering=0) as file:
            while count := file.readinto(buffer):
                total += count
    return total, time.perf_counter() - started


@app.command(hidden=True)
def load_once(model: Path, cache: Path) -> None:
    """Measure one start and print its figures as JSON."""
    settings = QuantSettings(cache_dir=str(cache))
    config = RunConfig.from_dict({"training": {"use_qlora": True}})
    topology, hf_config = job.initialize(config), read_config(model)
    with peak_of_body() as cached:
        started = time.perf_counter()
        where = prepare(model, hf_config, settings)
        cache_seconds = time.perf_counter() - started
    with peak_of_body() as filled:
        started = time.perf_counter()
        built = build_model(hf_config, topology, quant=settings)
        load_base(built, model, QuantizedCheckpoint(where, hf_config, settings))
        fill_seconds = time.perf_counter() - started
    size = sum(tensor.nbytes for tensor in (*built.parameters(), *built.buffers()))
    print()
    print(json.dumps({"cache_seconds": cache_seconds, "fill_seconds": fill_seconds, "cache_peak": cached.bytes,
                      "fill_peak": filled.bytes, "model": size}))  # fmt: skip


def write_checkpoint(folder: Path, layers: int) -> int:
    """Write a bf16 checkpoint of `layers` layers; return the bytes of its largest tensor."""
    folder.mkdir()
    config = full_shape(layers).hf_config()
    config.save_pretrained(folder)
    shapes: dict[str, tuple[int, ...]] = {}
    for i, stacks in enumerate(quantized_layers(config)):
        for name, (experts, n, k) in stacks:
            path, _, leaf = name.rpartition(".")
            names = [f"{path}.{e}.{leaf}.weight" for e in range(experts)] if experts > 1 else [f"{name}.weight"]
            shapes |= dict.fromkeys(names, (n, k))
        layer = f"model.layers.{i}"
        shapes |= dict.fromkeys(
            (f"{layer}.input_layernorm.weight", f"{layer}.post_attention_layernorm.weight"), (2048,)
        )
        shapes |= dict.fromkeys((f"{layer}.self_attn.q_norm.weight", f"{layer}.self_attn.k_norm.weight"), (128,))
        shapes[f"{layer}.mlp.gate.weight"] = (128, 2048)
    shapes |= {
        "model.embed_tokens.weight": (151936, 2048),
        "model.norm.weight": (2048,),
        "lm_head.weight": (151936, 2048),
    }
    specs = {name: TensorSpec(torch.bfloat16, shape) for name, shape in shapes.items()}
    writer = TensorFileWriter(folder / "model.safetensors", specs)
    for name in specs:
        fill(writer, name)
    writer.close()
    return max(spec.nbytes for spec in specs.values())


@app.command()
def kl(
    model: Annotated[Path, typer.Argument(help="a folder with a bf16 or fp32 checkpoint")],
    text: Annotated[Path | None, typer.Option(help="a text file to tokenize; by default random tokens")] = None,
    tokens: Annotated[int, typer.Option(min=2)] = 2048,
    length: Annotated[int, typer.Option(min=2, help="tokens of the separate pieces")] = 256,
    with_transformers: Annotated[
        bool, typer.Option("--transformers", help="also transformers with bitsandbytes, which skips the experts")
    ] = False,
) -> None:
    """KL(bf16 base || 4-bit base), mean over positions, in nats."""
    hf_config = read_config(model)
    if text:
        from transformers import AutoTokenizer

        ids = torch.tensor(AutoTokenizer.from_pretrained(model).encode(text.read_text(encoding="utf-8")[: 8 * tokens]))
    else:
        ids = torch.randint(hf_config.vocab_size, (tokens,), generator=torch.Generator().manual_seed(0))
    pieces = ids[:tokens].split(length)
    topology = job.initialize(RunConfig.from_dict({}))

    def logits(quant: QuantSettings | None) -> Tensor:
        built = build_model(hf_config, topology, quant=quant).eval()
        where = prepare(model, hf_config, quant) if quant else None
        load_base(built, model, QuantizedCheckpoint(where, hf_config, quant) if where and quant else None)
        with torch.no_grad():
            parts = [MicroBatch(p, torch.full_like(p, IGNORED), Segments.of([len(p)], host.device())) for p in pieces]
            return torch.cat([built.logits(batch).float().cpu() for batch in parts])

    base = logits(None)
    table = Table("4 bits", "KL, nats", "largest at a position", "same most likely token")
    sides = {f"megasft, double = {double}": logits(QuantSettings(double=double)) for double in (True, False)}
    if with_transformers:
        sides["transformers + bitsandbytes, double = True"] = _transformers(model, pieces)
    for name, found in sides.items():
        each = (base.softmax(-1) * (base.log_softmax(-1) - found.log_softmax(-1))).sum(-1)
        same = (base.argmax(-1) == found.argmax(-1)).float().mean()
        table.add_row(name, f"{each.mean():.5f}", f"{each.max():.4f}", f"{same:.2%}")
    Console().print(table)
    entropy = -(base.softmax(-1) * base.log_softmax(-1)).sum(-1).mean()
    print(f"{len(base):,} positions in pieces of {length}; entropy of the base {entropy:.3f} nats; "
          f"cache in {default_cache_dir()}")  # fmt: skip


def _transformers(model: Path, pieces: tuple[Tensor, ...]) -> Tensor:
    from transformers import BitsAndBytesConfig, Qwen3MoeForCausalLM

    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    built = Qwen3MoeForCausalLM.from_pretrained(
        model, dtype=torch.bfloat16, quantization_config=quantization, device_map="cpu", local_files_only=True
    )
    with torch.no_grad():
        return torch.cat([built(piece[None]).logits[0].float() for piece in pieces])


if __name__ == "__main__":
    app()
