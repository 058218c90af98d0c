"""A recipe: training in stages, with one set of numbers for all targets. What it finds, and what not yet: docs/results.md.

Where examples of one kind agree on what they read (`apd_jax.modes`), and these modes explain the network, components begin there, and
only `refine` is left to do, or `polish` and `refine` where the loss says that this was not all. Where modes explain too little,
components begin at random and go through all stages:

  explore  from a strong simplicity pressure, under which components hold next to nothing, down to a weak one: mechanisms emerge one after
           the other, each in components of its own, several of which may share it. Restarts differ in how many components they keep.
  settle   the pieces joined, unused components begun anew; at the weak pressure, k components per example.
  clean    the best of several restarts, by its loss; joined again, unused components cleared for good. More than k are kept, so that
           none gains from holding a piece of another's mechanism.
  polish   simplicity, which shrinks what it selects, is switched off; and instead of the k·B largest all components are kept whose
           attribution exceeds a threshold, so that nothing that matters is dropped: the components grow to their full length.
  refine   the threshold is lowered to a tenth, and the others are not dropped but times U(0, 1), so that they can be ablated in any
           combination. Steps are in proportion to √loss, which is how far the weights are off: what is exact already stays as it is.

Coefficients are relative: every loss is measured in units of its value at a reference point of this target (`apd_jax.scales`), so that one
number means the same on every target. k, the mean number of active components, is `config.topk`; where that is 0, it is how many modes
examples have on average. If hidden activations are to be reconstructed too, say so by a `config.hidden_reconstruction_coeff` above 0; how
strongly is the recipe's.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import PRNGKeyArray
from ml_collections import config_dict

from apd_jax import components as components_lib
from apd_jax.components import Components
from apd_jax.errors import InputError
from apd_jax.methods import config as config_lib
from apd_jax.methods.config import Config
from apd_jax.network import data
from apd_jax.network.problem import Problem
from apd_jax.recipe import modes as modes_lib
from apd_jax.recipe import restructure as restructure_lib
from apd_jax.recipe import scales as scales_lib
from apd_jax.recipe.scales import Scales
from apd_jax.train import loop as train
from apd_jax.train import parallel
from apd_jax.train import step as step_lib

log = logging.getLogger(__name__)

STAGES = ("explore", "settle", "clean", "polish", "refine")
FOUND = "recipe.json"  # in a workdir: what the modes say of the network
SELECTION_WINDOW = 0.2  # the last part of `settle` over which restarts' losses are averaged
_DRAWS = 0x5EED  # sets the draws for scales and statistics apart from those of training
_LOOKS = (
    1,
    2,
    4,
)  # how many times the usual number of examples is searched for modes, until they explain the network ...
_FEW_MISSING = (
    1e-3,
    0.1,
)  # ... and leave no part between these of what is read unexplained, as when a mode or a few are missing
_K_OFF = 2.5  # a topk that differs by this factor from what the modes say is worth a warning
_GIVE_K = "set topk to the mean number of components that an example should need."


def default_recipe() -> config_dict.ConfigDict:
    """The numbers of the recipe. Coefficients are relative; see the module."""
    r = config_dict.ConfigDict()
    r.least_explained = 0.8  # components begin at modes that do this part of what the weights do, beside what is always on; above 1: never
    r.find_always_on = (
        True  # where the config's num_always_on is 0: as many as hold the leaves that modes share
    )
    r.restarts = 4  # independent random beginnings, of which the one with the lowest loss after `settle` is polished
    r.threshold = 0.25  # what matters: an attribution above this part of √(distance of the model without components / k)
    r.minimality_coeff = 1.67
    r.hidden_reconstruction_coeff = 1.67  # where the config's is above 0
    r.explore = _stage(
        num_steps=4000,
        topk_last=1.25,
        learning_rate=3e-3,
        simplicity_coeff=20.0,
        simplicity_coeff_final=7.0,
    )
    r.settle = _stage(num_steps=3000, learning_rate=3e-3, simplicity_coeff=7.0)
    r.clean = _stage(num_steps=2000, learning_rate=2e-3, simplicity_coeff=3.0, topk=1.5)
    r.polish = _stage(
        num_steps=2000,
        learning_rate=1e-3,
        simplicity_coeff=0.0,
        mask="threshold",
        threshold=1.5,
        faithfulness_coeff=10.0,
    )
    r.nearly_exact = 2e-3  # a loss, relative as in `refine`, below which components that begin at modes need no `polish`
    r.refine = _stage(
        num_steps=250,
        learning_rate=1e-2,
        simplicity_coeff=0.0,
        mask="threshold",
        threshold=0.15,
        inactive="uniform",
        faithfulness_coeff=10.0,
    )
    r.init_scale = 3.0
    return r.lock()


def _stage(**settings: Any) -> config_dict.ConfigDict:
    """The settings of a stage.

    simplicity_coeff_final: where the coefficient ends. topk, threshold: in units of the config's k and of `recipe.threshold`. topk_last:
    the topk of the last restart, where they differ. mask: of `apd_jax.config.MASKS`. importance_coeff: the price of k active components.
    """
    defaults = {"faithfulness_coeff": 1.0, "simplicity_coeff_final": settings["simplicity_coeff"]}
    defaults |= {
        "topk": 1.0,
        "mask": "batch_topk",
        "inactive": "drop",
        "threshold": 1.0,
        "importance_coeff": 0.0,
    }
    return config_dict.ConfigDict(defaults | settings)


_SET_BY_RECIPE = (
    *("faithfulness_coeff", "minimality_coeff", "simplicity_coeff", "simplicity_coeff_final"),
    *(
        "mask",
        "inactive",
        "threshold",
        "importance_coeff",
        "num_steps",
        "learning_rate",
        "threshold_learning_rate",
        "init_scale",
    ),
)


def check(config: Config, recipe: Config) -> None:
    """Raises InputError for a setting of the config that the recipe would silently replace, or a stage that cannot run."""
    default = config_lib.default_config()
    if changed := [name for name in _SET_BY_RECIPE if config[name] != default[name]]:
        raise InputError(
            f"{changed[0]} is set by the recipe, stage by stage; change it there (recipe.explore, ...), or leave the recipe out."
        )
    if recipe.restarts < 1:
        raise InputError(f"recipe.restarts must be at least 1; got {recipe.restarts}.")
    if config.topk == 0 and recipe.least_explained > 1:
        raise InputError(
            f"topk = 0 leaves k to the modes, but recipe.least_explained = {recipe.least_explained} leaves them out; {_GIVE_K}"
        )
    config = _with_any_k(config)
    config_lib.validate(config)
    for stage in STAGES:
        try:
            config_lib.validate(stage_config(config, recipe, stage, Scales(1.0, 1.0, 1.0, 1.0)))
        except InputError as error:
            raise InputError(f"recipe.{stage}: {error}") from None


def base_config(settings: Config) -> Config:
    """What `last_config` was made of: the recipe's own fields back at their defaults."""
    config, default = settings.copy_and_resolve_references(), config_lib.default_config()
    config.update({name: default[name] for name in _SET_BY_RECIPE})
    return config


