"""What the argument of a command stands for: a run directory, a run file, a PEFT adapter, or a model.

Reads no weights and imports neither torch nor megatron-core, so that a wrong path is refused at once.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from megasft.config.schema import RunConfig, load_config
from megasft.messages import UserError
from megasft.model.hub import is_hub_id
from megasft.train.checkpoint.folder import RUN_FILE

ADAPTER_CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class Target:
    """A model to generate with: `adapter` is None for the base alone, `config` is None where no run is named."""

    model: str
    adapter: str | None = None
    config: RunConfig | None = None


@dataclass(frozen=True)
class FoundAdapter:
    """The folder of an adapter, and the settings of the run that trained it where the argument names a run."""

    folder: Path
    config: RunConfig | None = None


def find_target(argument: str, adapter: str | None = None) -> Target:
    """What `megasft generate` is to use, with the adapter `adapter` if it is given. Raises UserError."""
    path = Path(argument).expanduser()
    if (run := _run(argument)) is not None:
        folder, config = run
        return Target(config.job.model, adapter or str(_trained(argument, folder)), config)
    if (path / ADAPTER_CONFIG).is_file():
        if adapter is not None:
            raise UserError(f"{argument}: is an adapter, and so is --adapter {adapter}; name the model and one adapter")
        return Target(_base_of(path), argument)
    if not path.is_dir() and not is_hub_id(argument):
        raise UserError(f"{argument}: no such folder, and not a hub id (owner/name)")
    if path.is_dir() and not (path / "config.json").is_file():
        raise UserError(
            f"{argument}: is neither a run directory ({RUN_FILE}), nor a PEFT adapter ({ADAPTER_CONFIG}), nor a model "
            "(config.json)"
        )
    return Target(argument, adapter)


def find_adapter(argument: str) -> FoundAdapter:
    """The adapter that a run directory, a run file or an adapter folder stands for. Raises UserError."""
    if (run := _run(argument)) is not None:
        folder, config = run
        return FoundAdapter(_trained(argument, folder), config)
    path = Path(argument).expanduser()
    if not path.is_dir():
        raise UserError(f"{argument}: no such folder; name a run directory, or the folder of a PEFT adapter")
    return FoundAdapter(path)


def _run(argument: str) -> tuple[Path, RunConfig] | None:
    """The run directory and the settings of a run, if `argument` names one."""
    path = Path(argument).expanduser()
    if argument.endswith(".toml"):
        config = load_config(path)
        return Path(config.job.output_dir), config
    if (path / ADAPTER_CONFIG).is_file() or not (path / RUN_FILE).is_file():  # a checkpoint holds both
        return None
    return path, load_config(path / RUN_FILE)


def _trained(argument: str, run: Path) -> Path:
    """The adapter that a run left when it finished."""
    adapter = run / "adapter"
    if (adapter / ADAPTER_CONFIG).is_file():
        return adapter
    others = [str(path) for path in (run / "best", run / "checkpoints/latest") if (path / ADAPTER_CONFIG).is_file()]
    remedy = f"name {' or '.join(others)} instead" if others else "train it first"
    raise UserError(f"{argument}: has no adapter in {adapter}, for the run has not finished; {remedy}")


def _base_of(adapter: Path) -> str:
    """The base model that an adapter names."""
    path = adapter / ADAPTER_CONFIG
    try:
        name = json.loads(path.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: not a readable adapter configuration ({error})") from None
    if not name:
        raise UserError(f"{adapter}: its configuration names no base model; name the model and --adapter {adapter}")
    return str(name)
