"""The `megasft` command."""

import json
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, Literal, NoReturn

import typer

from megasft.config.parallelism import TopologySettings, resolve_topology
from megasft.config.schema import RunConfig, load_config
from megasft.launch import rendezvous
from megasft.launch.exit import REFUSED, first_to_report
from megasft.messages import UserError, say

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
        _import_rank()
        from megasft import rank

        rank.train(settings)
    else:
        from megasft.launch.exit import interrupted
        from megasft.launch.launcher import launch, use_cores

        ranks = ranks or settings.world_size() or 1
        use_cores(ranks)
        from megasft import preflight

        preflight.check(settings, resolve_topology(settings.data.topology, ranks))
        launch(ranks, interrupted(settings), main, _import_rank, max_restarts)


@app.command()
def generate(
    model: Annotated[
        str,
        typer.Argument(help="A model (folder or hub id), a run file with its adapter, or an adapter with its base."),
    ],
    adapter: Annotated[str | None, typer.Option(help="The folder of a PEFT adapter, in either layout.")] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="Answer this and end.")] = None,
    system: Annotated[str | None, typer.Option(help="The system prompt.")] = None,
    tools: Annotated[Path | None, typer.Option(help="A JSON file with the list of tools the template gets.")] = None,
    template_arg: Annotated[
        list[str], typer.Option(metavar="NAME=VALUE", help="For the chat template, as enable_thinking=false.")
    ] = [],  # noqa: B006
    jsonl: Annotated[
        Path | None,
        typer.Option(help="Answer each conversation of this file, less an assistant's last message; JSON out."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The longest answer.")] = 512,
    temperature: Annotated[float, typer.Option(help="0: always the likeliest token; above: drawn at random.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens that sum to this.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Draw from so many tokens; 0: from all.")] = 0,
    seed: Annotated[int, typer.Option(help="Of the draw.")] = 0,
    dtype: Annotated[
        Literal["bf16", "fp32"] | None, typer.Option(help="By default what the run file or the model's folder says.")
    ] = None,
    tensor_parallel: Annotated[int | None, typer.Option(min=1)] = None,
    expert_parallel: Annotated[int | None, typer.Option(min=1)] = None,
    expert_tensor_parallel: Annotated[int | None, typer.Option(min=1)] = None,
    pipeline_parallel: Annotated[int | None, typer.Option(min=1, help="Sizes are the run file's, or 1.")] = None,
    qlora: Annotated[
        bool | None, typer.Option(help="Over the base in 4 bits or not; by default what the run file says.")
    ] = None,
) -> None:
    """Look at what a model answers, with its adapter: to --prompt, to standard input, or in a chat on the terminal.

    For looking at results, not for serving: one conversation at a time. It ends with the vLLM command that serves the
    adapter. The answer goes to standard output, everything else to standard error.
    """
    from megasft.generation.request import Request, find_model_and_adapter, template_variables

    name, folder, config = find_model_and_adapter(model, adapter)
    asked = {
        "tensor_parallel": tensor_parallel, "expert_parallel": expert_parallel,
        "expert_tensor_parallel": expert_tensor_parallel, "pipeline_parallel": pipeline_parallel,
    }  # fmt: skip
    if prompt is not None and jsonl is not None:
        raise UserError("--prompt and --jsonl both say what to answer; keep one of the two")
    topology = config.data.topology if config else TopologySettings()
    in_4_bits = bool(config and config.training.use_qlora) if qlora is None else qlora
    request = Request(
        name,
        folder,
        dtype or (config.dtype if config else None),
        topology.model_copy(update={key: size for key, size in asked.items() if size}),
        prompt,
        system,
        tools,
        template_variables(template_arg),
        jsonl,
        max_new_tokens,
        {"temperature": temperature, "top_p": top_p, "top_k": top_k, "seed": seed},
        (config or RunConfig.from_dict({})).quant if in_4_bits else None,
    )
    if "RANK" in os.environ:
        _import_rank()
        from megasft.generation.run import run
        from megasft.rank import run_rank

        run_rank(lambda _: run(request), "interrupted")
    else:
        from megasft.launch.launcher import launch, use_cores

        ranks = request.ranks()
        use_cores(ranks)
        request.check(request.sizes(ranks))
        launch(ranks, "interrupted", main, _import_rank, asks_rank_0=True)


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
    from megasft.adapters.export import export_adapter

    export_adapter(adapter, out, layout, model)
    print(f"{out}: {layout} adapter")


@app.command()
def merge(
    adapter: Annotated[Path, typer.Option(help="The folder of a PEFT adapter, in either layout.")],
    out: Annotated[Path, typer.Option(help="The model folder to write; it must not hold files.")],
    model: Annotated[str, typer.Option(help="The base, a folder or hub id, if not what the adapter names.")] = "",
    dtype: Annotated[Literal["keep", "bf16", "fp32"], typer.Option(help="Of the result; keep: the base's.")] = "keep",
    max_shard_size: Annotated[str, typer.Option(help="Of one file of weights.")] = "5GB",
    onto: Annotated[
        Literal["original", "quantized-base"],
        typer.Option(
            help="original: the weights of the base. quantized-base: those that QLoRA trained over, in 4 bits."
        ),
    ] = "original",
    config: Annotated[
        Path | None,
        typer.Option("--config", "-c", help="Take [quant] and the precision for quantized-base from a run file."),
    ] = None,
) -> None:
    """Merge an adapter into its base: a model folder that needs no adapter."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    from megasft.adapters.merge import find_base, merge_adapter, parse_size
    from megasft.model.hub import find_model

    run = load_config(config) if config else RunConfig.from_dict({})
    quant = run.quant if onto == "quantized-base" else None
    limit, base = parse_size(max_shard_size), find_model(model or find_base(adapter))
    console = Console(stderr=True)
    columns = (TextColumn("merging"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("merging", total=None)
        report = merge_adapter(
            base, adapter, out, dtype, limit, lambda done, total: bar.update(task, completed=done, total=total),
            quant, run.dtype,
        )  # fmt: skip
    print(
        f"{out}: {report.tensors} tensors, {report.adapted} adapted, {report.nbytes / 1e9:.2f} GB, "
        f"{report.files} file(s)"
    )


def _import_rank() -> None:
    """Import what a rank uses: in each rank, or once in a launcher that forks them."""
    from megasft import host

    host.import_megatron()
    import megasft.generation.run
    import megasft.rank  # noqa: F401

    host.prepare()


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
        name = Path(sys.argv[0]).name.replace("__main__.py", "megasft")
        _refuse(f"{error.format_message().rstrip('.')}; see {name} --help")


def _refuse(message: str) -> NoReturn:
    rank = os.environ.get("RANK", "0")
    # Whichever rank comes first, for torchrun ends the others when it exits.
    store = rendezvous.connect() if rendezvous.launcher_hosts() else None
    if first_to_report(store, rank, otherwise=os.environ.get("LOCAL_RANK", "0") == "0"):
        say(message)
    sys.exit(REFUSED)


def _quieten() -> None:
    """Keep from the user what libraries tell their developers, on import and later."""
    warnings.filterwarnings("ignore", module=r"(.*/)?megatron[./]")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.")
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # "No CUDA runtime is found"
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
