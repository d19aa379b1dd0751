"""A whole tiny job on disk: model, tokenizer, conversations and run file, for tests that go through the front door."""

import json
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.parity.reference import random_model, tiny_config

CHATML = (
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
RUN_FILE = """\
[job]
model = "{folder}/model"
data = "{folder}/train.jsonl"
output_dir = "{folder}/run"
[data]
validation_path = "{folder}/validation.jsonl"
[data.topology]
tensor_parallel = {tensor}
data_parallel = {data}
[lora]
r = 4
alpha = 8
[training.validation]
eval_steps = 2
[hyperparameters]
max_steps = {steps}
per_device_batch = 2
sequence_length = 256
learning_rate = 1e-2
[hyperparameters.parallelism]
bf16 = false
[checkpoint]
every_steps = 2
keep = 1
"""


def make_world(
    folder: Path, tensor: int = 1, data: int = 1, steps: int = 4, conversations: int = 12, **changes: Any
) -> Path:
    """Fill `folder` and return the path of its run file. Bytes are the vocabulary: 256 and four control tokens.

    `changes` are of the model's configuration.
    """
    backend = tokenizers.Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[]))  # fmt: skip
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    model = folder / "model"
    random_model(tiny_config(vocab_size=264, mlp_only_layers=[], **changes)).save_pretrained(model)
    hf = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    hf.chat_template = CHATML
    hf.save_pretrained(model)
    for name, count in (("train", conversations), ("validation", 4)):
        lines = [json.dumps({"messages": [
            {"role": "user", "content": f"{name} {i}: what comes after {i}?"},
            {"role": "assistant", "content": f"{i + 1} does" + "!" * (i % 5)},
        ]}) for i in range(count)]  # fmt: skip
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    run_file = folder / "job.toml"
    run_file.write_text(RUN_FILE.format(folder=folder, tensor=tensor, data=data, steps=steps))
    return run_file
