"""Trackers: where the numbers of a run go beside metrics.jsonl, for `[logging] to`.

Each works in a thread of its own, so that no step waits for a network; one that fails gets no more numbers, and the run
continues. A resumed run continues the run of each tracker, whose name is kept in trackers.json of the run directory.
"""

import contextlib
import errno
import importlib.util
import json
import netrc
import os
import queue
import re
import secrets
import shlex
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlparse

import numpy as np

from megasft.config.keys import redact
from megasft.config.schema import RunConfig
from megasft.messages import UserError

CLOSE_SECONDS = 60.0  # for what is on its way when a run ends
WAITING = 10_000  # lines at most
NAMES = "trackers.json"


def check(config: RunConfig) -> None:
    """Raise UserError where a tracker that `[logging] to` names is not installed or cannot be logged in to."""
    for name in config.logging.to:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"[logging] to: {name} is not installed; pip install 'megasft[{name}]', or leave it out")
    online = os.environ.get("WANDB_MODE", "online") in ("online", "run")
    if "wandb" in config.logging.to and online and not os.environ.get("WANDB_API_KEY") and not _in_netrc():
        raise UserError(
            "[logging] to: wandb has no key; run `wandb login`, pass --env-file with WANDB_API_KEY=... in the file, or "
            "set WANDB_MODE=offline"
        )


def _in_netrc() -> bool:
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    with contextlib.suppress(OSError, netrc.NetrcParseError):
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    return False


def places(config: RunConfig) -> list[tuple[str, str]]:
    """(tracker, the command or the place that shows the run) of each that `[logging] to` names."""
    folder, project = Path(config.job.output_dir), config.logging.project
    offline = os.environ.get("WANDB_MODE") in ("offline", "dryrun")
    synced = f"wandb sync {shlex.quote(str(folder / 'wandb'))}/offline-run-*" if offline else str(folder / "wandb")
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    shown = {
        "tensorboard": ("TensorBoard", shlex.join(["tensorboard", "--logdir", str(folder / "tensorboard")])),
        "wandb": ("wandb", synced),
        "mlflow": ("MLflow", redact(uri) if uri else str(Path("mlruns").resolve())),
        "trackio": ("Trackio", shlex.join(["trackio", "show", "--project", project])),
    }
    return [shown[name] for name in dict.fromkeys(config.logging.to)]


@dataclass(frozen=True)
class Line:
    """A line of metrics.jsonl, and the numbers in it by names such as train/loss (`metrics.flat`)."""

    kind: str
    step: int
    time: float
    values: dict[str, Any]
    numbers: dict[str, float]


class Tracker(Protocol):
    """Gets every line of a run."""

    def log(self, line: Line) -> None:
        """One line."""

    def close(self) -> None:
        """Send what is left."""


@dataclass
class TrackedRun:
    """What the trackers are told of a run; `names` are those they gave it, by tracker, kept for when it is resumed."""

    config: RunConfig
    step: int
    resumed: bool
    names: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.folder = Path(self.config.job.output_dir)
        if self.resumed:
            with contextlib.suppress(OSError, ValueError):
                found = json.loads((self.folder / NAMES).read_text(encoding="utf-8"))
                self.names |= {str(key): str(value) for key, value in found.items()}
        self._lock = threading.Lock()
        self.tags = {key: str(value) for key, value in self.config.tags.items()}
        self.settings = self.config.model_dump(mode="json", exclude_none=True)

    @property
    def name(self) -> str:
        """For people."""
        return self.config.logging.run_name or self.folder.resolve().name

    def keep(self, tracker: str, name: str) -> None:
        """Keep the name that a tracker gave this run."""
        with self._lock:
            self.names[tracker] = name
            (self.folder / NAMES).write_text(json.dumps(self.names), encoding="utf-8")


class TensorBoard:
    """An event file in `tensorboard/` of the run directory, written at once. A full disk leaves gaps.

    Not by SummaryWriter, whose thread ends where a disk is full.
    """

    def __init__(self, run: TrackedRun) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter
        from torch.utils.tensorboard.summary import histogram

        self._events, self._summaries, self._histogram = event_pb2, summary_pb2, histogram
        folder, now = run.folder / "tensorboard", time.time()
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{now:.6f}.{socket.gethostname()}.{os.getpid()}"
        self._file = open(folder / name, "wb", buffering=0)  # noqa: SIM115 (closed by close)
        self._packed = RecordWriter(self._file)
        self._write(wall_time=now, file_version="brain.Event:2")
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._write(
            wall_time=now, step=run.step + 1, session_log=start
        )  # of steps from this one on, the last ones count

    def log(self, line: Line) -> None:
        """All numbers as one event; a table of numbers as a histogram."""
        values = [self._summaries.Summary.Value(tag=name, simple_value=value) for name, value in line.numbers.items()]
        summary = self._summaries.Summary(value=values)
        if line.kind == "experts":
            summary.MergeFrom(self._histogram("experts/tokens", np.array(line.values["tokens"]), 30))
        self._write(wall_time=line.time, step=line.step, summary=summary)

    def _write(self, **event: Any) -> None:
        """One record, complete or not at all."""
        length = self._file.tell()
        try:
            data = self._events.Event(**event).SerializeToString()
            self._packed.write(data)
            if self._file.tell() != length + len(data) + 16:  # of the record's own; a full disk takes a part
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            with contextlib.suppress(OSError):
                self._file.truncate(length)
                self._file.seek(length)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class Wandb:
    """Weights & Biases; what it keeps on this disk is in `wandb/` of the run directory."""

    def __init__(self, run: TrackedRun) -> None:
        import wandb

        name = run.names.get("wandb") or secrets.token_hex(4)
        self._run: Any = wandb.init(
            project=run.config.logging.project,
            name=run.name,
            id=name,
            resume="allow",
            dir=str(run.folder),
            config=run.settings,
            tags=[f"{key}={value}"[:64] for key, value in run.tags.items()],  # longer ones it refuses
            # The terminal is ours, and so are the device's numbers; the machine's and the command's are nobody's.
            settings=wandb.Settings(console="off", silent=True, x_disable_stats=True, x_disable_meta=True),
        )
        self._run.define_metric("*", step_metric="step")  # its own step cannot go back, as that of a resumed run does
        run.keep("wandb", name)

    def log(self, line: Line) -> None:
        """All numbers."""
        if line.numbers:
            self._run.log({"step": line.step, **line.numbers})

    def close(self) -> None:
        """Send what is left."""
        self._run.finish()


