"""Whatever a model's config.json and tensors say: the logits of transformers, or one line that names key or tensor."""

import contextlib
import io
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from megasft.messages import UserError
from tests.parity.peft_adapters import base_model, logits
from tests.parity.reference import random_model, tiny_config
from tests.support import on_ranks

SAMPLES = on_ranks.random_samples(203, [24, 9])
PLAIN = tiny_config(num_hidden_layers=2, num_experts=4, num_experts_per_tok=2, mlp_only_layers=[])
ABSENT = "absent"  # the key is left out
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 8}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8}  # fmt: skip
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8,
            "original_max_position_embeddings": 8}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
ROPES: list[Any] = [
    ABSENT, None, {}, {"rope_type": "default", "rope_theta": 10000}, {"rope_type": "default", "rope_theta": "1e6"},
    {"type": "linear", "factor": 2.0}, LINEAR, LINEAR | {"factor": 0}, {"rope_type": "dynamic", "factor": 2.0},
    YARN, YARN | {"attention_factor": 0.7}, YARN | {"mscale": 0.7, "mscale_all_dim": 1.0}, YARN | {"truncate": False},
    YARN | {"beta_fast": 16, "beta_slow": 2}, YARN | {"factor": None}, YARN | {"factor": "4"}, {"rope_type": "yarn"},
    LLAMA3, LONGROPE, LINEAR | {"partial_rotary_factor": 0.5}, {"rope_type": "proportional", "rope_theta": 1e4},
    {"full_attention": LINEAR}, {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4},
]  # fmt: skip
KEYS: dict[str, list[Any]] = {
    "hidden_act": ["silu", "swish", "gelu"], "attention_bias": [True, False], "attention_dropout": [0.0, 0, 0.1],
    "use_sliding_window": [True, False], "sliding_window": [None, 4], "max_window_layers": [1],
    "layer_types": [["sliding_attention", "full_attention"], ["full_attention"] * 2, None],
    "head_dim": [ABSENT, None, 8, 15], "num_attention_heads": [4, 6, 8], "num_key_value_heads": [ABSENT, None, 1, 3, 8],
    "norm_topk_prob": [ABSENT, True, False], "num_experts_per_tok": [ABSENT, 0, 1, 3, 4], "num_local_experts": [3, 4],
    "decoder_sparse_step": [ABSENT, 0, 2, 3], "mlp_only_layers": [ABSENT, None, [0], [-1], [0, 1], [7]],
    "rms_norm_eps": [ABSENT, 1e-2, "1e-6"], "tie_word_embeddings": [ABSENT, True, None],
    "rope_parameters": ROPES, "rope_scaling": ROPES, "rope_theta": [5e5, 100, None], "partial_rotary_factor": [0.5, 1.0],
    "original_max_position_embeddings": [16], "max_position_embeddings": [ABSENT, 8, 16],
    "output_router_logits": [True], "router_aux_loss_coef": [0.1], "dtype": [None, "float16"], "torch_dtype": ["float64"],
    "shared_expert_intermediate_size": [0, 32], "n_shared_experts": [1], "per_layer_config": [{}, {"1": {"rms_norm_eps": 1e-2}}],
    "dual_chunk_attention_config": [{"chunk_size": 16, "local_size": 4, "original_max_position_embeddings": 16}],
    "pad_token_id": [0, 202], "vocab_size": [202, 204], "moe_intermediate_size": [48], "intermediate_size": [64],
}  # fmt: skip
CHANGES = st.lists(st.sampled_from(sorted(KEYS)), max_size=3, unique=True).flatmap(
    lambda keys: st.fixed_dictionaries({key: st.sampled_from(KEYS[key]) for key in keys})
)
Q, HEAD = "model.layers.0.self_attn.q_proj", "lm_head.weight"
# What is done to the tensors, and the name that an error may have.
TENSORS: dict[str, tuple[Any, str]] = {
    "nothing": (lambda t: None, "\0"),
    "bf16": (lambda t: t.update({name: value.bfloat16() for name, value in t.items()}), "\0"),
    "mixed": (lambda t: t.update({name: value.half() for name, value in t.items() if "norm" in name}), "\0"),
    "double": (lambda t: t.update({name: value.double() for name, value in t.items() if "experts" in name}), "\0"),
    "bias": (lambda t: t.update({f"{Q}.bias": torch.ones(128)}), f"{Q}.bias"),
    "shared expert": (lambda t: t.update({"model.layers.0.mlp.shared_expert.up_proj.weight": torch.ones(32, 64)}), "shared_expert"),
    "no head": (lambda t: t.pop(HEAD, None), HEAD),
    # of a head's usual size: logits eight times as large differ by more than 1e-5 in fp32 on processors with AVX512
    "a head": (lambda t: t.setdefault(HEAD, torch.randn(203, 64) / 8), HEAD),
    "padded vocabulary": (lambda t: t.update({name: torch.cat([t[name], t[name][:5]]) for name in (HEAD, "model.embed_tokens.weight") if name in t}),
                          "model.embed_tokens.weight"),
    "whole numbers": (lambda t: t.update({f"{Q}.weight": (100 * t[f"{Q}.weight"]).to(torch.int8)}), f"{Q}.weight"),
}  # fmt: skip


