"""What a run says of itself, from any rank: rank 0 records it, the others say nothing."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megasft.config.schema import RunConfig
from megasft.distributed.topology import Topology
from megasft.messages import UserError, say
from megasft.train import trackers
from megasft.train.metrics import Metrics


class RunLog:
    """The records of a run and the failures that do not end it; none once it is closed. Every rank makes one."""

    def __init__(self, config: RunConfig, topology: Topology) -> None:
        self._config, self._topology = config, topology
        self._metrics: Metrics | None = None
        self._length = 0  # of metrics.jsonl when it was closed

    def open(self, total_steps: int, step: int, length: int) -> None:
        """Write `config.toml` and open the metrics of a run at `step`; every rank calls it. Raises UserError.

        Args:
            length: bytes of metrics.jsonl to keep (`Metrics`).
        """
        with self._topology.together():
            if self._topology.is_first:
                output_dir = Path(self._config.job.output_dir)
                try:
                    output_dir.mkdir(parents=True, exist_ok=True)
                    (output_dir / ".config.toml").write_text(self._config.to_toml())
                    (output_dir / ".config.toml").rename(output_dir / "config.toml")
                    tracked = trackers.TrackedRun(self._config, step, resumed=length > 0)
                    self._metrics = Metrics(output_dir, total_steps, step, length, lambda: trackers.start(tracked))
                except OSError as error:
                    raise UserError(f"[job] output_dir: {output_dir} cannot be written ({error.strerror})") from None

    def record(self, kind: str, step: int, **values: Any) -> None:
        """One line of metrics.jsonl and of the terminal (`Metrics.record`)."""
        if self._metrics:
            self._metrics.record(kind, step, **values)

    def checkpoint(self, step: int, folder: Path) -> None:
        """Record a checkpoint that is on disk, unless a resumed run has kept its line."""
        if self._metrics and step not in self._metrics.checkpoints:
            self._metrics.record("checkpoint", step, path=str(folder))

    def lines(self) -> Iterator[dict[str, Any]]:
        """The lines that metrics.jsonl has; none on ranks that do not write it."""
        return self._metrics.lines() if self._metrics else iter(())

    def say(self, message: str) -> None:
        """One line on standard error."""
        if self._topology.is_first:
            say(message)

    def failed(self, what: str, reason: str, step: int) -> None:
        """Something could not be written: an event and a warning, or with `on_failure = "stop"` a UserError."""
        reason += "; what was written before is intact"
        if self._config.checkpoint.on_failure == "stop":
            raise UserError(f"stopped: {reason}")
        self.record("event", step, event=f"{what} failed", reason=reason)
        self.say(f"{reason}, training continues")

    @property
    def length(self) -> int:
        """Bytes of metrics.jsonl."""
        return self._metrics.length if self._metrics else self._length

    def sync(self) -> None:
        """Flush metrics.jsonl to the disk."""
        if self._metrics:
            self._metrics.sync()

    def restore_terminal(self) -> None:
        """Take the progress bar away, for a rank that ends before its run does."""
        if self._metrics:
            self._metrics.display.close()

    def close(self) -> None:
        """Close everything; a signal may still come, and save the run once more."""
        if self._metrics:
            self._metrics.close()
            self._length = self._metrics.length
            self._metrics = None
