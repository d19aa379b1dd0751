"""Settings far from what others use, each with its source. Advice changes nothing."""

from collections.abc import Iterator
from dataclasses import replace

from megasft.config.schema import RunConfig
from megasft.config.values import ROUTER
from megasft.plan.memory import worst_rank
from megasft.plan.plan import Plan

LOW_RATE = 2e-5  # a fifth of the 1e-4 of the LoRA recipes named below
SHORT = 0.5  # of sequence_length: packing then at least halves the padding or the number of small micro batches
WARM_UP_STEPS = 10  # below that, a line says so


def advice(config: RunConfig, plan: Plan) -> list[str]:
    """Lines about this run file, the most costly first; none where there is nothing to say."""
    return list(_lines(config, plan))


def _lines(config: RunConfig, plan: Plan) -> Iterator[str]:
    hyper, sizes = config.hyperparameters, plan.job.sizes
    rate = hyper.learning_rate
    if rate < LOW_RATE:
        yield (
            f"[hyperparameters] learning_rate = {rate:g} is {1e-4 / rate:.0f} times below the 1e-4 of "
            "Megatron-Bridge's and ms-swift's LoRA recipes; tinker-cookbook's formula gives some 5e-4"
        )
    if sizes.expert_tensor > 1 and _fits_whole(plan):
        yield (
            f"[data.topology] expert_tensor_parallel = {sizes.expert_tensor}, but experts fit on a GPU without being "
            "cut: with 1 a rank multiplies fewer and wider rows, which `megasft plan --search` finds faster"
        )
    if ROUTER in config.lora.targets:
        yield (
            f"[lora] target_modules has {ROUTER}, the router: vLLM ignores its LoRA and SGLang refuses it "
            "(docs/adapters.md)"
        )
    if plan.dataset is not None:
        mean = plan.dataset.tokens / plan.dataset.conversations
        if not config.data.packing and mean < SHORT * hyper.sequence_length:
            yield (
                f"[data] packing = false, but conversations have some {mean:,.0f} tokens of {hyper.sequence_length:,}: "
                "packing fills the rows, as the data of Megatron-Bridge's fine-tuning is packed"
            )
        warm_up = (plan.steps or 0) * hyper.warmup_ratio
        if hyper.warmup_ratio and warm_up < WARM_UP_STEPS:
            yield (
                f"[hyperparameters] warmup_ratio = {hyper.warmup_ratio:g} of {plan.steps} steps is {warm_up:.1f} steps "
                f"of warm-up, where arXiv:1910.04209 finds 2 / (1 - adam_beta2) = {2 / (1 - hyper.adam_beta2):,.0f} "
                "enough: a smaller global batch gives more steps"
            )
    if not config.training.validation.enabled:
        yield (
            "[training.validation] is not enabled: nothing shows overfitting, and best/ is not kept; set [data] "
            "validation_fraction = 0.02"
        )


def _fits_whole(plan: Plan) -> bool:
    """Whether the same job fits with experts that are not cut."""
    sizes = replace(plan.job.sizes, expert_tensor=1)
    return worst_rank(replace(plan.job, sizes=sizes, imbalance=plan.imbalance)).peak <= plan.usable
