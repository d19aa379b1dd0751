"""Make the demo's world without a network: instruction data, a SentencePiece tokenizer, a small pretrained Qwen3-MoE.

    python tools/make_demo.py --out demo

The data come from the running interpreter's standard library: the user gives a function's signature and docstring,
the assistant answers with its body. The base model is pretrained for a minute on the source text of the training
modules and never sees a conversation, so that LoRA has something to teach. The same interpreter, packages and seed
make the same world.

    OUT/data/train.jsonl, validation.jsonl   {"messages": [{"role": ..., "content": ...}, ...]} a line, split by module
    OUT/model/tokenizer.model                SentencePiece BPE; transformers builds its tokenizer from it when it loads
    OUT/model/                               tokenizer and ChatML template, config.json, model.safetensors
    OUT/stamp.json                           what all this was made from: when it still holds, there is nothing to do
"""

import ast
import hashlib
import inspect
import io
import json
import math
import os
import platform
import sysconfig
import tempfile
import time
import tokenize
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

os.environ["HF_HUB_OFFLINE"] = "1"

import sentencepiece
import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.utils import logging as transformers_logging

Conversation = list[dict[str, str]]

ENDOFTEXT, IM_START, IM_END = SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = """\
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

# Folders of the standard library that hold tests, tables of data or other people's packages.
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}
SYSTEM_PROMPT = "You are a careful Python programmer."
BODY_REQUESTS = (
    "Write the body of this function from `{module}`.\n\n{header}",
    "Complete the code.\n\n{header}",
    "Here are the signature and the docstring of `{name}`. What code follows?\n\n{header}",
    "{header}\n\nImplement it.",
)
ANSWER = "Here is the body of the function:\n\n```python\n{body}\n```"
PURPOSE_REQUEST, FOLLOW_UP = "What does this function in `{module}` do?\n\n{signature}", "Now write its body."


@dataclass(frozen=True)
class Settings:
    """All that decides what is made."""

    seed: int = 0
    max_chars: int = 600  # of a header and of a body: about 200 tokens
    validation_one_in: int = 20  # modules
    vocabulary: int = 4096
    hidden: int = 128
    layers: int = 4
    heads: int = 8
    key_value_heads: int = 4
    head_dim: int = 32
    experts: int = 16
    experts_per_token: int = 4
    expert_intermediate: int = 64
    pretrain_steps: int = 150
    pretrain_sequences: int = 4  # per step
    pretrain_length: int = 256  # tokens
    pretrain_learning_rate: float = 3e-3


def main(
    out: Annotated[Path, typer.Option(help="the folder to make")] = Path("demo"),
    seed: Annotated[int, typer.Option(help="of the model's weights and of every choice")] = 0,
    pretrain_steps: Annotated[int, typer.Option(help="0 leaves the base model random")] = Settings.pretrain_steps,
) -> None:
    """Make the demo's data set, tokenizer and base model."""
    console = Console()
    settings = Settings(seed=seed, pretrain_steps=pretrain_steps)
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
    """The versions, and this file, that the demo's world depends on."""
    packages = {name: version(name) for name in ("torch", "transformers", "sentencepiece")}
    script = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    return {"python": platform.python_version(), **packages, "make_demo.py": script}


def make_world(world: Path, settings: Settings) -> dict[str, str]:
    """Write data and model into the folder `world` and return what there is to say about them."""
    data, model_folder = world / "data", world / "model"
    data.mkdir(parents=True)
    model_folder.mkdir()

    train_modules, validation_modules = split_modules(standard_library(), settings)
    train, validation = build_conversations(train_modules, validation_modules, settings)
    for name, conversations in (("train", train), ("validation", validation)):
        lines = (json.dumps({"messages": c}, ensure_ascii=False) + "\n" for c in conversations)
        (data / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")

    tokenizer = make_tokenizer(model_folder, train, settings)
    model = make_model(tokenizer, settings)
    loss = pretrain(model, tokenizer, train_modules.values(), settings)
    model.save_pretrained(model_folder)

    lengths = sorted(len(tokenizer.encode(render(tokenizer, c))) for c in train)
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    total = sum(p.numel() for p in model.parameters())
    median, p95, longest = (lengths[round(q * (len(lengths) - 1))] for q in (0.5, 0.95, 1.0))
    return {
        "conversations": f"{len(train):,} to train on, {len(validation):,} to validate",
        "modules": f"{len(train_modules)} and {len(validation_modules)}",
        "tokens": f"{sum(lengths):,} in train; a conversation has {median} (median), {p95} (95%), {longest} (longest)",
        "512 tokens hold": f"{sum(n <= 512 for n in lengths) / len(lengths):.1%} of the conversations",
        "parameters": f"{total:,}, of which {experts:,} in {settings.layers} x {settings.experts} experts",
        "pretraining": f"{settings.pretrain_steps} steps on the modules' source, last loss {loss:.2f}",
    }


# --- data: from the standard library to conversations ---


def standard_library() -> dict[str, str]:
    """Source text by module name, sorted by name."""
    root = Path(sysconfig.get_path("stdlib"))
    modules = {}
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).with_suffix("").parts
        if SKIPPED_FOLDERS.isdisjoint(parts):
            try:
                with tokenize.open(path) as file:  # honours the encoding that the file declares
                    modules[".".join(parts).removesuffix(".__init__")] = file.read()
            except (SyntaxError, UnicodeDecodeError):
                continue
    return dict(sorted(modules.items()))


