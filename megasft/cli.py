"""The `megasft` command."""

import json
import logging
import os
import sys
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal, NoReturn

import typer

from megasft.config.parallelism import TopologySettings
from megasft.config.schema import RunConfig, load_config
from megasft.launch import rendezvous
from megasft.launch.exit import REFUSED, first_to_report
from megasft.messages import UserError, say

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
    max_restarts: Annotated[
        int, typer.Option(min=0, metavar="N", help="How often to restart a run that fails, from its last checkpoint.")
    ] = 0,
) -> None:
    """Train as a run file says.

    Launches the ranks itself; under torchrun it is one of them. The same command again resumes from the newest
    checkpoint.
    """
    overrides = [*set_, f"checkpoint.resume={json.dumps(resume)}"] if resume else set_
    settings = load_config(config, overrides, dataset)
    if "RANK" in os.environ:
        _import_rank()
        from megasft import rank

        rank.train(settings)
    else:
        from megasft import preflight
        from megasft.launch.exit import interrupted
        from megasft.launch.launcher import launch, use_cores

        ranks = ranks or settings.world_size() or 1
        use_cores(ranks)
        preflight.check(settings, preflight.topology_sizes(settings, ranks))
        launch(ranks, interrupted(settings), main, _import_rank, max_restarts)


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
  megasft generate runs/demo                                chat, on a terminal
  megasft generate runs/demo --prompt "Write a haiku."
  megasft generate runs/demo/best --jsonl test.jsonl > answers.jsonl
  megasft generate Qwen/Qwen3-Coder-30B-A3B-Instruct --tensor-parallel 2
"""
)
def generate(
    target: Annotated[
        str,
        typer.Argument(
            metavar="TARGET",
            help="A run directory or run file, which stands for the adapter it trained, the folder of a PEFT adapter "
            "(checkpoints and best/ are such folders), or a model: a folder or hub id.",
        ),
    ],
    adapter: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="Use this PEFT adapter, in either layout.")
    ] = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", metavar="TEXT", help="Answer this prompt and exit.")
    ] = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="The system prompt.")] = None,
    tools: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A JSON file with a list of tools for the chat template.")
    ] = None,
    template_arg: Annotated[
        list[str],
        typer.Option(metavar="NAME=VALUE", help="A variable of the chat template, as in enable_thinking=false."),
    ] = [],  # noqa: B006
    jsonl: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Answer each conversation of this file and write JSON lines; a last assistant message is left out.",
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="The longest answer, in tokens.")] = 512,
    temperature: Annotated[
        float,
        typer.Option(metavar="T", help="0: the most likely token (greedy); above 0: sample from softmax(logits / T)."),
    ] = 0.0,
    top_p: Annotated[
        float,
        typer.Option(metavar="P", help="Sample from the most likely tokens that sum to this probability; 1: from all."),
    ] = 1.0,
    top_k: Annotated[int, typer.Option(metavar="K", help="Sample from the K most likely tokens; 0: from all.")] = 0,
    seed: Annotated[int, typer.Option(metavar="N", help="Seed of the sampling.")] = 0,
    dtype: Annotated[
        Literal["bf16", "fp32"] | None,
        typer.Option(help="Precision of the model.  [default: that of the run, or of the model's config.json]"),
    ] = None,
    tensor_parallel: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Ranks that share each layer.  [default: the run's, or 1]")
    ] = None,
    expert_parallel: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Ranks that share the experts.  [default: the run's, or 1]")
    ] = None,
    expert_tensor_parallel: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Ranks that share each expert.  [default: the run's]")
    ] = None,
    pipeline_parallel: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Stages of layers.  [default: the run's, or 1]")
    ] = None,
    qlora: Annotated[
        bool | None,
        typer.Option("--qlora/--no-qlora", help="Use a 4-bit base or not.  [default: as the run was trained]"),
    ] = None,
) -> None:
    """Answer prompts, or chat on the terminal.

    Prompts come from --prompt, --jsonl or standard input. For looking at results, not for serving: it answers one
    conversation at a time, and ends with the vLLM command that serves the adapter. The answer goes to standard output,
    everything else to standard error.
    """
    from megasft.generation.request import Request, check_sampling, template_variables
    from megasft.target import find_target

    if prompt is not None and jsonl is not None:
        raise UserError("--prompt and --jsonl both say what to answer; keep one of the two")
    sampling = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "seed": seed}
    check_sampling(**sampling)  # type: ignore[arg-type]
    variables = template_variables(template_arg)
    found = find_target(target, adapter)
    config = found.config
    asked = {
        "tensor_parallel": tensor_parallel, "expert_parallel": expert_parallel,
        "expert_tensor_parallel": expert_tensor_parallel, "pipeline_parallel": pipeline_parallel,
    }  # fmt: skip
    topology = config.data.topology if config else TopologySettings()
    in_4_bits = bool(config and config.training.use_qlora) if qlora is None else qlora
    request = Request(
        found.model,
        found.adapter,
        dtype or (config.dtype if config else None),
        topology.model_copy(update={key: size for key, size in asked.items() if size}),
        prompt,
        system,
        tools,
        variables,
        jsonl,
        max_new_tokens,
        sampling,
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

    from megasft.adapters.merge import find_base, merge_adapter, parse_size
    from megasft.model.hub import find_model

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
    print(
        f"{out}: {report.tensors} tensors, {report.adapted} adapted, {report.nbytes / 1e9:.2f} GB, "
        f"{report.files} file(s)"
    )


@app.command(
    epilog="""\b
Examples:
  megasft export runs/demo demo-fused --layout fused
  megasft export adapters/from-peft for-vllm
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
) -> None:
    """Write an adapter in another layout."""
    from megasft.storage.new_folder import refuse_full
    from megasft.target import find_adapter

    refuse_full(out)
    found = find_adapter(adapter)
    from megasft.adapters.export import export_adapter

    export_adapter(found.folder, out, layout, model or "")
    print(f"{out}: {layout} adapter")


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
    """Turn conversations of another format into those that megasft trains on.

    Prints what was read, changed, left out and refused. Exits with 1 if a record was refused, 2 if nothing could be
    done.
    """
    from megasft.data.convert import Hub, print_account
    from megasft.data.convert import convert as convert_file

    account = convert_file(source, output, format or "", train_on, drop, Hub(split, subset, revision))
    raise typer.Exit(print_account(account))


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
    store = rendezvous.connect() if rendezvous.launcher_hosts() else None
    if first_to_report(store, rank, otherwise=os.environ.get("LOCAL_RANK", "0") == "0"):
        say(message)
    sys.exit(REFUSED)


def _quieten() -> None:
    """Silence what libraries tell their developers, on import and later."""
    warnings.filterwarnings("ignore", module=r"(.*/)?megatron[./]")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.")
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # "No CUDA runtime is found"
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
