"""Do the bars tell anything (16)?

An untrained decomposition, a random and a shuffled network must fail them.
"""

from __future__ import annotations

import dataclasses
import functools
import operator

import jax
from jaxtyping import PRNGKeyArray, PyTree

from apd_jax import components as components_lib
from apd_jax.evidence import ablate, fit, length, retrain
from apd_jax.evidence.check import Case, Check, Cost, asks
from apd_jax.evidence.subject import fresh, make

ASKED = (fit.faithfulness, fit.sparse, ablate.partial, ablate.monotone)
OF_TRAINED = (*ASKED, length.minimality, length.description_length)
TRAINED = "trained_on_random_network"


def random_params(case: Case, key: PRNGKeyArray) -> PyTree:
    """Another network: the target's initialisation drawn afresh, or `shuffled` if it has none."""
    if case.target is not None and case.target.loss_fn is not None:
        return jax.jit(case.target.init_fn)(key)
    return shuffled(case, key)


def shuffled(case: Case, key: PRNGKeyArray) -> PyTree:
    """The target with the entries of each decomposed leaf in random places."""
    leaves = components_lib.decomposed_leaves(case.subject.components, case.subject.params)
    mixed = components_lib.shuffled(key, leaves)
    return components_lib.replace_leaves(case.subject.params, mixed)


def _cost(case: Case) -> Cost:
    """Of every control its choice and its checks; one is trained, where that is asked for."""
    asked = [*ASKED] * 3 + ([*OF_TRAINED] if case.full else [])
    own = retrain.runs(case, 1) + Cost(gate=4)
    found = functools.reduce(operator.add, (ask.cost(case) for ask in asked), own)
    shared = tuple((ask.number, ask.cost(case).programs) for ask in dict.fromkeys(asked))
    return dataclasses.replace(found, programs=own.programs + 4, shared=shared)


@asks(16, "controls", "Controls", _cost)
def controls(case: Case) -> Check:
    """Check 16: what checks 1, 3, 4 and 6 say where they should fail.

    Of freshly initialised components; and of these components for a freshly drawn and for a
    shuffled network. Each must fail 1 and 3. With `full` a decomposition of the freshly drawn
    network is trained too, by the same settings. It must fail one of these bars or of those of 2
    and 19: if it meets them all, they show what the data look like and nothing of this network.
    """
    s, key = case.subject, jax.random.fold_in(case.key, 16)
    untrained = fresh(key, s)
    other = random_params(case, jax.random.fold_in(key, 1))
    judged = {
        "untrained": make(s.setting, s.params, untrained, s.x),
        "random_network": make(s.setting, other, s.trained, s.x),
        "shuffled_network": make(
            s.setting, shuffled(case, jax.random.fold_in(key, 2)), s.trained, s.x
        ),
    }
    if case.full:
        judged[TRAINED] = make(s.setting, other, retrain.again(case, params=other)[0], s.x)
    values, fooled, counted = {}, [], []
    for name, subject in judged.items():
        checks = [ask(case.about(subject)) for ask in (OF_TRAINED if name == TRAINED else ASKED)]
        missed = [check for check in checks if check.passed is False]
        failed, told = {check.number for check in missed}, name.replace("_", " ")
        which = ", ".join(f"{check.title.lower()} ({check.number})" for check in missed)
        counted.append(f"{told} {len(failed)} of {len(checks)}" + (f": {which}" if missed else ""))
        values |= {
            f"{name}_bars_failed": len(failed),
            f"{name}_sparse_error": checks[1].values["trained"],
        }
        if name != TRAINED and not {1, 3} <= failed:
            kept = sorted({1, 3} - failed)
            fooled.append(f"{told} (check{'s' * (len(kept) > 1)} {' and '.join(map(str, kept))})")
    text = f"Bars failed, as they should be: {'; '.join(counted)}."
    if fooled:
        text = (
            f"WARNING: the control {' and the control '.join(fooled)} passes bars that it must "
            f"fail; these bars tell nothing here. {text}"
        )
    values["fooled"] = len(fooled)
    beaten = values.get(f"{TRAINED}_bars_failed") != 0
    return Check(
        passed=not fooled and beaten,
        bar="untrained components, a random and a shuffled network fail 1 and 3; a decomposition "
        "trained on a random network fails one of 1, 2, 3, 4, 6, 19",
        values=values,
        text=text,
        why="" if case.full else "a decomposition trained on a random network is left to --full",
        budget=case.examples,
    )