def split_modules(modules: dict[str, str], settings: Settings) -> tuple[dict[str, str], dict[str, str]]:
    """Training and validation modules: a module is on one side as a whole."""
    train: dict[str, str] = {}
    validation: dict[str, str] = {}
    for name, source in modules.items():
        held_out = digest(settings.seed, "split", name) % settings.validation_one_in == 0
        (validation if held_out else train)[name] = source
    return train, validation


@dataclass(frozen=True)
class Function:
    """A documented function, its code moved to the left margin."""

    module: str
    name: str
    signature: str  # the `def` line or lines
    header: str  # signature and docstring
    docstring: str
    body: str  # what follows the docstring, indented by four


def functions(module: str, source: str) -> Iterator[Function]:
    """The functions and methods in `source` that have a docstring and code after it."""
    lines = source.split("\n")  # as `ast` counts them; `splitlines` also splits at form feeds
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return
    pending: list[tuple[ast.AST, str]] = [(tree, "")]
    while pending:
        parent, prefix = pending.pop()
        for node in ast.iter_child_nodes(parent):
            if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                pending.append((node, prefix))
                continue
            pending.append((node, f"{prefix}{node.name}."))
            docstring = ast.get_docstring(node)
            if isinstance(node, ast.ClassDef) or not docstring or len(node.body) < 2:
                continue
            first, end = node.body[0], node.end_lineno
            assert first.end_lineno
            code = [line.removeprefix(" " * node.col_offset) for line in lines[node.lineno - 1 : end]]
            to_docstring, after_docstring = first.lineno - node.lineno, first.end_lineno - node.lineno + 1
            function = Function(
                module=module,
                name=prefix + node.name,
                signature="\n".join(code[:to_docstring]),
                header="\n".join(code[:after_docstring]),
                docstring=docstring,
                body="\n".join(code[after_docstring:]).strip("\n"),
            )
            if function.signature and is_python(f"{function.header}\n{function.body}"):
                yield function


def is_python(text: str) -> bool:
    """Whether `text` parses."""
    try:
        ast.parse(text)
    except SyntaxError:
        return False
    return True


def build_conversations(
    train_modules: dict[str, str], validation_modules: dict[str, str], settings: Settings
) -> tuple[list[Conversation], list[Conversation]]:
    """Training and validation conversations, shuffled; no body and no header is in both, or twice in one."""
    seen: set[str] = set()
    splits = []
    for modules in (train_modules, validation_modules):
        kept = []
        for module, source in modules.items():
            for function in functions(module, source):
                keys = {"".join(text.split()) for text in (function.header, function.body)}
                fits = max(len(function.header), len(function.body)) <= settings.max_chars
                if fits and "\u2581" not in function.header + function.body and seen.isdisjoint(keys):
                    kept.append(function)
                seen |= keys  # what is too long to ask for is still no answer for the other side
        kept.sort(key=lambda f: digest(settings.seed, "order", f.module, f.name, f.body))
        splits.append([conversation(function, settings) for function in kept])
    return splits[0], splits[1]


def conversation(function: Function, settings: Settings) -> Conversation:
    """Ask for the body of `function`, in one turn or after a first one about its purpose, as its hash decides."""
    choice = digest(settings.seed, "phrase", function.module, function.name, function.body)
    choice, with_system = divmod(choice, 4)
    choice, two_turns = divmod(choice, 6)
    fields = {**asdict(function), "docstring": inspect.cleandoc(function.docstring)}
    messages = [{"role": "system", "content": SYSTEM_PROMPT}] if with_system == 0 else []
    if two_turns == 0:
        messages.append({"role": "user", "content": PURPOSE_REQUEST.format(**fields)})
        messages.append({"role": "assistant", "content": fields["docstring"]})
        messages.append({"role": "user", "content": FOLLOW_UP})
    else:
        messages.append({"role": "user", "content": BODY_REQUESTS[choice % len(BODY_REQUESTS)].format(**fields)})
    return [*messages, {"role": "assistant", "content": ANSWER.format(**fields)}]


