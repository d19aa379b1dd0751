"""One rank of `megasft evaluate`."""

import json
import os

from megasft.adapters.adapter_file import AdapterFile
from megasft.distributed.topology import join_world
from megasft.evaluation.evaluate import measure, prepare
from megasft.evaluation.report import as_json, print_table, write_lines
from megasft.evaluation.request import EvaluationRequest
from megasft.job import load_model
from megasft.messages import say_once
from megasft.model.hf_config import DTYPES, read_config
from megasft.model.hub import find_model

TIMEOUT_MINUTES = 24 * 60.0  # the other ranks wait in a collective while rank 0 reads the conversations


def run(request: EvaluationRequest) -> None:
    """Evaluate; every rank calls it. Rank 0 reads the conversations and prints the results."""
    asked, config = request.model, request.config
    topology = join_world(request.sizes(int(os.environ.get("WORLD_SIZE", 1))), 0, TIMEOUT_MINUTES)
    with topology.together():
        if topology.is_first:
            request.check(topology.sizes)
        lora = None if asked.adapter is None else AdapterFile(asked.adapter).settings()
    dtype = asked.precision(read_config(find_model(asked.model)))
    # Conversations before weights: a bad line is found in seconds.
    task = prepare(config, topology, request.data, request.generate, request.max_new_tokens)
    model = load_model(asked.model, topology, DTYPES[dtype], lora, asked.adapter, quant=asked.quant, recompute=False)
    evaluation = measure(config, model, task, say_once)
    with topology.together():
        if topology.is_first:
            if request.output is not None:
                write_lines(evaluation, request.output)
            if request.as_json:
                print(json.dumps(as_json(evaluation), indent=2))
            else:
                print_table(evaluation)
