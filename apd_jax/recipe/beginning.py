"""Where the recipe begins: at modes, where these explain the network."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray

from apd_jax import components as components_lib
from apd_jax.components import Components
from apd_jax.methods.apd import APD
from apd_jax.network.problem import Problem
from apd_jax.recipe import held
from apd_jax.recipe import modes as modes_lib
from apd_jax.recipe import scales as scales_lib
from apd_jax.recipe.numbers import STAGES, Recipe, stage_method, with_any_k
from apd_jax.recipe.scales import Scales
from apd_jax.train import parallel

log = logging.getLogger("apd_jax.recipe")

DRAWS = 0x5EED  # sets the draws for scales and statistics apart from those of training
_LOOKS = (1, 2, 4)  # times the usual number of examples that are searched, until modes explain ...
# ... the network and leave no part between these of what is read, as when a few modes are missing
_FEW_MISSING = (1e-3, 0.1)
_K_OFF = 2.5  # a topk that differs by this factor from what the modes say is worth a warning


@dataclasses.dataclass(frozen=True)
class Beginning:
    """Components at the modes, and what the modes say of the network."""

    components: Components  # of all instances
    num_always_on: int
    active: float  # modes that an example has, the mean: an estimate of k

    @property
    def said(self) -> dict[str, Any]:
        """What `recipe.json` holds."""
        return {"num_always_on": self.num_always_on, "modes_per_example": self.active}


def at_modes(problem: Problem, method: APD, recipe: Recipe, scales: Scales) -> Beginning | None:
    """Components that begin at the modes, of every instance; None where one has too few of them.

    Cost: see `modes.find`, for every instance on data of its own.
    """
    if recipe.least_explained > 1:
        return None
    settings = stage_method(with_any_k(method), recipe, STAGES[-1], scales)
    keys = jax.random.split(
        jax.random.fold_in(jax.random.key(method.seed), DRAWS + 1), (method.num_instances, 2)
    )

    def fresh(key: PRNGKeyArray) -> Components:
        return settings.make_components(key, problem)

    def begin() -> tuple[list[Components], np.ndarray]:
        found, active, least = [], [], 1.0
        find = recipe.find_always_on and not method.num_always_on
        on = None if find else method.num_always_on
        for draw, init in keys:
            one = fresh(init)
            if least >= recipe.least_explained:  # so far all begin at modes
                search = _Search(problem, method, recipe, scales, draw, one, on)
                look = search.best()
                one, on = look.components, look.num_always_on
                least, active = min(least, look.explained), [*active, look.active]
            found.append(jax.device_get(one))
        return found, np.array((least, on, np.mean(active)), np.float32)

    like = ([jax.eval_shape(fresh, keys[0, 0])] * len(keys), np.zeros(3, np.float32))
    found, (explained, always_on, active) = parallel.from_primary(begin, like=like)
    if float(explained) < recipe.least_explained:
        return None
    if len(found) == 1:
        stacked = jax.tree.map(jnp.asarray, found[0])
    else:
        stacked = jax.tree.map(lambda *a: jnp.stack(a), *found)
    return Beginning(stacked, int(always_on), float(active))


@dataclasses.dataclass(frozen=True)
class _Look:
    """What a search among some examples found.

    explained: the share of the target's effect that the modes' components reproduce on their own.
    unheld: (modes, leaves that they share, always-on components that would hold these, components
    needed for both), where these could not be held.
    """

    components: Components
    explained: float
    num_always_on: int
    active: float
    unexplained: float = 0.0  # of what examples read
    unheld: tuple[Any, ...] = ()


@dataclasses.dataclass(frozen=True)
class _Search:
    """The search for the modes of one instance. given: components always on; None: found."""

    problem: Problem
    method: APD
    recipe: Recipe
    scales: Scales
    draw: Any
    fresh: Components
    given: int | None

    def best(self) -> _Look:
        """The best of looks among more and more examples."""
        enough = self.recipe.least_explained
        best = _Look(self.fresh, 0.0, self.given or 0, float(self.method.topk))
        for times in _LOOKS:
            look = self._among(times)
            if look is None:
                log.info("no modes among %d times the examples", times)
                continue
            if look.explained >= min(best.explained, enough):  # among more, fewer are missing
                best = look
            a_few_missing = _FEW_MISSING[0] < look.unexplained < _FEW_MISSING[1]
            if best.explained >= enough and not a_few_missing:
                break
        if best.explained >= enough:
            self._warn(best)
        return best

    def _among(self, times: int) -> _Look | None:
        method, problem = self.method, self.problem
        modes = modes_lib.find(problem, method.batch_size, self.draw, times=times)
        if not len(modes):
            return None
        shared = [name for name, gain in modes.gains.items() if gain < held.SHARED]
        holding = (held.num_to_hold(problem, name, self.fresh) for name in shared)
        needed = max(holding, default=0)
        on = self.given
        if on is None:
            on = needed if needed + len(modes) <= method.num_components else 0
        one = held.components(problem, modes, self.fresh, num_always_on=on)
        explained = self._reproduced(one, on + len(modes))
        if on:  # what is always on could hold anything, and does not count
            explained -= max(0.0, self._reproduced(one, on))
        gains = ", ".join(f"{name} {gain:.2f}" for name, gain in modes.gains.items())
        log.info(
            "%d modes, %.3g per example, explain %.3f of what the weights do; gain of %s; beside "
            "%d always on",
            *(len(modes), modes.active, explained, gains, on),
        )
        unheld = ()
        if shared and not on:
            unheld = (len(modes), " and ".join(shared), needed, needed + len(modes))
        return _Look(one, explained, on, modes.active, modes.unexplained, unheld)

    def _reproduced(self, components: Components, first: int) -> float:
        """Share of the target's effect that the first n components reproduce on their own.

        1 - D(f_n, f) / D(f_0, f)
        """
        on = jnp.arange(components.num_components) < first
        alone = components_lib.weighted_sum(components, self.problem.params, on.astype(jnp.float32))
        distance = scales_lib.distances(self.problem, self.method, alone)[0]
        return 1 - distance / self.scales.minimality

    def _warn(self, best: _Look) -> None:
        if best.unheld:
            log.warning(
                "%d modes share %s: each part does less than the whole on its own mode; "
                "num_always_on = %d of at least %d components could hold it whole.",
                *best.unheld,
            )
        k = float(self.method.topk)
        if k > 0 and not 1 / _K_OFF < k / best.active < _K_OFF:
            log.warning(
                "topk = %g, but examples have %.2g modes on average; topk should be about that.",
                *(k, best.active),
            )
