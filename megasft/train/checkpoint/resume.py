"""Whether a run resumes and from which checkpoint, and what may not have changed since."""

import contextlib
import os
import shutil
import tomllib
from collections.abc import Iterable, Sequence
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megasft.config.schema import RunConfig
from megasft.config.values import short_targets
from megasft.data.identity import data_identity, refuse_other_data, refuse_other_sources
from megasft.launch import rendezvous
from megasft.messages import UserError, say
from megasft.train.checkpoint.best import BEST, step_of_best
from megasft.train.checkpoint.folder import RUN_FILE, Checkpoints, RunState, damage, read_state

if TYPE_CHECKING:  # for `check`, which needs no rank and so neither torch nor megatron-core
    from megasft.data.dataset import Batches, Mix
    from megasft.distributed.topology import Topology


def find(config: RunConfig, topology: "Topology") -> tuple[Path, RunState] | None:
    """The checkpoint to resume from and its state, None for a run from the start; every rank calls it.

    The ranks share the work of its checksums. A corrupted one is skipped with a warning, for the one before it. Raises
    UserError where the one asked for is corrupted, or all are.
    """
    import torch.distributed as dist

    output = Path(config.job.output_dir)
    own = Checkpoints(output / "checkpoints")
    shared: list[Any] = ["", []]
    with topology.together():
        if topology.is_first:
            shared = [_setting(config), _candidates(config)]
    dist.broadcast_object_list(shared)
    setting, candidates = shared
    found: tuple[Path, RunState] | None = None
    for folder in candidates:
        said: list[str | None] = [None] * topology.world
        dist.all_gather_object(said, damage(folder, topology.rank, topology.world))
        wrong = next((words for words in said if words), None)
        if wrong is None:
            with topology.together():
                found = folder, read_state(folder)
            break
        if setting != "auto":
            raise UserError(f'[checkpoint] resume = {setting!r}: {folder}: {wrong}; name another checkpoint, or "auto"')
        if topology.is_first:
            say(f"{folder}: {wrong}; using the checkpoint before it")
    if candidates and found is None:
        raise UserError(
            f"{own.folder}: all checkpoints in it are corrupted; start from scratch with --resume never, or in another "
            "[job] output_dir"
        )
    return found


def tidy(config: RunConfig, found: tuple[Path, RunState] | None) -> None:
    """Restore `output_dir` to what it was when the checkpoint to resume from was written; rank 0 calls it.

    Files of another run, or of a later part of this one, are moved to a folder `earlier-<n>`; incomplete files of
    killed runs are removed. Raises UserError.
    """
    output = Path(config.job.output_dir)
    own = Checkpoints(output / "checkpoints")
    own.clear_leftovers()
    for name in (BEST, "adapter"):
        for path in output.glob(f".{name}.*"):
            shutil.rmtree(path, ignore_errors=True)
    try:
        if found and found[0].parent == own.folder.resolve():
            if later := own.after(found[1].step):  # they are damaged, or given up by going back to this one
                own.point_latest_at(found[0])
                best = output / BEST
                given_up = [output / "adapter", *([best] if step_of_best(best) > found[1].step else [])]
                _set_aside(output, [*later, *given_up])
        elif found or _setting(config) == "never" or (output / "adapter").exists():  # of a run that came to its end
            _set_aside(output, (output / name for name in RUN_FILES))
    except OSError as error:
        raise UserError(f"[job] output_dir: {output} cannot be written ({error.strerror})") from None
    if _setting(config) != "auto":
        with contextlib.suppress(OSError):
            (output / _LAUNCH).write_text(_launch())


RUN_FILES = ("checkpoints", "metrics.jsonl", "tensorboard", BEST, "adapter")


def check(config: RunConfig, base: str, data_parallel: int) -> None:
    """Raise UserError if the run cannot resume from its checkpoint; reads a small file of that, and of other data their
    content.
    """
    folder = _expected(config)
    if folder is not None:
        state = read_state(folder)
        refuse_changes(state.identity, identity(config, base, data_parallel), config, folder)
        if "data" not in config.checkpoint.allow_changed:
            refuse_other_sources(state.loader["data"], config)


def check_data(config: RunConfig, samples: "Mix", batches: "Batches") -> None:
    """The same of the data."""
    folder = _expected(config)
    if folder is not None:
        then = read_state(folder).loader["data"]
        refuse_other_data(then, data_identity(samples, batches), "data" in config.checkpoint.allow_changed)


def _expected(config: RunConfig) -> Path | None:
    return next((folder for folder in _candidates(config) if damage(folder, parts=0) is None), None)


def _candidates(config: RunConfig) -> list[Path]:
    setting = _setting(config)
    if setting == "never":
        return []
    if setting == "auto":
        return [folder.resolve() for folder in Checkpoints(Path(config.job.output_dir) / "checkpoints").all()]
    folder = Path(setting)
    if not os.path.isdir(folder):
        raise UserError(f'[checkpoint] resume = {setting!r}: no such folder; name a checkpoint, "auto" or "never"')
    return [folder.resolve()]


