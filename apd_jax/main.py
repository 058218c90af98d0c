"""Command line: train (the default), evaluate, inspect or report one run, or compare two.

python -m apd_jax.main --config=configs/resid_mlp.py --workdir=runs/resid_mlp
python -m apd_jax.main --config=configs/tms.py:5-2 --workdir=runs/tms --config.apd.topk=0.3
python -m apd_jax.main --mode=evaluate --workdir=runs/tms
python -m apd_jax.main --mode=inspect --workdir=runs/tms
python -m apd_jax.main --mode=report --workdir=runs/tms
python -m apd_jax.main --mode=compare --workdir=runs/tms --other=runs/tms_seed_1
python -m apd_jax.main --mode=harvest --workdir=runs/prose
python -m apd_jax.main --mode=labels --workdir=runs/prose
python -m apd_jax.main --mode=clusters --workdir=runs/prose
python -m apd_jax.main --mode=graph --workdir=runs/prose --prompt="She said that"
python -m apd_jax.main --mode=curve --workdir=runs/prose --prices=0.3,1,3 --steps=500

What the settings mean: python -m apd_jax.main --explain=apd

Also of workdirs of `apd_jax.decompose` and folders of `decomposition.save`: inspect and compare as
above, evaluate and report with the network's function and inputs:
python -m apd_jax.main --mode=evaluate --workdir=runs/mine --apply=nets:forward --data=inputs.npy
"""

from __future__ import annotations

from collections.abc import Sequence

from absl import app, flags
from ml_collections import config_flags

from apd_jax.commands import clusters, curve, experiment, graph, harvest, labels
from apd_jax.commands.cli import (
    keep_programs,
    make_console,
    only_our_messages,
    parse,
    refuse,
    told_in_a_sentence,
)
from apd_jax.commands.given import define_flags
from apd_jax.methods.meanings import explain
from apd_jax.train import parallel

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Experiment: FILE[:variant[,variant...]]; fields by --config.field=value."
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the run; the same command goes on where it stopped."
)
_OTHER = flags.DEFINE_string("other", None, "Folder of a second run, for --mode=compare.")
_THOROUGH = flags.DEFINE_bool(
    "thorough", False, "Of --mode=evaluate: also what takes many times as long, e.g. adversaries."
)
_READERS = {
    "evaluate": lambda *of: experiment.evaluate(*of, thorough=_THOROUGH.value),
    "inspect": experiment.inspect,
    "report": experiment.report,
    "harvest": lambda *of: harvest.harvest(*of, options=_HARVEST()),
    "clusters": lambda *of: clusters.clusters(*of, options=_CLUSTERS()),
    "graph": lambda *of: graph.graph(*of, options=_GRAPH()),
    "labels": lambda *of: labels.labels(*of, options=_LABELS()),
}
_EXPLAIN = flags.DEFINE_string(
    "explain", None, "A method's name (apd, spd, ...): prints what every setting of it means."
)
_GIVEN = define_flags()
_HARVEST = harvest.define_flags()
_CLUSTERS = clusters.define_flags()
_GRAPH = graph.define_flags()
_CURVE = curve.define_flags()
_LABELS = labels.define_flags()
_MODE = flags.DEFINE_enum(
    "mode",
    "train",
    ["train", *_READERS, "compare", "curve"],
    "All but train read a workdir; they need no --config.",
)


def main(argv: Sequence[str]) -> None:
    with told_in_a_sentence():
        parallel.initialize()
        only_our_messages()
        console = make_console()
        if len(argv) > 1:
            refuse(f"unexpected argument {argv[1]!r}; options are written --name=value.")
        if _EXPLAIN.value:
            print(explain(_EXPLAIN.value))
            return
        if not _WORKDIR.value:
            refuse("--workdir is missing; give the folder of the run, e.g. --workdir=runs/tms.")
        keep_programs(_WORKDIR.value)
        if _MODE.value in _READERS:
            parallel.from_primary(lambda: _READERS[_MODE.value](_WORKDIR.value, console, _GIVEN()))
        elif _MODE.value == "compare":
            if not _OTHER.value:
                refuse("--other is missing; give the folder of the second run.")
            parallel.from_primary(
                lambda: experiment.compare(_WORKDIR.value, _OTHER.value, console, _GIVEN())
            )
        elif _MODE.value == "curve":
            curve.curve(_WORKDIR.value, console, _GIVEN(), **_CURVE())
        elif _CONFIG.value is None:
            refuse("--config is missing; give an experiment, e.g. --config=configs/tms.py.")
        elif _GIVEN():
            refuse("--apply, --data, --params and --valid are for reading a workdir; see --mode.")
        else:
            experiment.run(_CONFIG.value, _WORKDIR.value, console)


if __name__ == "__main__":
    app.run(main, flags_parser=lambda argv: parse(argv, _CONFIG))
