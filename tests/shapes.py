"""Shapes and types of arrays, in the signatures of the package, are checked while tests run."""

import inspect
import re
from collections.abc import Callable
from typing import Any

import jaxtyping

_ARRAYS = re.compile(r"\b(Bool|Float|Inexact|Int|Key|Num|Shaped|UInt)\d*\[")
_jaxtyped = jaxtyping.jaxtyped


def _arrays_jaxtyped(*, typechecker: Any) -> Callable:
    """Of functions whose signature has arrays; all else in it is left to pyright.

    Functions inside of functions are not checked: each call of the outer one would compile their
    checks anew, a tenth of what all tests take.
    """

    def decorate(fn: Any) -> Any:
        inner = "<locals>" in fn.__qualname__
        plain = not isinstance(fn, type) and not _ARRAYS.search(str(inspect.get_annotations(fn)))
        return fn if inner or plain else _jaxtyped(fn, typechecker=typechecker)

    return decorate


def check() -> None:
    """From now on, in this process: before the package is imported."""
    jaxtyping.jaxtyped = _arrays_jaxtyped
    jaxtyping.install_import_hook("apd_jax", "beartype.beartype")
