"""Qwen3-MoE from a Hugging Face `config.json` to a megatron-core GPTModel with LoRA."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRotaryEmbedding

from megasft import host
from megasft.config import BLOCK_SIZES, LoraSettings, QuantSettings, TopologySizes
from megasft.errors import UserError
from megasft.model.attention import Segments, SelfAttention
from megasft.model.head import supervised_loss
from megasft.model.mlp import DenseMLP, Router, SparseMLP
from megasft.model.norm import RMSNorm
from megasft.shards import Shard, part, whole
from megasft.topology import Topology
from megasft.topology_sizes import choose_dispatcher

IGNORED = -100  # a label that is not supervised, as in torch and transformers
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
ROPE_TYPES = ("default", "linear", "yarn", "llama3")  # the others change with the length of the sequence


@dataclass
class MicroBatch:
    """Conversations laid end to end. T is a multiple of the tensor-parallel size.

    tokens, labels int64 [T]; labels[i] is the token to be predicted at position i, or IGNORED.
    """

    tokens: Tensor
    labels: Tensor
    segments: Segments


def read_config(folder: str | Path) -> Qwen3MoeConfig:
    """The architecture in `folder/config.json`. Raises UserError for anything that is not a Qwen3-MoE we can train."""
    path = Path(folder) / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        kind = raw.get("model_type")
    except FileNotFoundError:
        raise UserError(f"{folder}: not a model folder: it has no config.json") from None
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: not a readable model configuration ({error})") from None
    if kind != "qwen3_moe":
        raise UserError(f"{path}: model_type = {kind!r}; megasft trains 'qwen3_moe' models")
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if isinstance(rope, dict) and rope.get("rope_type", rope.get("type", "default")) not in ROPE_TYPES:
        # asked here because transformers remarks on it in words of its own
        raise UserError(f"{path}: rope_parameters = {rope!r} is not supported; known: {', '.join(ROPE_TYPES)}")
    try:
        config = Qwen3MoeConfig.from_dict(raw)
        _check_supported(config)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except Exception as error:  # transformers raises what it likes on a malformed configuration
        raise UserError(f"{path}: transformers refuses it: {' '.join(str(error).split())}") from None
    return config


def _check_supported(config: Qwen3MoeConfig) -> None:
    for key in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
                "intermediate_size", "moe_intermediate_size", "decoder_sparse_step"):  # fmt: skip
        if getattr(config, key) < 1:
            raise UserError(f"{key} = {getattr(config, key)!r} must be at least 1")
    if getattr(config, "quantization_config", None):
        raise UserError("quantization_config: weights that are quantized already cannot be loaded; take the bf16 model")
    refused = {
        "hidden_act": config.hidden_act != "silu",
        "attention_bias": config.attention_bias,
        "use_sliding_window": config.use_sliding_window,
        "num_experts": config.num_experts < 1,
        "num_experts_per_tok": not 1 <= config.num_experts_per_tok <= config.num_experts,
        "num_attention_heads": config.num_attention_heads % config.num_key_value_heads != 0,
        "rope_parameters": (config.rope_parameters or {}).get("rope_type") not in ROPE_TYPES,
    }
    for key, bad in refused.items():
        if bad:
            raise UserError(f"{key} = {getattr(config, key)!r} is not supported; no released Qwen3-MoE model has it")
    if config.num_experts_per_tok == 1 and config.norm_topk_prob:
        raise UserError("num_experts_per_tok = 1 with norm_topk_prob leaves the router nothing to weigh; unsupported")


def check_fits(config: Qwen3MoeConfig, sizes: TopologySizes, quant: QuantSettings | None = None) -> None:
    """Whether the model can be cut by this topology, with `quant` into whole blocks; raises UserError naming the number
    that does not divide.
    """
    dense = any(not sparse for sparse in sparse_layers(config))
    for key, n, name, by in (
        ("num_attention_heads", config.num_attention_heads, "tensor_parallel", sizes.tensor),
        ("num_key_value_heads", config.num_key_value_heads, "tensor_parallel", sizes.tensor),
        ("intermediate_size", config.intermediate_size if dense else 0, "tensor_parallel", sizes.tensor),
        ("num_experts", config.num_experts, "expert_parallel", sizes.expert),
        ("moe_intermediate_size", config.moe_intermediate_size, "expert_tensor_parallel", sizes.expert_tensor),
        ("num_hidden_layers", config.num_hidden_layers, "pipeline_parallel", sizes.pipeline),
    ):
        if n % by:
            fitting = ", ".join(str(d) for d in range(1, by) if n % d == 0)
            raise UserError(
                f"[data.topology] {name} = {by} does not divide the model's {key} = {n}; "
                f"smaller sizes that do: {fitting}"
            )
    if quant:
        _check_blocks(config, sizes, quant.block_size)


def _check_blocks(config: Qwen3MoeConfig, sizes: TopologySizes, size: int) -> None:
    """Whether the inputs of every linear layer that a rank holds are whole blocks of `size`."""
    sparse = sparse_layers(config)
    for layers, key, n, name, by in (
        ("q_proj, k_proj, v_proj, gate_proj and up_proj", "hidden_size", config.hidden_size, "", 1),
        ("o_proj", "num_attention_heads x head_dim", config.num_attention_heads * head_dim(config),
         "tensor_parallel", sizes.tensor),
        ("dense down_proj", "intermediate_size", 0 if all(sparse) else config.intermediate_size,
         "tensor_parallel", sizes.tensor),
        ("experts' down_proj", "moe_intermediate_size", config.moe_intermediate_size if any(sparse) else 0,
         "expert_tensor_parallel", sizes.expert_tensor),
    ):  # fmt: skip
        if n // by % size:
            cut = f" / {name} {by}" if by > 1 else ""
            fitting = [d for d in range(1, by) if by % d == 0 and n // d % size == 0]
            blocks = [b for b in BLOCK_SIZES if n // by % b == 0]
            remedies = [f"block_size = {blocks[-1]}"] if blocks and blocks[-1] < size else []
            remedies += [f"[data.topology] {name} = {fitting[-1]}"] if fitting else []
            remedies += ["[training] use_qlora = false"] if not remedies else []
            raise UserError(
                f"[quant] block_size = {size} does not divide the {n // by} inputs that a rank holds of {layers} "
                f"({key} {n}{cut}); set {' or '.join(remedies)}"
            )


def head_dim(config: Qwen3MoeConfig) -> int:
    """Width of an attention head; `head_dim` may be left out of config.json."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def sparse_layers(config: Qwen3MoeConfig) -> list[bool]:
    """For each layer, whether it has experts (else it is dense)."""
    return [
        i not in (config.mlp_only_layers or []) and (i + 1) % config.decoder_sparse_step == 0
        for i in range(config.num_hidden_layers)
    ]


