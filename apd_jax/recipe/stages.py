"""A recipe: training in stages, with one set of numbers for all targets (`docs/results.md`).

Where examples of one kind agree on what they read (`apd_jax.recipe.modes`), or are mixtures of
codes (`apd_jax.recipe.separation`), or layers have units between them (`apd_jax.recipe.units`), and
components that begin there stand the test of `apd_jax.recipe.beginning`, only `refine` is left to
do, or `polish` and `refine` where the loss says that this was not all. Where none stands it,
components begin at random and go through all stages:

  explore  from a strong simplicity pressure, under which components hold next to nothing, down to a
           weak one. Mechanisms emerge one after the other, each in components of its own, several
           of which may share it. Restarts differ in how many components they keep.
  settle   the pieces joined, unused components begun anew; at the weak pressure, k components per
           example.
  clean    the best of several restarts, by its loss; joined again, unused components cleared for
           good. More than k are kept, so that none gains from holding a piece of another's
           mechanism.
  polish   simplicity, which shrinks what it selects, is switched off. Instead of the k·B largest
           all components are kept whose attribution exceeds a threshold, so that nothing that
           matters is dropped: the components grow to their full length. Where loss and simplicity
           together are worse after it than before (`judge`), it is undone.
  refine   the threshold is lowered to a tenth, and the others are not dropped but times U(0, 1), so
           that they can be ablated in any combination. Steps are in proportion to √loss, which is
           how far the weights are off: what is exact already stays as it is.

Where `recipe.budget` bounds the time, all stages have the same share of their steps (`budget`).

Coefficients are relative: every loss is measured in units of its value at a reference point of this
target (`apd_jax.recipe.scales`), so that one number means the same on every target. k, the mean
number of active components, is `topk`; where that is 0, it is how many modes examples have on
average. If hidden activations are to be reconstructed too, say so by a
`hidden_reconstruction_coeff` above 0; how strongly is the recipe's.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from apd_jax.components import Components
from apd_jax.errors import InputError
from apd_jax.methods.apd import APD
from apd_jax.methods.base import Method
from apd_jax.methods.optimizers import Trained
from apd_jax.network.problem import Problem
from apd_jax.paths import user_path
from apd_jax.recipe import budget, restructure
from apd_jax.recipe import scales as scales_lib
from apd_jax.recipe.beginning import Beginning, accepted
from apd_jax.recipe.judge import Judge, Worth
from apd_jax.recipe.numbers import (
    DRAWS,
    STAGES,
    Recipe,
    as_apd,
    base_method,
    check,
    default_recipe,
    filled,
    stage_method,
)
from apd_jax.recipe.scales import Scales
from apd_jax.train import loop, parallel
from apd_jax.train.progress import say
from apd_jax.train.state import init_state
from apd_jax.train.step import make_loss
from apd_jax.train.workdir import keep_settings

log = logging.getLogger(__name__)

FOUND = "recipe.json"  # in a workdir: what the modes say of the network
WORSE = 1.1  # times what loss and simplicity were together: a stage is undone above
_ROUNDING = 1e-12  # a loss below is rounding, of either sign
SELECTION_WINDOW = 0.2  # the last part of `settle` over which restarts' losses are averaged

__all__ = [
    "FOUND",
    "STAGES",
    "base_method",
    "check",
    "default_recipe",
    "fit",
    "found_method",
    "in_proportion",
    "last_method",
]


def found_method(method: Any, workdir: epath.PathLike) -> APD:
    """The settings of the run in `workdir`, with what the recipe found for what they leave open.

    Raises:
      InputError: they leave k open, and what was found there is missing or torn.
    """
    method, path = as_apd(method), user_path(workdir) / FOUND
    if not path.exists() and method.topk != 0:
        return method
    try:
        return filled(method, **json.loads(path.read_text()))
    except (FileNotFoundError, ValueError):
        raise InputError(
            f"{path}, which says what k the recipe found, is missing or torn; the command of the "
            "run makes it again."
        ) from None


def last_method(problem: Problem, method: APD, recipe: Recipe) -> APD:
    """The settings of the last stage, which components are evaluated with; the run's seed."""
    scales = scales_lib.measure(problem, method)
    return stage_method(method, recipe, STAGES[-1], scales).replace(seed=method.seed)


