"""What a run file leaves open, settled: keys at a second place, validation, and whether the topology fits."""

from typing import TYPE_CHECKING, Any

from megasft.config.aliases import SYNONYMS
from megasft.config.measures import LOSSES, LOWER_IS_BETTER, MEASURED, SCORES, listed
from megasft.config.parallelism import choose_dispatcher, derive, fit
from megasft.config.toml import Key, RunFile
from megasft.messages import UserError

if TYPE_CHECKING:
    from megasft.config.schema import RunConfig


def fold_synonyms(config: "RunConfig", file: RunFile) -> "RunConfig":
    """Move keys that stand at a second place too to their own. Raises UserError where the two contradict each other."""
    for synonym, key in SYNONYMS.items():
        value = getattr(config.hyperparameters, synonym[-1])
        if value is None:
            continue
        name = key[-1]
        if name in config.lora.model_fields_set and getattr(config.lora, name) != value:
            raise UserError(f"{file.at(synonym)}: contradicts {file.at(key)}; keep one of the two")
        config = changed(changed(config, key, value), synonym, None)
    return changed(config, ("hyperparameters", "train_kind"), None)


def settle_validation(config: "RunConfig", file: RunFile) -> "RunConfig":
    """Set `enabled` if the file leaves it out, and `validation_fraction` to the share that is really held out.

    That is 0 without validation, and with a `validation_path`. Set `greater_is_better` too. Raises UserError.
    """
    data, validation = config.data, config.training.validation
    enabled, fraction = validation.enabled, data.validation_fraction
    if "enabled" not in validation.model_fields_set:
        enabled = bool(data.validation_path or ("validation_fraction" in data.model_fields_set and fraction))
    for key in ("early_stopping_patience", "generate"):
        if not enabled and getattr(validation, key):
            at = file.at(("training", "validation", key))
            raise UserError(f"{at}: there is no validation; set [training.validation] enabled = true")
    if not enabled or data.validation_path:
        fraction = 0.0
    elif not fraction:
        remedy = "set it above 0, name a [data] validation_path, or set [training.validation] enabled = false"
        raise UserError(f"{file.at(('data', 'validation_fraction'))}: leaves nothing to validate on; {remedy}")
    config = _settle_best(config, file)
    config = changed(config, ("training", "validation", "enabled"), enabled)
    return changed(config, ("data", "validation_fraction"), fraction)


def _settle_best(config: "RunConfig", file: RunFile) -> "RunConfig":
    """Set `greater_is_better` if the file leaves it out. Raises UserError for a metric that is not measured."""
    validation = config.training.validation
    metric, greater = validation.metric_for_best_model.removeprefix("val."), validation.greater_is_better
    if metric in SCORES and not validation.generate:
        at = file.at(("training", "validation", "metric_for_best_model"))
        raise UserError(
            f"{at}: needs answers; set [training.validation] generate = 32, or name one of {listed(MEASURED)}"
        )
    if greater and metric in LOSSES:
        at = file.at(("training", "validation", "greater_is_better"))
        raise UserError(f"{at}: a {metric} is better when it is smaller; set it to false")
    if greater is None:
        greater = metric not in LOWER_IS_BETTER
    return changed(config, ("training", "validation", "greater_is_better"), greater)


def check_topology(config: "RunConfig", file: RunFile) -> None:
    """Refuse, before any rank is launched, a topology that does not fit the file's GPUs or dispatcher."""
    asked = config.hyperparameters.parallelism.token_dispatcher
    try:
        choose_dispatcher(asked, derive(config.data.topology))
    except ValueError as error:
        at = file.at(("hyperparameters", "parallelism", "token_dispatcher"))
        raise UserError(f'{at}: {error}; "alltoall" works with any topology') from None
    compute = config.compute
    ranks = compute.gpu_count * compute.nodes if compute.gpu_count else config.world_size()
    if ranks is None:
        return
    try:
        fit(config.data.topology, ranks)
    except ValueError as error:
        place = file.at(("compute", "gpu_count") if compute.gpu_count else ("data", "topology"))
        nodes = f" on {compute.nodes} nodes" if compute.nodes > 1 else ""
        raise UserError(f"{place}: makes {ranks} ranks{nodes}, but [data.topology] {error}") from None


def changed(settings: Any, key: Key, value: Any) -> Any:
    """A copy of nested settings with `key` set."""
    name, *rest = key
    return settings.model_copy(update={name: changed(getattr(settings, name), tuple(rest), value) if rest else value})