def _setting(config: RunConfig) -> str:
    """`[checkpoint] resume`; a run that its launcher restarts resumes from its own checkpoints, however it started."""
    if config.checkpoint.resume != "auto" and rendezvous.is_restart():
        # Not if no attempt before came to `tidy`: then what is there is of another run.
        with contextlib.suppress(OSError):
            output = Path(config.job.output_dir)
            if (output / _LAUNCH).read_text() == _launch() and Checkpoints(output / "checkpoints").all():
                return "auto"
    return config.checkpoint.resume


_LAUNCH = ".launch"  # in output_dir: which launch the files there are of, where it was not to go on with what was there


def _launch() -> str:
    """What all attempts of one launch have in common and no other launch has."""
    run = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    if run != "none":  # torchrun's default
        return run
    parent = os.getppid()
    return f"{parent} {Path(f'/proc/{parent}/stat').read_text().rpartition(')')[2].split()[19]}"  # when it was started


def _set_aside(output: Path, paths: Iterable[Path]) -> None:
    """Move what is there of these to a new folder in `output`."""
    there = [path for path in paths if path.exists()]
    if not there:
        return
    number = 1
    while (aside := output / f"earlier-{number}").exists():
        number += 1
    aside.mkdir()
    for path in there:
        shutil.move(path, aside / path.name)
    say(f"{output}: moved {', '.join(path.name for path in there)} to {aside.name}")


def identity(config: RunConfig, base: str | None, data_parallel: int) -> dict[str, Any]:
    """What must be the same when a run goes on, by the name under which a change of it is refused.

    Args:
        base: `model.hf_checkpoint.fingerprint` of the base model, if it was read from files.
    """
    hyper, quant = config.hyperparameters, config.quant
    format_ = {"[quant] double": quant.double, "[quant] block_size": quant.block_size}
    return {
        "base model": base,
        "[training] use_qlora": config.training.use_qlora,
        **(format_ if config.training.use_qlora else {}),
        "[job] seed": config.job.seed,
        "[lora] r": config.lora.r,
        "[lora] alpha": config.lora.alpha,
        "[lora] target_modules": sorted(config.lora.targets),
        "global batch": hyper.per_device_batch * hyper.gradient_accumulation_steps * data_parallel,
    }


def base_fingerprint(config: RunConfig) -> str | None:
    """Of the base model, None where it is not read from files."""
    from megasft.model.hf_checkpoint import fingerprint
    from megasft.model.hub import find_model

    try:
        return fingerprint(find_model(config.job.model))
    except UserError:
        return None


def refuse_changes(then: dict[str, Any], now: dict[str, Any], config: RunConfig, folder: Path) -> None:
    """Raise UserError naming the setting that differs between a checkpoint and the run that is to resume from it."""
    for name, value in now.items():
        old = then.get(name)
        if old == value:
            continue
        if name == "[job] seed" and "data" in config.checkpoint.allow_changed:
            continue  # it decides their order
        if name == "base model":
            if old is None or value is None or "base" in config.checkpoint.allow_changed:
                continue
            raise UserError(
                f"[job] model = {config.job.model!r}: is not the base model that {folder} was trained on (weights or "
                'config.json differ); name that one, or allow it with [checkpoint] allow_changed = ["base"]'
            )
        if name == "global batch":
            one = value // config.hyperparameters.gradient_accumulation_steps
            remedy = f"set [hyperparameters] gradient_accumulation_steps = {old // one}"
            if old % one:
                remedy = f"per_device_batch times data_parallel, {one}, does not divide it: change one of them"
            raise UserError(f"{folder}: was trained with a global batch of {old}, and this run has {value}; {remedy}")
        if name == "[lora] target_modules":
            old, value = list(short_targets(old or [])), list(short_targets(value))
        # An adapter of another r, alpha or other targets would be refused in its turn.
        adapter = "" if name.startswith("[lora]") else f", from this adapter with [job] init_adapter = {str(folder)!r}"
        raise UserError(
            f"{name} = {_words(value)}: {folder} was trained with {_words(old)}; set it so, or start a new run (set "
            f"another [job] output_dir, or pass --resume never){adapter}"
        )


def template_date(config: RunConfig) -> date | None:
    """The `[data] template_date` of the checkpoint that the run would resume from; None if it has none."""
    folder = _expected(config)
    if folder is None:
        return None
    found = _run_file(folder).get("data", {}).get("template_date")
    return found if isinstance(found, date) else None


def changed_settings(folder: Path, config: RunConfig) -> list[str]:
    """`key now (was then)` for each setting that bears on the numbers and differs from the checkpoint's run file."""
    then = _run_file(folder)
    old, new = (
        {key: value for key, value in _flat(settings) if not key.startswith(_NO_NUMBERS)}
        for settings in (then, tomllib.loads(config.to_toml()))
    )
    keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    return [f"{key} {_words(new.get(key))} (was {_words(old.get(key))})" for key in keys]


def _run_file(folder: Path) -> dict[str, Any]:
    try:
        return tomllib.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{folder / RUN_FILE}: not a run file ({error})") from None


# `identity` compares the layers that [lora] target_modules stands for, however they are written.
_NO_NUMBERS = ("checkpoint.", "logging.", "compute.", "tags.", "job.", "data.topology.", "lora.target_modules")


def _flat(settings: dict[str, Any], prefix: str = "") -> Sequence[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for key, value in settings.items():
        pairs += _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]
    return pairs


def _words(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
