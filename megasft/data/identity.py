"""Which data a run is trained on and in which order, and what of that has changed where a run resumes.

Imports neither torch nor megatron-core: most changes are refused before any rank is launched.
"""

import json
import zlib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megasft.data.records import SUFFIXES, conversation_files
from megasft.messages import UserError
from megasft.storage.digests import cached_sha256
from megasft.storage.disk_cache import default_cache_dir

if TYPE_CHECKING:
    from megasft.config.schema import RunConfig
    from megasft.data.dataset import Batches, Mix
    from megasft.data.tokenize import Recipe

MADE_OF = "made_of.json"  # in a folder of the token cache: what its samples were made of
_KEYS = {  # of a Recipe, by the key of the run file
    "sequence_length": "[hyperparameters] sequence_length",
    "train_on": "[data] train_on",
    "overlong": "[data] overlong",
    "parse_special_in_text": "[data] parse_special_in_text",
    "lost_reasoning": "[data] lost_reasoning",
    "ignore_keys": "[data] ignore_keys",
}


def data_identity(samples: "Mix", batches: "Batches") -> dict[str, Any]:
    """All that decides the rows of an epoch and their order, and what they were made of. JSON can hold it."""
    return {
        "samples": batches.samples,
        "lengths": zlib.crc32(samples.lengths.tobytes()),
        "seed": batches.seed,
        "row_length": batches.row_length,
        "sources": [list(source) for source in batches.sources],
        "content": [source.digest for source in samples.sources],
        "made_of": [source.made_of for source in samples.sources],  # in words; the others decide
    }


def refuse_other_data(then: dict[str, Any], now: dict[str, Any], allow_changed: bool) -> bool:
    """Whether two `data_identity` are of other data. Raises UserError naming what has changed, unless it may."""
    if all(then.get(key) == here for key, here in now.items() if key != "made_of"):
        return False
    if not allow_changed:
        _refuse(_difference(then, now))
    return True


def refuse_other_sources(then: dict[str, Any], config: "RunConfig") -> None:
    """The part of `refuse_other_data` that needs no tokens: packing, and the weights and content of files.

    `then` is a `data_identity`. Raises UserError.
    """
    sources = config.training_data()
    row_length = config.hyperparameters.sequence_length if config.data.packing else None
    weights = [[None, source.weight] for source in sources]
    # Another number of sources may be one whose every sample is held out: only their samples tell.
    comparable = len(weights) == len(_list(then, "sources"))
    if difference := _order_difference(then, {"row_length": row_length, "sources": weights}, comparable):
        _refuse(difference)
    if not comparable:
        return
    root = Path(config.data.cache_dir or default_cache_dir()).expanduser()
    for source, was in zip(sources, _list(then, "made_of"), strict=False):
        files = conversation_files(source.path)
        if isinstance(was, dict) and was.get("kinds") == _kinds(files) and was.get("files") != _digests(files, root):
            _refuse(f"{source.path} has other content")


def describe(files: Sequence[Path], digests: Sequence[str], tokenizer: str, recipe: "Recipe") -> str:
    """The text of `MADE_OF`. `digests` are of the files, `tokenizer` is the fingerprint of tokenizer and template."""
    return json.dumps(
        {"files": list(digests), "kinds": _kinds(files), "tokenizer": tokenizer, "recipe": asdict(recipe)}, indent=2
    )


def _refuse(difference: str) -> None:
    raise UserError(
        f"the training data are not those of the checkpoint: {difference}; restore that, or start a new run (set "
        'another [job] output_dir, or pass --resume never), or set [checkpoint] allow_changed = ["data"] to resume on '
        "the new data"
    )


def _difference(then: dict[str, Any], now: dict[str, Any]) -> str:
    """What has changed between two `data_identity`, in words."""
    if order := _order_difference(then, now):
        return order
    for number, (was, here) in enumerate(zip(_list(then, "made_of"), _list(now, "made_of"), strict=False), 1):
        if not (isinstance(was, dict) and isinstance(here, dict) and was and here):
            continue
        of = "" if len(_list(now, "made_of")) == 1 else f" of source {number} of [data] mix"
        recipe = was.get("recipe")
        for key, value in here["recipe"].items():
            if isinstance(recipe, dict) and key in recipe and recipe[key] != value:
                return f"{_KEYS[key]} = {_toml(value)} (was {_toml(recipe[key])})"
        if was.get("tokenizer") != here["tokenizer"]:
            return "the model's tokenizer, its chat template, [data] template_args or template_date have changed"
        if was.get("files") != here["files"]:
            return f"the content{of} has changed"
    if then.get("samples") != now["samples"]:
        return (
            f"{now['samples']:,} samples (were {then.get('samples')}); did [data] validation_fraction, validation_path "
            "or [training.validation] enabled change?"
        )
    if then.get("seed") != now["seed"]:
        return f"[job] seed = {now['seed']} (was {then.get('seed')})"
    return "their tokens differ; were they tokenized by other versions of megasft, transformers or tokenizers?"


def _order_difference(then: dict[str, Any], now: dict[str, Any], weights: bool = True) -> str | None:
    """What has changed of packing, or of the number of sources and their weights."""
    was, here = then.get("row_length"), now["row_length"]
    if (was is None) != (here is None):
        return f"[data] packing = {_toml(here is not None)} (was {_toml(was is not None)})"
    if was != here:
        return f"{_KEYS['sequence_length']} = {here} (was {was}), which sets the length of packed rows"
    before, after = (_list(then, "sources"), now["sources"]) if weights else ([], [])
    if len(before) != len(after):
        return f"{len(after)} training files in place of {len(before)}"
    for number, (old, new) in enumerate(zip(before, after, strict=True), 1):
        if isinstance(old, list) and old[1:] != new[1:]:
            return f"the weight of source {number} of [data] mix is {new[1]:g} (was {old[-1]})"
    return None


def _list(identity: dict[str, Any], key: str) -> list[Any]:
    found = identity.get(key)
    return found if isinstance(found, list) else []


def _digests(files: Sequence[Path], root: Path) -> list[str]:
    try:
        return [cached_sha256(file, root) for file in files]
    except OSError as error:
        raise UserError(f"{error.filename or files[0]}: cannot be read ({error.strerror})") from None


def _kinds(files: Sequence[Path]) -> list[str]:
    return [next(kind for kind in SUFFIXES if file.name.endswith(kind)) for file in files]


def _toml(value: Any) -> str:
    return json.dumps(value)
