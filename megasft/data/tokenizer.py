"""A tokenizer with its chat template: an HF folder, or a bare SentencePiece model.

*Control tokens* are the added tokens that steer a chat: all that the tokenizer calls special, and those the template
writes around messages. Only the template may write them; other added tokens (`<think>`, `<tool_call>`) are ordinary
vocabulary. Inside a message a control token is text, and two tools here keep the two apart without moving a character:

- `swap` exchanges every control token with a stand-in of the same length from a private range of Unicode, and back.
  Messages are swapped before they are rendered, so that whatever control token the rendering holds is the template's.
- `encode(..., guarded=True)` takes a rendering swapped once more (the template's tokens are stand-ins now, the
  messages' are plain characters) to a copy of the tokenizer that knows the control tokens under their stand-ins only.
"""

import contextlib
import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Mapping
from datetime import date, datetime
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import jinja2
import tokenizers

from megasft.data.assistant_spans import Frame, FrameError, learn_frame
from megasft.data.conversations import RESERVED_VARIABLES
from megasft.messages import UserError

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
STAND_IN_FIRST, STAND_IN_REST = 0x10F000, "\U0010fffd"
STAND_IN = re.compile(f"[{chr(STAND_IN_FIRST)}-{STAND_IN_REST}]")
MAX_CONTROL_TOKENS = ord(STAND_IN_REST) - STAND_IN_FIRST


def load_tokenizer(
    model_dir: str | Path, template_args: Mapping[str, Any] | None = None, template_date: date | None = None
) -> "ChatTokenizer":
    """Load the tokenizer and chat template of an HF folder, or of a SentencePiece `.model` file or a folder with one.

    `template_args` and `template_date` are `ChatTokenizer`'s.

    Reads local files only and runs no code of theirs. A SentencePiece model without `chat_template.jinja` beside it
    gets the ChatML template if its vocabulary has `<|im_start|>` and `<|im_end|>`.

    Raises:
        UserError: nothing there, no tokenizer in it, no chat template, a template that does not compile, or one that
            has no use for a variable in `template_args`.
    """
    path = Path(model_dir)
    if not path.exists():
        raise UserError(f"{path}: no such model folder or SentencePiece file")
    folder = path if path.is_dir() else path.parent
    sentencepiece = path if path.is_file() else folder / "tokenizer.model"
    if path.is_dir() and ((folder / "tokenizer.json").exists() or (folder / "tokenizer_config.json").exists()):
        hf = _from_folder(folder)
    elif sentencepiece.exists() and sentencepiece.suffix == ".model":
        hf = _from_sentencepiece(sentencepiece)
    elif path.is_dir():
        hf = _from_folder(folder)
    else:
        raise UserError(f"{path}: not a tokenizer; give a folder with tokenizer.json, or a SentencePiece .model file")
    beside = folder / "chat_template.jinja"
    if beside.exists() and not hf.chat_template:
        hf.chat_template = beside.read_text(encoding="utf-8")
    if not hf.chat_template and {"<|im_start|>", "<|im_end|>"} <= hf.get_vocab().keys() and sentencepiece.exists():
        hf.chat_template = CHATML
    if not hf.chat_template:
        raise UserError(f"{path}: the tokenizer has no chat template; put one into {folder}/chat_template.jinja")
    return ChatTokenizer(hf, str(path), template_args, template_date)


def mentions_date(folder: str | Path) -> bool:
    """Whether a chat template of the model in `folder` may write today's date: a look at its text, no more."""
    files = [*Path(folder).glob("*chat_template*"), Path(folder, "tokenizer_config.json")]
    files += Path(folder).glob("additional_chat_templates/*")
    return any(b"strftime_now" in file.read_bytes() for file in files if file.is_file())


