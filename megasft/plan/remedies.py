"""A job that does not fit the memory of its GPUs is refused, with the settings that fit and cost least speed."""

from dataclasses import replace

from megasft.config.schema import RunConfig
from megasft.messages import UserError
from megasft.model.shape import Shape
from megasft.plan.devices import GPUS, IMBALANCE, Gpu, find_gpu
from megasft.plan.job import Job
from megasft.plan.memory import worst_rank
from megasft.plan.plan import DEFAULT_GPU
from megasft.plan.search import Candidate, search

GiB = 2**30


def refuse_too_large(config: RunConfig, shape: Shape, ranks: int, name: str, usable: int, per_node: int) -> None:
    """Raise UserError if the plan needs more than `usable` bytes of a GPU `name`, unless `[compute] ignore_plan`."""
    if config.compute.ignore_plan:
        return
    job = replace(Job.of(config, shape, ranks), imbalance=IMBALANCE)
    peak = worst_rank(job).peak
    if peak <= usable:
        return
    found = remedies(config, shape, job, name, usable, per_node)
    words = f"add {'; or '.join(found)}" if found else "nothing else fits so many of them; use more, or larger ones"
    raise UserError(
        f"the plan of this job needs {peak / GiB:.1f} GiB of a GPU ({name}), of which {usable / GiB:.1f} GiB are free: "
        f"{words}; --set compute.ignore_plan=true launches it all the same"
    )


def remedies(
    config: RunConfig, shape: Shape, job: Job, name: str, usable: int, per_node: int, count: int = 3
) -> list[str]:
    """`--set` options that make the job fit: of those that change the fewest settings the fastest, one of a kind."""
    ranked = search(config, shape, job.world, known_gpu(name), per_node, None, usable)
    fitting = [(one, options(one, job)) for one in ranked if not one.reason]
    found: dict[frozenset[str], str] = {}
    for _, changed in sorted(fitting, key=lambda pair: len(pair[1])):  # stable: the fastest first
        if len(found) < count:
            found.setdefault(frozenset(changed), " ".join(f"--set {key}={value}" for key, value in changed.items()))
    return list(found.values())


def options(one: Candidate, job: Job) -> dict[str, str]:
    """The settings in which a candidate differs from a job, as `--set` takes them."""
    own = Candidate(job.sizes, job.samples, job.recompute, job.quant is not None, one.packing, job.micro_batches)
    return {
        f"{section}.{key}": str(value).lower()
        for section, keys in one.settings().items()
        for key, value in keys.items()
        if own.settings()[section][key] != value
    }


def known_gpu(name: str) -> Gpu:
    """Its data sheet, or where the plan has none, that of the default: speeds are compared with each other only."""
    try:
        return find_gpu(name)
    except UserError:
        return GPUS[DEFAULT_GPU]
