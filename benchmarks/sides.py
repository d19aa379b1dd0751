"""The two timed sides: megasft's Trainer, and the same training step with transformers and peft."""

import contextlib
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
from megatron.core.optimizer import MegatronOptimizer
from peft import PeftModel
from peft.tuners.lora.layer import ParamWrapper
from steps import Step
from torch import Tensor, nn
from transformers import Qwen3MoeForCausalLM

from megasft import host
from megasft.train import trainer as training
from megasft.train.optimizer import optimizer_state_bytes
from megasft.train.trainer import Trainer

# transformers' implementations of experts; sonicmoe and deepgemm are kernels for GPUs that it downloads.
EXPERTS = ("grouped_mm", "eager", "batched_mm")
GATHERED_LIMIT = 4 * 2**30  # bytes of weights that batched_mm may copy


class Ours:
    """megasft's Trainer, with separate times of its optimizer step."""

    name = "megasft"

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self._optimize = training.step
        training.step = self._timed

    def _timed(self, optimizer: MegatronOptimizer) -> tuple[float, bool]:
        host.synchronize()
        started = time.perf_counter()
        outcome = self._optimize(optimizer)
        host.synchronize()
        self._optimizer_seconds = time.perf_counter() - started
        return outcome

    def step(self, numbers: Sequence[int]) -> Step:
        """Run the Trainer's next step, which must be on the samples `numbers`."""
        assert list(numbers) == list(self.trainer.batches[self.trainer.step])
        started, cpu = time.perf_counter(), time.process_time()
        record = self.trainer.train_step()
        cpu, ended = time.process_time() - cpu, time.perf_counter()
        return Step(record["loss"], record["grad_norm"], ended - started, self._optimizer_seconds, cpu)

    def kept_bytes(self) -> int:
        """Bytes that stay between steps on this rank: weights, gradient buffers and optimizer states."""
        model, ddp = self.trainer.model, self.trainer.ddp
        kept = [*model.parameters(), *model.buffers()]
        kept += [buffer.grad_data for buffer in ddp.buffers + ddp.expert_parallel_buffers]
        return _bytes(kept) + optimizer_state_bytes(self.trainer.optimizer)


