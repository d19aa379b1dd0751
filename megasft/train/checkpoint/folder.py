"""A checkpoint on disk: a folder that appears complete or not at all, with checksums of its files.

    checkpoints/
      latest -> step-000100
      step-000100/
        adapter_model.safetensors, adapter_config.json   the adapter as a PEFT adapter: any tool loads the folder
        optimizer-00000-of-00004.safetensors ...         master weights and moments, one file a rank (optimizer_shards)
        state.json                                       where the run stood (`RunState`)
        config.toml                                      the resolved run file
        manifest.json                                    size and SHA-256 of each of these; written last

No random states are saved: those of a step derive from the seed and the step's number.
"""

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from megasft.config.schema import RunConfig
from megasft.messages import UserError, say
from megasft.storage.digests import file_sha256

FORMAT = 1
MANIFEST, STATE, RUN_FILE, LATEST = "manifest.json", "state.json", "config.toml", "latest"
_NAME = re.compile(r"step-\d{6,19}", re.ASCII)  # any other name is the user's
_FILE_NAME = re.compile(r"\w[\w.-]{0,99}", re.ASCII)  # in the checkpoint's own folder, whatever the manifest says
_SINCE = {"stale": 0, "experts_seen": "", "measure": "val.loss"}  # what the states of earlier versions lack


@dataclass(frozen=True, kw_only=True)
class RunState:
    """The state of a run between two steps.

    Attributes:
        step: optimizer steps taken, those skipped included.
        updates: of these, the steps that changed the weights; Adam counts them.
        skipped: how many of the last steps in a row were skipped because loss or gradient was not finite.
        tokens: trained on so far.
        validated: the step of the last validation, -1 before the first.
        saved: the step of the last checkpoint that was due, 0 before the first.
        measure: what validations are compared by (`ValidationSettings.measure`).
        best, best_step: the best value of it and its step; None and 0 before the first.
        stale: how many of the last validations in a row were no better.
        experts_seen: the experts that have got a token in this epoch (`early_signs.add_seen`).
        loader: `Loader.state_dict`, which determines the next batch.
        metrics_bytes: length of metrics.jsonl.
        identity: settings that must not change within a run, by name (`resume.identity`).
    """

    step: int = 0
    updates: int = 0
    skipped: int = 0
    tokens: int = 0
    validated: int = -1
    saved: int = 0
    measure: str = "val.loss"
    best: float | None = None
    best_step: int = 0
    stale: int = 0
    experts_seen: str = ""
    loader: dict[str, Any]
    metrics_bytes: int = 0
    identity: dict[str, Any]


class Checkpoints:
    """The `checkpoints` folder of a run."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def of(self, step: int) -> Path:
        """The folder of a step's checkpoint, whether it exists or not."""
        return self.folder / f"step-{step:06d}"

    def all(self) -> list[Path]:
        """All checkpoints, the newest first."""
        with contextlib.suppress(OSError):
            found = [path for path in self.folder.iterdir() if _NAME.fullmatch(path.name) and path.is_dir()]
            return sorted(found, key=_step, reverse=True)
        return []

    def after(self, step: int) -> list[Path]:
        """Those of later steps."""
        return [folder for folder in self.all() if _step(folder) > step]

    def begin(self, step: int) -> Path:
        """An empty folder to make the checkpoint of a step in. Raises OSError."""
        work = self.folder / f".step-{step:06d}.part"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        return work

    def finish(self, work: Path, step: int, state: RunState, config: RunConfig, files: dict[str, str]) -> Path:
        """Complete a checkpoint whose other files exist, and give it its name. Raises OSError.

        Args:
            files: SHA-256 of each file in `work`, by name.
        """
        texts = {STATE: json.dumps(asdict(state), indent=1), RUN_FILE: config.to_toml()}
        digests = files | {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}
        for name, text in texts.items():
            write_text(work / name, text)
        entries = {
            name: {"bytes": (work / name).stat().st_size, "sha256": digest} for name, digest in sorted(digests.items())
        }
        write_text(work / MANIFEST, json.dumps({"format": FORMAT, "step": step, "files": entries}, indent=1))
        _sync(work)
        folder = self.of(step)
        if folder.exists():
            self._retire(folder)
        work.rename(folder)
        _sync(self.folder)
        self.point_latest_at(folder)
        return folder

    def point_latest_at(self, folder: Path) -> None:
        """Point `latest` at a checkpoint of this folder; warn where that fails, as resuming does not need it."""
        link = self.folder / f".{LATEST}"
        try:
            link.unlink(missing_ok=True)
            link.symlink_to(folder.name)
            link.rename(self.folder / LATEST)
            _sync(self.folder)
        except OSError as error:
            say(f"{self.folder / LATEST}: cannot be linked to {folder.name} ({error.strerror})")

    def prune(self, keep: int, best_step: int) -> None:
        """Remove all but the newest `keep` and the one of the best validation."""
        for folder in self.all()[keep:]:
            if _step(folder) != best_step:
                with contextlib.suppress(OSError):
                    self._retire(folder)

    def clear_leftovers(self) -> None:
        """Remove incomplete checkpoints of killed runs."""
        for path in self.folder.glob(".step-*"):
            shutil.rmtree(path, ignore_errors=True)
        with contextlib.suppress(OSError):
            (self.folder / f".{LATEST}").unlink()

    def _retire(self, folder: Path) -> None:
        """Remove a checkpoint, after renaming it: half removed, it must not look complete."""
        gone = self.folder / f".{folder.name}.old"
        shutil.rmtree(gone, ignore_errors=True)
        folder.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)


