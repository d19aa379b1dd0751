"""A record of each format that people have, and the `messages` that become of it."""

import json


def system(text):
    return {"role": "system", "content": text}


def user(text, **keys):
    return {"role": "user", "content": text, **keys}


def assistant(text, *calls, **keys):
    return {"role": "assistant", "content": text, **({"tool_calls": list(calls)} if calls else {}), **keys}


def tool(text, **keys):
    return {"role": "tool", "content": text, **keys}


def call(name, arguments, **keys):
    return {"type": "function", "function": {"name": name, "arguments": arguments}, **keys}


def turns(*pairs):
    return {"conversations": [{"from": who, "value": what} for who, what in pairs]}


F = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
HERMES = f"You can call functions.\n<tools> </tools> hold them:\n<tools>\n[{json.dumps(F)}]\n</tools>\nAnswer in JSON."
PART = {"text": "part"}
USE = {"toolUse": {"toolUseId": "1", "name": "f", "input": {"é": [1]}}}
RESULT = {"toolResult": {"toolUseId": "1", "content": [{"text": "r"}, {"json": {"é": 1}}], "status": "success"}}

RIGHT = {
    "sharegpt": (
        turns(("system", "Be brief."), ("human", "hi"), ("gpt", "grüß dich")) | {"id": "x1"},
        {"messages": [system("Be brief."), user("hi"), assistant("grüß dich")], "id": "x1"},
    ),
    "sharegpt, roles in other words and keys": (
        {"conversation": [{"role": "User", "content": "a"}, {"role": "ChatGPT", "value": "b", "weight": 0}]},
        {"messages": [user("a"), assistant("b", weight=0)]},
    ),
    "sharegpt, empty system": (
        turns(("system", ""), ("human", "a"), ("gpt", "b")),
        {"messages": [user("a"), assistant("b")]},
    ),
    "sharegpt, system beside it": (
        turns(("human", "a"), ("gpt", "b")) | {"system": "s"},
        {"messages": [system("s"), user("a"), assistant("b")]},
    ),
    "sharegpt, null fields": (
        {"conversations": [{"from": "human", "value": "a", "weight": None}, {"from": "gpt", "value": "b", "content": None}], "tools": None},
        {"messages": [user("a", weight=None), assistant("b")], "tools": None},
    ),
    "sharegpt, parallel calls and observations": (
        turns(
            ("human", "a"), ("gpt", "I look."), ("function_call", '{"name": "f", "arguments": {"é": 1}}'), ("function_call", '[{"name": "g", "arguments": "{}"}]'),
            ("observation", "1"), ("tool", "2"), ("gpt", "b"),
        ),
        {"messages": [user("a"), assistant("I look.", call("f", {"é": 1}), call("g", "{}")), tool("1"), tool("2"), assistant("b")]},
    ),
    "sharegpt, call with another flag than the text before it": (
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b", "loss": False}, {"from": "function_call", "value": '{"name": "f"}'}]},
        {"messages": [user("a"), assistant("b", loss=False), assistant("", call("f", None))]},
    ),
    "sharegpt, as JSON text": (
        {"conversations": json.dumps(turns(("human", "a"), ("gpt", "é"))["conversations"])},
        {"messages": [user("a"), assistant("é")]},
    ),
    "sharegpt, as an object of lists": (
        {"conversations": {"from": ["human", "gpt"], "value": ["a", "b"]}},
        {"messages": [user("a"), assistant("b")]},
    ),
    "hermes": (
        turns(
            ("system", HERMES), ("human", "a"), ("gpt", "I look.\n<tool_call>\n{'name': 'f', 'arguments': {'x': True}}\n</tool_call>\n<tool_call>{\"name\": \"f\", \"arguments\": {}}</tool_call>"),
            ("tool", "<tool_response>\n{\"r\": 1}\n</tool_response>\n<tool_response>\n 2\n</tool_response>"), ("gpt", "b"),
        ),
        {
            "messages": [
                system("You can call functions.\n<tools> </tools> hold them:\nAnswer in JSON."), user("a"), assistant("I look.", call("f", {"x": True}), call("f", {})),
                tool('{"r": 1}'), tool(" 2"), assistant("b"),
            ],
            "tools": [F],
        },
    ),
    "hermes, tools in a column too": (
        turns(("system", f"<tools>{json.dumps(F)}</tools>"), ("human", "a"), ("gpt", "b")) | {"tools": json.dumps([F])},
        {"messages": [user("a"), assistant("b")], "tools": json.dumps([F])},
    ),
    "hermes, results in a user turn": (
        turns(("system", HERMES), ("human", "a"), ("gpt", '<tool_call>{"name": "f"}</tool_call>'), ("human", "<tool_response>r</tool_response>"), ("gpt", "b")),
        {"messages": [system("You can call functions.\n<tools> </tools> hold them:\nAnswer in JSON."), user("a"), assistant("", call("f", None)), tool("r"), assistant("b")], "tools": [F]},
    ),
    "alpaca": (
        {"instruction": "Add.", "input": "1, 2", "output": "3"},
        {"messages": [user("Add.\n1, 2"), assistant("3")]},
    ),
    "alpaca, missing input": ({"instruction": "a", "output": "b"}, {"messages": [user("a"), assistant("b")]}),
    "alpaca, empty and null fields": (
        {"instruction": "a", "input": "", "output": "b", "system": "", "history": None},
        {"messages": [user("a"), assistant("b")]},
    ),
    "alpaca, history and system": (
        {"instruction": "c", "input": None, "output": "d", "system": "s", "history": [["a", "b"]]},
        {"messages": [system("s"), user("a"), assistant("b"), user("c"), assistant("d")]},
    ),
    "dolly": (
        {"instruction": "Who?", "context": "It was Ana.", "response": "Ana", "category": "qa"},
        {"messages": [user("Who?\nIt was Ana."), assistant("Ana")], "category": "qa"},
    ),
    "prompt and completion": ({"prompt": "a", "completion": "b"}, {"messages": [user("a"), assistant("b")]}),
    "prompt and response": ({"prompt": "a", "response": "b"}, {"messages": [user("a"), assistant("b")]}),
    "question and answer": ({"question": "a", "answer": "b"}, {"messages": [user("a"), assistant("b")]}),
    "input and output": ({"input": "a", "output": "b"}, {"messages": [user("a"), assistant("b")]}),
    "question and response with a system prompt": (
        {"id": "7", "system_prompt": "s", "question": "a", "response": "b"},
        {"messages": [system("s"), user("a"), assistant("b")], "id": "7"},
    ),
    "pair with reasoning": (
        {"question": "a", "reasoning": "hm", "answer": "b"},
        {"messages": [user("a"), assistant("b", reasoning="hm")]},
    ),
    "prompt and completion as messages": (
        {"prompt": [user("a"), assistant("b"), user("c")], "completion": [assistant("d")], "tools": [F]},
        {"messages": [user("a"), assistant("b", loss=False), user("c"), assistant("d")], "tools": [F]},
    ),
    "prompt as messages, completion as text": (
        {"prompt": [system("s"), user("a")], "completion": "b"},
        {"messages": [system("s"), user("a"), assistant("b")]},
    ),
    "openai": (
        {"messages": [user("a"), assistant("b", weight=0), user("c"), assistant("d", weight=1)], "parallel_tool_calls": False},
        {"messages": [user("a"), assistant("b", weight=0), user("c"), assistant("d", weight=1)], "parallel_tool_calls": False},
    ),
    "openai, functions": (
        {"messages": [user("a"), {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}}], "functions": [F["function"]]},
        {"messages": [user("a"), {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}}], "functions": [F["function"]]},
    ),
    "messages as JSON text": ({"messages": json.dumps([user("a"), assistant("é")])}, {"messages": [user("a"), assistant("é")]}),
    "messages as a list of JSON texts": (
        {"messages": [json.dumps(user("a")), json.dumps(assistant("é"))]},
        {"messages": [user("a"), assistant("é")]},
    ),
    "messages as an object of lists": (
        {"messages": {"role": ["user", "assistant"], "content": ["a", "b"]}},
        {"messages": [user("a"), assistant("b")]},
    ),
    "bedrock, text": (
        {"schemaVersion": "bedrock-conversation-2024", "system": [{"text": "s"}], "messages": [user([PART]), assistant([{"text": "b"}])]},
        {"system": [{"text": "s"}], "messages": [user([PART]), assistant([{"text": "b"}])]},
    ),
    "bedrock, tools": (
        {
            "messages": [
                user([PART]),
                assistant([{"reasoningContent": {"reasoningText": {"text": "hm", "signature": "x"}}}, {"text": "I look."}, USE, {"toolUse": {"toolUseId": "2", "name": "g", "input": {}, "note": "n"}}]),
                user([RESULT, {"toolResult": {"toolUseId": "2", "content": [{"text": "r2"}], "status": "error"}}, {"text": "and?"}]), assistant([{"text": "b"}]),
            ],
            "toolConfig": {"tools": [{"toolSpec": {"name": "f", "description": "é", "inputSchema": {"json": {"type": "object"}}}}], "toolChoice": {"auto": {}}},
        },
        {
            "messages": [
                user([PART]),
                assistant([{"type": "thinking", "thinking": "hm", "signature": "x"}, {"type": "text", "text": "I look."}], call("f", {"é": [1]}, id="1"), call("g", {}, id="2"), note="n"),
                tool([{"type": "text", "text": "r"}, {"type": "text", "text": '{"é": 1}'}], tool_call_id="1", status="success"), tool("r2", tool_call_id="2", status="error"),
                user("and?"), assistant([{"text": "b"}]),
            ],
            "tools": [{"type": "function", "function": {"name": "f", "description": "é", "parameters": {"type": "object"}}}],
            "tool_choice": {"auto": {}},
        },
    ),
    "anthropic": (
        {
            "system": "s",
            "messages": [
                user("a"), assistant([{"type": "text", "text": "I look."}, {"type": "tool_use", "id": "1", "name": "f", "input": {"x": 1}}]),
                user([{"type": "tool_result", "tool_use_id": "1", "content": "r", "is_error": True}]), assistant("b"),
            ],
        },
        {"system": "s", "messages": [user("a"), assistant("I look.", call("f", {"x": 1}, id="1")), tool("r", tool_call_id="1", is_error=True), assistant("b")]},
    ),
    "trace": (
        {"dialogue": [user("a"), assistant("b", call("f", '{"é": 1}')), tool("r")], "assistant": {"content": "", "tool_calls": [call("g", {})]}, "tools": [F], "score": 1.0},
        {"messages": [user("a"), assistant("b", call("f", '{"é": 1}'), loss=False), tool("r"), assistant("", call("g", {}))], "tools": [F], "score": 1.0},
    ),
}  # fmt: skip