class Peer:
    """Trains the adapter of a peft model on the same samples.

    `experts` is transformers' `experts_implementation`; "best" takes the fastest of EXPERTS that runs here. peft folds
    an expert's factors into its weight, for all experts of a layer, before each forward. In bf16, the base is bf16 and
    the adapter fp32 under autocast, as in transformers' Trainer.
    """

    def __init__(self, model: Path, adapter: Path, trainer: Trainer, experts: str) -> None:
        self.samples, hyper = trainer.train, trainer.config.hyperparameters
        dtype = trainer.model.config.params_dtype
        base = Qwen3MoeForCausalLM.from_pretrained(
            model, dtype=dtype, experts_implementation=EXPERTS[0] if experts == "best" else experts,
            local_files_only=True,
        )  # fmt: skip
        base.config.use_cache = False
        self.base = base
        if hyper.parallelism.activation_checkpointing:
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        with warnings.catch_warnings():
            # peft warns about every Qwen3-MoE adapter, because its pattern for experts names parameters, not modules.
            warnings.filterwarnings("ignore", message=".*_pattern keys did not match any targeted module")
            self.model = PeftModel.from_pretrained(base, str(adapter), is_trainable=True)
        self.model.to(host.device()).train()
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.trained,
            lr=hyper.learning_rate,
            betas=(hyper.adam_beta1, hyper.adam_beta2),
            eps=hyper.adam_eps,
            weight_decay=hyper.weight_decay,
            fused=True,
        )
        self.max_grad_norm = hyper.max_grad_norm
        self.autocast = dtype == torch.bfloat16
        self.fused = [
            (cast(nn.Linear, module.lora_B["default"]).weight, module.num_experts)
            for module in self.model.modules()
            if isinstance(module, ParamWrapper) and module.parameter_name == "gate_up_proj"
        ]
        assert self.fused, "this version of peft wraps the experts differently"
        assert not any(block.any() for B, experts in self.fused for block in between_blocks(B, experts))
        self.tried: dict[str, str] = {}  # what `best` found: seconds, or why it does not run
        if experts == "best":
            experts = self._fastest()
            base.set_experts_implementation(experts)
        self.name = f"transformers + peft, {experts}"

    def _fastest(self) -> str:
        """The fastest of EXPERTS by the CPU time of a forward and backward, the second of two."""
        found: dict[str, float] = {}
        ids, targets = self._batch([0])
        for experts in EXPERTS:
            try:
                if experts == "batched_mm":
                    self._refuse_gathered_weights(ids.numel())
                self.base.set_experts_implementation(experts)
                for _ in range(2):
                    started = time.process_time()
                    self._loss(ids, targets).backward()
                    host.synchronize()
                    found[experts] = time.process_time() - started
                self.tried[experts] = f"{found[experts] * 1e3:,.0f} ms"
            except (ImportError, RuntimeError, ValueError, NotImplementedError, AssertionError) as error:
                found.pop(experts, None)
                self.tried[experts] = str(error).partition("\n")[0]
            self.optimizer.zero_grad()
        return min(found, key=found.__getitem__)

    def _refuse_gathered_weights(self, tokens: int) -> None:
        """batched_mm copies the weights of each token's experts."""
        config = self.base.config
        weights = 3 * config.hidden_size * config.moe_intermediate_size
        size = tokens * config.num_experts_per_tok * weights * self.base.dtype.itemsize
        if size > GATHERED_LIMIT:
            raise ValueError(f"would copy {size / 2**30:.0f} GiB of weights a layer")

    def _batch(self, numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Input ids and targets [conversations, length]."""
        ids = torch.stack([self.samples[n][0] for n in numbers]).long().to(host.device())
        mask = torch.stack([self.samples[n][1] for n in numbers]).to(host.device())
        return ids[:, :-1], torch.where(mask[:, 1:], ids[:, 1:], -100)

    def _loss(self, ids: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast(ids.device.type, torch.bfloat16) if self.autocast else contextlib.nullcontext():
            return self.model(input_ids=ids, labels=targets, shift_labels=targets).loss

    def step(self, numbers: Sequence[int]) -> Step:
        """Run one optimizer step on the samples `numbers`, which must have the same length.

        It zeroes the gradients between the blocks of fused adapters, because otherwise this side would train another
        model than megasft does. The times exclude that.
        """
        ids, targets = self._batch(numbers)
        host.synchronize()
        started, cpu = time.perf_counter(), time.process_time()
        self.optimizer.zero_grad()
        loss = self._loss(ids, targets)
        loss.backward()
        host.synchronize()
        paused, cpu_paused = time.perf_counter(), time.process_time()
        for B, experts in self.fused:
            assert B.grad is not None
            for block in between_blocks(B.grad, experts):
                block.zero_()
        host.synchronize()
        resumed, cpu_resumed = time.perf_counter(), time.process_time()
        norm = torch.nn.utils.clip_grad_norm_(self.trained, self.max_grad_norm)
        self.optimizer.step()
        host.synchronize()
        ended, cpu_ended = time.perf_counter(), time.process_time()
        return Step(
            loss.item(),
            norm.item(),
            ended - resumed + paused - started,
            ended - resumed,
            cpu_ended - cpu_resumed + cpu_paused - cpu,
        )

    def kept_bytes(self) -> int:
        """Bytes that stay between steps: weights, gradients and Adam's moments."""
        kept = [*self.model.parameters(), *self.model.buffers()]
        kept += [parameter.grad for parameter in self.trained if parameter.grad is not None]
        for state in self.optimizer.state.values():
            kept += [value for value in state.values() if isinstance(value, Tensor)]
        return _bytes(kept)


def between_blocks(B: Tensor, experts: int) -> list[Tensor]:
    """The zero blocks of a fused B, outside the adapters of gate and up, which peft would train too.

    B [2F, 2 r experts], with columns ordered by rank, then by expert.
    """
    wide = B.detach().unflatten(1, (-1, experts))
    f, r = wide.shape[0] // 2, wide.shape[1] // 2
    return [wide[:f, r:], wide[f:, :r]]


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
