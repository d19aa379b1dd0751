"""Finding ranks that hang: after a time limit one line names them, their hosts and where they are.

A thread of each rank reports the rank's progress to the launcher's store every few seconds. A rank without progress for
`[job] timeout_minutes` reads the reports of the others. If none of them makes progress, or some have stopped reporting,
it names the ranks that the others wait for: those that do not report, else those that are in no collective.

PyTorch's flight recorder knows which collectives a rank entered, for gloo as for NCCL (`host.collectives`).
"""

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megasft import host
from megasft.launch import rendezvous
from megasft.launch.exit import stop_asked
from megasft.messages import UserError

if TYPE_CHECKING:
    from torch.distributed import Store

REPORT_SECONDS = 5.0
BACKGROUND = ("checkpoints", "stop")  # groups of threads that training does not wait for


@dataclass(frozen=True)
class Report:
    """What a rank reports.

    Attributes:
        number: of the report, counted up; it stays the same where a rank has stopped or is cut off.
        idle: seconds without progress.
        excused: no limit holds, because the rank reads data or weights.
        ended: the rank is done.
        doing: such as "step 12, micro batch 3".
        last: the collective it entered last, such as "all_reduce 812 of DATA_PARALLEL_GROUP"; "" before the first.
        waits_in: the one it is still in; "" where it is in none.
        place: where its main thread is, such as "load (dataset.py:12)".
    """

    number: int
    host: str
    process: int
    idle: float
    excused: bool
    ended: bool
    doing: str
    last: str
    waits_in: str
    place: str


class Watchdog:
    """Reports this rank's progress, and reads the others' reports when it makes none.

    Attributes:
        stop_asked: whether some rank has asked all to stop.
    """

    def __init__(self, rank: int, world: int, limit: float) -> None:
        """Start, if there is a launcher; `limit` in seconds."""
        self.stop_asked = False
        self._rank, self._world, self._limit = rank, world, limit
        self._every = min(REPORT_SECONDS, limit / 12)
        self._main = threading.main_thread().ident
        self._progress: Callable[[], tuple[int, str]] | None = None
        self._last_progress: tuple[int, ...] = ()
        # Seconds while this process ran: a pause of all ranks (Ctrl-Z, `scontrol suspend`) is no hang.
        self._idle = self._unanswered = 0.0
        self._reported = self._asked = time.monotonic()
        self._number = 0
        self._seen: dict[int, tuple[Report | None, float]] = {}  # of each rank the last report and when it came
        self._verdict: str | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="watch")
        self._has_launcher = rendezvous.store() is not None
        if self._has_launcher:
            self._thread.start()

    def attach(self, progress: Callable[[], tuple[int, str]]) -> None:
        """The limit holds from now on. `progress` returns a number that grows with all work done, and what is done."""
        self._progress = progress

    def detach(self) -> None:
        """This rank is done; returns when the others know."""
        self._ended.set()
        if self._has_launcher:
            self._thread.join(self._limit)

    def verdict(self) -> str | None:
        """Why the job hangs, if it does; to be called every second. It talks to no other process, so it cannot hang."""
        now = time.monotonic()
        self._unanswered += min(now - self._asked, 5.0)
        self._asked = now
        if self._verdict is None and self._has_launcher and self._unanswered > self._limit:
            address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            return (
                f"no answer for {_minutes(self._limit)} ([job] timeout_minutes): rank {self._rank} (host "
                f"{socket.gethostname()}) cannot reach rank 0 at {address} any more"
            )
        return self._verdict

    def _run(self) -> None:
        store: Store | None = None
        report_at = 0.0
        while self._verdict is None:
            ended = self._ended.is_set()
            try:
                store = store or rendezvous.connection(timedelta(seconds=10))
                assert store is not None
                self.stop_asked = self.stop_asked or stop_asked(store)
                if ended or time.monotonic() >= report_at:
                    report_at = time.monotonic() + self._every
                    report = self._report(ended)
                    store.set(_key(self._rank), json.dumps(asdict(report)))
                    if report.idle > self._limit / 2:
                        self._look(store, report)
                self._unanswered = 0.0
            except (RuntimeError, UserError):  # no launcher any more, no way to it, or another job's at its port
                store = None
            if ended:
                return
            self._ended.wait(min(1.0, self._every))

    def _report(self, ended: bool) -> Report:
        done, doing = self._progress() if self._progress else (0, "reading data and weights")
        records = host.collectives()
        progress = (done, *(entries[-1]["record_id"] for entries in records if entries))
        now = time.monotonic()
        self._idle = self._idle + min(now - self._reported, 4 * self._every) if progress == self._last_progress else 0.0
        self._last_progress, self._reported = progress, now
        entered = [entry for entries in records for entry in entries if entry["process_group"][1] not in BACKGROUND]
        last = max(entered, key=lambda entry: entry["time_created_ns"], default=None)
        pending = min(
            (entry for entry in entered if not entry["retired"]),
            key=lambda entry: entry["time_created_ns"],
            default=None,
        )
        waits_in, place = _name(pending) if pending else "", ""
        frame = sys._current_frames().get(self._main or 0)
        if frame is not None:
            path = Path(frame.f_code.co_filename)
            place = f"{frame.f_code.co_name} ({path.name}:{frame.f_lineno})"
            if not waits_in and "distributed" in path.parts:  # gloo's send and receive are not recorded
                waits_in = place
        self._number += 1
        return Report(
            number=self._number,
            host=socket.gethostname(),
            process=os.getpid(),
            idle=self._idle,
            excused=self._progress is None,
            ended=ended,
            doing=doing,
            last=_name(last) if last else "",
            waits_in=waits_in,
            place=place,
        )

    def _look(self, store: "Store", mine: Report) -> None:
        """Read the others' reports; reach a verdict if the limit is over."""
        now = time.monotonic()
        ranks = [rank for rank in range(self._world) if store.check([_key(rank)])]
        for rank, text in zip(ranks, store.multi_get([_key(rank) for rank in ranks]), strict=True):
            report = Report(**json.loads(text))
            before = self._seen.get(rank, (None, now))[0]
            if before is None or before.number != report.number:
                self._seen[rank] = (report, now)
        for rank in range(self._world):
            self._seen.setdefault(rank, (None, now))  # one that never reported
        if mine.idle > self._limit:
            patience = max(3 * self._every, self._limit / 3)
            silent = {
                rank: now - since
                for rank, (report, since) in self._seen.items()
                if now - since > patience and not (report and report.ended)
            }
            self._verdict = judge({rank: report for rank, (report, _) in self._seen.items()}, silent, self._limit)


