"""Make the demo's world without a network: games of Crafter as conversations, tokenizer, a small pretrained Qwen3-MoE.

    python tools/make_demo.py --out demo

The traces are of a script that plays Crafter (examples/crafter). The base model is pretrained for a minute or two on
the calls of players whose rules were drawn at random (examples/crafter/aimless.py): it reads and writes their language,
and plays badly. The same packages and seed make the same world.

    OUT/data/                                train.jsonl, validation.jsonl, held_out.jsonl: the script's games, by seed
    OUT/model/tokenizer.model                SentencePiece BPE; transformers builds its tokenizer from it when it loads
    OUT/model/                               tokenizer and template with tools, config.json, model.safetensors
    OUT/stamp.json                           what all this was made from: when it still holds, there is nothing to do
"""

import hashlib
import io
import json
import os
import platform
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

os.environ["HF_HUB_OFFLINE"] = "1"
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
# Games are played in processes of their own, which find the package `examples` by it.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))

import sentencepiece
import typer
from demo_model import Encoded, ModelSettings, make_model, pretrain
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from examples.crafter import traces

Record = dict[str, Any]

ENDOFTEXT, IM_START, IM_END = SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TAGS = tuple(f"<{end}{name}>" for name in ("tools", "tool_call", "tool_response") for end in ("", "/"))
BRACKETS = re.compile(r"(?<=\[)|(?=\])")  # of a list: what is before and behind one is never in the same token
ASSISTANT = f"{IM_START}assistant\n"  # what an answer follows
# The form of Qwen3's: tools as JSON in the system's message, calls as JSON in <tool_call>, results in the user's turn.
CHAT_TEMPLATE = """\
{%- if messages[0].role == 'system' or tools %}
{{- '<|im_start|>system' }}
{%- if messages[0].role == 'system' %}
{{- '\\n' + messages[0].content }}
{%- endif %}
{%- if tools %}
{{- '\\n<tools>' }}
{%- for tool in tools %}
{{- '\\n' + (tool | tojson) }}
{%- endfor %}
{{- '\\n</tools>' }}
{%- endif %}
{{- '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
{%- if message.role == 'system' and loop.first %}
{%- elif message.role == 'assistant' %}
{{- '<|im_start|>assistant\\n' + (message.content or '') }}
{%- for call in message.tool_calls or [] %}
{{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
{{- (call.function.arguments | tojson) + '}\\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- elif message.role == 'tool' %}
{{- '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}
{%- else %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


@dataclass(frozen=True)
class Settings(ModelSettings):
    """All that decides what is made."""

    games: int = 200  # of the script, which slips now and then, to train on
    validation_games: int = 10
    held_out_games: int = 10
    aimless_games: int = 40  # to pretrain on
    vocabulary: int = 1400

    def seeds(self) -> dict[str, range]:
        """Seeds of the games of each part; no two parts share one, nor one with the worlds to be tested in."""
        train, validation, held_out, aimless = (range(k * 50_000, (k + 1) * 50_000) for k in range(4))
        start = 1000 * self.seed
        return {
            "train": train[start : start + self.games],
            "validation": validation[start : start + self.validation_games],
            "held_out": held_out[start : start + self.held_out_games],
            "aimless": aimless[start : start + self.aimless_games],
        }


def main(
    out: Annotated[Path, typer.Option(help="the folder to make")] = Path("demo"),
    seed: Annotated[int, typer.Option(min=0, max=49, help="of worlds, weights and every choice")] = 0,
    games: Annotated[int, typer.Option(min=1, max=1000, help="of the script, to train on")] = Settings.games,
    aimless_games: Annotated[int, typer.Option(min=1, max=1000, help="to pretrain on")] = Settings.aimless_games,
    pretrain_steps: Annotated[int, typer.Option(help="0 leaves the base model random")] = Settings.pretrain_steps,
) -> None:
    """Make the demo's data set, tokenizer and base model."""
    console = Console()
    settings = Settings(seed=seed, games=games, aimless_games=aimless_games, pretrain_steps=pretrain_steps)
    stamp = {"settings": asdict(settings), "made_from": made_from()}
    stamp_file = out / "stamp.json"
    if stamp_file.exists() and json.loads(stamp_file.read_text()) == stamp:
        console.print(f"{out} is up to date")
        return
    if out.exists() and any(out.iterdir()) and not stamp_file.exists():
        console.print(f"{out} exists and was not made by this tool: remove it, or give another folder with --out")
        raise typer.Exit(2)

    start = time.perf_counter()
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as folder:
        world = Path(folder) / "new"
        facts = make_world(world, settings)
        (world / "stamp.json").write_text(json.dumps(stamp, indent=2) + "\n")
        if out.exists():
            out.rename(Path(folder) / "old")
        world.rename(out)

    table = Table(title=f"{out}, made in {time.perf_counter() - start:.0f} s", show_header=False)
    for fact in facts.items():
        table.add_row(*fact)
    console.print(table)


def made_from() -> dict[str, str]:
    """The versions, and the files, that the demo's world depends on."""
    packages = {name: version(name) for name in ("torch", "transformers", "sentencepiece", "crafter", "numpy")}
    sources = [Path(__file__), ROOT / "tools/demo_model.py", *sorted((ROOT / "examples/crafter").glob("*.py"))]
    digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sources}
    return {"python": platform.python_version(), **packages, **digests}