def stage_config(config: Config, recipe: Config, stage: str, scales: Scales) -> Config:
    """The absolute settings of one stage."""
    settings, c = recipe[stage], config.copy_and_resolve_references()
    c.update(
        faithfulness_coeff=settings.faithfulness_coeff / scales.faithfulness,
        minimality_coeff=recipe.minimality_coeff / scales.minimality,
        hidden_reconstruction_coeff=recipe.hidden_reconstruction_coeff / scales.hidden
        if config.hidden_reconstruction_coeff > 0
        else 0.0,
        simplicity_coeff=settings.simplicity_coeff / scales.simplicity,
        simplicity_coeff_final=settings.simplicity_coeff_final / scales.simplicity
        if settings.simplicity_coeff_final > 0
        else None,
        topk=config.topk * (settings.topk_last if stage == "explore" else settings.topk),
        mask=settings.mask,
        inactive=settings.inactive,
        importance_coeff=settings.importance_coeff / config.topk,
        threshold=settings.threshold * recipe.threshold * (scales.minimality / config.topk) ** 0.5,
        num_steps=settings.num_steps,
        learning_rate=settings.learning_rate,
        init_scale=recipe.init_scale,
        num_instances=config.num_instances * (recipe.restarts if stage in STAGES[:2] else 1),
        seed=config.seed
        + min(
            STAGES.index(stage), 3
        ),  # no batch twice, but that `refine` begins with those of `polish`
    )
    return c


