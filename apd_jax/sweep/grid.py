"""Which runs a sweep has: the text of --sweep as axes, and the settings that they span."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from typing import Any

import numpy as np

from apd_jax.errors import InputError, one_of
from apd_jax.methods import registry
from apd_jax.methods.base import Method


@dataclasses.dataclass(frozen=True)
class Grid:
    """The Cartesian product of a few fields' values, by a number of seeds each."""

    axes: dict[str, tuple[float, ...]]  # {field: values}, in the order given; without the seed
    seeds: tuple[int, ...]

    @property
    def settings(self) -> list[dict[str, float]]:
        """All settings, the last axis changing fastest; a single empty one without axes."""
        return [
            dict(zip(self.axes, values, strict=True))
            for values in itertools.product(*self.axes.values())
        ]

    def ceiling(self, method: Method) -> Method:
        """The method with every axis at its largest value.

        That decides before tracing which terms are on, and how much room k needs.
        """
        return method.replace(**{field: max(values) for field, values in self.axes.items()})


def parse(text: str, method: Any) -> Grid:
    """Reads "seed=0:20;topk=0.5,1,2;simplicity_coeff=log(1,100,5)".

    Axes are `field=values`, separated by semicolons. Values are a list `a,b,c`; or
    `log(first,last,count)`, `count` of them in equal ratios; or, for the seed, a range `first:stop`
    without `stop`. Fields are "seed" and the method's numbers. Without seeds the method's is taken.

    Args:
      method: its settings; every swept one is checked as if it stood there.
    Raises:
      InputError: an unknown field, one that cannot be swept or has no effect, no values or the same
        twice, or a setting refused.
    """
    method = registry.of(method)
    axes: dict[str, tuple[Any, ...]] = {}
    for part in filter(None, (part.strip() for part in text.split(";"))):
        field, equals, values = (piece.strip() for piece in part.partition("="))
        if not equals:
            raise InputError(f"--sweep has {part!r}; write field=values, as in topk=0.5,1,2.")
        _check_field(field, method)
        if field in axes:
            raise InputError(f"--sweep names {field} twice; give all its values at once.")
        axes[field] = _values(field, values)
    if not axes:
        raise InputError(
            "--sweep is empty; give what to sweep, e.g. --sweep='seed=0:5;topk=0.5,1,2'."
        )
    seeds = tuple(axes.pop("seed", (method.seed,)))
    grid = Grid(axes, seeds)
    for setting in grid.settings:
        method.replace(**setting).check()
    grid.ceiling(method).check()
    return grid


def _check_field(field: str, method: Method) -> None:
    numbers = method.numbers()
    one_of("field in --sweep", field, dict.fromkeys(("seed", *numbers, *method.fields())))
    if field != "seed" and field not in numbers:
        raise InputError(
            f"{field} cannot be swept, as it changes the program itself; what can are seed, "
            f"{', '.join(numbers)}. Make a run, or a sweep, for each value of it."
        )
    if field in (read_with := method.read_with()):
        other, needed = read_with[field]
        if getattr(method, other) not in needed:
            raise InputError(
                f"sweeping {field} would change nothing: it is read with {other} = "
                f"{' or '.join(map(repr, needed))} only."
            )


def _values(field: str, text: str) -> tuple[Any, ...]:
    """The values of one axis, in their order."""
    spaced = re.fullmatch(r"log\(([^,]*),([^,]*),([^,]*)\)", text)
    between = re.fullmatch(r"(\d+):(\d+)", text)
    if field == "seed":
        values = (
            range(*map(int, between.groups()))
            if between
            else [_number(field, piece, whole=True) for piece in text.split(",")]
        )
    elif spaced:
        first, last, count = (
            _number(field, spaced[1]),
            _number(field, spaced[2]),
            _number(field, spaced[3], whole=True),
        )
        if not (first > 0 and last > 0 and count >= 2):
            raise InputError(
                f"{field}={text} in --sweep: log(first,last,count) needs two numbers above 0 and a "
                "count of at least 2."
            )
        spread = np.geomspace(first, last, count)
        values = [float(f"{value:.6g}") for value in spread]  # as one would write them
    else:
        values = [_number(field, piece) for piece in text.split(",")]
    if not values:
        raise InputError(
            f"{field}={text} in --sweep holds no value; the end of a range is not part of it."
        )
    if len(set(values)) < len(values):
        raise InputError(f"{field}={text} in --sweep holds a value twice; name each once.")
    return tuple(values)


def _number(field: str, text: str, *, whole: bool = False) -> Any:
    try:
        number = int(text) if whole else float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number) or (whole and number < 0):
        kind = "whole number of at least 0" if whole else "number"
        raise InputError(
            f"{field} in --sweep has {text.strip()!r} where a {kind} is needed; "
            "write a,b,c, or log(first,last,count), or for the seed first:stop."
        )
    return number
