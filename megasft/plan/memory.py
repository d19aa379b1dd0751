"""What a rank needs at most in a step: state, saved activations, and the worst moment's own tensors.

T: tokens of a micro batch, S: of a sequence shard; n: rows of the experts; H, F: hidden and expert width; b: bytes of
an activation. It follows what `lora.functional`, `model.mlp`, `model.attention` and `model.loss` save for backward;
`tests/cuda_path` compares with steps on fake CUDA tensors.
"""

from dataclasses import dataclass

from megasft.plan.job import Job
from megasft.plan.state import owned, state_bytes, trained

LOSS_CHUNK_BYTES, MIN_CHUNK, MAX_CHUNK = 256 * 2**20, 64, 4096  # of `model.loss`
NORMS_CHUNK = 2**24  # elements, of `train.adapter_norms`
COPY_BYTES = 16  # of each copy of a token: two 32-bit and a 64-bit number (`model.copies.Copies`)


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank. `state` stays between steps; of `moments`, the tensors of each that are there beside it."""

    state: dict[str, int]
    moments: dict[str, dict[str, int]]

    @property
    def between_steps(self) -> int:
        """Bytes that stay."""
        return sum(self.state.values())

    @property
    def worst(self) -> str:
        """The moment that needs most."""
        return max(self.moments, key=lambda name: sum(self.moments[name].values()))

    @property
    def activations(self) -> dict[str, int]:
        """What the worst moment needs beside the state."""
        return self.moments[self.worst]

    @property
    def peak(self) -> int:
        """Bytes at most."""
        return self.between_steps + sum(self.activations.values())


def memory(job: Job) -> Memory:
    """What the job's rank needs."""
    return Memory(state_bytes(job), _moments(job))


def worst_rank(job: Job) -> Memory:
    """What the rank needs that needs most: the first of a pipeline stage, whose share of the states is complete."""
    return max(map(memory, job.heaviest), key=lambda found: found.peak)


def host_bytes(job: Job) -> int:
    """Page-locked host memory for a checkpoint's copy of master weights and moments."""
    return 12 * sum(owned(job))


def _moments(job: Job) -> dict[str, dict[str, int]]:
    b, h, s = job.width, job.shape.hidden_size, job.tokens // job.sizes.tensor
    layer_input = b * s * h
    attention = _attention(job)
    of_kind = {sparse: (_experts if sparse else _dense)(job) for sparse in set(job.layers)}
    mlps = [of_kind[sparse] for sparse in job.layers]
    in_flight = min(job.sizes.pipeline - job.stage, job.micro_batches)
    saved, transient = max(mlps, key=sum)
    if job.recompute:
        stays, worst = layer_input, attention + saved
        if job.recompute == "selective":  # the input of the MLP too
            stays, worst = 2 * layer_input + attention, saved
        kept, last, one = len(job.layers) * stays, 0, "recomputed layer"
        waiting = (in_flight - 1) * kept
        # A layer's dispatcher keeps the numbers of its copies of tokens until its next forward.
        kept += sum(job.layers) * job.rows * COPY_BYTES
    else:
        kept = sum(layer_input + attention + saved for saved, _ in mlps)
        worst, one = layer_input + attention + saved, "last layer"
        last, waiting = layer_input + attention + mlps[-1][0], (in_flight - 1) * kept
    residual = {"residual and its gradient": 2 * layer_input}
    moments = {
        "backward of a layer": {
            "saved activations": waiting + kept - last, one: worst, "products in flight": transient, **residual,
        },
        "sums of gradients": {"flattened gradients": _flattened(job)},
        "optimizer": {"Adam's temporaries": _adam(job)},
        "norms of a logged step": {"updates of adapters": _updates(job)},
    }  # fmt: skip
    if job.is_last:
        moments["loss head"] = {"saved activations": waiting + kept, **_head(job)}
    return moments


