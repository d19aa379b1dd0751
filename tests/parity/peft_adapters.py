"""Adapters made and saved by peft, with random values, and peft's logits with them."""

from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Qwen3MoeForCausalLM

GATE_UP, DOWN, ROUTER = "mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"


def base_model(folder: Path) -> Qwen3MoeForCausalLM:
    return Qwen3MoeForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def save_trained_by_peft(base: Path, folder: Path, **settings) -> None:
    """An adapter that peft created for the model in `base`, with random A and B, as after training."""
    torch.manual_seed(3)
    config = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **{"r": 4, "lora_alpha": 12, **settings})
    model = get_peft_model(base_model(base), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.05)
    # The values are peft's; that A and B are drawn at random is not part of the adapter's meaning.
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(folder)


def loaded_by_peft(base: Path, folder: Path) -> PeftModel:
    """The model in `base` with the adapter; asserts that peft loads every tensor of the file."""
    model = PeftModel.from_pretrained(base_model(base), folder).eval()
    result = model.load_adapter(folder, "default")
    assert not result.missing_keys
    assert not result.unexpected_keys
    return model


def logits(model: torch.nn.Module, samples: list) -> torch.Tensor:
    """Logits of all samples, concatenated: [tokens, vocabulary]."""
    with torch.no_grad():
        return torch.cat([model(ids[None]).logits[0] for ids, _ in samples])
