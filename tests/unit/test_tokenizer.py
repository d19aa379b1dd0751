"""Tokenizers: what a folder has to hold, and the tokens that end a turn."""

import json
import shutil

import pytest

from megasft.data.tokenizer import load_tokenizer
from megasft.messages import UserError
from tests.unit.conftest import TEMPLATES


def write(folder, name, content):
    (folder / name).write_text(json.dumps(content))


def test_a_folder_without_files_of_a_tokenizer_is_refused_by_their_names(tmp_path):
    # transformers would make a tokenizer of special tokens alone, by the model type.
    write(tmp_path, "config.json", {"model_type": "qwen3_moe"})
    with pytest.raises(UserError, match=r"no tokenizer could be loaded from this folder \(it has no tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_without_offsets_is_refused(tmp_path):
    write(tmp_path, "config.json", {"model_type": "t5"})
    write(tmp_path, "tokenizer_config.json", {"tokenizer_class": "ByT5Tokenizer"})
    (tmp_path / "chat_template.jinja").write_text((TEMPLATES / "chatml.jinja").read_text())
    with pytest.raises(UserError, match=r"ByT5Tokenizer runs in Python and gives no offsets; add a tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_the_templates_tokens_are_tokens_though_the_folder_asks_to_split_them(bpe_folder, tmp_path):
    shutil.copytree(bpe_folder, tmp_path, dirs_exist_ok=True)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    write(tmp_path, "tokenizer_config.json", settings | {"split_special_tokens": True})
    (tmp_path / "chat_template.jinja").write_text((TEMPLATES / "chatml.jinja").read_text())
    tokenizer = load_tokenizer(tmp_path)
    (encoding,) = tokenizer.encode(["<|im_start|>a<|im_end|>"])
    assert encoding.ids[0] == tokenizer.hf.convert_tokens_to_ids("<|im_start|>")
    assert encoding.ids[-1] == tokenizer.eos_id == tokenizer.hf.convert_tokens_to_ids("<|im_end|>")


def test_a_turn_ends_with_the_templates_token_or_where_none_was_found_with_the_tokenizers(with_template):
    found = with_template("header_ids")
    assert found.hf.eos_token == "<|end|>"
    assert found.decode([found.eos_id]) == "<|eot_id|>"
    bare = with_template("{% for message in messages %}{{ message.content }} {% endfor %}")
    assert bare.frame is None
    assert bare.frame_error
    assert bare.decode([bare.eos_id]) == "<|end|>"
