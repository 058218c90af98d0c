"""What a running decomposition tells: progress, `metrics.jsonl` and TensorBoard scalars."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
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

from apd_jax.errors import InputError
from apd_jax.paths import user_path
from apd_jax.train import parallel

log = logging.getLogger(__name__)
_PROTO: Any = event_pb2  # its classes are made when it is imported
_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}
_PART = re.compile(r"(\d+(?:\.\d+)?)\s*(s|m|h)[a-z]*\s*")
_SECONDS_BETWEEN_LINES = 10.0  # where the output is not a terminal


class ProgressDisplay:
    """A progress bar with rate, time left and the latest values.

    Where the output is a file, plain lines now and then.
    """

    def __init__(self, title: str, total: int, *, console: Console | None = None, begun: int = 0):
        self._console = console or Console(stderr=True)
        self._title, self._total, self._begun = title, total, begun
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
        # A line that changes: rich's own bar needs ipywidgets, and warns without.
        self._cell = _notebook_cell() if self._console.is_jupyter else None
        self._bar = Progress(*columns, console=self._console, disable=not self._console.is_terminal)
        self._task = self._bar.add_task(title, total=total, rate="", values="")

    def __enter__(self) -> ProgressDisplay:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def update(self, step: int, values: Mapping[str, float]) -> None:
        """Shows `step` of the total and a few named values.

        The rate counts from the end of the first call, which compiles; that call's own time per
        step is shown as an upper bound, at once.
        """
        now, first = time.monotonic(), self._first_step is None
        if first:
            cost, bound = (now - self._start) / max(step - self._begun, 1), "at most "
            self._first_step, self._start = step, now
        else:
            cost, bound = (now - self._start) / max(step - (self._first_step or 0), 1), ""
        shown = "  ".join(f"{name} {value:.3g}" for name, value in values.items())
        speed = (
            f"{bound}{cost:.3g} s/step"
            if cost > 0.1 or first
            else f"{1 / max(cost, 1e-9):.3g} steps/s"
        )
        self._bar.update(self._task, completed=step, rate=speed, values=shown)
        if self._cell is not None:
            line = f"{self._title}: step {step}/{self._total}  {speed}  {shown}"
            self._cell.update({"text/plain": line}, raw=True)
            return
        due = first or now - self._last_line > _SECONDS_BETWEEN_LINES or step >= self._total
        if due and not self._console.is_terminal:
            self._last_line, left = now, ""
            if step < self._total:
                left = f", {bound}{duration((self._total - step) * cost)} left"
            self._console.print(
                f"{self._title}: step {step}/{self._total}  {speed}{left}  {shown}",
                highlight=False,
                soft_wrap=True,
            )


def _notebook_cell() -> Any:
    """A handle of IPython on a place below the cell."""
    try:
        from IPython.display import display  # type: ignore[reportMissingImports]
    except ImportError:
        return None
    return display({"text/plain": ""}, raw=True, display_id=True)


def begins(method: Any, components: Any, step: int, end: int) -> str:
    """What is said before the first step: method, size and devices."""
    devices = jax.devices()
    many = f" in {method.num_instances} instances" if method.num_instances > 1 else ""
    where = f"{len(devices)} device{'s' * (len(devices) > 1)} ({devices[0].device_kind})"
    return (
        f"method {method.name}, {components.num_components} components{many}, steps {step + 1:,} "
        f"to {end:,} of {method.batch_size:,} examples on {where}; the first "
        f"{min(method.steps_per_call, end - step)} include compiling"
    )


def duration(seconds: float) -> str:
    """A time in the unit that people would say it in."""
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def seconds(budget: int | float | str) -> float:
    """Seconds of 300, "300", "300s", "5min", "1h 30min".

    Raises:
      InputError: it is none of these, or not above 0.
    """
    text = str(budget).strip().lower()
    if re.fullmatch(r"\d+(\.\d+)?", text):
        found = float(text)
    else:
        if not re.fullmatch(f"({_PART.pattern})+", text):
            raise InputError(
                f"budget must be seconds or a time like 90s, 5min, 1h30min; got {budget!r}."
            )
        found = sum(float(number) * _UNITS[unit] for number, unit in _PART.findall(text))
    if not 0 < found < float("inf"):
        raise InputError(f"budget must be above 0; got {budget!r}.")
    return found


def say(text: str) -> None:
    """A line beside the progress, from the first process."""
    console = Console(stderr=True, quiet=not parallel.is_primary())
    console.print(text, highlight=False, markup=False, soft_wrap=True)


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


def log_to_wandb(**options: Any) -> Callable[[Mapping[str, Any]], None]:
    """An `on_log` of `apd_jax.decompose` that writes every row to Weights & Biases.

    Args:
      options: of `wandb.init`, such as project, name, or id with resume="allow".
    Raises:
      InputError: wandb is not installed.
    """
    try:
        import wandb  # type: ignore[reportMissingImports]
    except ImportError:
        raise InputError("wandb is not installed; pip install wandb, or apd_jax[wandb].") from None
    run = wandb.init(**options)

    def write(row: Mapping[str, Any]) -> None:
        numbers = {k: v for k, v in row.items() if not isinstance(v, str)}
        run.log(dict(_scalars(numbers)), step=row["step"])

    return write


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
