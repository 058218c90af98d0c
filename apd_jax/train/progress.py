"""What a running decomposition tells: progress, `metrics.jsonl` and TensorBoard scalars."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from etils import epath
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from tensorboardX import event_file_writer, summary
from tensorboardX.proto import event_pb2

from apd_jax.paths import user_path

log = logging.getLogger(__name__)
_PROTO: Any = event_pb2  # its classes are made when it is imported
_SECONDS_BETWEEN_LINES = 10.0  # where the output is not a terminal


class ProgressDisplay:
    """A progress bar with rate, time left and the latest values.

    Where the output is a file, plain lines now and then.
    """

    def __init__(self, title: str, total: int, *, console: Console | None = None):
        self._console = console or Console(stderr=True)
        self._title, self._total = title, total
        self._last_line = self._start = time.monotonic()
        self._first_step: int | None = None
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[values]}"),
        )
        self._bar = Progress(*columns, console=self._console, disable=not self._console.is_terminal)
        self._task = self._bar.add_task(title, total=total, rate="", values="")

    def __enter__(self) -> ProgressDisplay:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def update(self, step: int, values: Mapping[str, float]) -> None:
        """Shows `step` of the total and a few named values."""
        now = time.monotonic()
        if self._first_step is None:  # the rate counts from the end of the first, compiling call
            self._first_step, self._start = step, now
        seconds = now - self._start
        rate = (step - self._first_step) / seconds if seconds > 0 else 0.0
        shown = "  ".join(f"{name} {value:.3g}" for name, value in values.items())
        speed = f"{rate:.3g} steps/s" if rate else ""
        self._bar.update(self._task, completed=step, rate=speed, values=shown)
        due = now - self._last_line > _SECONDS_BETWEEN_LINES or step >= self._total
        if due and not self._console.is_terminal:
            self._last_line, left = now, ""
            if rate and step < self._total:
                left = f", {(self._total - step) / rate:.0f} s left"
            self._console.print(
                f"{self._title}: step {step}/{self._total}  {speed}{left}  {shown}",
                highlight=False,
                soft_wrap=True,
            )


class MetricsLog:
    """Appends rows to `metrics.jsonl` and TensorBoard.

    Rows past the step resumed from are dropped: they come again.
    """

    def __init__(self, workdir: epath.PathLike, resume_step: int = 0):
        folder = user_path(workdir)
        self._path = folder / "metrics.jsonl"
        self.rows = [row for row in read_rows(self._path) if row["step"] <= resume_step]
        self._warned = False
        self._complete = False  # whether the file holds all rows
        self._board: event_file_writer.EventsWriter | None = None
        try:
            self._write_all()
            board = folder / "tensorboard"
            board.mkdir(parents=True, exist_ok=True)
            # Not SummaryWriter: it waits for ever for a thread that a full disk has ended.
            self._board = event_file_writer.EventsWriter(str(board / "events"))
            if resume_step:
                again = _PROTO.SessionLog(status=_PROTO.SessionLog.START)
                self._event(step=resume_step, session_log=again)
        except OSError as error:
            self._fails(error)

    def append(self, row: Mapping[str, Any]) -> None:
        """Adds a row. Where it cannot be written training goes on: it is kept, and tried again."""
        self.rows.append(dict(row))
        try:
            if self._complete and "://" not in str(self._path):  # cloud storage cannot append
                self._complete = False
                with self._path.open("a") as file:
                    file.write(json.dumps(dict(row)) + "\n")
                self._complete = True
            else:
                self._write_all()
        except OSError as error:
            self._fails(error)
        # TensorBoard has no place for what is not finite.
        scalars = [summary.scalar(tag, v) for tag, v in _scalars(row) if math.isfinite(v)]
        for one in scalars:
            self._event(step=row["step"], summary=one)

    def close(self) -> None:
        if self._board is not None:
            try:
                self._board.close()
            except OSError as error:
                self._fails(error)

    def _write_all(self) -> None:
        unfinished = self._path.with_name(".metrics.jsonl.unfinished")
        try:
            unfinished.write_text("".join(json.dumps(row) + "\n" for row in self.rows))
            unfinished.replace(self._path)
        except OSError:
            unfinished.unlink(missing_ok=True)
            raise
        self._complete = True

    def _event(self, **fields: Any) -> None:
        if self._board is not None:
            try:
                self._board.write_event(_PROTO.Event(wall_time=time.time(), **fields))
                self._board.flush()
            except OSError as error:
                with contextlib.suppress(OSError):
                    self._board.close()
                self._board = None
                self._fails(error)

    def _fails(self, error: OSError) -> None:
        if not self._warned:
            self._warned = True
            log.warning(
                "losses cannot be written to %s (%s); training goes on.",
                self._path.parent,
                error.strerror or error,
            )


def _scalars(row: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The values of a row by name, those of several instances one by one."""
    for name, value in row.items():
        if isinstance(value, list):
            yield from ((f"{name}/{i}", v) for i, v in enumerate(value))
        elif name != "step":
            yield name, value


_NOT_LOSSES = ("step", "seconds_per_step", "mean_active")


def loss_names(rows: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """The losses that logged rows hold, the total first."""
    names = dict.fromkeys(name for row in rows[:1] for name in row if name not in _NOT_LOSSES)
    return tuple(sorted(names, key=lambda name: name != "total"))


def read_rows(path: epath.Path) -> list[dict[str, Any]]:
    """The rows of a metrics file; a last line cut short by a kill is ignored."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows
