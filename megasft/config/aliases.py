"""Other names for keys: two keys for one setting, and the names that other trainers give to settings."""

from megasft.config.toml import Key

# Two keys for one setting. Each stands for the other where an override replaces it, so both directions are here.
SYNONYMS: dict[Key, Key] = {
    ("hyperparameters", "lora_rank"): ("lora", "r"),
    ("hyperparameters", "lora_alpha"): ("lora", "alpha"),
    ("hyperparameters", "lora_dropout"): ("lora", "dropout"),
    ("hyperparameters", "lora_target_modules"): ("lora", "target_modules"),
}


_TWICE = SYNONYMS | {("job", "data"): ("data", "mix")}


SAME_SETTING = _TWICE | {key: synonym for synonym, key in _TWICE.items()}


# The names that transformers, peft, trl, axolotl and megatron-core give to these keys.
FOREIGN_NAMES = {
    ("logging", "to"): "report_to",
    ("logging", "project"): "wandb_project project_name experiment_name",
    ("job", "model"): "model_name_or_path model_name model_path base_model",
    ("job", "data"): "dataset dataset_path train_file",
    ("compute", "gpu_count"): "num_gpus n_gpus",
    ("compute", "nodes"): "num_nodes nnodes",
    ("job", "output_dir"): "output output_path save_dir",
    ("data", "validation_path"): "eval_file validation_file",
    ("data", "validation_fraction"): "validation_split",
    ("data", "packing"): "sample_packing pack_sequences",
    ("data", "mix"): "datasets blend",
    ("data", "cache_dir"): "dataset_cache cache",
    ("data", "overlong"): "truncation truncation_side excess_length_strategy",
    ("data", "topology", "tensor_parallel"): "tp tensor_model_parallel_size",
    ("data", "topology", "data_parallel"): "dp data_parallel_size",
    ("data", "topology", "expert_parallel"): "ep expert_model_parallel_size",
    ("data", "topology", "expert_tensor_parallel"): "etp expert_tensor_parallel_size",
    ("data", "topology", "pipeline_parallel"): "pp pipeline_model_parallel_size",
    ("training", "use_qlora"): "load_in_4bit",
    ("training", "validation", "evaluation_strategy"): "eval_strategy",
    ("training", "validation", "save_best_model_at_end"): "load_best_model_at_end save_best",
    ("quant", "type"): "quant_type bnb_4bit_quant_type",
    ("quant", "double"): "double_quant bnb_4bit_use_double_quant",
    ("quant", "block_size"): "blocksize",
    ("lora", "r"): "rank lora_r lora_rank",
    ("lora", "alpha"): "lora_alpha",
    ("lora", "dropout"): "lora_dropout",
    ("lora", "target_modules"): "lora_target_modules",
    ("hyperparameters", "n_epochs"): "epochs num_epochs num_train_epochs",
    ("hyperparameters", "per_device_batch"): "batch_size micro_batch_size per_device_train_batch_size",
    (
        "hyperparameters",
        "sequence_length",
    ): "max_length seq_length seq_len max_seq_len max_seq_length cutoff_len",
    ("hyperparameters", "learning_rate"): "lr",
    ("hyperparameters", "lr_schedule"): "lr_scheduler lr_scheduler_type",
    ("hyperparameters", "warmup_ratio"): "warmup warmup_steps warmup_fraction",
    ("hyperparameters", "max_grad_norm"): "clip_grad gradient_clipping",
    ("hyperparameters", "adam_beta1"): "beta1",
    ("hyperparameters", "adam_beta2"): "beta2",
    ("hyperparameters", "adam_eps"): "adam_epsilon eps",
    ("hyperparameters", "gradient_accumulation_steps"): "grad_accum gradient_accumulation",
    ("hyperparameters", "router_aux_loss_coef"): "aux_loss_coef moe_aux_loss_coeff",
    ("hyperparameters", "expert_capacity_factor"): "capacity_factor moe_expert_capacity_factor",
    ("hyperparameters", "parallelism", "token_dispatcher"): "moe_token_dispatcher_type dispatcher",
    ("hyperparameters", "parallelism", "activation_checkpointing"): "gradient_checkpointing",
    ("checkpoint", "every_steps"): "save_steps save_strategy save_interval",
    ("checkpoint", "keep"): "save_total_limit",
    ("checkpoint", "resume"): "resume_from_checkpoint",
    ("logging", "every_steps"): "logging_steps",
}


# Settings of other trainers that have no counterpart here: what megasft does instead.
_PROCESSES = "tokenizing and loading use all available cores by themselves"
_PRECISION = "[hyperparameters.parallelism] bf16 = true or false sets the precision"
_ATTENTION = "attention is Transformer Engine's on GPUs where it is installed, and PyTorch's otherwise"
_OPTIMIZER = "the optimizer is AdamW, with its states in fp32"
_TARGETS = "adapters are plain LoRA on the linear layers that [lora] target_modules names"
ABSENT = {
    "use_rslora": "the update is alpha / r * B A: for rsLoRA's scaling set [lora] alpha to alpha * sqrt(r)",
    "use_dora": _TARGETS,
    "modules_to_save": _TARGETS,
    "lora_bias": _TARGETS,
    "bias": _TARGETS,
    "init_lora_weights": "A starts as PEFT's default and B at zero; [job] init_adapter starts from another adapter",
    "num_proc": _PROCESSES,
    "dataset_num_proc": _PROCESSES,
    "preprocessing_num_workers": _PROCESSES,
    "num_workers": _PROCESSES,
    "dataloader_num_workers": _PROCESSES,
    "optim": _OPTIMIZER,
    "optimizer": _OPTIMIZER,
    "dtype": _PRECISION,
    "torch_dtype": _PRECISION,
    "tf32": _PRECISION,
    "attn_implementation": _ATTENTION,
    "flash_attention": _ATTENTION,
    "use_flash_attention_2": _ATTENTION,
    "push_to_hub": "the adapter stays in [job] output_dir; `hf upload` sends it",
    "hub_model_id": "the adapter stays in [job] output_dir; `hf upload` sends it",
    "trust_remote_code": "code in a model's folder is never run",
    "chat_template": "the template is the model's: put a chat_template.jinja into its folder",
    "train_on_inputs": 'only assistant turns are trained on: [data] train_on, and "loss" in a message, choose them',
    "assistant_only_loss": "only assistant turns are trained on, always",
    "completion_only_loss": "only assistant turns are trained on, always",
    "sequence_parallel": "sequence parallelism is on wherever tensor_parallel is above 1",
    "context_parallel": "attention does not split sequences over ranks; tensor_parallel shards their activations",
    "context_parallel_size": "attention does not split sequences over ranks; tensor_parallel shards their activations",
    "zero_stage": "optimizer states are sharded over data parallel, which is ZeRO stage 1",
    "deepspeed": "optimizer states are sharded over data parallel, which is ZeRO stage 1",
    "fsdp_config": "weights are sharded by [data.topology]",
    "torch_compile": "nothing is compiled",
    "use_liger_kernel": "the loss is computed for supervised positions only, in megasft's own code",
    "group_by_length": "[data] packing = true avoids padding",
    "shuffle": "every epoch is shuffled, by [job] seed",
    "neftune_noise_alpha": "[lora] dropout is the only noise",
    "label_smoothing": "the loss is plain cross-entropy",
    "label_smoothing_factor": "the loss is plain cross-entropy",
    "per_device_eval_batch_size": "validation uses per_device_batch",
    "eval_batch_size": "validation uses per_device_batch",
    "min_lr": "the schedule ends at 0",
}