def damage(folder: Path, part: int = 0, parts: int = 1) -> str | None:
    """What is wrong with a checkpoint; None if nothing is.

    Checksums are verified of every `parts`-th file from `part` on, and of none where `parts` is 0.
    """
    try:
        for i, (name, (size, digest)) in enumerate(sorted(manifest(folder).items())):
            try:
                if (folder / name).stat().st_size != size:
                    return f"{name} has {(folder / name).stat().st_size:,} bytes instead of {size:,}"
                if parts and i % parts == part and file_sha256(folder / name) != digest:
                    return f"{name} is corrupted: its checksum is not that of {MANIFEST}"
            except OSError as error:
                return f"{name} cannot be read ({error.strerror})"
        read_state(folder)
    except UserError as error:
        return str(error)
    return None


def manifest(folder: Path) -> dict[str, tuple[int, str]]:
    """Bytes and SHA-256 of each file of a checkpoint, by name. Raises UserError."""
    try:
        found = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        version, entries = found["format"], found["files"]
        files = {name: (entry["bytes"], entry["sha256"]) for name, entry in entries.items()}
        whole = all(
            _FILE_NAME.fullmatch(name) and _is_count(size) and isinstance(digest, str)
            for name, (size, digest) in files.items()
        )
    except OSError as error:
        raise UserError(f"{MANIFEST} cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{MANIFEST} is corrupted") from None
    if version != FORMAT:
        raise UserError(f"{MANIFEST} is of format {str(version)[:20]}, this megasft reads {FORMAT}")
    if not whole or not {STATE, RUN_FILE} <= files.keys():
        raise UserError(f"{MANIFEST} is corrupted")
    return files


def read_state(folder: Path) -> RunState:
    """The state in a checkpoint. Raises UserError."""
    try:
        found = _SINCE | json.loads((folder / STATE).read_text(encoding="utf-8"))
        state = RunState(**{field.name: found[field.name] for field in fields(RunState)})
        names = [field.name for field in fields(RunState) if field.type is int and field.name != "validated"]
        counts = [getattr(state, name) for name in names]
        wrong = type(state.validated) is not int or state.validated < -1  # -1 before the first validation
        wrong |= not all(map(_is_count, [*counts, state.loader["epoch"], state.loader["row"]]))
        wrong |= max(state.updates, state.skipped, state.validated, state.best_step, state.saved) > state.step
        wrong |= not (isinstance(state.loader["data"], dict) and isinstance(state.identity, dict))
        wrong |= len(bytes.fromhex(state.experts_seen)) > 2**20
        wrong |= not (state.best is None or math.isfinite(state.best))
    except OSError as error:
        raise UserError(f"{STATE} cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        wrong = True
    if wrong:
        raise UserError(f"{STATE} is not the state of a run")
    return state


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def optimizer_file(rank: int, world: int) -> str:
    """The name of a rank's optimizer file."""
    return f"optimizer-{rank:05d}-of-{world:05d}.safetensors"


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def write_text(path: Path, text: str) -> None:
    """Write a file that reaches the disk. Raises OSError."""
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
