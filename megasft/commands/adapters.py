"""`megasft merge` and `megasft export`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from megasft.commands.app import AdapterArgument, BaseOption, app
from megasft.config.schema import RunConfig, load_config
from megasft.messages import say


@app.command(
    epilog="""\b
Examples:
  megasft merge runs/demo merged
  megasft merge runs/demo/best merged --model demo/model --dtype bf16
  megasft merge runs/qlora merged --onto quantized-base
"""
)
def merge(
    adapter: AdapterArgument,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The model folder to write; it must not hold files.")],
    model: BaseOption = None,
    dtype: Annotated[
        Literal["keep", "bf16", "fp32"], typer.Option(help="Precision of the result; keep: that of the base.")
    ] = "keep",
    max_shard_size: Annotated[str, typer.Option(metavar="SIZE", help="The largest file of weights.")] = "5GB",
    onto: Annotated[
        Literal["original", "quantized-base"],
        typer.Option(help="original: add to the base's weights; quantized-base: to the 4-bit weights of QLoRA."),
    ] = "original",
    config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            "-c",
            metavar="RUN.toml",
            help="Take [quant] and the precision for quantized-base from this run file.  [default: the run's own]",
        ),
    ] = None,
) -> None:
    """Merge an adapter into its base model.

    Writes a model folder that needs no adapter.
    """
    from megasft.storage.new_folder import refuse_full
    from megasft.target import find_adapter

    refuse_full(out)
    found = find_adapter(adapter)
    run = load_config(config) if config else found.config or RunConfig.from_dict({})
    # Imported after these checks: torch takes seconds, and a wrong path should not.
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    from megasft.adapters.adapter_file import AdapterFile
    from megasft.adapters.fit import warn_of_other_base
    from megasft.adapters.merge import find_base, merge_adapter, parse_size
    from megasft.messages import size
    from megasft.model.hub import find_model

    if model:
        warn_of_other_base(AdapterFile(found.folder), model)
    quant = run.quant if onto == "quantized-base" else None
    limit, base = parse_size(max_shard_size), find_model(model or find_base(found.folder))
    console = Console(stderr=True)
    columns = (TextColumn("merging"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("merging", total=None)
        report = merge_adapter(
            base, found.folder, out, dtype, limit, lambda done, total: bar.update(task, completed=done, total=total),
            quant, run.dtype,
        )  # fmt: skip
    print(f"{out}: {report.tensors} tensors, {report.adapted} adapted, {size(report.nbytes)}, {report.files} file(s)")
    if report.routers:
        say(f"{out}: the LoRA of {report.routers} router(s) is merged too; any server applies it")


@app.command(
    epilog="""\b
Examples:
  megasft export runs/demo demo-fused --layout fused
  megasft export adapters/from-peft for-vllm
  megasft export runs/demo for-sglang --without-router
"""
)
def export(
    adapter: AdapterArgument,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write; it must not hold files.")],
    layout: Annotated[
        Literal["per-expert", "fused"],
        typer.Option(help="per-expert: what vLLM takes, and peft too; fused: what peft itself trains and saves."),
    ] = "per-expert",
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            metavar="MODEL",
            help="The base model to name in the adapter.  [default: the one it names now]",
        ),
    ] = None,
    without_router: Annotated[
        bool,
        typer.Option(
            "--without-router",
            help="Leave out the router's LoRA, which some servers ignore or refuse; the rest is not what was trained.",
        ),
    ] = False,
) -> None:
    """Write an adapter in another layout, or without the router's LoRA."""
    from megasft.storage.new_folder import refuse_full
    from megasft.target import find_adapter

    refuse_full(out)
    found = find_adapter(adapter)
    from megasft.adapters.export import export_adapter
    from megasft.adapters.peft_layout import SERVED_ROUTER

    routers = export_adapter(found.folder, out, layout, model or "", without_router)
    print(f"{out}: {layout} adapter")
    if without_router and routers:
        say(
            f"{out}: without the LoRA of {routers} router(s), tokens go to the experts that the base chooses, and "
            "answers differ from those of the trained model; `megasft merge` keeps it for any server"
        )
    elif without_router:
        say(f"{out}: the adapter has no LoRA of a router; nothing is left out")
    elif routers:
        say(
            f"{out}: has the LoRA of {routers} router(s): {SERVED_ROUTER}; `megasft merge` keeps it for any server, "
            "and --without-router exports the rest"
        )