def make_world(world: Path, settings: Settings) -> dict[str, str]:
    """Write data and model into the folder `world` and return what there is to say about them."""
    data, model_folder = world / "data", world / "model"
    data.mkdir(parents=True)
    model_folder.mkdir()

    played, records = {}, {}
    for name, seeds in settings.seeds().items():
        file = (world if name == "aimless" else data) / f"{name}.jsonl"
        played[name] = traces.write(file, {"aimless": "aimless", "train": "careless"}.get(name, "expert"), seeds)
        with file.open(encoding="utf-8") as lines:
            records[name] = [json.loads(line) for line in lines]
    (world / "aimless.jsonl").unlink()

    tokenizer = make_tokenizer(model_folder, [*records["train"], *records["aimless"]], settings)
    model = make_model(tokenizer, settings)
    loss = pretrain(model, encode(tokenizer, records["aimless"]), settings)
    model.save_pretrained(model_folder)

    lengths = sorted(len(ids) for ids, _ in encode(tokenizer, records["train"]))
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    total = sum(p.numel() for p in model.parameters())
    median, longest = lengths[len(lengths) // 2], lengths[-1]
    train, aimless = played["train"], played["aimless"]
    return {
        "games of the script": f"{settings.games} to train on",
        "their mean return": f"{train.mean_return:.2f}, {train.mean_achievements:.1f} of 22 achievements",
        "conversations": f"{train.conversations:,} to train on, with {train.calls:,} calls",
        "tokens": f"{sum(lengths):,} to train on; a conversation has {median} (median), {longest} (longest)",
        "parameters": f"{total:,}, of which {experts:,} in {settings.layers} x {settings.experts} experts",
        "pretraining": f"{settings.pretrain_steps} steps, {aimless.calls:,} aimless calls, last loss {loss:.2f}",
    }


# --- tokenizer ---


def make_tokenizer(folder: Path, records: Sequence[Record], settings: Settings) -> PreTrainedTokenizerBase:
    """Train SentencePiece on the conversations and return it as transformers loads it from `folder`.

    transformers 5 turns a `tokenizer.model` into a backend of the `tokenizers` library at load time: BPE with byte
    fallback, and every user-defined symbol a token of its own. Nothing is normalised: text comes back as it went in.
    A word is one token where it is frequent, with its digits and quotes: a fact of what the player sees is one. It
    learns from single lines, so a newline ends a token and never starts a longer one: the newline after
    `<|im_start|>assistant` cannot merge with the answer. Likewise at the brackets of a list of actions, else a small
    model may forget one.
    """
    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(
            part
            for record in records
            for line in spoken(record).splitlines(keepends=True)
            for part in BRACKETS.split(line)
        ),
        model_writer=trained,
        model_type="bpe",
        vocab_size=settings.vocabulary,
        hard_vocab_limit=False,
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        split_by_unicode_script=False,
        split_by_number=False,
        max_sentence_length=8192,  # bytes; longer ones would be left out
        unk_id=0,
        bos_id=-1,
        eos_id=-1,
        pad_id=-1,
        user_defined_symbols=[*SPECIAL_TOKENS, *TAGS],
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(trained.getvalue())
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    tokenizer_config = {
        "tokenizer_class": "TokenizersBackend",
        "unk_token": "<unk>",
        "eos_token": IM_END,
        "pad_token": ENDOFTEXT,
        "extra_special_tokens": [IM_START],
        "added_tokens_decoder": {
            str(1 + len(SPECIAL_TOKENS) + k): {
                "content": tag,
                **dict.fromkeys(("special", "normalized", "lstrip", "rstrip", "single_word"), False),
            }
            for k, tag in enumerate(TAGS)
        },
        "clean_up_tokenization_spaces": False,
        "model_max_length": 4096,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2) + "\n")
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3_moe"}))  # AutoTokenizer asks for one
    return AutoTokenizer.from_pretrained(folder)


def spoken(record: Record) -> str:
    """The text of a conversation as the template writes it, without its tokens: for the tokenizer to learn from."""
    lines = [json.dumps(tool) for tool in record.get("tools", [])]
    for message in record["messages"]:
        lines += [message["role"], message["content"]]
        lines += [json.dumps(call["function"]) for call in message.get("tool_calls", [])]
    return "\n".join(lines)


def encode(tokenizer: PreTrainedTokenizerBase, records: Sequence[Record]) -> list[Encoded]:
    """The tokens of each conversation, and which of them are of an answer."""
    start, end = tokenizer.encode(ASSISTANT, add_special_tokens=False), tokenizer.convert_tokens_to_ids(IM_END)
    result = []
    for record in records:
        text = tokenizer.apply_chat_template(record["messages"], tools=record.get("tools"), tokenize=False)
        ids = tokenizer.encode(text, add_special_tokens=False)
        answer, inside = [], False
        for k, token in enumerate(ids):
            inside = inside or ids[max(0, k - len(start)) : k] == start
            answer.append(inside)
            inside = inside and token != end
        result.append((ids, answer))
    return result


if __name__ == "__main__":
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    typer.run(main)