def write(folder: Path, changes: dict[str, Any], tensors: str) -> dict[str, Any]:
    """A checkpoint of this config.json, with random weights of the shapes that transformers makes of it if it can."""
    raw = {"num_experts": 4, "model_type": "qwen3_moe", **PLAIN.to_dict()}
    del raw["num_local_experts"]
    raw = {key: value for key, value in (raw | changes).items() if value != ABSENT}
    (folder / "config.json").write_text(json.dumps(raw))
    try:
        model = random_model(Qwen3MoeConfig.from_pretrained(folder))
        assert sum(parameter.numel() for parameter in model.parameters()) < 10**7
    except Exception:  # transformers raises many kinds
        model = random_model(PLAIN)
    model.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(raw))
    state = load_file(folder / "model.safetensors")
    TENSORS[tensors][0](state)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return raw


def theirs(folder: Path) -> torch.Tensor | None:
    """The logits of transformers; None if it cannot load the model, or takes random weights where it finds none."""
    try:
        _, report = Qwen3MoeForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
        missing = report["missing_keys"] or report["mismatched_keys"]
        return None if missing else logits(base_model(folder), SAMPLES)
    except Exception:
        return None


def ours(folder: Path) -> torch.Tensor | str:
    try:
        job = {"model": str(folder)}
        lora = {"target_modules": ["q_proj"]}  # fresh: B is zero, so the base's logits do not change
        return on_ranks.logits({"job": job, "lora": lora, "hyperparameters": {"parallelism": {"bf16": False}}}, SAMPLES)
    except UserError as error:
        return str(error)


@settings(
    max_examples=60, deadline=None, derandomize=True, database=None, phases=(Phase.explicit, Phase.generate),
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
@given(CHANGES, st.sampled_from(sorted(TENSORS)))
@example({"tie_word_embeddings": True}, "a head")
@example({"rope_parameters": ABSENT, "rope_theta": 5e5, "rope_scaling": YARN}, "nothing")
@example({"layer_types": ["full_attention"] * 2, "rope_parameters": {"full_attention": LINEAR}}, "nothing")
def equal_or_refused(changes: dict[str, Any], tensors: str) -> None:
    with tempfile.TemporaryDirectory() as name, contextlib.redirect_stderr(io.StringIO()):
        folder = Path(name)
        write(folder, changes, tensors)
        want, found = theirs(folder), ours(folder)
    if isinstance(found, str):
        assert "\n" not in found
        names = {*changes, TENSORS[tensors][1]} | ({"rope_parameters"} if "rope_scaling" in changes else set())
        assert any(name in found for name in names), found  # transformers calls both rope_parameters
    elif want is not None:
        torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)


def on_rank() -> None:
    equal_or_refused()


def test_odd_configurations_and_tensors_give_the_logits_of_transformers_or_are_refused_by_name(ranks):
    ranks(1, on_rank)