def judge(reports: dict[int, Report | None], silent: Iterable[int], limit: float) -> str | None:
    """The message about ranks that hang; None while some rank makes progress or is excused.

    Args:
        reports: the last of each rank, None from a rank that never reported.
        silent: ranks that have stopped reporting.
        limit: seconds.
    """
    silent = set(silent)
    there = {rank: report for rank, report in reports.items() if report and not report.ended and rank not in silent}
    if any(report.idle < 0.8 * limit or (report.excused and not silent) for report in there.values()):
        return None
    blamed = []
    for rank in sorted(silent):
        report = reports[rank]
        if report is None:
            blamed.append(f"rank {rank} never started")
        else:
            blamed.append(f"{_who(rank, report)} has not reported since {report.doing}{_entered(report)}")
    if not blamed:
        blamed = [
            f"{_who(rank, report)} hangs in {report.place}, {report.doing}{_entered(report)}"
            for rank, report in there.items()
            if not report.waits_in
        ]
    waiting: dict[str, list[int]] = {}
    for rank, report in there.items():
        if report.waits_in:
            waiting.setdefault(report.waits_in, []).append(rank)
    places = [f"{_ranks(ranks)} in {place}" for place, ranks in waiting.items()]
    waits = f"waiting: {_few(places)}" if places else ""
    who = _few(blamed) if blamed else "all ranks wait for each other"
    return f"no progress for {_minutes(limit)} ([job] timeout_minutes): {'; '.join(filter(None, (who, waits)))}"


def _who(rank: int, report: Report) -> str:
    return f"rank {rank} (host {report.host}, process {report.process})"


def _ranks(ranks: list[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"


def _entered(report: Report) -> str:
    return f", its last collective {report.last}" if report.last else ""


def _few(texts: list[str], most: int = 4) -> str:
    return "; ".join(texts[:most]) + (f"; and {len(texts) - most} more" if len(texts) > most else "")


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:g} minutes"


def _name(entry: dict[str, Any]) -> str:
    """Such as "all_reduce 812 of DATA_PARALLEL_GROUP"."""
    kind = entry["profiling_name"].rpartition(":")[2]
    number = entry["p2p_seq_id"] if entry["is_p2p"] else entry["collective_seq_id"]
    return f"{kind} {number} of {entry['process_group'][1] or 'group ' + entry['process_group'][0]}"


def _key(rank: int) -> str:
    return f"megasft/rank/{rank}"