class Mlflow:
    """MLflow, at MLFLOW_TRACKING_URI or else in `mlruns/` of the current folder."""

    def __init__(self, run: TrackedRun) -> None:
        uri = os.environ.get("MLFLOW_TRACKING_URI") or f"file:{Path('mlruns').resolve()}"
        if uri.startswith("file:") or "://" not in uri:
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        from mlflow import entities
        from mlflow.tracking import MlflowClient

        self._entities, self._client = entities, MlflowClient(uri)
        name = run.names.get("mlflow")
        if name is None:
            project = run.config.logging.project
            experiment = self._client.get_experiment_by_name(project)
            number = experiment.experiment_id if experiment else self._client.create_experiment(project)
            name = self._client.create_run(number, run_name=run.name, tags=_named(run.tags)).info.run_id
            run.keep("mlflow", name)
        self._run = name
        self._client.update_run(name, status="RUNNING")
        known = self._client.get_run(name).data.params  # which cannot change: of a resumed run those of its start stay
        params = [
            entities.Param(key, value[:500]) for key, value in _named(_dotted(run.settings)).items() if key not in known
        ]
        for i in range(0, len(params), 100):
            self._client.log_batch(name, params=params[i : i + 100])

    def log(self, line: Line) -> None:
        """All numbers; a hundred devices may have more than one request takes."""
        metrics = [
            self._entities.Metric(name, value, int(line.time * 1000), line.step) for name, value in line.numbers.items()
        ]
        for i in range(0, len(metrics), 1000):
            self._client.log_batch(self._run, metrics=metrics[i : i + 1000])

    def close(self) -> None:
        """The run is finished."""
        self._client.set_terminated(self._run)


class Trackio:
    """Trackio, in its own folder (TRACKIO_DIR) or in the Space that TRACKIO_SPACE_ID names."""

    def __init__(self, run: TrackedRun) -> None:
        import trackio

        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            self._run: Any = trackio.init(
                project=run.config.logging.project,
                name=run.names.get("trackio") or run.name,
                resume="allow" if "trackio" in run.names else "never",
                config=run.settings,
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )
        run.keep("trackio", self._run.name)

    def log(self, line: Line) -> None:
        """All numbers."""
        if line.numbers:
            self._run.log(line.numbers, step=line.step)

    def close(self) -> None:
        """Send what is left."""
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            self._run.finish()


TRACKERS: dict[str, Callable[[TrackedRun], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "mlflow": Mlflow,
    "trackio": Trackio,
}


class Background:
    """A tracker in its thread.

    Attributes:
        failure: why it gets no more lines, empty while it does; may hold keys (`Metrics.record` leaves them out).
    """

    def __init__(self, name: str, begin: Callable[[], Tracker]) -> None:
        self.name, self.failure = name, ""
        self._begin, self._lines = begin, queue.Queue[Line | None](WAITING)
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def log(self, line: Line) -> None:
        """Hand it a line; does not wait."""
        if not self.failure:
            try:
                self._lines.put_nowait(line)
            except queue.Full:
                self.failure = f"it has not taken the last {WAITING:,} lines"

    def close(self) -> None:
        """Wait for what it has not sent, for at most CLOSE_SECONDS."""
        if not self.failure:
            with contextlib.suppress(queue.Full):
                self._lines.put_nowait(None)
            self._thread.join(CLOSE_SECONDS)
            if self._thread.is_alive():
                self.failure = f"after {CLOSE_SECONDS:.0f} s it has not taken all lines"

    def _work(self) -> None:
        try:
            tracker = self._begin()
            while (line := self._lines.get()) is not None:
                tracker.log(line)
            tracker.close()
        except BaseException as error:  # whatever it is, and SystemExit: training continues
            self.failure = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def start(run: TrackedRun) -> list[Background]:
    """The trackers that `[logging] to` names."""

    def begin(name: str) -> Background:
        return Background(name, lambda: TRACKERS[name](run))

    return [begin(name) for name in dict.fromkeys(run.config.logging.to)]


def _dotted(settings: dict[str, Any], before: str = "") -> dict[str, str]:
    """Nested settings as section.key: text."""
    found: dict[str, str] = {}
    for key, value in settings.items():
        found |= _dotted(value, f"{before}{key}.") if isinstance(value, dict) else {f"{before}{key}": str(value)}
    return found


def _named(values: dict[str, str]) -> dict[str, str]:
    """With keys of the characters that MLflow takes."""
    return {re.sub(r"[^\w\-. :/]", "_", key): value for key, value in values.items()}