class ChatTokenizer:
    """A fast tokenizer and its chat template.

    Attributes:
        hf: the transformers tokenizer.
        source: where it was loaded from, for messages.
        vocab_size: one more than the largest token id.
        frame: what the template writes around messages; None where it could not be found (`frame_error` says why).
        control_tokens: the added tokens that only the template may write.
        template_args: variables that the template gets with every conversation.
        template_date: the day that a template which writes today's date is told; None: today.
        writes_date: whether the template's text depends on the day.
    """

    def __init__(
        self,
        hf: Any,
        source: str,
        template_args: Mapping[str, Any] | None = None,
        template_date: date | None = None,
    ):
        self.hf, self.source = hf, source
        self.template_args, self.template_date = dict(template_args or {}), template_date
        self._check_template_args()
        self.vocab_size: int = max(hf.get_vocab().values()) + 1
        self.frame: Frame | None = None
        self.frame_error = ""
        added = {token.content: token.special for token in hf.added_tokens_decoder.values()}
        try:
            self.frame = learn_frame(self.render, [token for token in added if token.strip()])
        except jinja2.TemplateSyntaxError as error:
            raise UserError(
                f"{source}: the chat template does not compile (line {error.lineno}: {error.message})"
            ) from None
        except FrameError as error:
            self.frame_error = str(error)
        around = self.frame.text if self.frame else ""
        self.control_tokens = tuple(t for t, special in added.items() if t.strip() and (special or t in around))
        longest_first = sorted(self.control_tokens, key=len, reverse=True)[:MAX_CONTROL_TOKENS]
        self._stand_in = {
            t: chr(STAND_IN_FIRST + i) + STAND_IN_REST * (len(t) - 1) for i, t in enumerate(longest_first)
        }
        self._swapped = self._stand_in | {alias: token for token, alias in self._stand_in.items()}
        self.control = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._stand_ins = re.compile("|".join(self._stand_in.values()) or r"(?!)")
        self._either = re.compile("|".join(map(re.escape, self._swapped)) or r"(?!)")
        self.writes_date = self._writes_date()

    @property
    def eos_id(self) -> int:
        """The token that ends an assistant turn, or the tokenizer's own end of sequence."""
        if self.frame:
            return self.hf.convert_tokens_to_ids(self.frame.terminator)
        return self.hf.eos_token_id

    @property
    def pad_id(self) -> int:
        """What fills a batch; never seen by attention or loss."""
        return self.eos_id if self.hf.pad_token_id is None else self.hf.pad_token_id

    @cached_property
    def fingerprint(self) -> str:
        """Changes whenever the same conversation could become other tokens or another mask."""
        parts = [self._backend.to_str(), json.dumps(self.hf.chat_template), json.dumps(self.hf.special_tokens_map)]
        parts.append(json.dumps(self.template_args, sort_keys=True))
        if self.writes_date:
            parts.append(str(self.template_date or date.today()))
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    def check_vocabulary(self, model_vocab_size: int) -> None:
        """Raise a `UserError` if the model has no embedding for some token of this tokenizer."""
        if self.vocab_size > model_vocab_size:
            raise UserError(
                f"{self.source}: the tokenizer has {self.vocab_size} tokens, more than the model's vocabulary of "
                f"{model_vocab_size}; take the tokenizer that belongs to the model"
            )

    def render(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        generation_prompt: bool = False,
        **variables: Any,
    ) -> str:
        """The template's text, rendered in transformers' sandbox with `template_args` and these variables besides.

        Raises whatever the template raises.
        """
        self._set_date(self.template_date)
        return self.hf.apply_chat_template(
            messages,
            tools=tools,
            add_generation_prompt=generation_prompt,
            tokenize=False,
            **(self.template_args | variables),
        )

    def generation_marks(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, **variables: Any
    ) -> tuple[str, list[tuple[int, int]]] | None:
        """The text and the spans that the template's own `{% generation %}` marks enclose; None if it has none."""
        from transformers.utils.chat_template_utils import render_jinja_template

        template = self.hf.get_chat_template(tools=tools)
        if not re.search(r"\{%-?\s*generation\s*-?%\}", template):
            return None
        self._set_date(self.template_date)
        rendered: Any = render_jinja_template(
            [messages],
            tools=cast(Any, tools),
            chat_template=template,
            return_assistant_tokens_mask=True,
            **(self.hf.special_tokens_map | self.template_args | variables),
        )
        return rendered[0][0], rendered[1][0]

    def reads(self, variable: str) -> bool:
        """Whether the template mentions a variable."""
        return any(re.search(rf"\b{re.escape(variable)}\b", template) for template in self._templates())

    def swap(self, text: str) -> str:
        """Exchange control tokens and their stand-ins. Keeps the length; undoes itself."""
        return self._either.sub(lambda match: self._swapped[match[0]], text)

    def reveal(self, text: str) -> str:
        """Put the control tokens back where their stand-ins are."""
        return self._stand_ins.sub(lambda match: self._swapped[match[0]], text)

    def encode(self, texts: list[str], guarded: bool = False) -> list[tokenizers.Encoding]:
        """Tokenize rendered texts; with `guarded`, texts in which the control tokens are stand-ins (see above)."""
        backend = self._guarded if guarded else self._backend
        return backend.encode_batch(texts, add_special_tokens=False)

    def decode(self, ids: Any) -> str:
        """The text of token ids, control tokens included."""
        return self.hf.decode([int(i) for i in ids], skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def _templates(self) -> list[str]:
        found = self.hf.chat_template
        return list(found.values()) if isinstance(found, dict) else [found]

    def _check_template_args(self) -> None:
        for name in self.template_args:
            if name in RESERVED_VARIABLES:
                raise UserError(f"[data] template_args: {name} belongs to the rendering itself; remove it")
            if not self.reads(name):
                raise UserError(f"[data] template_args: the chat template of {self.source} has no variable {name!r}")

    def _set_date(self, day: date | None) -> None:
        """Have the template's `strftime_now` tell that day.

        The function is a global of transformers' compiled templates, which it keeps by their text; a variable of the
        same name would do, but transformers lets no function through as one.
        """
        for template in self._templates():
            if "strftime_now" in template:
                from transformers.utils import chat_template_utils

                compiled = chat_template_utils._compile_jinja_template(template)
                compiled.globals["strftime_now"] = lambda format: (day or datetime.now()).strftime(format)

    def _writes_date(self) -> bool:
        """Render tiny conversations under two dates that have nothing in common."""
        if not any("strftime_now" in template for template in self._templates()):
            return False
        asked = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
        tools = [{"type": "function", "function": {"name": "f", "description": "", "parameters": {}}}]
        given = self.template_date
        try:
            for system in ([], [{"role": "system", "content": "c"}]):
                for offered in (None, tools):
                    texts = set()
                    for self.template_date in (date(2013, 1, 6), date(2024, 10, 29)):
                        with contextlib.suppress(Exception):  # a template is a program: it may refuse any of these
                            texts.add(self.render([*system, *asked], offered))
                    if len(texts) > 1:
                        return True
        finally:
            self.template_date = given
        return False

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_guarded"}

    @cached_property
    def _backend(self) -> tokenizers.Tokenizer:
        backend = self.hf.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = False
        return backend

    @cached_property
    def _guarded(self) -> tokenizers.Tokenizer:
        data = json.loads(self._backend.to_str())
        rename = self._stand_in
        for token in data["added_tokens"]:
            token["content"] = rename.get(token["content"], token["content"])
        model = data["model"]
        if isinstance(model.get("vocab"), dict):
            model["vocab"] = {rename.get(piece, piece): i for piece, i in model["vocab"].items()}
        elif isinstance(model.get("vocab"), list):
            model["vocab"] = [[rename.get(piece, piece), score] for piece, score in model["vocab"]]
        if model.get("unk_token"):
            model["unk_token"] = rename.get(model["unk_token"], model["unk_token"])
        return tokenizers.Tokenizer.from_str(json.dumps(data))


def _from_folder(folder: Path) -> Any:
    from transformers import AutoTokenizer  # not above: it imports torch, which `megasft validate` may do without

    try:
        hf = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # transformers raises OSError, ValueError, KeyError or plain Exception, as it happens
        reason = (str(error).strip() or type(error).__name__).split("\n")[0]
        raise UserError(f"{folder}: no tokenizer could be loaded from this folder ({reason})") from error
    # transformers 5 makes a tokenizer of a folder without one, by its model_type, with special tokens alone.
    if hf.get_vocab().keys() <= {token.content for token in hf.added_tokens_decoder.values()}:
        files = "tokenizer.json, tokenizer.model or vocab.json"
        raise UserError(f"{folder}: no tokenizer could be loaded from this folder (it has no {files})")
    if not getattr(hf, "is_fast", False):
        raise UserError(f"{folder}: {type(hf).__name__} runs in Python and gives no offsets; add a tokenizer.json")
    model = folder / "tokenizer.model"
    if model.exists() and not (folder / "tokenizer.json").exists():
        _check_conversion(hf, _sentencepiece(model), model)
    return hf


def _from_sentencepiece(model: Path) -> Any:
    """Load through transformers' converter, from a folder that holds this one file under the name it looks for."""
    processor = _sentencepiece(model)
    with tempfile.TemporaryDirectory() as folder:
        shutil.copyfile(model, Path(folder) / "tokenizer.model")
        hf = _from_folder(Path(folder))
    if hf.eos_token is None and processor.eos_id() >= 0:
        hf.eos_token = processor.IdToPiece(processor.eos_id())
    return hf


def _sentencepiece(model: Path) -> Any:
    import sentencepiece

    try:
        return sentencepiece.SentencePieceProcessor(model_file=str(model))
    except (RuntimeError, OSError) as error:
        raise UserError(f"{model}: not a SentencePiece model") from error


def _check_conversion(hf: Any, processor: Any, model: Path) -> None:
    """Refuse a model that transformers takes for another kind (it reads unigram models as BPE if the class is Llama's).

    Compared from the second word on: transformers leaves out the space that SentencePiece puts before a whole text.
    """
    probe = "Compare the quick brown fox, 12 lazy dogs and the weather in other words."
    found = hf.backend_tokenizer.encode(probe, add_special_tokens=False).tokens
    expected = processor.encode(probe, out_type=str)
    second_word = [next((i for i, t in enumerate(p) if i and t.startswith("▁")), 0) for p in (found, expected)]
    if found[second_word[0] :] != expected[second_word[1] :]:
        raise UserError(
            f"{model}: transformers tokenizes with this model otherwise than SentencePiece does; "
            "correct `tokenizer_class` in tokenizer_config.json, or add a tokenizer.json"
        )