def digest(seed: int, *key: str) -> int:
    """A number that depends on nothing but its arguments (`hash` of a string changes from run to run)."""
    return int.from_bytes(hashlib.sha256("\0".join([str(seed), *key]).encode()).digest()[:8])


# --- tokenizer ---


def make_tokenizer(folder: Path, conversations: list[Conversation], settings: Settings) -> PreTrainedTokenizerBase:
    """Train SentencePiece on the conversations and return it as transformers loads it from `folder`.

    transformers 5 turns a `tokenizer.model` into a backend of the `tokenizers` library at load time: BPE with byte
    fallback, and every user-defined symbol a token of its own. Nothing is normalised: text comes back as it went in.
    It learns from single lines, so a newline ends a token and never starts a longer one: the newline after
    `<|im_start|>assistant` cannot merge with the answer.
    """
    text = (
        line
        for messages in conversations
        for message in messages
        for line in f"{message['role']}\n{message['content']}".splitlines(keepends=True)
    )
    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=text,
        model_writer=trained,
        model_type="bpe",
        vocab_size=settings.vocabulary,
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,  # one piece for an indentation
        split_digits=True,
        max_sentence_length=4 * settings.max_chars,  # bytes; longer ones would be left out
        unk_id=0,
        bos_id=-1,
        eos_id=-1,
        pad_id=-1,
        user_defined_symbols=list(SPECIAL_TOKENS),
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
        "clean_up_tokenization_spaces": False,
        "model_max_length": 4096,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2) + "\n")
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3_moe"}))  # AutoTokenizer asks for one
    return AutoTokenizer.from_pretrained(folder)


def render(tokenizer: PreTrainedTokenizerBase, messages: Conversation) -> str:
    """The ChatML text of a conversation."""
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert isinstance(text, str)
    return text


# --- model ---


def make_model(tokenizer: PreTrainedTokenizerBase, settings: Settings) -> Qwen3MoeForCausalLM:
    """A Qwen3-MoE with random weights."""
    torch.manual_seed(settings.seed)
    config = Qwen3MoeConfig(
        vocab_size=math.ceil(len(tokenizer) / 64) * 64,  # so that tensor parallel can split it
        hidden_size=settings.hidden,
        intermediate_size=4 * settings.hidden,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.key_value_heads,
        head_dim=settings.head_dim,  # type: ignore[call-arg]  # one of the attributes that the class does not list
        num_experts=settings.experts,
        num_experts_per_tok=settings.experts_per_token,
        moe_intermediate_size=settings.expert_intermediate,
        norm_topk_prob=True,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen3MoeForCausalLM(config)


def pretrain(
    model: Qwen3MoeForCausalLM, tokenizer: PreTrainedTokenizerBase, sources: Iterable[str], settings: Settings
) -> float:
    """Train all weights on source text, with the routers kept in balance; return the last step's loss."""
    steps, sequences, length = settings.pretrain_steps, settings.pretrain_sequences, settings.pretrain_length
    model.set_experts_implementation("grouped_mm")
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.pretrain_learning_rate, betas=(0.9, 0.95), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.pretrain_learning_rate, total_steps=max(steps, 1), pct_start=0.1
    )
    generator = torch.Generator().manual_seed(settings.seed)
    stream = token_stream(tokenizer, list(sources), generator)
    loss = torch.tensor(math.nan)
    for _ in track(range(steps), "pretraining the base model", transient=True):
        ids = torch.tensor([next(stream) for _ in range(sequences * length)]).view(sequences, length)
        output = model(input_ids=ids, labels=ids, use_cache=False, output_router_logits=True)
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        loss = output.loss.detach()
    return loss.item()


def token_stream(tokenizer: PreTrainedTokenizerBase, sources: list[str], generator: torch.Generator) -> Iterator[int]:
    """Endless tokens of source text in random order, `<|endoftext|>` after each."""
    while True:
        for index in torch.randperm(len(sources), generator=generator).tolist():
            yield from tokenizer.encode(sources[index], add_special_tokens=False)
            yield tokenizer.pad_token_id


if __name__ == "__main__":
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    typer.run(main)
