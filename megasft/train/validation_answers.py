"""Answers to validation conversations during training, and their scores."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megasft.config.measures import SCORES, listed
from megasft.config.schema import RunConfig
from megasft.data.account import Place
from megasft.data.dataset import Mix
from megasft.data.records import conversation_files
from megasft.data.tokenizer import ChatTokenizer, load_tokenizer
from megasft.distributed.topology import Topology
from megasft.evaluation.answers import answer_all, sums_by_conversation
from megasft.evaluation.questions import Questions, ask
from megasft.evaluation.score import score
from megasft.evaluation.statistics import ratio
from megasft.evaluation.tool_calls import Reply
from megasft.generation.text import stop_tokens
from megasft.messages import UserError
from megasft.model.hf_config import read_config
from megasft.model.hub import find_model
from megasft.model.qwen3_moe import Qwen3Moe


@dataclass(frozen=True)
class ValidationAnswers:
    """The questions of `[training.validation] generate`, the same at each validation. Rank 0 has the tokenizer."""

    questions: Questions
    stop: frozenset[int]
    max_new_tokens: int
    tokenizer: ChatTokenizer | None = None

    @classmethod
    def prepare(cls, config: RunConfig, topology: Topology, validation: Mix) -> "ValidationAnswers | None":
        """Read the conversations on rank 0; every rank calls it. None where no answers are asked for.

        Raises UserError for samples that come from no file, where no turn can be answered, and where the best model is
        to be found by a score that none of the turns has.
        """
        settings = config.training.validation
        if not settings.generate:
            return None
        folder = find_model(config.job.model)
        tokenizers: list[ChatTokenizer] = []

        def read() -> tuple[Questions, frozenset[int]]:
            hf_config = read_config(folder)
            tokenizers.append(load_tokenizer(folder, config.data.template_args, config.data.template_date))
            files, places = _places(validation)
            context = hf_config.max_position_embeddings
            questions = ask(files, places, settings.generate, tokenizers[0], config, context)
            _check_metric(config, questions)
            return questions, stop_tokens(folder, hf_config, tokenizers[0])

        questions, stop = topology.from_first(read)
        return cls(questions, stop, settings.max_new_tokens, *tokenizers)

    def measure(self, model: Qwen3Moe, on_step: Callable[[], None]) -> dict[str, float]:
        """The scores of the model's answers; every rank calls it and gets the same."""
        answers = answer_all(model, self.questions, self.tokenizer, self.stop, self.max_new_tokens, on_step)
        sums = sums_by_conversation(self.questions, answers, max(self.questions.chosen) + 1)
        return {name: ratio(found) for name, found in sums.items()}


def _places(validation: Mix) -> tuple[list[Path], list[Place]]:
    """The files of all sources, and where in them the validation's conversations are, sorted."""
    files: list[Path] = []
    places: set[Place] = set()
    for source in validation.sources:
        if source.places is None or not source.path:
            raise UserError("[training.validation] generate: needs validation conversations that were read from a file")
        first = len(files)
        files += conversation_files(source.path)
        for number in source.places.tolist():
            place = Place.of(number)
            places.add(Place(first + place.file, place.line))
    return files, sorted(places)


def _check_metric(config: RunConfig, questions: Questions) -> None:
    metric = config.training.validation.metric_for_best_model.removeprefix("val.")
    measured = scores_of(questions)
    if metric in SCORES and metric not in measured:
        share = SCORES[metric].partition(":")[0]
        raise UserError(
            f"[training.validation] metric_for_best_model = val.{metric}: a share of {share}, of which the validation "
            f"conversations that are answered have none; they give {listed(measured)}"
        )


def scores_of(questions: Questions) -> Sequence[str]:
    """The scores that answers to these questions have, whatever they are."""
    found = {"exact_match", "cut_off"}
    if questions.format is not None:
        shares = [score(question.reference, Reply("")) for question in questions.asked]
        found |= {name for one in shares for name, share in one.items() if share.all}
    return [name for name in SCORES if name in found]
