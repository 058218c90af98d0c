"""What the commands share: refusing a user's mistake in one sentence, and the console."""

from __future__ import annotations

import re
import sys

from rich.console import Console

from apd_jax import parallel


def make_console() -> Console:
    """Where tables go: as wide as the terminal, or 140 columns in a file; quiet on all processes but the first."""
    return Console(width=None if sys.stdout.isatty() else 140, quiet=not parallel.is_primary())


def sentence(error: Exception) -> str:
    """The last line of an error is its cause; ml_collections puts a traceback before it, and quotes unknown fields its own way."""
    text = str(error.args[0] if error.args else error)
    if isinstance(error, KeyError | AttributeError):
        field, near = re.search(r"\w+", text), re.search(r"Did you mean \\?[\"'](\w+)", text)
        return f"the config has no field {field[0] if field else text!r}." + (f" Did you mean {near[1]!r}?" if near else "")
    cause = [line.strip() for line in text.splitlines() if line.strip()][-1] if text.strip() else repr(error)
    return cause.split("InputError: ")[-1]


def refuse(sentence: str) -> None:
    """Ends the program with exit status 2."""
    if parallel.is_primary():  # the others have the same to say
        print(f"apd_jax: {sentence}", file=sys.stderr)
    sys.exit(2)
