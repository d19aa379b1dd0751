"""Agent traces become conversations that the reader accepts, with their tool calls structured."""

import json
import runpy
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from megasft.data.conversations import Conversation, read_conversations

TOOL = runpy.run_path(str(Path(__file__).parents[2] / "tools" / "convert_traces.py"))
STEP = {
    "dialogue": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "weather?"},
        {"role": "assistant", "content": None, "tool_calls": [{"name": "weather", "arguments": '{"city": "Päris"}'}]},
        {"role": "tool", "content": "mild"},
    ],
    "assistant": {"content": "", "tool_calls": [{"function": {"name": "say", "arguments": {"text": "mild"}}}]},
    "tools": [{"type": "function", "function": {"name": "weather"}}],
    "score": 1.0,
}


@pytest.fixture
def run(tmp_path):
    """Convert lines with the command; give its result and the conversations it wrote."""

    def convert(*traces, options=()):
        source, output = tmp_path / "traces.jsonl", tmp_path / "conversations.jsonl"
        source.write_text("\n".join(t if isinstance(t, str) else json.dumps(t) for t in traces))
        app = typer.Typer()
        app.command()(TOOL["main"])
        result = CliRunner().invoke(app, [str(source), str(output), *options])
        return result, list(read_conversations(output)) if output.exists() and output.stat().st_size else []

    return convert


def call(name, **arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def test_a_trace_becomes_a_conversation_with_structured_calls(run):
    result, (conversation,) = run(STEP)
    assert result.exit_code == 0
    assert isinstance(conversation, Conversation)
    roles = [message["role"] for message in conversation.messages]
    assert roles == ["system", "user", "assistant", "tool", "assistant"]
    assert conversation.messages[2]["tool_calls"] == [call("weather", city="Päris")]
    assert conversation.messages[4]["tool_calls"] == [call("say", text="mild")]
    assert conversation.tools == STEP["tools"]
    assert conversation.supervised == (False, False, False, False, True)


def test_earlier_turns_can_be_trained_on_too(run):
    _, (conversation,) = run(STEP, options=["--train-on", "all"])
    assert conversation.supervised == (False, False, True, False, True)


def test_bad_traces_are_reported_by_line_and_the_others_written(run):
    bad_call = {**STEP, "assistant": {"content": "x", "tool_calls": [{"name": "f", "arguments": "{"}]}}
    result, conversations = run("{", {"dialogue": "x"}, STEP, {**STEP, "assistant": None}, bad_call, STEP)
    assert result.exit_code == 1
    assert len(conversations) == 2
    for line, reason in ((1, "not JSON"), (2, "`dialogue`"), (4, "`assistant`"), (5, "`arguments` is not JSON")):
        assert f"traces.jsonl:{line}: " in result.output
        assert reason in result.output
    assert "2 conversations written" in result.output
    assert "4 traces left out" in result.output


def test_what_cannot_be_done_is_one_line_and_exit_code_2(run, tmp_path):
    result, _ = run(STEP, options=["--train-on", "some"])
    assert result.exit_code == 2
    assert result.output.startswith("error: --train-on some")
    app = typer.Typer()
    app.command()(TOOL["main"])
    same = str(tmp_path / "traces.jsonl")
    result = CliRunner().invoke(app, [same, same])
    assert result.exit_code == 2
    assert "write to another file" in result.output
    assert json.loads((tmp_path / "traces.jsonl").read_text()) == STEP