def _attention(job: Job) -> int:
    """Saved by attention and its norms, without the layer's input."""
    b, t, h, q, kv, d = job.width, job.tokens, job.shape.hidden_size, job.queries, job.keys, job.head_dim
    shard = t // job.sizes.tensor
    adapted = len(job.targets & {"q_proj", "k_proj", "v_proj"}), len(job.targets & {"o_proj"})
    found = b * t * h  # the gathered input of q, k, v
    found += b * t * (q + 2 * kv) + b * t * (q + 2 * kv) + b * t * q  # their product; normed and rotated; the result
    found += 4 * t * q // d  # softmax's sums
    found += b * t * job.r * sum(adapted)
    return found + b * shard * h + 2 * 4 * shard  # the input of the norm after it


def _experts(job: Job) -> tuple[int, int]:
    """(saved by router and experts, tensors in flight at the worst point of the backward)."""
    b, h, f, n, shape = job.width, job.shape.hidden_size, job.expert_width, job.rows, job.shape
    shard = job.tokens // job.sizes.tensor
    adapted = len(job.targets & {"gate_proj", "up_proj"}), len(job.targets & {"down_proj"})
    gate, k = "gate" in job.targets, shape.num_experts_per_tok
    saved = 4 * (shape.num_experts + shard) * h * gate  # the router's weight and input in fp32
    saved += shard * (4 * shape.num_experts + 8 * k) + 8 * k * job.tokens  # logits, weights and choices, all gathered
    saved += n * (COPY_BYTES * (not job.recompute) + 4)  # routing weights
    saved += b * n * (h + 2 * f) + b * n * job.padded_r * adapted[0]
    down = b * n * f + b * n * job.padded_r * adapted[1]
    of_rows = b * n * h + b * n * (2 * f + job.padded_r * adapted[0])  # gradients of the rows and of gate and up
    of_down = down + b * n * (h + f)  # what `down` saves, and gradients of its output and input
    return saved, max(of_rows, of_down)


def _dense(job: Job) -> tuple[int, int]:
    b, t, h, f = job.width, job.tokens, job.shape.hidden_size, job.dense_width
    saved = b * t * (h + 2 * f + f + job.r * len(job.targets & {"gate_proj", "up_proj", "down_proj"}))
    return saved, b * t * (2 * f + h * (2 + job.dropout))


def _flattened(job: Job) -> int:
    """A copy of the gradients that tensor or expert-tensor ranks add up."""
    (whole, _), (whole_experts, _) = trained(job)
    return 4 * max(whole * (job.sizes.tensor > 1), whole_experts * (job.sizes.expert_tensor > 1))


def _adam(job: Job) -> int:
    """torch's Adam; that of Transformer Engine needs none."""
    return 4 * max(owned(job))


def _updates(job: Job) -> int:
    """The updates whose norms a line of metrics has, a chunk at a time; a chunk may end with a large matrix."""
    return 4 * (2 + job.decay) * min(sum(owned(job)), 2 * NORMS_CHUNK)


def loss_chunk(job: Job) -> int:
    """Positions whose logits exist together."""
    rows = -(-job.shape.vocab_size // job.sizes.tensor)
    return min(job.supervised, MAX_CHUNK, max(MIN_CHUNK, LOSS_CHUNK_BYTES // (4 * rows)))


def _head(job: Job) -> dict[str, int]:
    b, t, h = job.width, job.tokens, job.shape.hidden_size
    rows, chunk = -(-job.shape.vocab_size // job.sizes.tensor), loss_chunk(job)
    several = job.supervised > chunk  # then the gradient of the chunk before is still there
    logits = chunk * rows * (4 + 4 * several + (b if b < 4 else 0))
    shard = t // job.sizes.tensor
    hidden = b * h * (shard + shard + (t if t > shard else 0) + chunk + job.supervised)
    return {"logits of a chunk": logits, "hidden states and their gradient": hidden}
