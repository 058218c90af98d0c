"""The numbers of the recipe: one set for all targets, in units of each target's own scale."""

from __future__ import annotations

from typing import Any

from ml_collections import config_dict

from apd_jax.errors import InputError
from apd_jax.methods import registry
from apd_jax.methods.apd import APD
from apd_jax.methods.base import Method
from apd_jax.recipe.scales import Scales
from apd_jax.train.progress import seconds

Recipe = Any  # a ConfigDict, whose own annotations make every field a union of all types

DRAWS = 0x5EED  # sets the draws for scales and statistics apart from those of training
STAGES = ("explore", "settle", "clean", "polish", "refine")
GIVE_K = "set topk to the mean number of components that an example should need."
SET_BY_RECIPE = (
    *("faithfulness_coeff", "minimality_coeff", "simplicity_coeff", "simplicity_coeff_final"),
    *("mask", "inactive", "threshold", "importance_coeff", "num_steps", "learning_rate"),
    *("threshold_learning_rate", "init_scale"),
)


def default_recipe() -> config_dict.ConfigDict:
    """The numbers of the recipe. Coefficients are relative; see `apd_jax.recipe.stages`."""
    r = config_dict.ConfigDict()
    # Components begin at modes, or at separated codes, that reproduce this share of the target's
    # effect by the mask that they find, beside what is always on; above 1: never.
    r.least_explained = 0.8
    r.find_always_on = True  # where num_always_on is 0: as many as hold what modes share
    r.restarts = 4  # random beginnings; that with the lowest loss after `settle` is polished
    # An attribution matters above this share of √(distance of the model without components / k),
    # or per position / (k · positions), since attributions are means over all positions' outputs.
    r.threshold = 0.25
    r.minimality_coeff = 1.67
    r.hidden_reconstruction_coeff = 1.67  # where the method's is above 0
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
    # A loss, relative as in `refine`, below which components at modes need no `polish`.
    r.nearly_exact = 2e-3
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
    # Of time, e.g. "10min": stages then have the share of their steps that fits into what the
    # search for a beginning, which is never cut short, leaves of it.
    r.budget = ""
    return r.lock()


def _stage(**settings: Any) -> config_dict.ConfigDict:
    """The settings of a stage.

    simplicity_coeff_final: where the coefficient ends. topk, threshold: in units of the method's k
    and of `recipe.threshold`. topk_last: the topk of the last restart, where they differ. mask: of
    `apd_jax.methods.apd.MASKS`. importance_coeff: the price of k active components.
    """
    defaults = {"faithfulness_coeff": 1.0, "simplicity_coeff_final": settings["simplicity_coeff"]}
    defaults |= {"topk": 1.0, "mask": "batch_topk", "inactive": "drop"}
    defaults |= {"threshold": 1.0, "importance_coeff": 0.0}
    return config_dict.ConfigDict(defaults | settings)


def as_apd(method: Any) -> APD:
    """The settings that the recipe starts from.

    Raises:
      InputError: they are another method's.
    """
    method = registry.of(method)
    if not isinstance(method, APD):
        raise InputError(
            f"the recipe trains by method 'apd'; got {method.name!r}, which needs no recipe."
        )
    return method


def _check_fields(recipe: Any) -> None:
    if not isinstance(recipe, config_dict.ConfigDict):
        raise InputError(f"recipe must come from apd_jax.default_recipe(); got {recipe!r}.")
    later = {"budget"}  # than the first recipes that were saved
    if missing := [name for name in default_recipe() if name not in {*recipe, *later}]:
        raise InputError(
            f"recipe lacks {missing[0]!r}; begin with apd_jax.default_recipe() and change it."
        )


def check(method: Any, recipe: Recipe) -> None:
    """Refuses what the recipe would silently replace, and stages that cannot run.

    Raises:
      InputError: one sentence.
    """
    _check_fields(recipe)
    method, default = as_apd(method), APD()
    changed = [n for n in SET_BY_RECIPE if getattr(method, n) != getattr(default, n)]
    if changed:
        raise InputError(
            f"{changed[0]} is set by the recipe, stage by stage; change it there "
            "(recipe.explore, ...), or leave the recipe out."
        )
    if recipe.get("budget"):
        seconds(recipe.budget)
    if recipe.restarts < 1:
        raise InputError(f"recipe.restarts must be at least 1; got {recipe.restarts}.")
    if method.topk == 0 and recipe.least_explained > 1:
        raise InputError(
            f"topk = 0 leaves k to the beginning, but recipe.least_explained = "
            f"{recipe.least_explained} leaves none but a random one; {GIVE_K}"
        )
    method = with_any_k(method)
    method.check()
    for stage in STAGES:
        try:
            stage_method(method, recipe, stage, Scales(1.0, 1.0, 1.0, 1.0)).check()
        except InputError as error:
            raise InputError(f"recipe.{stage}: {error}") from None


def base_method(method: Method) -> Method:
    """What `stage_method` was made of: the recipe's own fields back at their defaults."""
    default = APD()
    return method.replace(**{name: getattr(default, name) for name in SET_BY_RECIPE})


def stage_method(method: APD, recipe: Recipe, stage: str, scales: Scales) -> APD:
    """The absolute settings of one stage."""
    s, hidden, last = recipe[stage], 0.0, None
    if method.hidden_reconstruction_coeff > 0:
        hidden = recipe.hidden_reconstruction_coeff / scales.hidden
    if s.simplicity_coeff_final > 0:
        last = s.simplicity_coeff_final / scales.simplicity
    unit = (scales.minimality / method.topk / scales.positions) ** 0.5
    several = recipe.restarts if stage in STAGES[:2] else 1
    return method.replace(
        loss_units="absolute",
        faithfulness_coeff=s.faithfulness_coeff / scales.faithfulness,
        minimality_coeff=recipe.minimality_coeff / scales.minimality,
        hidden_reconstruction_coeff=hidden,
        simplicity_coeff=s.simplicity_coeff / scales.simplicity,
        simplicity_coeff_final=last,
        topk=method.topk * (s.topk_last if stage == "explore" else s.topk),
        mask=s.mask,
        inactive=s.inactive,
        importance_coeff=s.importance_coeff / method.topk,
        threshold=s.threshold * recipe.threshold * unit,
        num_steps=s.num_steps,
        learning_rate=s.learning_rate,
        init_scale=recipe.init_scale,
        num_instances=method.num_instances * several,
        # No batch twice, but that `refine` begins with those of `polish`.
        seed=method.seed + min(STAGES.index(stage), 3),
    )


def filled(method: APD, num_always_on: int, modes_per_example: float) -> APD:
    """The settings with what was found in the place of what they leave open."""
    method = method.replace(num_always_on=num_always_on)
    return method.replace(topk=modes_per_example) if method.topk == 0 else method


def with_any_k(method: APD) -> APD:
    """For what does not read k, which may be left open."""
    return filled(method, method.num_always_on, 1.0)
