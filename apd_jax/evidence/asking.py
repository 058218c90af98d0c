"""Which checks are asked, in which order, and what is seen meanwhile."""

from __future__ import annotations

import difflib
import time
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from apd_jax.errors import InputError, shown
from apd_jax.evidence.budget import Clock
from apd_jax.evidence.card import NEEDED
from apd_jax.evidence.check import Case, Check, Question
from apd_jax.train import parallel
from apd_jax.train.progress import duration


def chosen(
    questions: Sequence[Question], asked: Sequence[int | str] | int | str | None
) -> tuple[Question, ...]:
    """Those of these numbers and names, or of one; all for None.

    A part of a name will do if one has it.

    Raises:
      InputError: a number or name that no check has, or a part that several have.
    """
    if asked is None:
        return tuple(questions)
    several = [asked] if isinstance(asked, int | str) else asked
    if not isinstance(several, Iterable):
        raise InputError(f"checks must be numbers or names of checks; got {shown(asked)}.")
    numbers = {number for one in several for number in _meant(questions, one)}
    return tuple(question for question in questions if question.number in numbers)


def _meant(questions: Sequence[Question], one: int | str) -> list[int]:
    text = str(one).strip().lower().replace(" ", "_").replace("-", "_")
    exact = [q.number for q in questions if text in (str(q.number), q.name)]
    found = exact or [q.number for q in questions if text and text in q.name]
    if len(found) == 1:
        return found
    known = ", ".join(f"{q.name} ({q.number})" for q in questions)
    near = difflib.get_close_matches(text, [q.name for q in questions], n=1)
    meant = f" Did you mean {near[0]!r}?" if near and not found else ""
    raise InputError(
        f"{one!r} names {'no check' if not found else 'several checks'}; known: {known}.{meant}"
    )


def answers(
    case: Case, questions: Sequence[Question], display: Display, clock: Clock | None = None
) -> list[Check]:
    """Asks them. Within a budget, what the verdict rests on comes first; what does not fit says so.

    Returns: the checks in the order of their numbers.
    """
    order = list(questions)
    if clock is not None:
        order.sort(key=lambda question: question.number not in NEEDED)
        display.says("timing small pieces")
        display.tells(_plan(case, order, clock))
    found = {}
    for question in order:
        expected, left = 0.0, 0.0
        if clock is not None:
            expected, left = clock.expects(question.cost(case)), clock.left
        if clock is not None and expected > left:
            why = f"not run: it would take about {duration(expected)}, and of the budget of "
            why += f"{duration(clock.budget)} {duration(left) if left else 'nothing'} is left"
            found[question.number] = question.answer(Check(why=why))
        else:
            about = f", about {duration(expected)}" if expected >= 1 else ""
            display.says(f"{question.title} ({question.number}){about}")
            found[question.number] = _asked(question, case, clock)
        display.advance()
    return [found[question.number] for question in questions]


def _asked(question: Question, case: Case, clock: Clock | None) -> Check:
    began = time.monotonic()
    found = question(case)
    if clock is not None:
        clock.learn(question.number, question.cost(case), time.monotonic() - began)
    return found


def _plan(case: Case, order: Sequence[Question], clock: Clock) -> str:
    """What will not fit, as far as it is known before the first check; "" where all does."""
    left, out = clock.left, []
    for question in order:
        expected = clock.expects(question.cost(case))
        if expected > left:
            out.append(f"{question.name} ({question.number}), about {duration(expected)}")
        else:
            left -= expected
    spent = clock.budget - clock.left
    if not out:
        return ""
    return (
        f"of the budget of {duration(clock.budget)}, {duration(spent)} went into compiling and "
        f"timing the first passes; what will not fit: {'; '.join(out)}"
    )


class Display:
    """Which check is asked, and since when: bars, or a line each where there is no terminal."""

    def __init__(self, console: Console | None, total: int):
        self._console = console or Console(stderr=True, quiet=not parallel.is_primary())
        self._total, self._done, self._began = total, 0, time.monotonic()
        columns = (
            BarColumn(bar_width=24),
            TimeElapsedColumn(),
            TextColumn("{task.description}"),
        )
        self._bars = Progress(
            *columns,
            console=self._console,
            disable=not self._console.is_terminal,
            transient=True,
        )
        self._all = self._bars.add_task(f"evidence, {total} checks", total=total)
        self._now: TaskID | None = None

    def __enter__(self) -> Display:
        self._bars.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bars.stop()

    def says(self, what: str) -> None:
        if self._now is not None:
            self._bars.remove_task(self._now)
        self._now = self._bars.add_task(what, total=None)
        if not self._console.is_terminal:
            spent = duration(time.monotonic() - self._began)
            self._console.print(
                f"evidence: {self._done}/{self._total} checks after {spent}; now {what}",
                highlight=False,
                markup=False,
                soft_wrap=True,
            )

    def tells(self, what: str) -> None:
        """A line that stays."""
        if what:
            self._console.print(f"evidence: {what}", highlight=False, markup=False, soft_wrap=True)

    def advance(self) -> None:
        self._done += 1
        self._bars.update(self._all, completed=self._done)
