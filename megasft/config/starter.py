"""A short run file to begin with: what `megasft init` writes."""

import json
from pathlib import Path

from megasft.messages import UserError

EXPERT_PARALLEL = 2  # where the number of GPUs is even: a 30B base in bf16 leaves little room on one 80 GB GPU

# Ten lines in the spelling of `--set`; what is left out has its default.
TEMPLATE = """\
# Start: megasft train --config {path}   (every key, with its meaning: configs/qwen3_coder_30b.toml)
job.model = {model}
job.data = {data}
compute.gpu_count = {gpus}
data.topology.expert_parallel = {experts}
data.validation_fraction = 0.02
lora.r = 16
hyperparameters.sequence_length = 4096
hyperparameters.gradient_accumulation_steps = 16
hyperparameters.learning_rate = 1e-4
"""


def run_file(path: str, model: str, gpus: int, data: str) -> str:
    """The text of a run file for LoRA on `gpus` GPUs of one machine."""
    experts = EXPERT_PARALLEL if gpus % EXPERT_PARALLEL == 0 else 1
    return TEMPLATE.format(path=path, model=_quoted(model), data=_quoted(data), gpus=gpus, experts=experts)


def write_run_file(path: str | Path, model: str, gpus: int, data: str) -> None:
    """Write `run_file` to `path`. Raises UserError if it exists, or cannot be written."""
    path = Path(path)
    if path.suffix != ".toml":
        raise UserError(f"{path}: a run file is TOML; give it a name that ends in .toml")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("x", encoding="utf-8") as file:
            file.write(run_file(str(path), model, gpus, data))
    except FileExistsError:
        raise UserError(f"{path}: exists already; name another file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
