"""The keys of a conversation file: what each of them means, and what happens to those that mean nothing here.

A key is read, or harmless and counted, or refused with the reason that stands beside it. A key that is in no table may
carry meaning (a system prompt, a mask, a thought), so it is refused by name too, unless `[data] ignore_keys` lists it;
at the top of a record, a number or a truth value under an unknown name is taken for harmless. A null, an empty text and
an empty list say nothing anywhere.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from megasft.data.problems import WrongError

READ, HARMLESS = "read", "harmless"


def _table(read: str, harmless: str, refused: Mapping[str, str] | None = None) -> dict[str, str]:
    """Key -> READ, HARMLESS or why it is refused, from keys with spaces between them."""
    table = dict.fromkeys(read.split(), READ) | dict.fromkeys(harmless.split(), HARMLESS)
    for keys, reason in (refused or {}).items():
        table |= dict.fromkeys(keys.split(), reason)
    return table


# --- what keys mean that have several names -------------------------------------------------------------------------

SYSTEM = ("system", "system_prompt", "system_message", "system_instruction")
REASONING = (
    "reasoning_content", "reasoning", "thinking", "thought", "thoughts", "thinking_content", "reasoning_text",
    "chain_of_thought", "cot", "reasoning_details", "thinking_blocks",
)  # fmt: skip
TRAINED = (  # true or 1: learned from
    "loss", "weight", "train", "trainable", "training", "is_trainable", "should_train", "train_on", "learn",
    "learnable", "loss_mask", "loss_weight", "loss_scale", "compute_loss", "calculate_loss", "has_loss", "supervised",
    "supervise",
)  # fmt: skip
UNTRAINED = (  # true or 1: not learned from
    "masked", "is_masked", "mask_loss", "loss_masked", "ignore_loss", "skip_loss", "no_loss", "no_train",
    "do_not_train", "exclude_from_loss", "untrained",
)  # fmt: skip
ARGUMENTS = ("arguments", "parameters", "input", "args")

# --- the tables ------------------------------------------------------------------------------------------------------

_IDS = "id ids uid uuid index idx hash sha sha256 md5 checksum version status type object"
_TIMES = "timestamp created created_at updated updated_at date time datetime"
_ORIGINS = "model models model_name model_id provider source sources origin author user_id url urls license"
_MEASURES = (
    "score scores rating ratings reward rewards quality confidence tokens token_count num_tokens usage cost latency "
    "duration length lengths lang language languages locale metadata meta extra extra_info annotations citations "
    "logprobs finish_reason stop_reason finish safety moderation"
)
_TEXT_ELSEWHERE = "is text beside `messages` that the model would not see; put it into a message, or remove it"
_PREFERENCE = "belongs to preference data; megasft learns from `messages` alone"
_TEMPLATE_VARIABLE = "is a variable of chat templates; put it into `chat_template_kwargs` or [data] template_args"
_TOOLS_NAMED_OTHERWISE = "is not read; name the list of tools `tools`"
_MEDIA = "is not text; megasft trains on text alone"
_WHICH = "does not say whether the message is learned from or left out; write `loss`: true or false"
_CONVERT = "belongs to another format; `megasft convert` rewrites the file"

RECORD = _table(
    read=f"messages tools functions chat_template_kwargs {' '.join(SYSTEM)}",
    harmless=f"{_IDS} {_TIMES} {_ORIGINS} {_MEASURES} key keys conversation_id conv_id chat_id session_id thread_id "
    "trace_id request_id sample_id example_id row_id row prompt_id task_id instance_id dataset dataset_name "
    "data_source provenance split subset config category categories topic topics domain domains tag tags difficulty "
    "upvotes votes likes elo generator teacher seed temperature top_p top_k max_tokens n turns n_turns num_turns "
    "num_messages new_tokens success passed verified resolved title name comment comments notes tool_choice "
    "parallel_tool_calls stream store user function_call exit_status repo repository commit path file filename line "
    "num_tools",
    refused={
        "prompt completion instruction input output response question answer query text context background knowledge "
        "history preamble persona": _TEXT_ELSEWHERE,
        "conversations conversation dialogue dialog": _CONVERT,
        "chosen rejected preferred dispreferred label labels kto_tag": _PREFERENCE,
        "enable_thinking add_generation_prompt documents reasoning_effort thinking_budget date_string "
        "builtin_tools custom_tools tools_in_user_message": _TEMPLATE_VARIABLE,
        "tool_definitions tool_schemas tool_specs available_tools tools_json tool_config toolConfig apis "
        "function_definitions": _TOOLS_NAMED_OTHERWISE,
        "images image audio audios video videos": _MEDIA,
        "instructions developer systemPrompt systemInstruction": "is not read; name the system prompt `system`",
        " ".join(REASONING): "belongs to an assistant message, as its `reasoning_content`",
        "mask": _WHICH,
        "response_format": "asks for a form of answer that no message mentions; put it into the system prompt",
    },
)
MESSAGE = _table(
    read="role content name tool_name tool_call_id call_id tool_calls function_call "
    f"{' '.join([*REASONING, *TRAINED, *UNTRAINED])}",
    harmless=f"{_IDS} {_TIMES} {_ORIGINS} {_MEASURES} message_id msg_id turn turn_id turn_index parent parent_id "
    "parent_message_id end_turn cache_control created_by signature thinking_signature reasoning_signature "
    "encrypted_content is_error",
    refused={
        "from value": _CONVERT,
        "text": "is not read; name the text `content`",
        "refusal": "is not read; put the refusal into `content`",
        "audio images image video videos": _MEDIA,
        "mask ignore label labels target": _WHICH,
        "train_detail training_detail train_details": "masks a part of a message; write `loss` for the whole message",
    },
)
TOOL_CALL = _table(
    read=f"type function name id {' '.join(ARGUMENTS)}",
    harmless="index status signature thought_signature call_id tool_call_id cache_control parsed_arguments",
)
FUNCTION = _table(
    read=f"name {' '.join(ARGUMENTS)}",
    harmless="description strict parsed_arguments id index",
)
TEXT_PART = _table(
    read="type text",
    harmless="cache_control annotations citations index id logprobs",
)
REASONING_PART = _table(
    read="type text thinking reasoning summary",
    harmless="cache_control signature index id format data encrypted_content",
)

_HARMLESS_NAME = re.compile(
    r"(num|n)_\w+|meta_\w+|__\w+__|\w+_(id|ids|uuid|score|scores|rating|reward|url|urls|hash|sha|count|counts|at|date"
    r"|time|timestamp|source|model|version|lang|language|license|tokens|length)"
)


def check_keys(
    found: Mapping[str, Any],
    table: Mapping[str, str],
    where: str,
    notes: Counter[str],
    ignored: Iterable[str] = (),
    said: Iterable[str] | None = None,
) -> None:
    """Count the keys of an object that are passed over; raise WrongError for one that may carry meaning.

    Args:
        where: what the object is called in messages, "" for the record itself.
        notes: gets `ignored key `...`` for each harmless one.
        ignored: what `[data] ignore_keys` lists.
        said: of a record, the texts of its messages: a text that one of them holds too is lost by nobody.
    """
    for key, value in found.items():
        fate = table.get(key, "")
        if value is None or value in ("", [], {}):
            continue
        if fate == READ and (key in ARGUMENTS or not says_nothing(value)):
            continue
        top = said is not None
        harmless = fate == HARMLESS or says_nothing(value) or (top and _is_harmless(key, value, fate, said or ()))
        if key in ignored or harmless:
            notes[f"ignored key `{_kind(where)}{key}`"] += 1
            continue
        place = f"{where}: " if where else ""
        if fate:
            raise WrongError(f"{place}`{key}` {fate}; or pass over it with [data] ignore_keys = [{key!r}]", value)
        raise WrongError(
            f"{place}the key `{key}` is not known and may carry meaning; remove it, or pass over it with "
            f"[data] ignore_keys = [{key!r}]",
            value,
        )


def says_nothing(value: Any) -> bool:
    """Whether a value is null, empty, or made of nothing but nulls, as tables fill in objects that are not there."""
    if isinstance(value, dict | list):
        return all(says_nothing(item) for item in (value.values() if isinstance(value, dict) else value))
    return value is None or value == ""


def read_flags(found: Mapping[str, Any], where: str) -> bool | None:
    """Whether an object says that it is learned from: true, false, or None where it does not say. Raises WrongError."""
    verdicts: dict[str, bool] = {}
    for keys, meaning in ((TRAINED, True), (UNTRAINED, False)):
        for key in keys:
            value = found.get(key)
            if value is None:
                continue
            if not isinstance(value, int | float) or value not in (0, 1):
                raise WrongError(
                    f"{where}: `{key}` can be 0 or 1, false or true; other weights and masks are not supported", found
                )
            verdicts[key] = bool(value) == meaning
    if len(set(verdicts.values())) > 1:
        first, other = next(iter(verdicts)), next(k for k, v in verdicts.items() if v != next(iter(verdicts.values())))
        raise WrongError(f"{where}: `{first}` and `{other}` contradict each other", found)
    return next(iter(verdicts.values()), None)


def _is_harmless(key: str, value: Any, fate: str, said: Iterable[str]) -> bool:
    """Whether a record's key may be passed over."""
    if isinstance(value, str) and value.strip() in said:
        return True
    return not fate and (isinstance(value, int | float) or _HARMLESS_NAME.fullmatch(key) is not None)


def _kind(where: str) -> str:
    """`messages[3].tool_calls[0]` -> `messages[].tool_calls[].`"""
    return re.sub(r"\[\d+\]", "[]", where) + "." if where else ""
