"""The `megasft` command."""

import json
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, Literal, NoReturn

import typer

from megasft.config import RunConfig, load_config, resolve_topology
from megasft.ending import REFUSED, first_to_tell, launchers_store, say
from megasft.errors import UserError

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)

ConfigOption = Annotated[Path, typer.Option("--config", "-c", help="The run file (TOML).")]
DatasetOption = Annotated[Path | None, typer.Option("--dataset", "-d", help="Conversations, in place of [job] data.")]
SetOption = Annotated[list[str], typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override any key.")]
RanksOption = Annotated[
    int | None, typer.Option("--ranks", min=1, help="Ranks to launch; by default what the file asks for.")
]


@app.callback()
def commands() -> None:
    """Fine-tune Qwen3 mixture-of-experts models with LoRA on every linear layer."""


@app.command()
def train(
    config: ConfigOption,
    dataset: DatasetOption = None,
    set_: SetOption = [],  # noqa: B006
    ranks: RanksOption = None,
    resume: Annotated[
        str, typer.Option(help="auto: go on from the run's newest checkpoint; never; or a checkpoint's folder.")
    ] = "",
    max_restarts: Annotated[
        int, typer.Option(min=0, help="Begin a run that fails again so often, from its last checkpoint.")
    ] = 0,
) -> None:
    """Train: under torchrun as one of its ranks, otherwise launching the ranks itself."""
    overrides = [*set_, f"checkpoint.resume={json.dumps(resume)}"] if resume else set_
    settings = load_config(config, overrides, dataset)
    if "RANK" in os.environ:
        from megasft.worker import work

        work(settings)
    else:
        from megasft import preflight
        from megasft.launch import launch

        ranks = ranks or settings.world_size() or 1
        preflight.check(settings, resolve_topology(settings.data.topology, ranks))
        launch(settings, ranks, max_restarts)


@app.command()
def validate(
    dataset: Annotated[
        Path, typer.Argument(help="Conversations: .jsonl, .jsonl.gz, .jsonl.zst, .parquet, or a folder.")
    ],
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="Take tokenizer, length and [data] from a run file.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Take the tokenizer from this model folder or hub id.")] = None,
    show: Annotated[int, typer.Option(min=0, help="Print so many conversations, supervised tokens coloured.")] = 0,
) -> None:
    """Check a conversation file and count what is in it; exit code 1 if anything is wrong with it."""
    from megasft.data.tokenizer import load_tokenizer
    from megasft.data.validate import print_report, validate_dataset
    from megasft.data.validate import show as print_masks
    from megasft.model.hub import find_model

    settings = load_config(config) if config else RunConfig.from_dict({})
    name = model or (settings.job.model if config else None)
    tokenizer = load_tokenizer(find_model(name)) if name else None
    data, length = settings.data, settings.hyperparameters.sequence_length
    report = validate_dataset(dataset, tokenizer, length, data.train_on, data.parse_special_in_text, data.overlong)
    code = print_report(report)
    if show and tokenizer is None:
        raise UserError("--show needs a tokenizer: add --config or --model")
    if show and tokenizer is not None:
        print_masks(dataset, tokenizer, show, data.train_on, data.parse_special_in_text)
    raise typer.Exit(code)


@app.command()
def export(
    adapter: Annotated[Path, typer.Argument(help="The folder of a PEFT adapter, in either layout.")],
    out: Annotated[Path, typer.Argument(help="The folder to write; it must not hold files.")],
    layout: Annotated[
        Literal["per-expert", "fused"],
        typer.Option(help="per-expert: what vLLM takes, and peft too. fused: what peft itself trains and saves."),
    ] = "per-expert",
    model: Annotated[str, typer.Option(help="The name of the base to write down, if not that of the adapter.")] = "",
) -> None:
    """Write an adapter in another layout."""
    from megasft.lora.export import export_adapter

    export_adapter(adapter, out, layout, model)
    print(f"{out}: {layout} adapter")


@app.command()
def merge(
    adapter: Annotated[Path, typer.Option(help="The folder of a PEFT adapter, in either layout.")],
    out: Annotated[Path, typer.Option(help="The model folder to write; it must not hold files.")],
    model: Annotated[str, typer.Option(help="The base, a folder or hub id, if not what the adapter names.")] = "",
    dtype: Annotated[Literal["keep", "bf16", "fp32"], typer.Option(help="Of the result; keep: the base's.")] = "keep",
    max_shard_size: Annotated[str, typer.Option(help="Of one file of weights.")] = "5GB",
) -> None:
    """Merge an adapter into its base: a model folder that needs no adapter."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    from megasft.lora.merge import find_base, merge_adapter, parse_size
    from megasft.model.hub import find_model

    limit, base = parse_size(max_shard_size), find_model(model or find_base(adapter))
    console = Console(stderr=True)
    columns = (TextColumn("merging"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("merging", total=None)
        report = merge_adapter(
            base, adapter, out, dtype, limit, lambda done, total: bar.update(task, completed=done, total=total)
        )
    print(
        f"{out}: {report.tensors} tensors, {report.adapted} adapted, {report.nbytes / 1e9:.2f} GB, "
        f"{report.files} file(s)"
    )


def main() -> None:
    """Run the command; a user's mistake is one line and exit code 2."""
    _quieten()
    if len(sys.argv) == 1:
        sys.argv.append("--help")
    try:
        sys.exit(app(standalone_mode=False))
    except UserError as error:
        _refuse(str(error))
    except typer.TyperException as error:
        _refuse(f"{error.format_message().rstrip('.')}; see {Path(sys.argv[0]).name} --help")


def _refuse(message: str) -> NoReturn:
    rank = os.environ.get("RANK", "0")
    # Whichever rank comes first, for torchrun ends the others when it exits.
    if first_to_tell(launchers_store(), rank, otherwise=rank == "0"):
        say(message)
    sys.exit(REFUSED)


def _quieten() -> None:
    """Keep from the user what libraries tell their developers, on import and later."""
    warnings.filterwarnings("ignore", module=r"(.*/)?megatron[./]")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.")
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # "No CUDA runtime is found"
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
