"""`megasft init` and `megasft train`."""

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from megasft.commands.app import (
    ConfigOption,
    DatasetOption,
    SetOption,
    app,
    import_rank,
    main,
)
from megasft.config.keys import load_env_file
from megasft.config.schema import load_config


@app.command(
    epilog="""\b
Examples:
  megasft init --model Qwen/Qwen3-Coder-30B-A3B-Instruct --gpus 4
  megasft init run.toml --model models/qwen3-30b --gpus 8 --dataset conversations.jsonl
"""
)
def init(
    model: Annotated[str, typer.Option("--model", "-m", metavar="MODEL", help="The base model, a folder or hub id.")],
    gpus: Annotated[int, typer.Option("--gpus", min=1, metavar="N", help="GPUs to train on.")],
    out: Annotated[
        Path, typer.Argument(metavar="RUN.toml", help="The run file to write; it must not exist yet.")
    ] = Path("run.toml"),
    dataset: Annotated[Path, typer.Option("--dataset", "-d", metavar="DATA", help="Conversations to train on.")] = Path(
        "conversations.jsonl"
    ),
) -> None:
    """Write a short run file.

    configs/qwen3_coder_30b.toml shows every key and its meaning.
    """
    from megasft.config.starter import write_run_file

    write_run_file(out, model, gpus, str(dataset))
    print(f"{out}: edit it, then run `megasft train --config {out}`")


@app.command(
    epilog="""\b
Examples:
  megasft train --config configs/demo.toml
  megasft train --config configs/demo.toml --dry-run
  megasft train -c run.toml -d data.jsonl --set lora.r=8 --set hyperparameters.learning_rate=1e-5
  torchrun --nproc-per-node 4 -m megasft train --config run.toml
"""
)
def train(
    config: ConfigOption,
    dataset: DatasetOption = None,
    set_: SetOption = [],  # noqa: B006
    ranks: Annotated[
        int | None,
        typer.Option(
            "--ranks",
            min=1,
            metavar="N",
            help="Ranks to launch on this machine, one a GPU.  [default: what [data.topology] or [compute] asks for]",
        ),
    ] = None,
    resume: Annotated[
        str,
        typer.Option(
            metavar="HOW",
            help="auto: resume from the newest checkpoint in the run directory, if there is one; never: start a new "
            "run; or the folder of a checkpoint.  [default: [checkpoint] resume]",
        ),
    ] = "",
    env_file: Annotated[
        Path | None,
        typer.Option(
            "--env-file",
            metavar="FILE",
            help="Read variables from it that are not set, NAME=VALUE a line: keys of the hub and of trackers.",
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Check all that a launch would meet, print the plan, and launch nothing."),
    ] = False,
    max_restarts: Annotated[
        int, typer.Option(min=0, metavar="N", help="How often to restart a run that fails, from its last checkpoint.")
    ] = 0,
) -> None:
    """Train as a run file says.

    Launches the ranks itself; under torchrun it is one of them. The same command again resumes from the newest
    checkpoint.
    """
    if env_file is not None:
        load_env_file(env_file)
    overrides = [*set_, f"checkpoint.resume={json.dumps(resume)}"] if resume else set_
    settings = load_config(config, overrides, dataset)
    if settings.compute.gpu_count == 0:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch, which asks for GPUs when megasft.host is imported
    if dry_run:
        from megasft.checks.dry_run import dry_run as check_all

        check_all(settings, ranks or settings.world_size() or 1)
    elif "RANK" in os.environ:
        import_rank()
        from megasft import rank

        rank.train(settings)
    else:
        from megasft.checks import preflight
        from megasft.launch.exit import interrupted
        from megasft.launch.launcher import launch, use_cores

        ranks = ranks or settings.world_size() or 1
        use_cores(ranks)
        preflight.check(settings, preflight.topology_sizes(settings, ranks))
        preflight.check_gpus(settings, ranks)
        launch(ranks, interrupted(settings), main, import_rank, max_restarts)
