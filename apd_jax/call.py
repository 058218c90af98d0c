"""`decompose`: the library's one call, and the settings that it takes where none are given."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, SupportsIndex

from etils import epath
from jaxtyping import PyTree

from apd_jax.components import Components, Select
from apd_jax.decomposition import Decomposition, hook
from apd_jax.errors import InputError
from apd_jax.methods import registry
from apd_jax.methods import suggest as suggest_lib
from apd_jax.methods.base import Method
from apd_jax.methods.optimizers import instances
from apd_jax.network import data
from apd_jax.network.problem import Problem, check_examples, check_function, check_params
from apd_jax.recipe import budget, run, scales, stages
from apd_jax.train.progress import say


def decompose(
    apply_fn: Callable,
    params: PyTree,
    sample_fn: Callable | Iterable,
    config: Any = None,
    *,
    method: str | Method | None = None,
    select: Select = None,
    uses: Mapping[str, SupportsIndex] | None = None,
    attribution_fn: Callable | None = None,
    num_active_fn: Callable | None = None,
    valid_fn: Callable | None = None,
    elsewhere: Callable | Iterable | None = None,
    recipe: Any = None,
    init: Decomposition | Components | None = None,
    workdir: epath.PathLike | None = None,
    on_log: Callable[[dict[str, Any]], Any] | None = None,
    ragged: str = "drop",
) -> Decomposition:
    """Splits a trained network's parameters into components that sum to them.

    Few of them are needed on any input.

    Args:
      apply_fn: (params, x) -> outputs [B, ...], or (outputs, hidden) with hidden a dict of named
        activations. Example b of the output depends on example b of the input alone. `model.apply`
        of a Flax Linen module is one.
      params: pytree of arrays: a dict, Flax Linen variables, an NNX state. Leaves that are split
        over devices are put together; boxes with Linen's partitioning are taken off.
      sample_fn: the data, in batches x of `batch_size` examples. A function (rng, step) -> x that
        draws one on the device, pure, since a resumed run calls it again with the same arguments;
        `apd_jax.data.from_arrays` makes one of arrays in memory. Or such arrays themselves, a row
        per example (a dict of them if apply_fn takes one). Or any iterable of batches, or a
        generator function; where it ends it is begun again. A resumed run begins it from its start
        and drops the batches that were used before, so it is bit-identical if the same batches
        come again.
      config: settings: from `apd_jax.default_config()`, or a method's own settings object, e.g.
        `apd_jax.SPD(num_components=20)`. None: chosen by the kind of network, see
        `suggest`.
      method: instead of config, a method's name, "apd", "spd", "vpd", "whole" or "targeted", for
        what is chosen of its settings; or its settings.
      select: glob patterns over dotted leaf paths, {pattern: options} or a function (path, leaf)
        -> bool or options; see `apd_jax.components.init`. The `.value` at the end of NNX paths may
        be left out. None decomposes every floating leaf of two or more axes, but for tables:
        what is looked up by the inputs (embeddings, tied or not) or only added (positions, biases
        of heads). "*" takes all leaves.
      uses: {leaf path: times the forward pass multiplies with it}, for tied weights; 1 where
        absent.
      attribution_fn: the same function as apply_fn (outputs only), with products of weights
        associated so that its tangents are cheaper. None: apply_fn.
      num_active_fn: x -> [B], how many features are truly active; only for mask = "exact".
      valid_fn: x -> bool [B, T], which positions of outputs [B, T, ...] are real and not padding;
        the others count in no loss, no attribution and no mask, whatever stands there. Numbers (of
        segments, of an attention mask) count where they are above 0.
      elsewhere: data of the second stream, as sample_fn; for method "targeted".
      recipe: from `apd_jax.default_recipe()`: trains in its stages, instead of once with the
        coefficients of `config`. `topk` = 0 then leaves k to the modes. The returned decomposition
        has the settings of the last stage, and what was found.
      init: where to begin, instead of where the method does: components (e.g. from
        `apd_jax.components.from_materialized`), or a decomposition, whose gate is then taken, too.
        Where `num_components` is larger, the others begin at zero. To go on with a decomposition,
        see `Decomposition.train`.
      workdir: folder for config.json, network.json, checkpoints, metrics.jsonl and TensorBoard
        scalars. The same call then resumes; another network, selection or setting is refused, but
        for `num_steps`: with more, a run goes on from its last checkpoint, optimizer included, and
        from there on with the learning rates and annealed coefficients that a run of so many steps
        has at each step. None: nothing is written.
      on_log: called with every logged row {"step": ..., "total": ..., ...}; where it returns True
        training stops after the XLA call of `steps_per_call` steps that the row is of. In a workdir
        the stop is recorded: the same call then returns what there is. (A recipe's rows name their
        stage, and a stop ends that stage.) `apd_jax.log_to_wandb` is one.
      ragged: what becomes of an iterable's batches with fewer examples than the first: "drop" them,
        "join" all batches and cut them anew into `batch_size` (a loader's own size then does not
        matter), or "refuse".
    Raises:
      InputError: anything that does not fit, in one sentence.
    """
    if config is not None and method is not None:
        raise InputError("give config or method, not both: each holds a method's settings.")
    given = method if config is None else config
    chosen = None if given is None or isinstance(given, str) else registry.of(given)
    name = given if isinstance(given, str) else None
    if init is not None and recipe is not None:
        raise InputError("give init or recipe, not both: a recipe finds where components begin.")
    size = None if chosen is None else chosen.batch_size
    here, there = (_data(stream, ragged, size) for stream in (sample_fn, elsewhere))
    problem = Problem(
        *(apply_fn, run.as_arrays(params), here, attribution_fn, num_active_fn),
        *(select, uses, valid_fn, there),
    )
    if recipe is not None and getattr(problem.sample_fn, "once", False):
        raise InputError(
            "a recipe goes through the data several times, which an iterator cannot; give a list, "
            "a loader or a generator function."
        )
    if chosen is None:
        chosen = _suggested(problem, name if recipe is None else "apd")
        say(suggest_lib.why(problem, chosen))
        chosen = chosen if recipe is None else stages.base_method(chosen)
    else:
        check_function(problem)
    check_params(problem)
    check_examples(problem, chosen.distance)
    keep = hook("keep")
    trained, history, chosen = run.run(
        problem, chosen, recipe, workdir, run.given(init), keep=keep, on_log=on_log
    )
    scales.warn_if_far(problem, chosen, [one.components for one in instances(trained, chosen)])
    if recipe is not None:
        recipe = budget.as_trained(recipe, chosen.num_steps)
    return Decomposition(problem, trained.components, chosen, history, recipe, trained.gate)


def suggest(
    apply_fn: Callable,
    params: PyTree,
    sample_fn: Callable | Iterable,
    method: str | None = None,
    *,
    select: Select = None,
) -> Method:
    """The settings that `decompose` chooses for a network where none are given.

    To be changed and handed on:

        settings = apd_jax.suggest(apply_fn, params, x).replace(num_steps=500)
        decomposition = apd_jax.decompose(apply_fn, params, x, settings)

    What is chosen, and by what: `apd_jax.methods.suggest.suggested`.

    Args: as `decompose` takes them; method: a name.
    Raises:
      InputError: anything that does not fit, in one sentence.
    """
    here = _data(sample_fn, "drop", None)
    return _suggested(Problem(apply_fn, run.as_arrays(params), here, select=select), method)


def _suggested(problem: Problem, name: str | None) -> Method:
    if name is not None:
        registry.by_name(name)
    check_function(problem)
    return suggest_lib.suggested(problem, name)


def _data(given: Any, ragged: str, size: int | None) -> Any:
    """One stream of data as a problem holds it. Arrays hold examples, not batches of them."""
    if data.holds_examples(given):
        given = data.from_arrays(given, suggest_lib.batch_size(given) if size is None else size)
    return data.source(given, ragged, size)