def fit(
    problem: Problem,
    method: Any,
    recipe: Recipe,
    *,
    workdir: epath.PathLike | None = None,
    on_log: loop.OnLog | None = None,
) -> tuple[Trained, list[dict[str, Any]], Method]:
    """Runs the stages.

    Each resumes from its own checkpoints in `workdir`/stages, the last from `workdir` itself.

    Args:
      on_log: as in `apd_jax.decompose`: rows name their stage, and a stop ends the stage.
      method: settings of APD; what the recipe sets must stand at its default.
    Returns: components and gate, the logged rows of the last stage, and its settings.
    Raises: as `train.loop.fit`.
    """
    method = as_apd(method)
    check(method, recipe)
    began = time.monotonic()
    say("recipe: measuring the target, in whose units the losses are.")
    reference = scales_lib.measure(problem, method)
    judge = Judge(problem, method, recipe, reference)
    stages, begin, loss = STAGES, None, None
    found = accepted(problem, method, recipe, reference, judge)
    if found is not None:
        begin, method = Trained(found.components), filled(method, **found.said)
        if workdir is not None:
            parallel.from_primary(lambda: _keep(found, user_path(workdir)))
        refine = stage_method(method, recipe, "refine", reference)
        loss = _loss(problem, refine, begin)
        log.info("the loss at the beginning is %.2g of the reference", loss)
        stages = STAGES[-1:] if loss < recipe.nearly_exact else STAGES[-2:]
    recipe = budget.within(problem, method, recipe, stages, reference, workdir, began)
    last = last_method(problem, method, recipe)
    if workdir is not None:
        parallel.from_primary(lambda: keep_settings(workdir, last))
    run = _Stages(problem, method, recipe, reference, workdir, stages, judge, on_log)
    rows: list[dict[str, Any]] = []
    for stage in stages:
        begin, rows = run.one(stage, begin, loss if stage == stages[0] else None)
    assert begin is not None
    return begin, rows, last


@dataclasses.dataclass(frozen=True)
class _Stages:
    """One run of the recipe, stage by stage."""

    problem: Problem
    method: APD
    recipe: Recipe
    reference: Scales
    workdir: epath.PathLike | None
    stages: tuple[str, ...]
    judge: Judge
    on_log: loop.OnLog | None = None

    def one(
        self, stage: str, begin: Trained | None, loss: float | None = None
    ) -> tuple[Trained, list[dict[str, Any]]]:
        """The stage from where the one before ended, restructured for the next.

        loss: of `refine` there, where it is known.
        """
        settings = stage_method(self.method, self.recipe, stage, self.reference)
        last, n = stage == STAGES[-1], self.method.num_instances
        several = n * self.recipe.restarts
        if begin is not None and last:
            settings = in_proportion(self.problem, settings, begin, loss)
        folder = None
        if self.workdir is not None:
            folder = user_path(self.workdir) / ("" if last else f"stages/{stage}")
        spread, tell = stage == "explore" and several > 1, self.on_log
        state, rows = loop.advance(
            self.problem,
            settings,
            components=None if begin is None else begin.components,
            settings=_spread(settings, self.recipe, n) if spread else None,
            workdir=folder,
            title=f"decomposition, {stage} ({self.stages.index(stage) + 1} of {len(self.stages)})",
            on_log=None if tell is None else lambda row: tell({"stage": stage, **row}),
        )
        trained = loop.finished(Trained(state.components, state.gate), settings)
        if last:
            self._say(trained)
            return trained, rows
        if stage == "polish":
            assert begin is not None
            return self._unless_worse(begin, trained), rows
        components = trained.components
        if stage == "settle" and several > 1:
            best = _best(rows, settings, n, self.recipe.restarts)
            best = best[0] if n == 1 else best
            components = jax.tree.map(lambda a: a[best], components)
        explored = stage == "explore"
        count = several if explored else n
        between = _between(self.problem, settings, components, count, revive=explored)
        return Trained(between), rows

    def _worths(self, components: Components) -> list[Worth]:
        """Of every instance."""
        n, on, k = self.method.num_instances, self.method.num_always_on, self.method.topk
        each = [components]
        if n > 1:
            each = [jax.tree.map(lambda a, i=i: a[i], components) for i in range(n)]
        return [self.judge.by_threshold(one, on, k) for one in each]

    def _unless_worse(self, before: Trained, after: Trained) -> Trained:
        """What a stage ended with, but what it began with where that was better."""

        def compare() -> np.ndarray:
            pairs = zip(*(self._worths(end.components) for end in (before, after)), strict=True)
            return np.array(
                [float(new.total > WORSE * old.total) for old, new in pairs], np.float32
            )

        n = self.method.num_instances
        undone = parallel.from_primary(compare, like=np.zeros(n, np.float32)) > 0
        if not undone.any():
            return after
        log.warning("polish made %d of %d instances worse, and is undone there.", undone.sum(), n)

        def choose(old: Any, new: Any) -> Any:
            if n == 1:
                return old
            return jnp.where(undone.reshape(-1, *[1] * (new.ndim - 1)), old, new)

        return Trained(jax.tree.map(choose, before.components, after.components), after.gate)

    def _say(self, trained: Trained) -> None:
        """What came of it, by the mask of `polish`."""
        for i, worth in enumerate(
            self._worths(trained.components) if parallel.is_primary() else ()
        ):
            log.info(
                "instance %d: loss %.2g, %.3g components on, simplicity %.2g of the whole's",
                *(i, worth.loss, worth.active, worth.simplicity),
            )


