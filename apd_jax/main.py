"""Command line: train (the default), evaluate or inspect one run.

python -m apd_jax.main --config=configs/resid_mlp.py --workdir=runs/resid_mlp
python -m apd_jax.main --config=configs/tms.py:5-2 --workdir=runs/tms --config.apd.topk=0.3
python -m apd_jax.main --mode=evaluate --workdir=runs/tms
python -m apd_jax.main --mode=inspect --workdir=runs/tms
"""

from __future__ import annotations

from collections.abc import Sequence

from absl import app, flags, logging
from ml_collections import config_flags

from apd_jax import experiment, parallel
from apd_jax.cli import make_console, parse, refuse, told_in_a_sentence

_CONFIG = config_flags.DEFINE_config_file("config", None, "Experiment: FILE[:variant[,variant...]]; fields by --config.field=value.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; the same command goes on where it stopped.")
_MODE = flags.DEFINE_enum("mode", "train", ["train", "evaluate", "inspect"], "evaluate and inspect read a workdir; they need no --config.")


def main(argv: Sequence[str]) -> None:
    logging.set_verbosity(logging.ERROR)  # orbax tells every file it writes; our own warnings have a logger of their own
    with told_in_a_sentence():
        parallel.initialize()
        console = make_console()
        if len(argv) > 1:
            refuse(f"unexpected argument {argv[1]!r}; options are written --name=value.")
        if not _WORKDIR.value:
            refuse("--workdir is missing; give the folder of the run, e.g. --workdir=runs/tms.")
        if _MODE.value == "evaluate":
            parallel.from_primary(lambda: experiment.evaluate(_WORKDIR.value, console))
        elif _MODE.value == "inspect":
            parallel.from_primary(lambda: experiment.inspect(_WORKDIR.value, console))
        elif _CONFIG.value is None:
            refuse("--config is missing; give an experiment, e.g. --config=configs/tms.py.")
        else:
            experiment.run(_CONFIG.value, _WORKDIR.value, console)


if __name__ == "__main__":
    app.run(main, flags_parser=lambda argv: parse(argv, _CONFIG))