def build_model(
    config: Qwen3MoeConfig,
    topology: Topology,
    lora: LoraSettings | None = None,
    dtype: torch.dtype = torch.bfloat16,
    recompute: bool = True,
    dispatcher: str = "auto",
    capacity_factor: float | None = None,
    quant: QuantSettings | None = None,
) -> "Qwen3Moe":
    """This rank's part of the model: storage for its base weights and, where `lora` names targets, zero adapters.

    `model.weights.load_base` fills the first, `lora.adapter` the second. `recompute` keeps each layer's input only and
    runs the layer again in backward. `capacity_factor` limits what an expert takes in training (`model.mlp.Router`).
    `quant` keeps the frozen linear layers and experts in 4 bits.
    """
    check_fits(config, topology.sizes, quant)
    if lora is None:
        lora = LoraSettings.model_construct(target_modules=())
    settings = _megatron_config(config, topology.sizes, dtype, recompute, dispatcher, capacity_factor)
    return Qwen3Moe(config, topology, lora, quant, settings)


def _megatron_config(
    config: Qwen3MoeConfig,
    sizes: TopologySizes,
    dtype: torch.dtype,
    recompute: bool,
    dispatcher: str,
    capacity_factor: float | None,
) -> TransformerConfig:
    full_recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    return TransformerConfig(
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        num_query_groups=config.num_key_value_heads,
        kv_channels=head_dim(config),
        ffn_hidden_size=config.intermediate_size,
        layernorm_epsilon=config.rms_norm_eps,
        normalization="RMSNorm",
        activation_func=torch.nn.functional.silu,
        gated_linear_unit=True,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        # experts
        num_moe_experts=config.num_experts,
        moe_ffn_hidden_size=config.moe_intermediate_size,
        moe_layer_freq=[int(sparse) for sparse in sparse_layers(config)],
        moe_router_topk=config.num_experts_per_tok,
        moe_router_pre_softmax=not config.norm_topk_prob,
        moe_router_dtype="fp32",
        moe_router_load_balancing_type="none",
        moe_aux_loss_coeff=0.0,
        moe_expert_capacity_factor=capacity_factor,
        moe_token_dispatcher_type=choose_dispatcher(dispatcher, sizes),
        # precision and parallelism
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        pipeline_dtype=dtype,
        tensor_model_parallel_size=sizes.tensor,
        sequence_parallel=sizes.tensor > 1,
        expert_model_parallel_size=sizes.expert,
        expert_tensor_parallel_size=sizes.expert_tensor,
        pipeline_model_parallel_size=sizes.pipeline,
        variable_seq_lengths=sizes.pipeline > 1,
        calculate_per_token_loss=True,
        perform_initialization=False,
        gradient_accumulation_fusion=False,
        deterministic_mode=torch.are_deterministic_algorithms_enabled(),
        bias_dropout_fusion=False,
        **(full_recompute if recompute else {}),
    )


