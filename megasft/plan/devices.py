"""GPUs, and the constants of the roofline: the same for all of them. Every time that a plan gives comes from these."""

from dataclasses import dataclass

from megasft.messages import UserError


@dataclass(frozen=True)
class Gpu:
    """A GPU by its data sheet.

    memory: bytes. flops: dense bf16, per second. hbm: bytes per second. link, network: bytes per second and direction,
    to the GPUs of the node and to other nodes. watts: its limit.
    """

    name: str
    memory: float
    flops: float
    hbm: float
    link: float
    network: float
    watts: float


# Dense bf16 products with fp32 accumulation, FLOP/s, without sparsity: NVIDIA's data sheets. The words of a GPU's name
# contain those of one of these; the first that fits counts.
PEAKS = {
    "B200": 2250e12,
    "GH200": 989e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H800": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "A40": 149.7e12,
    "A10G": 70e12,
    "A10": 125e12,
    "L4": 121e12,
}

# NVIDIA's data sheets; NVLink is given as the sum of both directions there.
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("A100", 80e9, PEAKS["A100"], 2.039e12, 300e9, 25e9, 400),
        Gpu("H100", 80e9, PEAKS["H100"], 3.35e12, 450e9, 50e9, 700),
        Gpu("H200", 141e9, PEAKS["H200"], 4.8e12, 450e9, 50e9, 700),
        Gpu("B200", 180e9, PEAKS["B200"], 8.0e12, 900e9, 50e9, 1000),
    )
}
PER_NODE = 8  # GPUs, where the run file does not say


@dataclass(frozen=True)
class Constants:
    """Shares of the data sheet's rates that a step reaches. Assumed, not measured; `megasft plan` prints them."""

    dense: float = 0.55  # of FLOP/s, in products of thousands of rows
    grouped: float = 0.35  # of FLOP/s, in the experts' grouped products
    attention: float = 0.45  # of FLOP/s, in flash attention, backward included
    half_rows: int = 96  # rows of a product (of an expert, on average) at which half of its rate is reached
    memory: float = 0.75  # of HBM bandwidth, in kernels that move data
    links: float = 0.70  # of a link's bandwidth, in collectives
    latency: float = 20e-6  # seconds of each collective
    launch: float = 4e-6  # seconds of each kernel at least, which the host needs to launch it
    reserve: float = 0.06  # of memory: CUDA context, NCCL's buffers, what the allocator cannot use
    power: float = 0.8  # of the limit, while training


CONSTANTS = Constants()
IMBALANCE = 1.5  # rows of the busiest expert-parallel rank over the mean: a bad case, assumed


def find_gpu(name: str, asked: str = "--gpu") -> Gpu:
    """The GPU whose model `name` mentions, as "NVIDIA H200 NVL". Raises UserError that begins with `asked`."""
    words = name.upper().replace("-", " ").replace("_", " ").split()
    for model, gpu in GPUS.items():
        if any(model in word for word in words):
            return gpu
    raise UserError(f"{asked} {name}: its data sheet is not in the plan; --gpu takes {', '.join(GPUS)}")
