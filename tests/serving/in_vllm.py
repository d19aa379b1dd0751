"""Answers of vLLM on CPUs. Runs in .venv-serving: reads a job from standard input, writes its answers to a file.

`examples/serving/experts_on_cpu.py` stands in for vLLM's kernel of experts with LoRA, which needs a GPU, and for no more.
"""

import json
import os
import sys
from pathlib import Path
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

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "serving"))
import experts_on_cpu


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
        experts_on_cpu.install()
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
