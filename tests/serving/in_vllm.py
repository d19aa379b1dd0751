"""Answers of vLLM on CPUs. Runs in .venv-serving: reads a job from standard input, writes its answers to a file.

vLLM's CPU build has no kernel for experts with LoRA, and its Triton kernel for them needs a GPU. `experts` stands in for
that kernel alone: loading, LoRA layers, routing, attention, sampling and everything else are vLLM's.
"""

import json
import os
import sys
from typing import Any

os.environ |= {
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the stand-in is for this process
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}

import torch
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest
from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts


def experts(self, output, hidden_states, w1, w2, topk_weights, topk_ids, *_: Any, **__: Any) -> None:
    """What `TritonExperts.apply` computes in `output` [T, H], from w1 [E, 2 F, H] and w2 [E, H, F], in plain torch."""
    lora = self._lora_context
    slots = (
        lora.punica_wrapper.token_lora_indices[: len(hidden_states)] if lora else torch.full_like(topk_ids[:, 0], -1)
    )
    total = torch.zeros_like(output)
    for slot in slots.unique().tolist():
        for e in topk_ids.unique().tolist():
            tokens, place = torch.nonzero((topk_ids == e) & (slots == slot)[:, None], as_tuple=True)
            x = hidden_states[tokens]
            gate_up = x @ w1[e].T
            if slot >= 0:
                pairs = zip(lora.w13_lora_a_stacked, lora.w13_lora_b_stacked, strict=True)
                gate_up = gate_up + torch.cat([x @ A[slot, e].T @ B[slot, e].T for A, B in pairs], dim=-1)
            gate, up = gate_up.chunk(2, dim=-1)
            inner = torch.nn.functional.silu(gate) * up
            y = inner @ w2[e].T
            if slot >= 0:
                y = y + inner @ lora.w2_lora_a_stacked[0][slot, e].T @ lora.w2_lora_b_stacked[0][slot, e].T
            total.index_add_(0, tokens, y * topk_weights[tokens, place, None])
    output.copy_(total)


def route_with_lora(model: torch.nn.Module) -> int:
    """Let the experts' runner call the router that carries LoRA, where vLLM leaves it the plain one."""
    blocks = [module for module in model.modules() if hasattr(module, "experts") and hasattr(module, "gate")]
    for block in blocks:
        block.experts.base_layer.gate = block.gate
    return len(blocks)


def main() -> None:
    """Answer every prompt of the job with every adapter of it, greedily."""
    job = json.load(sys.stdin)
    lora = {"enable_lora": True, "max_lora_rank": 16, "max_loras": len(job["adapters"])} if job["lora"] else {}
    if job["lora"]:
        TritonExperts.apply = experts
    llm = LLM(
        job["model"], skip_tokenizer_init=True, dtype="float32", enforce_eager=True, max_model_len=128, max_num_seqs=8,
        max_logprobs=job["top"], seed=0, **lora,
    )  # fmt: skip
    if job["route_with_lora"]:
        assert all(llm.apply_model(route_with_lora))
    greedy = SamplingParams(
        temperature=0, max_tokens=job["new"], logprobs=job["top"], detokenize=False, ignore_eos=True
    )
    answers: dict[str, Any] = {}
    for number, (name, adapter) in enumerate(job["adapters"].items(), 1):
        request = LoRARequest(name, number, adapter) if adapter else None
        prompts = [{"prompt_token_ids": ids} for ids in job["prompts"]]
        try:
            outputs = llm.generate(prompts, greedy, use_tqdm=False, lora_request=request)
        except Exception as error:
            answers[name] = f"{type(error).__name__}: {error}"
            continue
        answers[name] = [
            {
                "tokens": list(output.outputs[0].token_ids),
                "top": [{str(i): value.logprob for i, value in step.items()} for step in output.outputs[0].logprobs],
            }
            for output in outputs
        ]
    with open(job["answers"], "w") as file:
        json.dump(answers, file)


if __name__ == "__main__":
    main()
