"""`megasft evaluate`."""

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
from megasft.config.schema import RunConfig


@app.command(
    epilog="""\b
Examples:
  megasft evaluate runs/demo                                losses on the run's validation data, base and adapter
  megasft evaluate runs/demo held_out.jsonl --generate 32
  megasft evaluate Qwen/Qwen3-Coder-30B-A3B-Instruct held_out.jsonl --adapter runs/run/best --ranks 4
  megasft evaluate runs/demo held_out.jsonl --generate all --json --output conversations.jsonl
"""
)
def evaluate(
    target: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A model, a folder or hub id; or a run directory or run file, which stands for the adapter it trained "
            "and its [data] settings; or the folder of a PEFT adapter.",
        ),
    ],
    data: Annotated[
        str | None,
        typer.Argument(
            metavar="DATA", help="Held-out conversations: a file or folder.  [default: the run's validation_path]"
        ),
    ] = None,
    adapter: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="Use this PEFT adapter, in either layout.")
    ] = None,
    generate: Annotated[
        str | None,
        typer.Option(
            metavar="N",
            help="Also answer each supervised turn of N conversations, or of all, and score the answers.",
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="The longest answer, in tokens.")] = 512,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a JSON line for each conversation, with its answers.")
    ] = None,
    sequence_length: Annotated[
        int | None,
        typer.Option(min=2, metavar="N", help="Tokens of the longest conversation.  [default: the run's, or 4096]"),
    ] = None,
    set_: Annotated[
        list[str],
        typer.Option(
            "--set",
            metavar="SECTION.KEY=VALUE",
            help="Override a setting of the run, or a default, as in data.train_on=last; may be repeated.",
        ),
    ] = [],  # noqa: B006
    ranks: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Ranks to launch on this machine, one a GPU; those beyond one model share the work.  [default: as "
            "many as hold the model once]",
        ),
    ] = None,
    dtype: DtypeOption = None,
    tensor_parallel: TensorParallelOption = None,
    expert_parallel: ExpertParallelOption = None,
    expert_tensor_parallel: ExpertTensorParallelOption = None,
    pipeline_parallel: PipelineParallelOption = None,
    qlora: QloraOption = None,
) -> None:
    """Measure a model on held-out conversations, and its adapter beside its base.

    Loss, perplexity and token accuracy of the supervised tokens, by turn, and by text and tool calls; with --generate
    also how right the answers and tool calls are. The results go to standard output, everything else to standard error.
    """
    from megasft.evaluation.request import EvaluationRequest, find_data, read_count
    from megasft.generation.request import Request
    from megasft.target import find_target

    count = read_count(generate)
    found = find_target(target, adapter)
    if sequence_length:
        set_ = [*set_, f"hyperparameters.sequence_length={sequence_length}"]
    config = (found.config or RunConfig.from_dict({"job": {"model": found.model}})).overridden(set_)
    data = find_data(data, found.config, target)
    in_4_bits = config.training.use_qlora if qlora is None else qlora
    asked = {
        "tensor_parallel": tensor_parallel, "expert_parallel": expert_parallel,
        "expert_tensor_parallel": expert_tensor_parallel, "pipeline_parallel": pipeline_parallel,
    }  # fmt: skip
    model = Request(
        found.model,
        found.adapter,
        dtype or (config.dtype if found.config else None),
        config.data.topology.model_copy(update={key: size for key, size in asked.items() if size}),
        quant=config.quant if in_4_bits else None,
    )
    request = EvaluationRequest(model, config, data, count, max_new_tokens, as_json, output)
    if "RANK" in os.environ:
        import_rank()
        from megasft.evaluation.run import run
        from megasft.rank import run_rank

        run_rank(lambda _: run(request), "interrupted")
    else:
        from megasft.checks import gpus
        from megasft.launch.launcher import launch, use_cores

        ranks = ranks or model.ranks()
        use_cores(ranks)
        request.check(request.sizes(ranks))
        gpus.check_ranks(ranks)
        launch(ranks, "interrupted", main, import_rank)
