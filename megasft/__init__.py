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
from typing import Any

_MODULES = {
    "RunConfig": "config.schema",
    "load_config": "config.schema",
    "UserError": "messages",
    "initialize": "job",
    "load_data": "job",
    "build_model": "job",
    "Trainer": "train.trainer",
    "load_adapter": "adapters.model_io",
    "save_adapter": "adapters.model_io",
    "generate": "generation.decode",
    "generate_many": "generation.batch",
    "evaluate": "evaluation.evaluate",
    "Sampler": "generation.sampling",
}
__all__ = [*_MODULES]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'megasft' has no attribute {name!r}")
    module = _MODULES[name]
    if module.partition(".")[0] not in ("config", "messages"):
        import_module("megasft.host").import_megatron()
    return getattr(import_module(f"megasft.{module}"), name)


def __dir__() -> list[str]:
    return __all__
