"""Other names for keys: two keys for one setting, and what people look for under the names of other trainers."""

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


# What people look for under the names of transformers, peft, trl and megatron-core.
FOREIGN_NAMES = {
    ("job", "model"): "model_name_or_path base_model",
    ("job", "data"): "dataset dataset_path train_file",
    ("compute", "gpu_count"): "num_gpus n_gpus",
    ("compute", "nodes"): "num_nodes nnodes",
    ("data", "validation_path"): "eval_file validation_file",
    ("data", "validation_fraction"): "validation_split",
    ("data", "packing"): "sample_packing pack_sequences",
    ("data", "mix"): "datasets blend",
    ("data", "cache_dir"): "dataset_cache cache",
    ("data", "overlong"): "truncation truncation_side",
    ("data", "topology", "tensor_parallel"): "tp tensor_model_parallel_size",
    ("data", "topology", "data_parallel"): "dp data_parallel_size",
    ("data", "topology", "expert_parallel"): "ep expert_model_parallel_size",
    ("data", "topology", "expert_tensor_parallel"): "etp expert_tensor_parallel_size",
    ("data", "topology", "pipeline_parallel"): "pp pipeline_model_parallel_size",
    ("training", "use_qlora"): "load_in_4bit",
    ("training", "validation", "evaluation_strategy"): "eval_strategy",
    ("training", "validation", "save_best_model_at_end"): "load_best_model_at_end",
    ("quant", "type"): "quant_type bnb_4bit_quant_type",
    ("quant", "double"): "double_quant bnb_4bit_use_double_quant",
    ("quant", "block_size"): "blocksize",
    ("lora", "r"): "rank lora_r lora_rank",
    ("lora", "alpha"): "lora_alpha",
    ("lora", "dropout"): "lora_dropout",
    ("lora", "target_modules"): "lora_target_modules",
    ("hyperparameters", "n_epochs"): "epochs num_epochs num_train_epochs",
    ("hyperparameters", "per_device_batch"): "batch_size micro_batch_size per_device_train_batch_size",
    ("hyperparameters", "sequence_length"): "max_length seq_length max_seq_len max_seq_length",
    ("hyperparameters", "learning_rate"): "lr",
    ("hyperparameters", "lr_schedule"): "lr_scheduler lr_scheduler_type",
    ("hyperparameters", "warmup_ratio"): "warmup_steps",
    ("hyperparameters", "max_grad_norm"): "clip_grad gradient_clipping",
    ("hyperparameters", "adam_eps"): "adam_epsilon",
    ("hyperparameters", "router_aux_loss_coef"): "aux_loss_coef moe_aux_loss_coeff",
    ("hyperparameters", "expert_capacity_factor"): "capacity_factor moe_expert_capacity_factor",
    ("hyperparameters", "parallelism", "token_dispatcher"): "moe_token_dispatcher_type dispatcher",
    ("hyperparameters", "parallelism", "activation_checkpointing"): "gradient_checkpointing",
    ("checkpoint", "every_steps"): "save_steps",
    ("checkpoint", "keep"): "save_total_limit",
    ("logging", "every_steps"): "logging_steps",
}
