"""Errors that are the caller's to mend: one sentence that says what, where and what to do."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from typing import Any


class InputError(ValueError):
    """A value, file or folder given by the user does not fit.

    The command line prints it without a traceback.
    """


class UnknownName(InputError):
    """A name that is none of the known ones."""

    what = value = ""
    known: tuple[str, ...] = ()

    @classmethod
    def of(cls, what: str, value: str, known: Iterable[str]) -> UnknownName:
        """The sentence that lists the known names and says which is the nearest."""
        known = tuple(known)
        near = difflib.get_close_matches(str(value), known, n=1)
        meant = f" Did you mean {near[0]!r}?" if near else ""
        error = cls(f"unknown {what} {value!r}; known: {', '.join(known)}.{meant}")
        error.what, error.value, error.known = what, value, known
        return error


class NonFiniteError(InputError):
    """A loss became NaN or infinite during training; checkpoints from before are kept."""


class Interrupted(Exception):
    """Training was asked to stop and has saved a checkpoint.

    `signum` is the signal, `step` where it goes on.
    """

    def __init__(self, step: int, signum: int):
        super().__init__(f"interrupted at step {step}")
        self.step, self.signum = step, signum


def first_line(error: BaseException) -> str:
    """What an error says, in a line without the full stop at its end."""
    said = f"there is no {error}" if isinstance(error, KeyError) else str(error)
    lines = said.strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


def listed(names: Iterable[str], most: int = 6, joint: str = ", ") -> str:
    """The first of some names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return joint.join(names[:most]) + more


def number_of(what: str, value: Any) -> float:
    """`value` as a float.

    Raises:
      InputError: it is no number, or NaN.
    """
    try:
        found = math.nan if isinstance(value, str) else float(value)
    except (TypeError, ValueError):
        found = math.nan
    if math.isnan(found):
        raise InputError(f"{what} must be a number; got {shown(value)}.")
    return found


def of_kind(what: str, value: Any, kinds: type | tuple[type, ...], meant: str) -> Any:
    """`value`, if it is of one of these classes.

    Raises:
      InputError: it is not.
    """
    if not isinstance(value, kinds):
        raise InputError(f"{what} must be {meant}; got {shown(value)}.")
    return value


def shown(value: Any) -> str:
    """A value in a sentence: itself where it is short, else its class."""
    said = repr(value)
    return said if len(said) <= 40 and "\n" not in said else f"a {type(value).__name__}"


def seed_of(what: str, value: int) -> int:
    """`value`, if a random key can be made of it: other numbers would equal another seed.

    Raises:
      InputError: it is not in [0, 2**32).
    """
    if not 0 <= value < 2**32:
        raise InputError(f"{what} must lie in [0, 2**32); got {value}.")
    return value


def one_of(what: str, value: str, known: Iterable[str]) -> str:
    """`value`, if it is one of the known.

    Raises:
      UnknownName: it is not; the sentence lists the known and names the nearest.
    """
    known = tuple(known)
    if value in known:
        return value
    raise UnknownName.of(what, value, known)
