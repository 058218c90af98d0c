"""Training a target network from its config."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
from jaxtyping import PyTree

from apd_jax.components import path_name
from apd_jax.errors import InputError
from apd_jax.methods.schedules import learning_rate
from apd_jax.targets.base import Config, Target, at_least_one

STEPS_PER_CALL = 100


def pretrain(
    target: Target, config: Config, *, progress: Callable[..., Any] | None = None
) -> tuple[PyTree, list[dict[str, Any]]]:
    """Trains the target by AdamW on `target.loss_fn`, deterministically from `config.seed`.

    Args:
      config: an experiment's `config.target`: `seed` and `pretrain` (num_steps, learning_rate,
        schedule, warmup_fraction, weight_decay).
      progress: called as (steps done, num_steps, {"loss": ...}) every 100 steps.
    Returns:
      params, and the history [{"step", "loss"}]: each loss is the mean since the entry before.
      Leaves named by `target.frozen` keep their initial values.
    Raises:
      InputError: a setting is out of range, or the loss or a weight is no longer finite (the
        message names the step).
    Cost: one XLA call per 100 steps; the data is drawn inside it.
    """
    loss_fn, sample_fn, settings = target.loss_fn, target.pretrain_sample_fn, config.pretrain
    assert loss_fn is not None and sample_fn is not None, f"{target.name} is built, not trained"
    at_least_one(num_steps=settings.num_steps)
    key_init, key_data = jax.random.split(jax.random.key(config.seed))
    params = jax.jit(target.init_fn)(key_init)
    schedule = learning_rate(
        settings.schedule, settings.learning_rate, settings.num_steps, settings.warmup_fraction
    )
    adamw = optax.adamw(schedule, weight_decay=settings.weight_decay)
    optimizer = optax.multi_transform(
        {"trained": adamw, "frozen": optax.set_to_zero()},
        jax.tree_util.tree_map_with_path(
            lambda path, _: "frozen" if _matches(path_name(path), target.frozen) else "trained",
            params,
        ),
    )

    def step(state, index):
        params, optimizer_state = state
        loss, gradient = jax.value_and_grad(loss_fn)(params, sample_fn(key_data, index))
        updates, optimizer_state = optimizer.update(gradient, optimizer_state, params)
        return (optax.apply_updates(params, updates), optimizer_state), loss

    run = jax.jit(lambda state, indices: jax.lax.scan(step, state, indices))
    state, history = (params, optimizer.init(params)), []
    for first in range(0, settings.num_steps, STEPS_PER_CALL):
        indices = np.arange(first, min(first + STEPS_PER_CALL, settings.num_steps))
        state, losses = run(state, indices)
        losses = np.asarray(losses)
        if not np.isfinite(losses).all():
            raise _diverged(first + int(np.argmin(np.isfinite(losses))), settings.learning_rate)
        history.append({"step": int(indices[-1]) + 1, "loss": float(losses.mean())})
        if progress is not None:
            progress(history[-1]["step"], settings.num_steps, {"loss": history[-1]["loss"]})
    # The last update enters no loss above.
    if not all(np.isfinite(leaf).all() for leaf in jax.device_get(jax.tree.leaves(state[0]))):
        raise _diverged(settings.num_steps - 1, settings.learning_rate)
    finish = target.finish_fn or (lambda params: params)
    return finish(state[0]), history


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _diverged(step: int, rate: float) -> InputError:
    return InputError(
        f"target pretraining is no longer finite at step {step}; "
        f"lower config.target.pretrain.learning_rate (now {rate})."
    )
