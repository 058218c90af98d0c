"""Command line: the evidence of a run, from its workdir.

Checks 1 to 19 from the newest checkpoint, as evidence.json, evidence.md and figures:
  python -m apd_jax.evidence --workdir=runs/tms
Also those that need further runs (about twenty times the time of the run):
  python -m apd_jax.evidence --workdir=runs/tms --full
Within five minutes, some of the checks, by number or name:
  python -m apd_jax.evidence --workdir=runs/tms --budget=5min --checks=faithfulness,3,worst
Also how far two runs of one target agree:
  python -m apd_jax.evidence --workdir=runs/a --other=runs/b
Of a network of one's own (a workdir of decompose, or a saved decomposition):
  python -m apd_jax.evidence --workdir=runs/mine --apply=nets:forward --data=inputs.npy
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import jax
from absl import app, flags

from apd_jax.commands import cli
from apd_jax.commands import evidence as workdir
from apd_jax.commands.given import define_flags
from apd_jax.errors import InputError
from apd_jax.train import parallel

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a run with a checkpoint.")
_FULL = flags.DEFINE_bool("full", False, "Also train again, for checks 13 to 16.")
_OTHER = flags.DEFINE_string(
    "other", None, "Workdir of another run of the same target: how far do the two agree?"
)
_INSTANCE = flags.DEFINE_integer("instance", None, "Which of several instances; by default all.")
_NUM_EXAMPLES = flags.DEFINE_integer(
    "num_examples",
    None,
    "Held-out examples to judge on; by default as many as a training batch has.",
)
_BITS_PER_RANK = flags.DEFINE_float(
    "bits_per_rank", 1.0, "Description length: bits per rank per leaf of an active component."
)
_GIVEN = define_flags()

_CHECKS = flags.DEFINE_list(
    "checks", None, "Which checks, by number or (a part of the) name; by default all."
)
_BUDGET = flags.DEFINE_string(
    "budget",
    None,
    "Time, in seconds or as 90s, 5min, 1h30min: a check that would not fit is not run and says "
    "what it would take.",
)


def main(argv: Sequence[str]) -> None:
    try:
        parallel.initialize()
        cli.only_our_messages()
        if _FULL.value and jax.process_count() > 1:
            cli.refuse(
                "--full trains again, which one process does alone; give the command without a "
                "launcher."
            )
        if len(argv) > 1:
            cli.refuse(f"unexpected argument {argv[1]!r}; options are written --name=value.")
        if not _WORKDIR.value:
            cli.refuse("--workdir is missing; give the folder of a run, e.g. --workdir=runs/tms.")
        cli.keep_programs(_WORKDIR.value)
        console = cli.make_console()

        def write() -> None:
            workdir.write(
                _WORKDIR.value,
                console,
                full=_FULL.value,
                checks=_CHECKS.value,
                budget=_BUDGET.value,
                other=_OTHER.value,
                instance=_INSTANCE.value,
                num_examples=_NUM_EXAMPLES.value,
                bits_per_rank=_BITS_PER_RANK.value,
                given=_GIVEN(),
            )

        parallel.from_primary(write)
    except InputError as error:
        cli.refuse(str(error))
    except KeyboardInterrupt:
        print("Stopped; nothing was written.", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    app.run(main, flags_parser=cli.parse)
