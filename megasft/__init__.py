"""megasft: LoRA fine-tuning of Qwen3 mixture-of-experts models, Megatron style.

    import megasft

    config = megasft.load_config("configs/demo.toml")
    topology = megasft.initialize(config)
    train, validation = megasft.load_data(config, topology)
    model = megasft.build_model(config, topology)
    megasft.Trainer(config, topology, model, train, validation).fit()
    megasft.save_adapter(model, "my-adapter")

Names are imported when first used: `import megasft` alone is quick and changes nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megasft.config import RunConfig, load_config
    from megasft.errors import UserError
    from megasft.generation.decode import generate
    from megasft.generation.sampling import Sampler
    from megasft.job import build_model, initialize, load_data
    from megasft.lora.adapter import load_adapter, save_adapter
    from megasft.train.trainer import Trainer

_HOMES = {
    "RunConfig": "config",
    "load_config": "config",
    "UserError": "errors",
    "generate": "generation.decode",
    "Sampler": "generation.sampling",
    "initialize": "job",
    "load_data": "job",
    "build_model": "job",
    "load_adapter": "lora.adapter",
    "save_adapter": "lora.adapter",
    "Trainer": "train.trainer",
}
__all__ = ["RunConfig", "Sampler", "Trainer", "UserError", "build_model", "generate", "initialize", "load_adapter",
           "load_config", "load_data", "save_adapter"]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'megasft' has no attribute {name!r}")
    return getattr(import_module(f"megasft.{_HOMES[name]}"), name)
