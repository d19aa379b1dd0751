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

    The experts use grouped GEMMs (`experts_implementation="grouped_mm"`). In bf16, the base is bf16 and the adapter
    fp32 under autocast, as in transformers' Trainer.
    """

    name = "transformers + peft"

    def __init__(self, model: Path, adapter: Path, trainer: Trainer) -> None:
        self.samples, hyper = trainer.train, trainer.config.hyperparameters
        dtype = trainer.model.config.params_dtype
        base = Qwen3MoeForCausalLM.from_pretrained(
            model, dtype=dtype, experts_implementation="grouped_mm", local_files_only=True
        )
        base.config.use_cache = False
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

    def step(self, numbers: Sequence[int]) -> Step:
        """Run one optimizer step on the samples `numbers`, which must have the same length.

        It zeroes the gradients between the blocks of fused adapters, because otherwise this side would train another
        model than megasft does. The times exclude that.
        """
        ids = torch.stack([self.samples[n][0] for n in numbers]).long().to(host.device())
        mask = torch.stack([self.samples[n][1] for n in numbers]).to(host.device())
        targets = torch.where(mask[:, 1:], ids[:, 1:], -100)
        host.synchronize()
        started, cpu = time.perf_counter(), time.process_time()
        self.optimizer.zero_grad()
        with torch.autocast(ids.device.type, torch.bfloat16) if self.autocast else contextlib.nullcontext():
            loss = self.model(input_ids=ids[:, :-1], labels=targets, shift_labels=targets).loss
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