def found_config(config: Config, workdir: epath.PathLike) -> Config:
    """The config of the run in `workdir`, with what the recipe has found there in place of what the config leaves open.

    Raises:
      InputError: the config leaves k open, and what was found there is missing or torn.
    """
    path = epath.Path(workdir) / FOUND
    try:
        return (
            _filled(config, **json.loads(path.read_text()))
            if path.exists() or config.topk == 0
            else config
        )
    except (FileNotFoundError, ValueError):
        raise InputError(
            f"{path}, which says what k the recipe found, is missing or torn; the command of the run makes it again."
        ) from None


def _filled(config: Config, num_always_on: int, modes_per_example: float) -> Config:
    config = config.copy_and_resolve_references()
    config.num_always_on = num_always_on
    if config.topk == 0:
        config.topk = min(modes_per_example, float(config.num_components - num_always_on))
    return config


def _with_any_k(config: Config) -> Config:
    """For what does not read k, which the config may leave open."""
    return _filled(config, config.num_always_on, 1.0)


def last_config(problem: Problem, config: Config, recipe: Config) -> Config:
    """The settings of the last stage, which the components are evaluated with; the seed is the run's."""
    settings = stage_config(config, recipe, STAGES[-1], scales_lib.measure(problem, config))
    settings.seed = config.seed
    return settings


def fit(
    problem: Problem, config: Config, recipe: Config, *, workdir: epath.PathLike | None = None
) -> tuple[Components, list, Config]:
    """Runs the stages; each resumes from its own checkpoints in `workdir`/stages, the last one from `workdir` itself.

    Args:
      config: as for `train.fit`; what the recipe sets must stand at its default here.
    Returns: the components, the logged rows of the last stage, and its settings.
    Raises: as `train.fit`.
    """
    check(config, recipe)
    reference = scales_lib.measure(problem, config)
    R, n = recipe.restarts, config.num_instances
    stages, begin, found = STAGES, None, at_modes(problem, config, recipe, reference)
    if found is None and config.topk == 0:
        raise InputError(
            f"topk = 0 leaves k to the modes, but these explain too little of this network to begin at them; {_GIVE_K}"
        )
    if found is not None:
        begin, config = found.components, _filled(config, **found.said)
        if workdir is not None:
            parallel.from_primary(lambda: _keep(found, epath.Path(workdir)))
        loss = _loss(problem, stage_config(config, recipe, "refine", reference), begin)
        log.info("the loss at the modes is %.2g of the reference", loss)
        stages = STAGES[-1:] if loss < recipe.nearly_exact else STAGES[-2:]
    for number, stage in enumerate(stages):
        settings = stage_config(config, recipe, stage, reference)
        last = stage == STAGES[-1]
        if begin is not None and last:
            if settings.mask == "learned":
                settings.threshold_learning_rate = (
                    settings.learning_rate
                )  # where thresholds begin is a guess, however exact the rest is
            settings.learning_rate *= min(1.0, _loss(problem, settings, begin) ** 0.5)
        folder = (
            None if workdir is None else epath.Path(workdir) / ("" if last else f"stages/{stage}")
        )
        title = f"decomposition, {stage} ({number + 1} of {len(stages)})"
        traced = _spread(settings, recipe, n, R) if stage == "explore" and n * R > 1 else None
        state, rows = train.advance(
            problem, settings, components=begin, settings=traced, workdir=folder, title=title
        )
        components = train.finished(state.components, settings)
        if last:
            return components, rows, last_config(problem, config, recipe)
        if stage == "settle" and n * R > 1:
            best = _best(rows, settings, n, R)
            components = jax.tree.map(
                lambda a, best=best: a[best[0]] if n == 1 else a[best], components
            )
        if stage == "polish":
            begin = components
        else:
            begin = _between(
                problem,
                settings,
                components,
                n * R if stage == "explore" else n,
                revive=stage == "explore",
            )
    raise AssertionError("the last stage returns")


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


