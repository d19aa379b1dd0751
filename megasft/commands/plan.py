"""`megasft plan`."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from megasft.commands.app import ConfigOption, SetOption, app
from megasft.config.schema import load_config
from megasft.messages import UserError


@app.command(
    epilog="""\b
Examples:
  megasft plan --config run.toml
  megasft plan --config run.toml --gpu H100 --gpus 8 --data conversations.jsonl
  megasft plan --config run.toml --gpus 8 --nodes 8 --search
  megasft plan --config run.toml --plot memory.svg
"""
)
def plan(
    config: ConfigOption,
    set_: SetOption = [],  # noqa: B006
    gpu: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="A100, H100, H200 or B200.  [default: [compute] gpu_type, or H200]"),
    ] = None,
    gpus: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="GPUs of a node.  [default: [compute] gpu_count]")
    ] = None,
    nodes: Annotated[int | None, typer.Option(min=1, metavar="N", help="Nodes.  [default: [compute] nodes]")] = None,
    data: Annotated[
        Path | None, typer.Option(metavar="DATA", help="Conversations (.jsonl): also give steps, hours and energy.")
    ] = None,
    imbalance: Annotated[
        float | None,
        typer.Option(min=1, metavar="X", help="Tokens of the busiest experts' rank over the mean.  [default: 1.5]"),
    ] = None,
    search: Annotated[
        bool,
        typer.Option(
            "--search",
            help="Rank all topologies, micro batches, recomputation, packing and 4-bit base by estimated speed.",
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.svg", help="Write a picture of the memory.")] = None,
) -> None:
    """Work out what a job will take, and the fastest topology.

    Reads the run file and the model's config.json, no weights. Memory is counted; times are estimates.
    """
    from megasft.plan import report
    from megasft.plan.advice import advice
    from megasft.plan.devices import IMBALANCE
    from megasft.plan.plan import find_shape, gpu_of, make_plan, read_dataset

    settings = load_config(config, set_)
    shape, kind = find_shape(settings.job.model), gpu_of(settings, gpu)
    per_node = gpus or settings.compute.gpu_count or settings.world_size() or 1
    ranks = per_node * (nodes or settings.compute.nodes)
    dataset = read_dataset(data) if data else None
    if search:
        from megasft.plan.search import search as search_all

        try:
            here = make_plan(settings, shape, ranks, kind, per_node, dataset, imbalance or IMBALANCE)
        except UserError:  # the run file's topology is of other GPUs
            here = None
        ranked = search_all(settings, shape, ranks, kind, per_node, dataset, None, imbalance or IMBALANCE)
        searched = f"{ranks} x {kind.name}"
        print(json.dumps([asdict(one) for one in ranked]) if as_json else report.search_text(ranked, searched, here))
        return
    found = make_plan(settings, shape, ranks, kind, per_node, dataset, imbalance or IMBALANCE)
    if plot:
        plot.write_text(report.as_svg({config.stem: found}), encoding="utf-8")
    lines = advice(settings, found)
    if as_json:
        print(json.dumps(report.as_json(found) | {"advice": lines}, indent=2))
    else:
        print("\n".join([report.as_text(found), *(f"advice: {line}" for line in lines)]))
