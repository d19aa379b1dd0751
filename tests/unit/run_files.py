"""What the tests of run files share."""

import pytest

from megasft.config.schema import load_config
from megasft.messages import UserError

ALL_LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
EVERY_LAYER = ALL_LINEAR | {"gate"}


def refusal(call, *arguments, **named) -> str:
    with pytest.raises(UserError) as caught:
        call(*arguments, **named)
    message = str(caught.value)
    assert message
    assert len(message.splitlines()) == 1
    return message


def load_refusal(write, text, overrides=(), **named) -> str:
    return refusal(load_config, write(text), overrides, **named)


def table(section: str, key: str, toml_value: str) -> str:
    return f"[{section}]\n{key} = {toml_value}\n"
