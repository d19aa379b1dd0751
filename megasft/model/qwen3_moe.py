"""Build Qwen3-MoE with LoRA as a megatron-core GPTModel, from a Hugging Face `config.json`."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
)
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor
from transformers import Qwen3MoeConfig

from megasft.config.parallelism import TopologySizes, choose_dispatcher
from megasft.config.schema import LoraSettings, QuantSettings
from megasft.config.values import Recompute
from megasft.distributed.topology import Topology
from megasft.lora.dropout import Draw
from megasft.lora.recompute import UnreadSum, recomputing
from megasft.lora.sharded import ShardedLinear
from megasft.model.attention import SelfAttention
from megasft.model.batch import MicroBatch, Segments
from megasft.model.loss import Head, supervised_loss, token_losses
from megasft.model.mlp import DenseMLP, Router, SparseMLP
from megasft.model.norm import RMSNorm
from megasft.model.rotary import RotaryEmbedding
from megasft.model.shape import check_fits, head_dim, sparse_layers, stage_layers
from megasft.storage.shards import Shard, full_index, part


def build_model(
    config: Qwen3MoeConfig,
    topology: Topology,
    lora: LoraSettings | None = None,
    dtype: torch.dtype = torch.bfloat16,
    recompute: Recompute = True,
    dispatcher: str = "auto",
    capacity_factor: float | None = None,
    quant: QuantSettings | None = None,
) -> "Qwen3Moe":
    """Build this rank's part of the model: uninitialized base weights and, for the targets of `lora`, zero adapters.

    `model.load_base` loads the base weights; `adapters.model_io` initializes or loads the adapters. `recompute` saves
    only each layer's input and recomputes the layer in backward; "selective", only its MLP. `capacity_factor` limits
    the tokens of an expert in training (`model.mlp.Router`). `quant` keeps the frozen linear layers and experts in
    4 bits. Raises UserError for a topology that cannot shard the model.
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
    recompute: Recompute,
    dispatcher: str,
    capacity_factor: float | None,
) -> TransformerConfig:
    stages = stage_layers(config.num_hidden_layers, sizes.pipeline)
    recomputation: dict[str, Any] = {}
    if recompute == "selective":  # of none of megatron-core's modules: `model.mlp` does it
        recomputation = {"recompute_granularity": "selective", "recompute_modules": []}
    elif recompute:
        recomputation = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
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
        num_layers_in_first_pipeline_stage=stages[0] if sizes.pipeline > 1 else None,
        num_layers_in_last_pipeline_stage=stages[-1] if sizes.pipeline > 1 else None,
        variable_seq_lengths=sizes.pipeline > 1,
        calculate_per_token_loss=True,
        perform_initialization=False,
        gradient_accumulation_fusion=False,
        deterministic_mode=torch.are_deterministic_algorithms_enabled(),
        bias_dropout_fusion=False,
        **recomputation,
    )


