"""A plan: what a run file's job takes on so many GPUs of a kind."""

from dataclasses import dataclass, replace
from pathlib import Path

from megasft.config.schema import RunConfig
from megasft.messages import UserError
from megasft.model.hub import check_name, local_folder
from megasft.model.shape import PlainShape, Shape, check_fits, read_shape, released
from megasft.plan.devices import CONSTANTS, IMBALANCE, PER_NODE, Gpu, find_gpu
from megasft.plan.job import Job
from megasft.plan.memory import Memory, host_bytes, worst_rank
from megasft.plan.state import adapters, elements
from megasft.plan.time import Time, estimate

CHARACTERS = 4.0  # bytes of a conversation file for each token, assumed
DEFAULT_GPU = "H200"


@dataclass(frozen=True)
class Dataset:
    """Conversations of a file or folder, and their tokens, worked out from its size."""

    conversations: int
    tokens: int


@dataclass(frozen=True)
class Plan:
    """A job on GPUs: memory of the rank that needs most, with balanced experts and with an imbalance; an estimate of its
    time.
    """

    job: Job
    gpu: Gpu
    per_node: int
    memory: Memory
    imbalanced: Memory
    time: Time
    dataset: Dataset | None = None
    epochs: int = 1

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
    def trained(self) -> int:
        """Adapter parameters of the whole model."""
        whole = replace(
            self.job, sizes=replace(self.job.sizes, tensor=1, pipeline=1, data=1, expert=1, expert_tensor=1)
        )
        dense, experts = map(elements, adapters(whole))
        return sum(dense) + sum(experts) * self.job.r // self.job.padded_r

    @property
    def checkpoint(self) -> int:
        """Bytes of a checkpoint on disk: master weights, two moments, and an adapter in the model's precision."""
        return self.trained * (12 + self.job.width)

    @property
    def steps(self) -> int | None:
        """Optimizer steps of all epochs of the data set; samples are conversations, or packed rows."""
        if self.dataset is None:
            return None
        batch = self.job.sizes.data * self.job.micro_batches * self.job.tokens // max(1, self.job.longest)
        return max(1, -(-self.dataset.conversations * self.epochs // max(1, batch)))


def make_plan(
    config: RunConfig, shape: Shape, ranks: int, gpu: Gpu, per_node: int = PER_NODE, dataset: Dataset | None = None
) -> Plan:
    """The plan of a run file. Raises UserError where the topology does not fit the ranks or the model."""
    try:
        job = Job.of(config, shape, ranks)
    except ValueError as error:
        raise UserError(f"{ranks} GPUs, but [data.topology] {error}") from None
    check_fits(shape, job.sizes, job.quant)
    if dataset is not None:
        job, dataset = _filled(job, dataset, config.data.packing)
    uneven = replace(job, imbalance=IMBALANCE)
    return Plan(
        job, gpu, per_node, worst_rank(job), worst_rank(uneven), estimate(job, gpu, per_node), dataset,
        config.hyperparameters.n_epochs,
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
    return find_gpu(named or config.compute.gpu_type or DEFAULT_GPU)


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


def _filled(job: Job, dataset: Dataset, packing: bool) -> tuple[Job, Dataset]:
    """The job with micro batches as long as the data fill them: complete rows with packing, else mean conversations."""
    samples = job.tokens // max(1, job.longest)
    if packing:
        rows = -(-dataset.tokens // job.longest)
        return job, replace(dataset, conversations=rows)
    mean = min(job.longest, max(1, dataset.tokens // dataset.conversations))
    tokens = -(-samples * mean // job.sizes.tensor) * job.sizes.tensor
    return replace(job, tokens=tokens, supervised=samples * mean, longest=mean), dataset