def at_modes(problem: Problem, config: Config, recipe: Config, scales: Scales) -> Beginning | None:
    """Components that begin at the modes, of every instance; None where these explain too little for one of them.

    Cost: see `modes.find`, for every instance on data of its own.
    """
    if recipe.least_explained > 1:
        return None
    settings = stage_config(_with_any_k(config), recipe, STAGES[-1], scales)
    keys = jax.random.split(
        jax.random.fold_in(jax.random.key(config.seed), _DRAWS + 1), (config.num_instances, 2)
    )
    options = {"select": problem.select, "uses": problem.uses, "layouts": problem.layouts}

    def fresh(key: PRNGKeyArray) -> Components:
        return dataclasses.replace(
            step_lib.init_state(key, problem.params, settings, **options).components,
            log_thresholds=None,
        )

    def does(components: Components, first: int) -> float:
        """The part of what the weights do that this many components do alone."""
        on = jnp.arange(components.num_components) < first
        alone = components_lib.weighted_sum(components, problem.params, on.astype(jnp.float32))
        return 1 - scales_lib.distances(problem, config, alone)[0] / scales.minimality

    def begin_one(
        draw: PRNGKeyArray, init: Components, given: int | None
    ) -> tuple[Components, float, int, float]:
        best, explained, always_on, active, unheld = init, 0.0, given or 0, config.topk, ()
        for times in _LOOKS:
            modes = modes_lib.find(problem, config.batch_size, draw, times=times)
            if not len(modes):
                log.info("no modes among %d times the examples", times)
                continue
            shared = [name for name, gain in modes.gains.items() if gain < modes_lib.SHARED]
            needed = max((modes_lib.num_to_hold(problem, name, init) for name in shared), default=0)
            on = (
                given
                if given is not None
                else needed
                if needed + len(modes) <= config.num_components
                else 0
            )
            one = modes_lib.components(problem, modes, init, num_always_on=on)
            part = does(one, on + len(modes)) - (
                max(0.0, does(one, on)) if on else 0.0
            )  # what is always on could hold anything
            gains = ", ".join(f"{name} {gain:.2f}" for name, gain in modes.gains.items())
            log.info(
                "%d modes, %.3g per example, explain %.3f of what the weights do; gain of %s; beside %d always on",
                len(modes),
                modes.active,
                part,
                gains,
                on,
            )
            if part >= min(
                explained, recipe.least_explained
            ):  # among more examples fewer modes are missing
                best, explained, always_on, active = one, part, on, modes.active
                unheld = (
                    (len(modes), " and ".join(shared), needed, needed + len(modes))
                    if shared and not on
                    else ()
                )
            if (
                explained >= recipe.least_explained
                and not _FEW_MISSING[0] < modes.unexplained < _FEW_MISSING[1]
            ):
                break
        if explained >= recipe.least_explained and unheld:
            log.warning(
                "%d modes share %s: each part does less than the whole on its own mode; num_always_on = %d of at least %d components could "
                "hold it whole.",
                *unheld,
            )
        if (
            explained >= recipe.least_explained
            and config.topk > 0
            and not 1 / _K_OFF < config.topk / active < _K_OFF
        ):
            log.warning(
                "topk = %g, but examples have %.2g modes on average; topk should be about that.",
                config.topk,
                active,
            )
        return best, explained, always_on, active

    def begin() -> tuple[list[Components], np.ndarray]:
        found, active, least = [], [], 1.0
        on = None if recipe.find_always_on and not config.num_always_on else config.num_always_on
        for draw, init in keys:
            one = fresh(init)
            if least >= recipe.least_explained:  # so far all begin at modes
                one, explained, on, k = begin_one(draw, one, on)
                least, active = min(least, explained), [*active, k]
            found.append(jax.device_get(one))
        return found, np.array((least, on, np.mean(active)), np.float32)

    like = ([jax.eval_shape(fresh, keys[0, 0])] * len(keys), np.zeros(3, np.float32))
    found, (explained, always_on, active) = parallel.from_primary(begin, like=like)
    if float(explained) < recipe.least_explained:
        return None
    stacked = (
        jax.tree.map(jnp.asarray, found[0])
        if len(found) == 1
        else jax.tree.map(lambda *a: jnp.stack(a), *found)
    )
    return Beginning(stacked, int(always_on), float(active))