class Qwen3Moe(GPTModel):
    """megatron-core's GPTModel with Qwen3-MoE layers, Qwen3 rotary embedding and the supervised loss head."""

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
        stages, stage = stage_layers(config.num_layers, topology.sizes.pipeline), topology.groups.pp.rank()
        first = sum(stages[:stage])
        super().__init__(
            config,
            _layer_specs(hf_config, lora, quant, range(first, first + stages[stage])),
            vocab_size=-(-hf_config.vocab_size // tp) * tp,
            max_sequence_length=hf_config.max_position_embeddings,
            pre_process=topology.is_first_stage,
            post_process=topology.is_last_stage,
            share_embeddings_and_output_weights=hf_config.tie_word_embeddings,
            position_embedding_type="none",
            pg_collection=topology.groups,
        )
        self.rotary = RotaryEmbedding(hf_config)
        self.dropout_seed = 0  # of the optimizer step
        for prefix, layer in self._layers():
            layer.name_linears(prefix)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_("lora_" in name)

    def forward(self, batch: MicroBatch) -> Any:
        """The summed loss over the batch's supervised positions, fp32 [], and how many of them are predicted right,
        int64 []; hidden states on stages before the last.
        """
        assert batch.supervised is not None
        return self._run(batch, partial(self._loss, supervised=batch.supervised))

    def token_losses(self, batch: MicroBatch) -> Tensor:
        """Of each supervised position the loss, and 1 where it is predicted right, fp32 [2, n]; hidden states on stages
        before the last.
        """
        assert batch.supervised is not None
        return self._run(batch, partial(self._loss, supervised=batch.supervised, function=token_losses))

    def route(self, batch: MicroBatch) -> Tensor:
        """Run the layers for the routers' counts only: returns 0, or hidden states on stages before the last."""
        return self._run(batch, lambda hidden_states, **_: hidden_states.new_zeros(()))

    def logits(self, batch: MicroBatch) -> Tensor:
        """Logits of all positions, [T, vocabulary]; for tests only, training never needs them."""
        return self._run(batch, self._logits)

    def next_logits(self, batch: MicroBatch) -> Tensor:
        """Logits of the n positions `batch.supervised`, fp32 [n, vocabulary]; hidden states on earlier stages."""
        assert batch.supervised is not None
        return self._run(batch, partial(self._next_logits, at=batch.supervised))

    def next_tokens(self, batch: MicroBatch) -> Tensor:
        """The most likely token after each of the positions `batch.supervised`, int64 [n], the first of equal ones;
        hidden states on stages before the last.
        """
        assert batch.supervised is not None
        return self._run(batch, partial(self._next_tokens, at=batch.supervised))

    def _run(self, batch: MicroBatch, head: Any) -> Any:
        segments = batch.segments
        if self.training and batch.places is not None:
            segments = replace(segments, draw=Draw(self.dropout_seed, batch.places))
        return super().forward(
            input_ids=batch.tokens[None],
            position_ids=batch.segments.positions(batch.tokens.device),
            attention_mask=None,
            labels=batch.labels,
            packed_seq_params=segments,
            output_processor=head,
        )

    def _preprocess(  # type: ignore[override]
        self, input_ids: Tensor, position_ids: Tensor, packed_seq_params: Segments, **kwargs: Any
    ) -> tuple:
        prepared = list(super()._preprocess(input_ids, position_ids, packed_seq_params=packed_seq_params, **kwargs))
        hidden = prepared[0]
        if hidden is not None and self.training and self.config.recompute_granularity and torch.is_grad_enabled():
            # Recomputation runs backward only where the input requires a gradient; frozen embeddings give none.
            hidden.requires_grad_(True)
        prepared[1] = torch.cat(self.rotary(position_ids, self.config.params_dtype))
        prepared[5] = self._padding_mask(input_ids, packed_seq_params.padding)
        return tuple(prepared)

    def _padding_mask(self, input_ids: Tensor, padding: int) -> Tensor | None:
        """Mask of the padding in this rank's sequence shard, for the routers: bool [1, S]; None without padding."""
        if not padding:
            return None
        places = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        mask = places >= input_ids.shape[1] - padding
        # megatron-core 0.19.2 splits a given mask into sequence shards on the first pipeline stage only.
        return mask.chunk(self.topology.sizes.tensor, dim=1)[self.topology.groups.tp.rank()]

    def _head(self) -> Head:
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        weight = self.output_layer.weight if weight is None else weight
        tp = self.topology.groups.tp
        first = tp.rank() * weight.shape[0]
        rows = weight[: max(0, self.true_vocab_size - first)]
        return Head(rows, first, tp, self.config.sequence_parallel)

    def _loss(
        self, hidden_states: Tensor, labels: Tensor, supervised: Tensor, function: Any = supervised_loss, **_: Any
    ) -> Any:
        return function(hidden_states, labels, supervised, self._head())

    def _logits(self, hidden_states: Tensor, output_layer: Any, output_weight: Tensor | None, **_: Any) -> Tensor:
        logits, _bias = output_layer(hidden_states, weight=output_weight)
        logits = gather_from_tensor_model_parallel_region(logits, group=self.topology.groups.tp)
        return logits[:, 0, : self.true_vocab_size]

    def _at(self, hidden_states: Tensor, at: Tensor) -> Tensor:
        """Hidden states of the positions `at` of all sequence shards: [S, 1, H] -> [n, H]."""
        if self.config.sequence_parallel:
            hidden_states = gather_from_sequence_parallel_region(hidden_states, group=self.topology.groups.tp)
        return hidden_states.flatten(0, -2).index_select(0, at)

    def _next_logits(self, hidden_states: Tensor, at: Tensor, **_: Any) -> Tensor:
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        logits = self._at(hidden_states, at) @ (self.output_layer.weight if weight is None else weight).t()
        logits = gather_from_tensor_model_parallel_region(logits, group=self.topology.groups.tp)
        return logits[:, : self.true_vocab_size].float()

    def _next_tokens(self, hidden_states: Tensor, at: Tensor, **_: Any) -> Tensor:
        head = self._head()
        logits = (self._at(hidden_states, at) @ head.weight.t()).float()
        if not len(head.weight):  # padding rows only
            logits = logits.new_full((len(at), 1), -torch.inf)
        # Numbers of tokens are exact in fp64.
        best = torch.stack([part.double() for part in logits.max(-1)])
        best[1] += head.first_row
        everyone = best.new_empty(head.group.size() * 2, len(at))
        dist.all_gather_into_tensor(everyone, best, group=head.group)
        winner = everyone[::2].argmax(0, keepdim=True)
        return everyone[1::2].gather(0, winner)[0].long()

    def base_shards(self) -> Iterator[Shard]:
        """The base-model tensors that this rank holds a slice of."""
        h = self.config.hidden_size
        tied = self.share_embeddings_and_output_weights
        if self.pre_process:
            yield self._vocabulary_shard("model.embed_tokens.weight", self.embedding.word_embeddings.weight)
        for prefix, layer in self._layers():
            yield Shard(f"{prefix}.input_layernorm.weight", (h,), full_index(h), layer.input_layernorm.weight.data)
            yield Shard(
                f"{prefix}.post_attention_layernorm.weight", (h,), full_index(h), layer.pre_mlp_layernorm.weight.data
            )
            yield from _under(f"{prefix}.self_attn", layer.self_attention.base_shards())
            yield from _under(f"{prefix}.mlp", layer.mlp.base_shards())
        if self.post_process:
            yield Shard("model.norm.weight", (h,), full_index(h), self.decoder.final_layernorm.weight.data)
            if not tied or not self.pre_process:
                name = "model.embed_tokens.weight" if tied else "lm_head.weight"
                yield self._vocabulary_shard(name, self.output_layer.weight)

    def adapter_shards(self) -> Iterator[Shard]:
        """The adapter tensors that this rank holds a slice of: `<name in the base>.lora_A.weight` and `lora_B`."""
        for prefix, layer in self._layers():
            yield from _under(f"{prefix}.self_attn", layer.self_attention.adapter_shards())
            yield from _under(f"{prefix}.mlp", layer.mlp.adapter_shards())

    def routers(self) -> Iterator[tuple[int, Router]]:
        """(layer, router) for this stage's sparse layers; layers are numbered from 0 over all stages."""
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


class DecoderLayer(TransformerLayer):
    """megatron-core's layer, which also tells its linear layers what their dropout depends on.

    It does at each forward, so that a recomputation drops what the forward of the same micro batch did, though other
    micro batches may have come between them.
    """

    def name_linears(self, prefix: str) -> None:
        """Name the linear layers, `prefix` being this layer's name in the model."""
        self.linears = dict[str, ShardedLinear]()  # no ModuleDict: they are modules of this layer already
        for name, module in self.named_modules():
            if isinstance(module, ShardedLinear):
                module.name = f"{prefix}.{name}"
                self.linears[module.name] = module

    def forward(self, *args: Any, packed_seq_params: Segments, **kwargs: Any) -> Any:
        for linear in self.linears.values():
            linear.draw = packed_seq_params.draw
        return super().forward(*args, packed_seq_params=packed_seq_params, **kwargs)


def _layer_specs(
    config: Qwen3MoeConfig, lora: LoraSettings, quant: QuantSettings | None, layers: range
) -> TransformerBlockSubmodules:
    sparse = sparse_layers(config)
    specs = [
        ModuleSpec(
            DecoderLayer,
            submodules=TransformerLayerSubmodules(
                input_layernorm=RMSNorm,
                self_attention=ModuleSpec(SelfAttention, params={"lora": lora, "quant": quant}),
                self_attn_bda=_residual_add,
                pre_mlp_layernorm=RMSNorm,
                mlp=partial(SparseMLP if sparse[i] else DenseMLP, lora=lora, quant=quant),
                mlp_bda=_last_residual_add,
                cross_attention=IdentityOp,
            ),
        )
        for i in layers
    ]
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=RMSNorm)


def _residual_add(training: bool, fused: bool) -> Any:
    """Replaces megatron-core's bias-dropout-add, because Qwen3-MoE has neither bias nor dropout there."""
    return lambda output_and_bias, residual, dropout: residual + output_and_bias[0]


def _last_residual_add(training: bool, fused: bool) -> Any:
    """What the layer returns, which nothing reads where it is computed again (see `lora.recompute`)."""

    def add(output_and_bias: tuple[Tensor, None], residual: Tensor, dropout: float) -> Tensor:
        output, _ = output_and_bias
        # megatron-core enables gradients here in each forward; those before the backward have none of the output.
        unread = recomputing() and output.requires_grad
        return UnreadSum.apply(residual, output) if unread else residual + output

    return add


def _under(prefix: str, shards: Iterator[Shard]) -> Iterator[Shard]:
    for shard in shards:
        yield replace(shard, name=f"{prefix}.{shard.name}")
