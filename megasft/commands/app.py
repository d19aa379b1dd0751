"""What the commands share: the app, options, `main`, and what a rank imports."""

import contextlib
import os
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal, NoReturn

import typer

from megasft.launch import rendezvous
from megasft.launch.exit import REFUSED, first_to_report
from megasft.messages import UserError, quieten_libraries, say

# Without rich's markup, which takes the sections of a run file, such as [data], for styles and leaves them out.
app = typer.Typer(
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)

ConfigOption = Annotated[Path, typer.Option("--config", "-c", metavar="RUN.toml", help="The run file.")]
DatasetOption = Annotated[
    Path | None,
    typer.Option("--dataset", "-d", metavar="DATA", help="Train on this file or folder in place of [job] data."),
]
SetOption = Annotated[
    list[str],
    typer.Option(
        "--set", metavar="SECTION.KEY=VALUE", help="Override a key of the run file, as in lora.r=8; may be repeated."
    ),
]
AdapterArgument = Annotated[
    str,
    typer.Argument(
        metavar="ADAPTER",
        help="A run directory or run file, which stands for the adapter it trained, or the folder of a PEFT adapter.",
    ),
]
BaseOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        metavar="MODEL",
        help="The base model, a folder or hub id.  [default: the one the adapter names]",
    ),
]
DtypeOption = Annotated[
    Literal["bf16", "fp32"] | None,
    typer.Option(help="Precision of the model.  [default: that of the run, or of the model's config.json]"),
]
TensorParallelOption = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="Ranks that share each layer.  [default: the run's, or 1]")
]
ExpertParallelOption = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="Ranks that share the experts.  [default: the run's, or 1]")
]
ExpertTensorParallelOption = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="Ranks that share each expert.  [default: the run's]")
]
PipelineParallelOption = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="Stages of layers.  [default: the run's, or 1]")
]
QloraOption = Annotated[
    bool | None,
    typer.Option("--qlora/--no-qlora", help="Use a 4-bit base or not.  [default: as the run was trained]"),
]


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"megasft {version('megasft')}")
        raise typer.Exit


@app.callback(
    epilog="""\b
Examples:
  megasft init run.toml --model Qwen/Qwen3-Coder-30B-A3B-Instruct --gpus 4 --dataset data.jsonl
  megasft validate --config run.toml      check the conversations
  megasft train --config run.toml         train
  megasft generate runs/run               chat with the trained model
  megasft evaluate runs/run held_out.jsonl --generate 32
  megasft merge runs/run merged           write a model folder that needs no adapter

`megasft COMMAND --help` shows the options and examples of a command.
"""
)
def commands(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Fine-tune Qwen3 mixture-of-experts models with LoRA on every linear layer, on any number of GPUs.

    A run file (TOML) holds the settings of a run: `megasft init` writes a short one. A run leaves its adapter,
    checkpoints and metrics in a run directory, which the other commands take.
    """


def import_rank() -> None:
    """Import what a rank uses: in each rank, or once in a launcher that forks them."""
    from megasft import host

    host.import_megatron()
    import megasft.evaluation.run
    import megasft.generation.run
    import megasft.rank  # noqa: F401

    host.prepare()


def main() -> None:
    """Run the command; a user's mistake is one line and exit code 2."""
    quieten_libraries()
    if len(sys.argv) == 1:
        sys.argv.append("--help")
    try:
        sys.exit(app(prog_name="megasft", standalone_mode=False))
    except UserError as error:
        _refuse(str(error))
    except typer.TyperException as error:
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "megasft"
        _refuse(f"{error.format_message().rstrip('.')}; see {command} --help")


def _refuse(message: str) -> NoReturn:
    rank = os.environ.get("RANK", "0")
    # The first rank to get here speaks: torchrun ends the others when it exits.
    store = None
    with contextlib.suppress(RuntimeError, UserError):  # no store, or another job's: perhaps the very message
        store = rendezvous.connect() if rendezvous.launcher_hosts() else None
    if first_to_report(store, rank, otherwise=os.environ.get("LOCAL_RANK", "0") == "0"):
        say(message)
    sys.exit(REFUSED)
