"""A plan: what a run file's job takes on so many GPUs of a kind."""

from dataclasses import dataclass, replace
from pathlib import Path

from megasft.config.schema import RunConfig
from megasft.messages import UserError
from megasft.model.hub import check_name, local_folder
from megasft.model.shape import PlainShape, Shape, check_fits, read_shape, released
from megasft.plan import parameters
from megasft.plan.devices import CONSTANTS, IMBALANCE, PER_NODE, Gpu, find_gpu
from megasft.plan.job import Job
from megasft.plan.memory import Memory, host_bytes, worst_rank
from megasft.plan.time import Time, estimate

CHARACTERS = 4.0  # bytes of a conversation file for each token, assumed
DEFAULT_GPU = "H200"


@dataclass(frozen=True)
class Dataset:
    """Conversations of a file or folder, and their tokens, worked out from its size."""

    conversations: int
    tokens: int

    def fills(self, job: Job, packing: bool) -> Job:
        """The job with mean micro batches: complete rows with packing, else conversations of mean length."""
        mean = min(job.length, max(1, self.tokens // self.conversations))
        if packing:
            return replace(job, length=mean)
        tokens = -(-job.samples * mean // job.sizes.tensor) * job.sizes.tensor
        return replace(job, tokens=tokens, supervised=job.samples * mean, length=mean)

    def steps(self, job: Job, packing: bool, epochs: int) -> int:
        """Optimizer steps; samples are conversations, or packed rows."""
        samples = -(-self.tokens // job.length) if packing else self.conversations
        return max(1, -(-samples * epochs // job.global_batch))


@dataclass(frozen=True)
class Plan:
    """A job on GPUs: memory of the rank that needs most, with balanced experts and with `imbalance`, for the longest
    micro batch; an estimate of its time, for mean ones. `steps` of the data set, if one was given.
    """

    job: Job
    gpu: Gpu
    per_node: int
    memory: Memory
    imbalance: float
    imbalanced: Memory
    time: Time
    dataset: Dataset | None = None
    steps: int | None = None

    @property
    def usable(self) -> int:
        """Bytes of a GPU that tensors can have."""
        return int(self.gpu.memory * (1 - CONSTANTS.reserve))

    @property
    def headroom(self) -> int:
        """Bytes left at the peak, with imbalanced experts; negative where it does not fit."""
        return self.usable - self.imbalanced.peak

    @property
    def fits(self) -> bool:
        """Whether the job fits."""
        return self.headroom >= 0

    @property
    def host(self) -> int:
        """Page-locked memory of a rank on the host."""
        return host_bytes(self.job)

    @property
    def parameters(self) -> dict[str, int]:
        """All parameters of the base, by kind of module."""
        return parameters.parameters(self.job.shape)

    @property
    def trained(self) -> dict[str, int]:
        """Those of the adapters."""
        return parameters.trained(self.job.shape, self.job.targets, self.job.r)

    @property
    def checkpoint(self) -> int:
        """Bytes of a checkpoint on disk: master weights, two moments, and an adapter in the model's precision."""
        return sum(self.trained.values()) * (12 + self.job.width)

    @property
    def hours(self) -> float | None:
        """Of the data set."""
        return None if self.steps is None else self.steps * self.time.seconds / 3600

    @property
    def kilowatt_hours(self) -> float | None:
        """Of the GPUs, for the data set."""
        return self.hours and self.hours * self.job.world * self.gpu.watts * CONSTANTS.power / 1000


def make_plan(
    config: RunConfig,
    shape: Shape,
    ranks: int,
    gpu: Gpu,
    per_node: int = PER_NODE,
    dataset: Dataset | None = None,
    imbalance: float = IMBALANCE,
) -> Plan:
    """The plan of a run file. Raises UserError where the topology does not fit the ranks or the model."""
    try:
        job = Job.of(config, shape, ranks)
    except ValueError as error:
        raise UserError(f"{ranks} GPUs, but [data.topology] {error}") from None
    check_fits(shape, job.sizes, job.quant)
    packing, epochs = config.data.packing, config.hyperparameters.n_epochs
    mean = dataset.fills(job, packing) if dataset else job
    steps = dataset.steps(job, packing, epochs) if dataset else None
    if steps and config.hyperparameters.max_steps:
        steps = min(steps, config.hyperparameters.max_steps)
    uneven = worst_rank(replace(job, imbalance=imbalance))
    return Plan(
        job, gpu, per_node, worst_rank(job), imbalance, uneven, estimate(mean, gpu, per_node), dataset, steps
    )  # fmt: skip


def find_shape(name: str) -> PlainShape:
    """The sizes of the run file's model: from its folder, the hub's cache, or the table of released models."""
    check_name(name)
    if (folder := local_folder(name)) and (folder / "config.json").is_file():
        return read_shape(folder)
    if (shape := released(name)) is not None:
        return shape
    raise UserError(
        f"[job] model = {name!r}: its config.json is not on this machine; set --set job.model=FOLDER to a folder that "
        "holds it"
    )


def gpu_of(config: RunConfig, named: str | None) -> Gpu:
    """The GPU that the command line or else the run file names."""
    if named:
        return find_gpu(named, "--gpu")
    return find_gpu(config.compute.gpu_type or DEFAULT_GPU, "[compute] gpu_type =")


def read_dataset(path: str | Path) -> Dataset:
    """Count the conversations of .jsonl files, and estimate their tokens from the size. Raises UserError."""
    found = Path(path)
    files = sorted(found.glob("*.jsonl")) if found.is_dir() else [found]
    if not files or not all(file.is_file() and file.suffix == ".jsonl" for file in files):
        raise UserError(f"--data {path}: name a .jsonl file, or a folder of them")
    lines = size = 0
    for file in files:
        with file.open("rb") as stream:
            for line in stream:
                lines += bool(line.strip())
                size += len(line)
    if not lines:
        raise UserError(f"--data {path}: holds no conversation")
    return Dataset(lines, round(size / CHARACTERS))
