r"""Command line: many settings of one decomposition, trained side by side.

python -m apd_jax.sweep --config=configs/tms.py:5-2 --workdir=runs/sweep \
    --sweep='seed=0:20;topk=0.15,0.211,0.3;learning_rate=1e-2,3e-2'

Gives up the worse half, three times:
python -m apd_jax.sweep ... --sweep='seed=0:5;simplicity_coeff=log(0.1,10,9)' --halve=2
"""

from __future__ import annotations

from collections.abc import Sequence

from absl import app, flags
from ml_collections import config_flags

from apd_jax.commands import sweep
from apd_jax.commands.cli import (
    keep_programs,
    make_console,
    only_our_messages,
    parse,
    refuse,
    told_in_a_sentence,
)
from apd_jax.sweep.judge import CRITERIA
from apd_jax.train import parallel

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Experiment: FILE[:variant[,variant...]]; fields by --config.field=value."
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the sweep; the same command goes on where it stopped."
)
_SWEEP = flags.DEFINE_string(
    "sweep",
    "",
    "Axes field=values, separated by semicolons; values a,b,c, log(first,last,count), seeds 0:20.",
)
_HALVE = flags.DEFINE_integer(
    "halve",
    0,
    "Successive halving: the best 1/N of the settings go on, up to three times; 0: all to the end.",
)
_CRITERION = flags.DEFINE_enum(
    "criterion",
    "worst_error",
    list(CRITERIA),
    "What settings and seeds are chosen by; needs no truth.",
)


def main(argv: Sequence[str]) -> None:
    with told_in_a_sentence():
        parallel.initialize()
        only_our_messages()
        if len(argv) > 1:
            refuse(f"unexpected argument {argv[1]!r}; options are written --name=value.")
        if not _WORKDIR.value:
            refuse("--workdir is missing; give the folder of the sweep, e.g. --workdir=runs/sweep.")
        keep_programs(_WORKDIR.value)
        if _CONFIG.value is None:
            refuse("--config is missing; give an experiment, e.g. --config=configs/tms.py:5-2.")
        sweep.run(
            _CONFIG.value,
            _WORKDIR.value,
            _SWEEP.value,
            make_console(),
            criterion=_CRITERION.value,
            halve=_HALVE.value,
        )


if __name__ == "__main__":
    app.run(main, flags_parser=lambda argv: parse(argv, _CONFIG))
