"""Bytes that stay on a rank between two steps, from the sizes alone; exact."""

from functools import lru_cache
from math import lcm

from megasft.plan.job import Job

GROUP = 256  # scales that share one second-level scale (`quant.kernels`)
ALIGNED = 64  # elements: megatron-core starts each matrix of a buffer at a multiple of this


def frozen_bytes(job: Job) -> tuple[int, int]:
    """(bytes in 16 or 32 bits, bytes in 4 bits) of what is not trained.

    Norms, routers, embedding and head stay as they are; linear layers and experts are quantized with `job.quant`.
    """
    shape, h, d = job.shape, job.shape.hidden_size, job.head_dim
    vocabulary = -(-shape.vocab_size // job.sizes.tensor) * h
    tied_here = shape.tie_word_embeddings and job.is_first
    kept = vocabulary * job.is_first + (vocabulary * (not tied_here) + h) * job.is_last
    kept += sum(2 * h + 2 * d + sparse * shape.num_experts * h for sparse in job.layers)
    linear = [matrix for sparse in job.layers for matrix in linears(job, sparse)]
    if job.quant is None:
        return job.width * (kept + sum(times * rows * here for times, rows, _, here in linear)), 0
    return job.width * kept, sum(times * _four_bits(job, rows, full, here) for times, rows, full, here in linear)


def linears(job: Job, sparse: bool) -> list[tuple[int, int, int, int]]:
    """The frozen linear layers of a layer: (how often, rows here, inputs of the full matrix, inputs here)."""
    h, q = job.shape.hidden_size, job.shape.num_attention_heads * job.head_dim
    full, here, times = job.shape.intermediate_size, job.dense_width, 1
    if sparse:
        full, here, times = job.shape.moe_intermediate_size, job.expert_width, job.experts
    attention = [(1, job.queries, h, h), (2, job.keys, h, h), (1, h, q, job.queries)]
    return [*attention, (2 * times, here, h, h), (times, h, full, here)]


def _four_bits(job: Job, rows: int, inputs: int, here: int) -> int:
    """Codes and scales; with double quantization 8-bit scales, and in fp32 the groups of the scales of full rows and
    their mean.
    """
    assert job.quant is not None
    size = job.quant.block_size
    if not job.quant.double:
        return rows * here // 2 + 4 * (rows * here // size)
    return rows * here // 2 + rows * here // size + 4 * -(-rows * (inputs // size) // GROUP) + 4


def workspace_bytes(job: Job) -> int:
    """The buffer that 4-bit weights are dequantized into: the largest fused matrix, of all experts at once."""
    if job.quant is None:
        return 0
    largest = [0]
    for sparse in job.layers:
        h, width = job.shape.hidden_size, job.expert_width if sparse else job.dense_width
        largest += [(job.queries + 2 * job.keys) * h, job.queries * h]
        for one in (2 * width * h, h * width):
            most = min(job.quant.experts_at_once or 2**31, max(1, (2**31 - 1) // one))
            largest.append(one * (min(job.experts, most) if sparse else 1))
    return job.width * max(largest)


# --- adapters ---------------------------------------------------------------------------------------------------------

Matrix = tuple[int, bool]  # elements here, and whether all tensor-parallel (or expert-tensor) ranks hold the same


def adapters(job: Job) -> tuple[list[Matrix], list[Matrix]]:
    """This rank's adapter matrices outside the experts, and those of the experts, in the order of the model."""
    return _adapters(job.layout)


@lru_cache(1024)
def _adapters(job: Job) -> tuple[list[Matrix], list[Matrix]]:
    dense: list[Matrix] = []
    experts: list[Matrix] = []
    h, r = job.shape.hidden_size, job.r
    for sparse in job.layers:
        dense += _column(job, h, {"q_proj": job.queries, "k_proj": job.keys, "v_proj": job.keys}, r)
        dense += _row(job, job.queries, "o_proj", h, r)
        if sparse:
            if "gate" in job.targets:
                dense += [(r * h, True), (job.shape.num_experts * r, True)]
            f, e, wide = job.expert_width, job.experts, job.padded_r
            stacked = _column(job, h, {"gate_proj": f, "up_proj": f}, wide) + _row(job, f, "down_proj", h, wide)
            experts += [(e * elements, same) for elements, same in stacked]
        else:
            f = job.dense_width
            dense += _column(job, h, {"gate_proj": f, "up_proj": f}, r) + _row(job, f, "down_proj", h, r)
    return dense, experts


def _column(job: Job, inputs: int, parts: dict[str, int], r: int) -> list[Matrix]:
    adapted = [width for name, width in parts.items() if name in job.targets]
    return [(r * len(adapted) * inputs, True), *((width * r, False) for width in adapted)] if adapted else []


def _row(job: Job, inputs: int, name: str, outputs: int, r: int) -> list[Matrix]:
    return [(r * inputs, False), (outputs * r, True)] if name in job.targets else []


def elements(matrices: list[Matrix]) -> list[int]:
    """Elements of each matrix."""
    return [size for size, _ in matrices]


def buffer_elements(matrices: list[int], ranks: int) -> int:
    """Elements of megatron-core's buffer: matrices start at multiples of 64, it ends at one of lcm(ranks, 128)."""
    end = 0
    for size in matrices:
        end = -(-end // ALIGNED) * ALIGNED + size
    multiple = lcm(ranks, 128)
    return -(-end // multiple) * multiple


def owned_elements(matrices: list[int], ranks: int, rank: int) -> int:
    """Elements whose optimizer states rank `rank` of `ranks` keeps: those of its share of the buffer, without padding.

    megatron-core lays the parameters out from the last to the first.
    """
    share = buffer_elements(matrices, ranks) // ranks
    first, last = share * rank, share * (rank + 1)
    end = found = 0
    for size in reversed(matrices):
        start = -(-end // ALIGNED) * ALIGNED
        end = start + size
        found += max(0, min(end, last) - max(start, first))
    return found


def trained(job: Job) -> tuple[tuple[int, int], tuple[int, int]]:
    """(elements that all tensor-parallel ranks hold alike, elements of the buffer), outside the experts and in them."""
    return _trained(job.layout)


@lru_cache(1024)
def _trained(job: Job) -> tuple[tuple[int, int], tuple[int, int]]:
    dense, experts = adapters(job)
    return (
        (sum(size for size, same in dense if same), buffer_elements(elements(dense), job.sizes.data)),
        (sum(size for size, same in experts if same), buffer_elements(elements(experts), job.expert_data)),
    )


def owned(job: Job) -> tuple[int, int]:
    """Elements whose optimizer states this rank keeps, outside the experts and in them."""
    return _owned(job.layout)


@lru_cache(1024)
def _owned(job: Job) -> tuple[int, int]:
    dense, experts = (elements(matrices) for matrices in adapters(job))
    return (
        owned_elements(dense, job.sizes.data, job.data_rank),
        owned_elements(experts, job.expert_data, job.expert_data_rank),
    )


def state_bytes(job: Job) -> dict[str, int]:
    """Bytes on this rank between steps, by kind. In fp32 the weights are the master weights."""
    return dict(_state_bytes(job.layout))


@lru_cache(1024)
def _state_bytes(job: Job) -> dict[str, int]:
    padded = sum(size for _, size in trained(job))
    frozen, four_bits = frozen_bytes(job)
    return {
        "frozen weights": frozen,
        "4-bit weights": four_bits,
        "dequantization workspace": workspace_bytes(job),
        "adapters": job.width * padded,
        "gradients": 4 * padded,
        "optimizer states": (12 if job.width == 2 else 8) * sum(owned(job)),
    }
