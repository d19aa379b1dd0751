"""Answers of llama.cpp on CPUs. Runs in .venv-serving: reads a job from standard input, writes its answers to a file.

llama.cpp's own converters make GGUF files of the model and of each adapter, and its server (in xllamacpp) answers: as
`examples/serving/llama_cpp_server.py` does, but without HTTP.
"""

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "serving"))
import xllamacpp
from llama_cpp_server import convert_adapter, convert_model, settings


def answer(server: xllamacpp.Server, prompt: list[int], new: int, top: int) -> dict[str, Any]:
    """Greedy tokens, and the log-probabilities of the `top` best at each step."""
    said = server.handle_completions({
        "prompt": prompt, "max_tokens": new, "logprobs": top, "temperature": 0.0, "ignore_eos": True, "cache_prompt": False,
    })  # fmt: skip
    steps = said["choices"][0]["logprobs"]["content"]
    return {
        "tokens": [step["id"] for step in steps],
        "top": [{str(found["id"]): found["logprob"] for found in step["top_logprobs"]} for step in steps],
    }


def main() -> None:
    """Answer every prompt of the job with every adapter of it, greedily."""
    job = json.load(sys.stdin)
    folder = Path(job["answers"]).parent
    base = str(folder / "model.gguf")
    convert_model(job["model"], base)
    answers: dict[str, Any] = {}
    for name, adapter in job["adapters"].items():
        path = str(folder / f"{name}.gguf") if adapter else ""
        try:
            if adapter:
                convert_adapter(adapter, job["model"], path)
            server = xllamacpp.Server(settings(base, path))
        except (Exception, SystemExit) as error:
            answers[name] = f"{type(error).__name__}: {error}"
            continue
        answers[name] = [answer(server, prompt, job["new"], job["top"]) for prompt in job["prompts"]]
    with open(job["answers"], "w") as file:
        json.dump(answers, file)


if __name__ == "__main__":
    main()
