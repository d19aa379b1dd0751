"""What `megasft evaluate` was asked for; checked before any rank is launched."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megasft.checks.preflight import check_data
from megasft.config.parallelism import TopologySizes
from megasft.config.schema import RunConfig
from megasft.generation.request import Request
from megasft.messages import UserError

Count = int | Literal["all"]


@dataclass(frozen=True)
class EvaluationRequest:
    """The arguments of one `megasft evaluate`.

    Attributes:
        model: model, adapter, precision and topology.
        config: the treatment of data.
        generate: of how many conversations to answer the turns; 0: of none.
        output: a JSON Lines file to write, with a line for each conversation.
    """

    model: Request
    config: RunConfig
    data: str
    generate: Count = 0
    max_new_tokens: int = 512
    as_json: bool = False
    output: Path | None = None

    def sizes(self, ranks: int) -> TopologySizes:
        """The topology on so many ranks. Raises UserError unless they hold the model some times over."""
        if ranks % (least := self.model.ranks()):
            raise UserError(
                f"{ranks} ranks: the topology puts one model on {least}; use {least} ranks, or a multiple of it"
            )
        return self.model.sizes(ranks)

    def check(self, sizes: TopologySizes) -> None:
        """Raise UserError for input that is missing or does not fit; reads no weights."""
        check_data(self.data, self.config.data.on_error == "stop")
        if self.output is not None:
            folder = self.output.absolute().parent
            if not folder.is_dir() or self.output.is_dir() or not os.access(folder, os.W_OK):
                raise UserError(f"--output {self.output}: cannot be written; name a file in a folder that exists")
        self.model.check(sizes)


def read_count(text: str | None) -> Count:
    """The argument of --generate. Raises UserError."""
    if text is None:
        return 0
    if text == "all":
        return "all"
    if not text.isascii() or not text.isdigit() or not int(text):
        raise UserError(
            f"--generate {text}: must be a number of conversations, 1 or more, or all; without it only losses are "
            "measured"
        )
    return int(text)


def find_data(data: str | None, config: RunConfig | None, target: str) -> str:
    """The conversations to evaluate on: those named, or those that the run `target` validated on. Raises UserError."""
    if data is not None:
        return data
    if config is None:
        raise UserError(
            f"nothing to evaluate on, as {target} is not a run; name DATA, a file or folder of conversations, behind it"
        )
    if config.data.validation_path is None:
        raise UserError(
            f"nothing to evaluate on, as the run {target} has no [data] validation_path; name DATA, a file or folder "
            "of conversations, behind it"
        )
    return config.data.validation_path
