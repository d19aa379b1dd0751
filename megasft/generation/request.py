"""What `megasft generate` was asked for: model, adapter, topology, prompts; checked before any rank is launched."""

import json
import math
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from megasft.config.parallelism import TopologySettings, TopologySizes, derive, resolve_topology
from megasft.config.schema import QuantSettings
from megasft.data.records import conversation_files
from megasft.messages import UserError

if TYPE_CHECKING:  # transformers takes seconds
    from transformers import Qwen3MoeConfig

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank may be (vLLM 0.32, MaxLoRARanks)


@dataclass(frozen=True)
class Request:
    """The arguments of one `megasft generate`.

    Attributes:
        model: a folder or hub id.
        adapter: the folder of a PEFT adapter; None for the base alone.
        dtype: None for that of the model's config.json.
        topology: its data_parallel is not used.
        prompt: the user's message; None to ask on a terminal, or to read standard input.
        system: the system prompt.
        tools: a JSON file with a list of tools for the chat template.
        template: variables of the chat template; `run_template` those of the run, which they override. Those of a
            record in `jsonl` lie between.
        jsonl: a file of conversations to answer, in place of a prompt.
    """

    model: str
    adapter: str | None = None
    dtype: Literal["bf16", "fp32"] | None = None
    topology: TopologySettings = field(default_factory=TopologySettings)
    prompt: str | None = None
    system: str | None = None
    tools: Path | None = None
    template: dict[str, Any] = field(default_factory=dict)
    jsonl: Path | None = None
    max_new_tokens: int = 512
    sampling: dict[str, Any] = field(default_factory=dict)  # arguments of Sampler
    quant: QuantSettings | None = None  # for a 4-bit base
    run_template: dict[str, Any] = field(default_factory=dict)

    def ranks(self) -> int:
        """The fewest ranks that hold one replica: experts may be sharded over tensor-parallel ranks."""
        sizes = derive(self._topology)
        return sizes.pipeline * math.lcm(sizes.tensor, sizes.expert_tensor * sizes.expert)

    def sizes(self, ranks: int) -> TopologySizes:
        """The topology on so many ranks; those beyond `ranks()` are replicas that compute the same answer."""
        return resolve_topology(self._topology, ranks)

    @property
    def _topology(self) -> TopologySettings:
        """With experts cut as the rest, unless asked otherwise: an answer is given several GPUs for their memory."""
        asked = self.topology
        cut = asked.tensor_parallel if (asked.expert_parallel or 1) == 1 else 1
        update = {"data_parallel": None, "expert_tensor_parallel": asked.expert_tensor_parallel or cut}
        return asked.model_copy(update=update)

    def precision(self, config: "Qwen3MoeConfig") -> str:
        """The precision that was asked for, or that of the model's config.json."""
        return self.dtype or ("fp32" if str(config.dtype) == "torch.float32" else "bf16")

    def check(self, sizes: TopologySizes) -> None:
        """Raise UserError for input that is missing or does not fit; reads no weights."""
        from megasft.model.hub import check_name, find_model

        if self.adapter is not None and not Path(self.adapter).is_dir():
            raise UserError(f"{self.adapter}: no such folder; --adapter names one that holds a PEFT adapter")
        check_name(self.model)
        read_tools(self.tools)
        if self.jsonl is not None:
            conversation_files(self.jsonl)
        # Imported after the paths were checked, as in `megasft.checks.preflight`: torch and transformers take seconds.
        from megasft.adapters.adapter_file import AdapterFile
        from megasft.adapters.fit import fitting_pairs, warn_of_other_base
        from megasft.checks import gpus
        from megasft.data.tokenizer import load_tokenizer
        from megasft.model.hf_checkpoint import Checkpoint
        from megasft.model.hf_config import read_config
        from megasft.model.shape import check_fits

        folder = find_model(self.model)
        config = read_config(folder)
        check_fits(config, sizes, self.quant)
        gpus.tell_if_slow(config)
        load_tokenizer(folder).check_vocabulary(config.vocab_size)
        Checkpoint(folder)
        if self.adapter is not None:
            adapter = AdapterFile(self.adapter)
            fitting_pairs(adapter, adapter.settings(), config)
            warn_of_other_base(adapter, self.model)

    def vllm_command(self) -> str:
        """The shell command with which vLLM serves this model and adapter.

        An adapter of the router is merged first: vLLM does not apply it (docs/adapters.md).
        """
        if self.adapter is None:
            return shlex.join(["vllm", "serve", self.model])
        from megasft.adapters.adapter_file import AdapterFile

        adapter, folder, prepare = AdapterFile(self.adapter), self.adapter.rstrip("/"), ""
        if adapter.routers():
            merge = ["megasft", "merge", folder, f"{folder}-merged", "--model", self.model]
            return f"{shlex.join(merge)} && {shlex.join(['vllm', 'serve', f'{folder}-merged'])}"
        r = adapter.settings().r
        if adapter.fused:
            prepare = shlex.join(["megasft", "export", folder, f"{folder}-per-expert"]) + " && "
            folder += "-per-expert"
        path = Path(self.adapter).absolute()
        name = path.parent.name if path.name in ("adapter", "best") else path.name
        rank = next((size for size in VLLM_RANKS if size >= r), r)
        options = ["--enable-lora", "--lora-modules", f"{name}={folder}", "--max-lora-rank", str(rank)]
        return prepare + shlex.join(["vllm", "serve", self.model, *options])


def check_sampling(temperature: float = 0.0, top_p: float = 1.0, top_k: int = 0, seed: int = 0) -> None:
    """Raise UserError for arguments of `Sampler` that are out of range or, at temperature 0, without effect."""
    if not (math.isfinite(temperature) and temperature >= 0):
        raise UserError(f"temperature = {temperature:g}: must be 0 (greedy) or more")
    if not 0 < top_p <= 1:
        raise UserError(f"top_p = {top_p:g}: must be above 0 and at most 1 (off)")
    if top_k < 0:
        raise UserError(f"top_k = {top_k}: must be 0 (off) or more")
    if not 0 <= seed < 2**63:
        raise UserError(f"seed = {seed}: must be 0 or more and below 2^63")
    if temperature == 0 and (top_p < 1 or top_k):
        raise UserError("top_p and top_k have no effect at temperature 0 (greedy); set a temperature above 0 too")


def read_tools(path: Path | None) -> list[dict[str, Any]] | None:
    """The tools in a JSON file: a list of objects, as templates take them. Raises UserError."""
    if path is None:
        return None
    try:
        tools = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"--tools {path}: not a readable JSON file ({error})") from None
    if not isinstance(tools, list) or not tools or not all(isinstance(tool, dict) for tool in tools):
        raise UserError(f"--tools {path}: must be a list of objects, one for each tool")
    return tools


def template_variables(arguments: list[str]) -> dict[str, Any]:
    """Parse `name=value`: a value that is JSON (`false`, `3`) is taken as such, anything else as a string."""
    variables = {}
    for argument in arguments:
        name, equals, text = argument.partition("=")
        if not equals or not name.isidentifier():
            raise UserError(f"--template-arg {argument}: must be name=value, as in enable_thinking=false")
        try:
            variables[name] = json.loads(text)
        except ValueError:
            variables[name] = text
    return variables
