"""What a rank's training step sends, counted, beside the formulas of `megasft.plan.traffic`."""

from collections import Counter
from typing import Any

from megasft.plan.job import Job
from megasft.plan.state import state_bytes
from megasft.plan.traffic import StepTraffic
from megasft.train.trainer import Trainer
from tests.support import on_ranks
from tests.support.state import held
from tests.support.traffic import Traffic


def measured_and_expected(
    settings: dict[str, Any], samples: list[on_ranks.Sample]
) -> tuple[tuple[Counter, Counter], tuple[Counter, Counter]]:
    """On a rank: ((calls, bytes) of its second step, the same by formula). What it holds afterwards is what the plan
    says, to the byte.
    """
    config, topology, model = on_ranks.start(settings)
    trainer = Trainer(config, topology, model, on_ranks.as_samples(samples))
    trainer.train_step()
    compute, seen = trainer._compute, []

    def spied(batches, training):
        seen.extend((len(batch.tokens), len(batch.supervised)) for batch in batches)
        return compute(batches, training)

    trainer._compute = spied
    with Traffic() as traffic:
        trainer.train_step()
    job = Job.of(config, model.hf_config, topology.world).of_rank(topology.rank)
    has, says = held(model, trainer), state_bytes(job)
    assert has == says, f"{has}, {says}"
    formulas = StepTraffic(job).of(seen)
    return (traffic.calls, traffic.bytes), (formulas.calls, formulas.bytes)
