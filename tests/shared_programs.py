"""Runs of one problem with the same settings share their programs, as long as few lie in between.

A test that stops a run and resumes it, or compares two, would else trace and compile its step for
each. Shared is what `train.loop` builds: how a state begins, and the step.

Programs share a context of MLIR, too. jax makes one for each, which costs more than lowering a
small program.
"""

import functools
import threading
from collections import OrderedDict
from typing import Any

import jax
from jax._src import core
from jax._src.interpreters import mlir

from apd_jax.train import loop, parallel, placement

KEPT = 8  # a program that is kept takes memory
LOWERED = 50  # programs in a context, which holds their constants
_built: OrderedDict[Any, tuple[Any, Any]] = OrderedDict()
_build = loop._build
_pmap_program = functools.lru_cache(KEPT)(parallel.pmap_program)


def _key(problem: Any, method: Any, placed: Any) -> Any:
    """Of equal keys the programs are the same: functions and arrays are the same objects."""
    leaves, tree = jax.tree.flatten(problem.params)
    functions = (problem.apply_fn, problem.attribution_fn)
    unwrapped = tuple(getattr(fn, "fn", fn) for fn in functions)
    others = (problem.sample_fn, problem.elsewhere, problem.num_active_fn, problem.valid_fn)
    same = tuple(map(id, (*leaves, *unwrapped, *others)))
    chosen = repr((problem.select, problem.uses))
    where = placed.mesh if isinstance(placed, placement.Shards) else tuple(placed.devices)
    return same, tree, chosen, method, where


def build(problem: Any, method: Any, settings: Any, placed: Any) -> Any:
    """`loop._build`; what it made before of the same."""
    if settings is not None or not core.trace_state_clean():
        return _build(problem, method, settings, placed)
    key = _key(problem, method, placed)
    if key not in _built:  # with the problem, whose parts' ids are then not given to others
        _built[key] = problem, _build(problem, method, settings, placed)
        if len(_built) > KEPT:
            _built.popitem(last=False)
    _built.move_to_end(key)
    return _built[key][1]


_make_ir_context = mlir.make_ir_context
_contexts = threading.local()  # each thread has one of its own


def ir_context() -> Any:
    """`mlir.make_ir_context`; a new one after `LOWERED` programs."""
    _contexts.used = getattr(_contexts, "used", 0) + 1
    if _contexts.used % LOWERED == 1:
        _contexts.context = _make_ir_context()
    return _contexts.context


def install() -> None:
    """From now on, in this process."""
    mlir.make_ir_context = ir_context
    loop._build = build
    parallel.pmap_program = lambda step, num_steps, devices: _pmap_program(
        step, num_steps, tuple(devices)
    )
    placement.Shards.program = functools.lru_cache(KEPT)(placement.Shards.program)
