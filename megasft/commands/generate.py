"""`megasft generate`."""

import os
from pathlib import Path
from typing import Annotated

import typer

from megasft.commands.app import (
    DtypeOption,
    ExpertParallelOption,
    ExpertTensorParallelOption,
    PipelineParallelOption,
    QloraOption,
    TensorParallelOption,
    app,
    import_rank,
    main,
)
from megasft.config.parallelism import TopologySettings
from megasft.config.schema import RunConfig
from megasft.messages import UserError


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
    dtype: DtypeOption = None,
    tensor_parallel: TensorParallelOption = None,
    expert_parallel: ExpertParallelOption = None,
    expert_tensor_parallel: ExpertTensorParallelOption = None,
    pipeline_parallel: PipelineParallelOption = None,
    qlora: QloraOption = None,
) -> None:
    """Answer prompts, or chat on the terminal.

    Prompts come from --prompt, --jsonl or standard input. For looking at results, not for serving: it ends with the
    vLLM command that serves the adapter. The answer goes to standard output, everything else to standard error.
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
        config.data.template_args if config else {},
    )
    if "RANK" in os.environ:
        import_rank()
        from megasft.generation.run import run
        from megasft.rank import run_rank

        run_rank(lambda _: run(request), "interrupted")
    else:
        from megasft.launch.launcher import launch, use_cores

        ranks = request.ranks()
        use_cores(ranks)
        request.check(request.sizes(ranks))
        from megasft.checks import gpus

        gpus.check_ranks(ranks)
        launch(ranks, "interrupted", main, import_rank, asks_rank_0=True)