def in_proportion(
    problem: Problem, settings: APD, begin: Trained, loss: float | None = None
) -> APD:
    """Steps in proportion to √loss, measured where it is not given.

    Thresholds begin at a guess, and keep their rate.
    """
    rate = settings.learning_rate
    if settings.mask == "learned":
        settings = settings.replace(threshold_learning_rate=rate)
    loss = _loss(problem, settings, begin) if loss is None else loss
    share = min(1.0, max(loss, _ROUNDING) ** 0.5)
    return settings.replace(learning_rate=rate * share)


def _keep(found: Beginning, workdir: epath.Path) -> None:
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / FOUND).write_text(json.dumps(found.said))


def _loss(problem: Problem, method: APD, begin: Trained) -> float:
    """The loss that a stage begins with, the mean over batches and instances.

    Without the price on what is active.
    """
    total = make_loss(problem, method.replace(importance_coeff=0.0, num_instances=1))
    params = jax.tree.map(jnp.asarray, problem.params)
    keys = jax.random.split(
        jax.random.fold_in(jax.random.key(method.seed), DRAWS + 2), scales_lib.BATCHES
    )
    drawn = list(zip(keys, problem.looks(keys[0], len(keys)), strict=False))
    n = method.num_instances
    each = [begin] if n == 1 else [jax.tree.map(lambda a, i=i: a[i], begin) for i in range(n)]
    losses = [
        total(one.components, one.gate or None, params, key, x) for one in each for key, x in drawn
    ]
    return float(np.mean(losses))


def _spread(method: APD, recipe: Recipe, n: int) -> dict[str, np.ndarray]:
    """Of every instance, its seed and its k.

    Restarts differ in how many components they keep while they explore; of a single one it is the
    last value.
    """
    restarts, e = recipe.restarts, recipe.explore
    k = np.linspace(e.topk_last, e.topk, restarts)[::-1] / e.topk_last
    seeds = method.seed + 1000 * np.arange(n * restarts)
    return {"seed": seeds, "topk": np.tile(method.topk * k, n)}


def _best(rows: list[dict[str, Any]], method: APD, n: int, restarts: int) -> np.ndarray:
    """The restart with the lowest loss, for each of n."""

    def choose() -> np.ndarray:
        first = (1 - SELECTION_WINDOW) * method.num_steps
        late = [row["total"] for row in rows if row["step"] > first]
        loss = np.mean(late, axis=0).reshape(n, restarts)
        log.info("losses of the restarts: %s", np.array2string(loss, precision=4))
        chosen = np.nan_to_num(loss, nan=np.inf).argmin(axis=1).astype(np.int32)
        return np.arange(n, dtype=np.int32) * restarts + chosen

    return np.asarray(parallel.from_primary(choose, like=np.zeros(n, np.int32)))


def _between(
    problem: Problem, method: APD, components: Components, count: int, *, revive: bool
) -> Components:
    """Every instance restructured."""
    keys = jax.random.split(jax.random.fold_in(jax.random.key(method.seed), DRAWS), 2)

    usage = restructure.measure(problem, method, method.threshold, keys[0])
    done = []
    for i in range(count):
        one = components if count == 1 else jax.tree.map(lambda a, i=i: a[i], components)
        before = one = jax.device_get(one)
        fresh = init_state(jax.random.fold_in(keys[1], i), problem, method).components
        one, alive = restructure.restructure(
            one,
            usage(one),
            method.topk,
            fresh=fresh if revive else None,
            num_always_on=method.num_always_on,
        )
        log.info("instance %d: %d components alive", i, int(alive.sum()))
        if not alive.any():
            log.warning(
                "instance %d: no component is alive at k = %g, so all are kept as they are; with a "
                "k nearer to how many an example needs some may be.",
                *(i, method.topk),
            )
            one = before
        done.append(one)
    return done[0] if count == 1 else jax.tree.map(lambda *a: jnp.stack(a), *done)
