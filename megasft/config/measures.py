"""What validations and evaluations measure, by name."""

from collections.abc import Iterable

LOSSES = ("loss", "perplexity")
MEASURED = (*LOSSES, "token_accuracy")  # in every validation
# Of answers: what each is a share of, and what counts.
SCORES = {
    "exact_match": "turns: text and calls are those of the reference",
    "call_parsable": "turns with calls: the answer calls, and every call can be read",
    "call_name": "reference calls: the answer calls this tool",
    "call_arguments": "reference arguments: the answer has the same value",
    "call_match": "turns with calls: all calls are right and there are no others",
    "unasked_call": "turns without calls: the answer calls",
    "cut_off": "turns: the answer did not come to its end",
}
LOWER_IS_BETTER = (*LOSSES, "unasked_call", "cut_off")


def check_metric(value: str) -> str:
    """A metric as `val.loss`; other trainers' prefixes are accepted."""
    name = value.removeprefix("val.").removeprefix("val_").removeprefix("eval_")
    if name not in (*MEASURED, *SCORES):
        raise ValueError(f"is not measured; megasft measures {listed(MEASURED)}, and with `generate` {listed(SCORES)}")
    return f"val.{name}"


def listed(names: Iterable[str]) -> str:
    """Names as `metric_for_best_model` takes them."""
    return ", ".join(f"val.{name}" for name in names)
