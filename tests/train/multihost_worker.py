"""One of several processes.

It joins the others, checks the global mask, decomposes in a workdir, and saves what it ends up
with.

python multihost_worker.py WORKDIR NUM_STEPS SIGNALLED_PROCESS SIGNAL_AT_STEP NUM_COMPONENT_SHARDS
"""

import functools
import os
import signal
import sys

import jax
import jax.numpy as jnp
import numpy as np

from apd_jax import masks
from apd_jax.errors import InputError, Interrupted
from apd_jax.methods.apd import APD
from apd_jax.network.problem import Problem
from apd_jax.train import loop as train
from apd_jax.train import parallel

# Three values: the cut lies among ties.
TIED_SCORES = np.random.default_rng(0).integers(0, 3, (8, 5)).astype(np.float32)


@functools.cache
def make_problem(num_steps: int, num_component_shards: int = 1) -> tuple:
    """A one-layer network whose inputs are mostly zero, and its settings."""
    params = {"W": jnp.asarray(np.random.default_rng(0).normal(size=(6, 3)), jnp.float32)}

    def sample_fn(key, step):
        value, on = jax.random.split(jax.random.fold_in(key, step))
        return jax.random.uniform(value, (16, 6)) * jax.random.bernoulli(on, 0.2, (16, 6))

    method = APD(
        num_components=4,
        topk=1.1,
        batch_size=16,
        num_steps=num_steps,
        init_scale=3.0,
        learning_rate=1e-2,
        steps_per_call=4,
        log_every_steps=1,
        checkpoint_every_steps=8,
        num_component_shards=num_component_shards,
    )
    return Problem(lambda params, x: jax.nn.relu(x @ params["W"]), params, sample_fn), method


def signal_at(step: int) -> None:
    """Sends this process SIGTERM when the loop reports `step`."""
    update = train.ProgressDisplay.update

    def update_and_signal(self, now, values):
        update(self, now, values)
        if now == step:
            os.kill(os.getpid(), signal.SIGTERM)

    train.ProgressDisplay.update = update_and_signal


def refuse() -> None:
    raise InputError("a reason that process 0 alone can see")


def main(
    workdir: str, num_steps: str, signalled: str, step: str, num_component_shards: str
) -> None:
    parallel.initialize()
    index, devices = jax.process_index(), parallel.global_devices()
    mine = [i for i, d in enumerate(devices) if d.process_index == index]
    shard = TIED_SCORES.reshape(len(devices), -1, 5)[mine]
    mask = jax.pmap(
        lambda a: masks.batch_topk(a, 1.4, axis_name="data"), axis_name="data", devices=devices
    )(shard)
    if index == int(signalled):
        signal_at(int(step))
    result = {
        "mask": np.asarray(mask).reshape(-1, 5),
        "num_devices": len(devices),
        "from_primary": parallel.from_primary(lambda: 7, like=0),
    }
    try:
        parallel.from_primary(refuse)
    except InputError as error:
        result["refused"] = str(error)
    stopped = 0
    try:
        problem, method = make_problem(int(num_steps), int(num_component_shards))
        trained, _ = train.fit(problem, method, workdir=workdir)
        factors = trained.components.factors["W"]
        result |= {"U": factors.U, "V": factors.V}
    except Interrupted as stop:
        result["stopped_at"] = stop.step
        stopped = 128 + stop.signum
    np.savez(f"{workdir}.{index}.npz", **result)
    sys.exit(stopped)


if __name__ == "__main__":
    main(*sys.argv[1:])
