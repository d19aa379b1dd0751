"""The `megasft` command."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from megasft.config import RunConfig, load_config
from megasft.errors import UserError

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)

ConfigOption = Annotated[Path, typer.Option("--config", "-c", help="The run file (TOML).")]
DatasetOption = Annotated[Path | None, typer.Option("--dataset", "-d", help="Conversations, in place of [job] data.")]
SetOption = Annotated[list[str], typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override any key.")]
RanksOption = Annotated[int | None, typer.Option("--ranks", min=1, help="Ranks to launch; by default what the file asks for.")]


@app.callback()
def commands() -> None:
    """Fine-tune Qwen3 mixture-of-experts models with LoRA on every linear layer."""


@app.command()
def train(config: ConfigOption, dataset: DatasetOption = None, set_: SetOption = [], ranks: RanksOption = None) -> None:  # noqa: B006
    """Train: under torchrun as one of its ranks, otherwise launching the ranks itself."""
    settings = load_config(config, set_, dataset)
    if "RANK" in os.environ:
        from megasft.worker import work

        work(settings)
    else:
        from megasft.launch import launch

        launch(settings, ranks or settings.world_size() or 1)


@app.command()
def validate(
    dataset: Annotated[Path, typer.Argument(help="Conversations: .jsonl, .jsonl.gz, .jsonl.zst, .parquet, or a folder.")],
    config: Annotated[Path | None, typer.Option("--config", "-c", help="Take tokenizer and length from a run file.")] = None,
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
    report = validate_dataset(dataset, tokenizer, settings.hyperparameters.sequence_length)
    code = print_report(report)
    if show and tokenizer is None:
        raise UserError("--show needs a tokenizer: add --config or --model")
    if show and tokenizer is not None:
        print_masks(dataset, tokenizer, show)
    raise typer.Exit(code)


def main() -> None:
    """Run the command; a user's mistake is one line and exit code 2."""
    try:
        app()
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"megasft: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
