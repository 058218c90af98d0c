"""Command line: the page of a language model's run, with a box to type text into.

python -m apd_jax.serve --workdir=runs/prose

The page is served to this computer alone. The run must have been harvested: --mode=harvest.
"""

from __future__ import annotations

from collections.abc import Sequence

from absl import app, flags

from apd_jax.commands import live
from apd_jax.commands.cli import (
    keep_programs,
    make_console,
    only_our_messages,
    parse,
    refuse,
    told_in_a_sentence,
)

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.")
_PORT = flags.DEFINE_integer("port", 8765, "Of this computer; 0: any that is free.")


def main(argv: Sequence[str]) -> None:
    with told_in_a_sentence():
        only_our_messages()
        if len(argv) > 1:
            refuse(f"unexpected argument {argv[1]!r}; options are written --name=value.")
        if not _WORKDIR.value:
            refuse("--workdir is missing; give the folder of the run, e.g. --workdir=runs/prose.")
        keep_programs(_WORKDIR.value)
        live.serve(_WORKDIR.value, _PORT.value, make_console())


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
