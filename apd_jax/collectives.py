"""Sums over devices, inside a mapped function.

Components may be split over the devices of an axis: each device then holds some P_c, while
activations, outputs and losses are the same on all of them. Wherever the method has a Σ_c, every
device sums over its own components and `over_components` adds these up. Activations that meet
components pass through `into_components` first. The two are each other's transposes: what all
devices compute alike is differentiated once, and a device's components get their own gradient only.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
from jax import lax
from jaxtyping import Array, PyTree


def psum(x: Any, *axes: str | None) -> Any:
    """The sum over the devices of these mapped axes; those that are None do not exist."""
    there = tuple(axis for axis in axes if axis is not None)
    return lax.psum(x, there) if there else x


def place(axis: str | None) -> Any:
    """This device's number along a mapped axis; 0 without one."""
    return 0 if axis is None else lax.axis_index(axis)


def num_devices(axis: str | None) -> int:
    """How many devices share a mapped axis; 1 without one."""
    return 1 if axis is None else lax.axis_size(axis)


def over_components(x: PyTree, axis: str | None) -> PyTree:
    """Adds up a sum over components that every device has taken over its own.

    Derivative: the cotangent, alike on all devices, as it is.
    """
    return x if axis is None else _added(axis, x)


def into_components(x: Array, axis: str | None) -> Array:
    """x, alike on all devices, before it meets this device's components.

    Derivative: the sum of the devices' cotangents.
    """
    return x if axis is None else _shared(axis, x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _added(axis, x):
    return lax.psum(x, axis)


_added.defvjp(lambda axis, x: (lax.psum(x, axis), None), lambda axis, _, g: (g,))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _shared(axis, x):
    return x


_shared.defvjp(lambda axis, x: (x, None), lambda axis, _, g: (lax.psum(g, axis),))


def mean_over_batch(x: PyTree, axis: str | None) -> PyTree:
    """The mean over the devices of the batch's axis, of means that each took over its own examples.

    Derivative: the cotangent as it is. Gradients are averaged over devices afterwards, and the mean
    of what each device's own examples contribute is the gradient of the whole.
    """
    return x if axis is None else _averaged(axis, x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _averaged(axis, x):
    return lax.pmean(x, axis)


_averaged.defvjp(lambda axis, x: (lax.pmean(x, axis), None), lambda axis, _, g: (g,))