def _keep(found: Beginning, workdir: epath.Path) -> None:
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / FOUND).write_text(json.dumps(found.said))


def _loss(problem: Problem, config: Config, components: Components) -> float:
    """The loss that a stage with these settings begins with, the mean over batches and instances; without a price on what is active."""
    config = config.copy_and_resolve_references()
    config.importance_coeff = 0.0
    fns = {
        "attribution_fn": problem.attribution_fn,
        "num_active_fn": problem.num_active_fn,
        "valid_fn": problem.valid_fn,
    }
    total, params = (
        step_lib.make_loss(problem.apply_fn, config, **fns),
        jax.tree.map(jnp.asarray, problem.params),
    )
    keys = jax.random.split(
        jax.random.fold_in(jax.random.key(config.seed), _DRAWS + 2), scales_lib.BATCHES
    )
    if isinstance(problem.sample_fn, data.Batches):
        drawn = [(keys[0], jax.tree.map(jnp.asarray, problem.sample_fn.first))]
    else:
        draw = jax.jit(problem.sample_fn)
        drawn = [(key, draw(key, jnp.zeros((), jnp.int32))) for key in keys]
    each = [components]
    if config.num_instances > 1:
        each = [jax.tree.map(lambda a, i=i: a[i], components) for i in range(config.num_instances)]
    return float(np.mean([total(one, params, key, x) for one in each for key, x in drawn]))


def _spread(config: Config, recipe: Config, n: int, restarts: int) -> dict[str, np.ndarray]:
    """Of every instance, its seed and its k: restarts differ in how many components they keep while they explore."""
    k = (
        np.linspace(recipe.explore.topk_last, recipe.explore.topk, restarts)[::-1]
        / recipe.explore.topk_last
    )  # the last, if there is one only
    return {
        "seed": config.seed + 1000 * np.arange(n * restarts),
        "topk": np.tile(config.topk * k, n),
    }


def _best(rows: list[dict[str, Any]], config: Config, n: int, restarts: int) -> np.ndarray:
    """The restart with the lowest loss, for each of n."""

    def choose() -> np.ndarray:
        first = (1 - SELECTION_WINDOW) * config.num_steps
        loss = np.mean([row["total"] for row in rows if row["step"] > first], axis=0).reshape(
            n, restarts
        )
        log.info("losses of the restarts: %s", np.array2string(loss, precision=4))
        return np.arange(n, dtype=np.int32) * restarts + np.nan_to_num(loss, nan=np.inf).argmin(
            axis=1
        ).astype(np.int32)

    return np.asarray(parallel.from_primary(choose, like=np.zeros(n, np.int32)))


def _between(
    problem: Problem, config: Config, components: Components, count: int, *, revive: bool
) -> Components:
    """Every instance restructured."""
    keys = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), _DRAWS), 2)
    measure = jax.jit(
        lambda c: restructure_lib.usage(problem, config, c, config.threshold, keys[0])
    )
    done = []
    for i in range(count):
        one = jax.device_get(
            components if count == 1 else jax.tree.map(lambda a, i=i: a[i], components)
        )
        init = step_lib.init_state(
            jax.random.fold_in(keys[1], i),
            problem.params,
            config,
            select=problem.select,
            uses=problem.uses,
            layouts=problem.layouts,
        )
        one, alive = restructure_lib.restructure(
            one,
            measure(one),
            config.topk,
            fresh=init.components if revive else None,
            num_always_on=config.num_always_on,
        )
        log.info("instance %d: %d components alive", i, int(alive.sum()))
        done.append(one)
    return done[0] if count == 1 else jax.tree.map(lambda *a: jnp.stack(a), *done)
