"""Evidence for a decomposition: nineteen checks.

Each has its bar and its budget, and where it cannot be computed a reason. What a passed card says:
these components are needed for this behaviour on this distribution, under ablations up to this
budget.
"""

from __future__ import annotations

import datetime
import functools
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree
from rich.console import Console

from apd_jax.components import Components
from apd_jax.decomposition import Decomposition
from apd_jax.errors import InputError, number_of, of_kind, shown
from apd_jax.evaluation.general import STREAM
from apd_jax.evidence import ablate, audit, controls, fit, length, retrain, truth
from apd_jax.evidence.asking import Display, answers, chosen
from apd_jax.evidence.budget import Clock
from apd_jax.evidence.card import Evidence
from apd_jax.evidence.check import EVALUATION_BATCHES, Case, Check
from apd_jax.evidence.subject import Setting, make
from apd_jax.methods.base import Method
from apd_jax.methods.optimizers import Trained
from apd_jax.network import data
from apd_jax.network.takes import taken
from apd_jax.targets.base import Target
from apd_jax.train.progress import seconds

CHECKS = (
    *(
        fit.faithfulness,
        length.minimality,
        fit.sparse,
        ablate.partial,
        ablate.worst,
        ablate.monotone,
        truth.scrubbing,
    ),
    *(audit.fidelity, audit.tempered, truth.geometry_of, fit.shrinkage, fit.alive_components),
    *(
        retrain.capacity,
        retrain.seeds,
        retrain.data,
        controls.controls,
        fit.convergence,
        fit.provenance,
        length.description_length,
    ),
)


def evidence(
    decomposition: Decomposition,
    *,
    target: Target | None = None,
    x: PyTree = None,
    num_examples: int | None = None,
    bits_per_rank: float = 1.0,
    full: bool = False,
    seeds: Sequence[Trained] = (),
    other: Components | None = None,
    earlier: Mapping[int, Trained] | None = None,
    provenance: Mapping[str, Any] | None = None,
    checks: Sequence[int | str] | int | str | None = None,
    budget: int | float | str | None = None,
    console: Console | None = None,
) -> Evidence:
    """Fills the checks 1 to 19 for one decomposition; what cannot be computed for it says why.

    Args:
      decomposition: of one instance. Errors are measured as its `minimality_loss` says, in units of
        `Case.scale`.
      target: what is known of the network, for scrubbing, geometry and fresh weights; None for a
        network of your own.
      x: the examples to judge on; None draws `num_examples` from the sampler with a key that
        training never uses.
      num_examples: None takes as many as a training batch has, over which its mask was chosen, too.
      bits_per_rank: α of the description length, in bits per rank per leaf.
      full: also train again: more components (13), ten seeds (14), other data (15), a random
        network (16). Takes about twenty times the original run.
      seeds: other seeds' decompositions of the same target by the same settings, if there are any.
      other: another run of the same target, matched with this one.
      earlier: {step: what was trained} of other checkpoints of this run.
      provenance: workdir, command, step of the run.
      checks: those to run, by number or name; a part of a name will do: ["faithfulness", 3]. None
        runs all.
      budget: of time, in seconds or as "90s", "5min", "1h30min". Small pieces are timed, and a
        check that would not fit into what is left is not run and says what it would take; those
        known not to fit are named at once. Those that the verdict rests on come first. None runs
        all that is asked.
      console: where the display goes that says which check is running, and since when; None: the
        error stream.
    Raises:
      InputError: several instances; no data; examples that are none; a check that does not exist;
        a budget that is none; anything else of a wrong kind.
    Cost: without `full` some 1200 sparse passes over the examples, half of them with gradients.
    """
    started, questions = time.monotonic(), chosen(CHECKS, checks)
    allowed = None if budget is None else seconds(budget)
    method, problem = decomposition.method, decomposition.problem
    count = _num_examples(method, num_examples)
    key = jax.random.fold_in(jax.random.key(method.seed), STREAM + 2)
    draw, num_batches = _held_out(decomposition, x, key, count)
    about = _about(method, of_kind("provenance", provenance or {}, Mapping, "{name: value}"))
    of_kind("target", target, (Target, type(None)), "a Target, of apd_jax.targets")
    of_kind("earlier", earlier or {}, Mapping, "{step: what was trained}")
    setting = Setting(problem, method)
    with Display(console, len(questions)) as display:
        display.says("what the gate keeps")
        case = Case(
            subject=make(setting, problem.params, decomposition.trained, draw(0)),
            decomposition=decomposition,
            key=jax.random.fold_in(key, 1),
            draw=draw,
            num_batches=num_batches,
            target=target,
            seeds=[_trained("a run of seeds", run) for run in of_kind("seeds", seeds, *_RUNS)],
            other=None if other is None else _components(other),
            earlier={n: _trained(f"earlier[{n!r}]", run) for n, run in (earlier or {}).items()},
            provenance=about,
            bits_per_rank=number_of("bits_per_rank", bits_per_rank),
            full=full,
        )
        clock = None if allowed is None else Clock(case, allowed, started)
        return Evidence(about, answers(case, questions, display, clock))


def _num_examples(method: Method, asked: int | None) -> int:
    """How many examples to judge on.

    Raises:
      InputError: too few, or the method trained several instances.
    """
    if method.num_instances != 1:
        raise InputError(
            f"evidence is of one instance, and there are {method.num_instances}; take "
            "decomposition.instance(i)."
        )
    count: Any = method.batch_size if asked is None else asked
    if not isinstance(count, int | np.integer) or count < 2:
        raise InputError(f"num_examples must be a whole number, at least 2; got {shown(count)}.")
    return int(count)


_RUNS = (Sequence, "a list of what other seeds trained")


def _trained(what: str, run: Any) -> Trained:
    """What was trained, of a decomposition too."""
    found = run.trained if isinstance(run, Decomposition) else run
    return of_kind(what, found, Trained, "a decomposition, or its `trained`")


def _components(run: Any) -> Components:
    found = run.components if isinstance(run, Decomposition) else run
    return of_kind("other", found, Components, "a decomposition, or its components")


def _about(method: Method, provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Where the numbers come from, as far as it is known."""
    return {
        "workdir": "",
        "command": "decomposition.evidence()",
        "step": method.num_steps,
        "seed": method.seed,
        **provenance,
        "device": jax.devices()[0].device_kind,
        "num_devices": jax.device_count(),
        "jax": jax.__version__,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _held_out(decomposition: Decomposition, x: PyTree, key: jax.Array, num_examples: int):
    """i -> batch i of num_examples, and how many there are."""
    source = decomposition.problem.sample_fn
    if x is not None:
        x = taken(decomposition.problem.apply_fn, decomposition.problem.params, x)
        return (lambda i: x), 1
    if source is None:
        raise InputError(
            "this decomposition has no data (it was loaded without sample_fn); give examples as x."
        )
    if isinstance(source, data.Batches):
        return (lambda i: jax.tree.map(lambda a: jnp.asarray(a[:num_examples]), source.first)), 1
    draw = jax.jit(source)

    @functools.cache
    def batch(i: int) -> PyTree:
        size = jax.tree.leaves(data.shapes(source))[0].shape[0]
        per = -(-num_examples // size)
        drawn = [draw(key, jnp.asarray(i * per + j, jnp.int32)) for j in range(per)]
        return jax.tree.map(lambda *parts: jnp.concatenate(parts)[:num_examples], *drawn)

    return batch, EVALUATION_BATCHES


__all__ = ["CHECKS", "Case", "Check", "Evidence", "evidence"]