class Qwen3Moe(GPTModel):
    """megatron-core's GPTModel with Qwen3-MoE layers, Qwen3 rotary positions and the supervised loss head."""

    def __init__(
        self,
        hf_config: Qwen3MoeConfig,
        topology: Topology,
        lora: LoraSettings,
        quant: QuantSettings | None,
        config: TransformerConfig,
    ) -> None:
        self.hf_config, self.topology, self.lora = hf_config, topology, lora
        self.true_vocab_size = hf_config.vocab_size
        tp = topology.sizes.tensor
        layers_here = config.num_layers // topology.sizes.pipeline
        first = topology.groups.pp.rank() * layers_here
        super().__init__(
            config,
            _layer_specs(hf_config, lora, quant, range(first, first + layers_here)),
            vocab_size=-(-hf_config.vocab_size // tp) * tp,
            max_sequence_length=hf_config.max_position_embeddings,
            pre_process=topology.is_first_stage,
            post_process=topology.is_last_stage,
            share_embeddings_and_output_weights=hf_config.tie_word_embeddings,
            position_embedding_type="none",
            pg_collection=topology.groups,
        )
        # transformers' own, for every kind of rope scaling it knows
        self.rotary_emb = Qwen3MoeRotaryEmbedding(hf_config).to(host.device())
        for name, parameter in self.named_parameters():
            parameter.requires_grad_("lora_" in name)

    def forward(self, batch: MicroBatch) -> Tensor:  # type: ignore[override]
        """The summed loss over the batch's supervised positions, fp32 []; hidden states on stages before the last."""
        return self._run(batch, self._loss)

    def route(self, batch: MicroBatch) -> Tensor:
        """For what the routers count on the way: 0 in place of the loss; hidden states on stages before the last."""
        return self._run(batch, lambda hidden_states, **_: hidden_states.new_zeros(()))

    def logits(self, batch: MicroBatch) -> Tensor:
        """Logits of every position, [T, vocabulary]: for tests, never for training."""
        return self._run(batch, self._logits)

    def next_logits(self, batch: MicroBatch) -> Tensor:
        """Logits of the last position, fp32 [vocabulary]; hidden states on stages before the last."""
        return self._run(batch, self._next_logits)

    def _run(self, batch: MicroBatch, head: Any) -> Tensor:
        return super().forward(
            input_ids=batch.tokens[None],
            position_ids=batch.segments.positions(batch.tokens.device),
            attention_mask=None,
            labels=batch.labels,
            packed_seq_params=batch.segments,
            output_processor=head,
        )

    def _preprocess(  # type: ignore[override]
        self, input_ids: Tensor, position_ids: Tensor, packed_seq_params: Segments, **kwargs: Any
    ) -> tuple:
        prepared = list(super()._preprocess(input_ids, position_ids, packed_seq_params=packed_seq_params, **kwargs))
        hidden = prepared[0]
        if hidden is not None and self.training and self.config.recompute_granularity and torch.is_grad_enabled():
            # Recomputation runs backward only for layers whose input asks for a gradient; frozen embeddings do not.
            hidden.requires_grad_(True)
        like = torch.empty((), dtype=self.config.params_dtype, device=input_ids.device)
        cos, sin = self.rotary_emb(like, position_ids)
        prepared[1] = torch.cat([cos, sin])
        prepared[5] = self._padding_mask(input_ids, packed_seq_params.filling)
        return tuple(prepared)

    def _padding_mask(self, input_ids: Tensor, filling: int) -> Tensor | None:
        """Which tokens of this rank's sequence shard are filling, bool [1, S], for the routers; None if none is."""
        if not filling:
            return None
        places = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        mask = places >= input_ids.shape[1] - filling
        # megatron-core 0.19.2 cuts a mask that it is given into sequence shards on the first pipeline stage only.
        return mask.chunk(self.topology.sizes.tensor, dim=1)[self.topology.groups.tp.rank()]

    def _head_weight(self) -> tuple[Tensor, int]:
        """This rank's rows of the head that stand for tokens, and the id of the first."""
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        weight = self.output_layer.weight if weight is None else weight
        first = self.topology.groups.tp.rank() * weight.shape[0]
        return weight[: max(0, self.true_vocab_size - first)], first

    def _loss(self, hidden_states: Tensor, labels: Tensor, **_: Any) -> Tensor:
        weight, first = self._head_weight()
        return supervised_loss(
            hidden_states, weight, labels, first, self.topology.groups.tp, self.config.sequence_parallel
        )

    def _logits(self, hidden_states: Tensor, output_layer: Any, output_weight: Tensor | None, **_: Any) -> Tensor:
        logits, _bias = output_layer(hidden_states, weight=output_weight)
        logits = gather_from_tensor_model_parallel_region(logits, group=self.topology.groups.tp)
        return logits[:, 0, : self.true_vocab_size]

    def _next_logits(self, hidden_states: Tensor, **given: Any) -> Tensor:
        # The last position is the last of the last sequence shard; the head sees one of each shard.
        return self._logits(hidden_states[-1:], **given)[-1].float()

    def base_shards(self) -> Iterator[Shard]:
        """Every checkpoint tensor of the base model of which this rank holds a part."""
        h = self.config.hidden_size
        tied = self.share_embeddings_and_output_weights
        if self.pre_process:
            yield self._vocabulary_shard("model.embed_tokens.weight", self.embedding.word_embeddings.weight)
        for prefix, layer in self._layers():
            yield Shard(f"{prefix}.input_layernorm.weight", (h,), whole(h), layer.input_layernorm.weight.data)
            yield Shard(
                f"{prefix}.post_attention_layernorm.weight", (h,), whole(h), layer.pre_mlp_layernorm.weight.data
            )
            yield from _under(f"{prefix}.self_attn", layer.self_attention.base_shards())
            yield from _under(f"{prefix}.mlp", layer.mlp.base_shards())
        if self.post_process:
            yield Shard("model.norm.weight", (h,), whole(h), self.decoder.final_layernorm.weight.data)
            if not tied or not self.pre_process:
                name = "model.embed_tokens.weight" if tied else "lm_head.weight"
                yield self._vocabulary_shard(name, self.output_layer.weight)

    def adapter_shards(self) -> Iterator[Shard]:
        """Every adapter tensor of which this rank holds a part: `<name in the base>.lora_A.weight` and `lora_B`."""
        for prefix, layer in self._layers():
            yield from _under(f"{prefix}.self_attn", layer.self_attention.adapter_shards())
            yield from _under(f"{prefix}.mlp", layer.mlp.adapter_shards())

    def routers(self) -> Iterator[tuple[int, Router]]:
        """(layer, router) of this stage's sparse layers, layers counted from 0 over the whole model."""
        for layer in self.decoder.layers:
            if isinstance(layer.mlp, SparseMLP):
                yield layer.layer_number - 1, layer.mlp.router

    def _layers(self) -> Iterator[tuple[str, Any]]:
        for layer in self.decoder.layers:
            yield f"model.layers.{layer.layer_number - 1}", layer

    def _vocabulary_shard(self, name: str, weight: Tensor) -> Shard:
        rows = part(self.vocab_size, self.topology.groups.tp.rank(), self.topology.sizes.tensor)
        kept = slice(min(rows.start, self.true_vocab_size), min(rows.stop, self.true_vocab_size))
        h = self.config.hidden_size
        weight.data[kept.stop - kept.start :].zero_()
        return Shard(name, (self.true_vocab_size, h), (kept, slice(0, h)), weight.data[: kept.stop - kept.start])


def _layer_specs(
    config: Qwen3MoeConfig, lora: LoraSettings, quant: QuantSettings | None, layers: range
) -> TransformerBlockSubmodules:
    sparse = sparse_layers(config)
    specs = [
        ModuleSpec(
            TransformerLayer,
            submodules=TransformerLayerSubmodules(
                input_layernorm=RMSNorm,
                self_attention=ModuleSpec(SelfAttention, params={"lora": lora, "quant": quant}),
                self_attn_bda=_residual_add,
                pre_mlp_layernorm=RMSNorm,
                mlp=partial(SparseMLP if sparse[i] else DenseMLP, lora=lora, quant=quant),
                mlp_bda=_residual_add,
                cross_attention=IdentityOp,
            ),
        )
        for i in layers
    ]
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=RMSNorm)


def _residual_add(training: bool, fused: bool) -> Any:
    """In the place of megatron-core's bias-dropout-add: Qwen3-MoE has neither bias nor dropout there."""
    return lambda output_and_bias, residual, dropout: residual + output_and_bias[0]


def _under(prefix: str, shards: Iterator[Shard]) -> Iterator[Shard]:
    for shard in shards:
        yield replace(shard, name=f"{prefix}.{shard.name}")
