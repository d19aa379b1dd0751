"""`megasft validate` and `megasft convert`."""

from pathlib import Path
from typing import Annotated

import typer

from megasft.commands.app import (
    SetOption,
    app,
)
from megasft.config.schema import RunConfig, load_config
from megasft.messages import UserError


@app.command(
    epilog="""\b
Examples:
  megasft validate data.jsonl                                       structure only
  megasft validate --config run.toml                                the data that the run file names
  megasft validate data.jsonl -c run.toml --set data.train_on=last
  megasft validate data.jsonl --model models/qwen3-30b --show 2     see what is trained on
"""
)
def validate(
    dataset: Annotated[
        Path | None,
        typer.Argument(
            metavar="DATA",
            help="Conversations: .jsonl, .jsonl.gz, .jsonl.zst, .parquet, or a folder of them.  "
            "[default: the training and validation data of the run file]",
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            "--config", "-c", metavar="RUN.toml", help="Take data, tokenizer, length and [data] from a run file."
        ),
    ] = None,
    set_: SetOption = [],  # noqa: B006
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            metavar="MODEL",
            help="Take the tokenizer from this model folder or hub id.  [default: the run file's]",
        ),
    ] = None,
    show: Annotated[
        int, typer.Option(min=0, metavar="N", help="Print the first N conversations with their supervised tokens.")
    ] = 0,
) -> None:
    """Check conversations and count their tokens.

    Tokens are counted where --config or --model gives a tokenizer. The exit code is 1 if anything is wrong.
    """
    if config is None and (dataset is None or set_):
        raise UserError(
            "--set changes a run file: add --config RUN.toml" if set_ else "nothing to check: name DATA or --config"
        )
    if show and config is None and model is None:
        raise UserError("--show needs a tokenizer: add --config or --model")
    settings = load_config(config, set_) if config else RunConfig.from_dict({})
    if dataset is not None:
        paths = [str(dataset)]
    else:
        validation = settings.data.validation_path
        paths = [*(source.path for source in settings.training_data()), *([validation] if validation else [])]
    from megasft.data.tokenize import Recipe
    from megasft.data.validate import print_report, validate_dataset
    from megasft.data.validate import show as print_masks

    data, recipe, code = settings.data, Recipe.of(settings), 0
    tokenizer = positions = None
    if name := model or (settings.job.model if config else None):
        from megasft.data.tokenizer import load_tokenizer
        from megasft.model.hub import find_model
        from megasft.model.positions import longest_input

        folder = find_model(name)
        tokenizer = load_tokenizer(folder, data.template_args, data.template_date)
        positions = longest_input(folder)
    for path in paths:
        code = max(code, print_report(validate_dataset(path, tokenizer, recipe, positions)))
        if show and tokenizer is not None:
            print_masks(path, tokenizer, show, recipe)
    raise typer.Exit(code)


@app.command(
    epilog="""\b
Examples:
  megasft convert sharegpt.json data.jsonl
  megasft convert qa.parquet data.jsonl --format context+question/answer
  megasft convert traces.jsonl data.jsonl --train-on all
  megasft convert someone/chats data.jsonl --split train_sft      from the Hugging Face hub
"""
)
def convert(
    source: Annotated[
        str,
        typer.Argument(
            metavar="IN",
            help="Conversations of any format: .jsonl or .json (plain, .gz, .zst), .parquet, a folder of them, or the "
            "name of a dataset on the Hugging Face hub.",
        ),
    ],
    output: Annotated[Path, typer.Argument(metavar="OUT.jsonl", help="The file to write.")],
    format: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="messages, sharegpt, alpaca, pairs, traces, hermes, or PROMPT/ANSWER to name the columns.  "
            "[default: what the first record looks like]",
        ),
    ] = None,
    train_on: Annotated[
        str,
        typer.Option(metavar="WHICH", help="Of agent traces: last, the answer only; all, earlier assistant turns too."),
    ] = "last",
    drop: Annotated[
        list[str], typer.Option(metavar="KEY", help="Leave this key out of records and messages; can be repeated.")
    ] = [],  # noqa: B006
    split: Annotated[str, typer.Option(metavar="NAME", help="The split to read of a dataset on the hub.")] = "train",
    subset: Annotated[
        str | None, typer.Option(metavar="NAME", help="The configuration to read of a dataset on the hub.")
    ] = None,
    revision: Annotated[
        str | None, typer.Option(metavar="NAME", help="The branch, tag or commit to read of a dataset on the hub.")
    ] = None,
) -> None:
    """Convert conversations from another format.

    Prints what was read, changed, left out and refused. Exits with 1 if a record was refused, 2 if nothing could be
    done.
    """
    from megasft.data.convert import Hub, print_account
    from megasft.data.convert import convert as convert_file

    account = convert_file(source, output, format or "", train_on, drop, Hub(split, subset, revision))
    raise typer.Exit(print_account(account))
