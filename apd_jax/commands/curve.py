"""`--mode=curve`: the run of a workdir trained on at one price after another, each from the last.

  curve/start.json                     what the run itself is worth on the text
  curve/steps_N/A_B/                   a run of its own, as `apd_jax.decompose` leaves it: N steps
                                       at price B, from those at price A, from the run
  curve/steps_N/A_B/point.json         what it is worth
  curve.json, figures/curve.png        all points of the newest call

Points that are there are kept: the same call, or one with more prices behind, goes on. The text is
held out where the run's target has such, else the batches of --data, whatever these are.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from typing import Any

from absl import flags
from etils import epath
from rich.console import Console

from apd_jax.commands import runs
from apd_jax.commands.experiment import BOTH
from apd_jax.commands.given import Given
from apd_jax.decomposition import Decomposition
from apd_jax.errors import InputError
from apd_jax.evaluation import language
from apd_jax.methods import suggest
from apd_jax.network import data
from apd_jax.paths import user_path
from apd_jax.report import curve as drawn
from apd_jax.report import figures, tables
from apd_jax.storage import workdirs
from apd_jax.storage.structure import Functions
from apd_jax.train import parallel
from apd_jax.train.workdir import write_json

FIELD = "importance_coeff"  # the price, of every method with learned gates
NAMES = ("prices", "steps")


def define_flags() -> Callable[[], dict[str, Any]]:
    """The flags of this mode; the result reads them."""
    prices = flags.DEFINE_list(
        "prices",
        [],
        "Of --mode=curve: importance_coeff of each point, in the config's units, e.g. 0.3,1,3.",
    )
    steps = flags.DEFINE_integer("steps", 500, "Of --mode=curve: training steps of each point.")
    return lambda: {"prices": prices.value, "steps": steps.value}


def curve(
    workdir: epath.PathLike,
    console: Console,
    given: Given | None = None,
    *,
    prices: list[str],
    steps: int,
) -> None:
    """Cross-entropy against L0 over prices, as curve.json, a figure and a table.

    Every point has `steps` steps behind the run's own, with the batches and the learning rates that
    a run of so many has there; only its components and gate come from the point before.

    Raises:
      InputError: no prices, no language model, a method without this price, or a curve of
        another run in the folder.
      Interrupted: by a signal, with a checkpoint saved.
    """
    asked = [_price(text) for text in prices]
    if not asked:
        raise InputError("--prices is missing; give those of the points, e.g. --prices=0.3,1,3.")
    if steps < 1:
        raise InputError(f"--steps must be at least 1; got {steps}.")
    run, folder = runs.restore(workdir, given, BOTH), user_path(workdir)
    own = _own_price(run)
    if not suggest.reads_tokens(run.problem, data.shapes(run.problem.sample_fn)):
        raise InputError(f"{folder} decomposes no language model, whose cross-entropy is asked.")
    target, count = run.evaluated_target, run.num_batches
    text = "the text of --data" if target is None else "held-out text"
    source = data.as_sampler(run.problem.sample_fn if target is None else target.fresh_fn, count)

    def worth(found: Decomposition) -> dict[str, Any]:
        batches = language.drawn(source, count, run.seed)
        return language.evaluate(found, batches, seed=run.seed, num_batches=count)

    base = run.decomposition(0, run.rows)
    points = [_start(folder / "curve" / "start.json", base, run, worth)]
    for point in _points(folder / "curve" / f"steps_{steps}", base, asked, own, steps, worth):
        points.append(point)
        parallel.from_primary(lambda: _write(folder, steps, points, text))
    console.print(tables.grid_table(drawn.grid(points, text)))
    where = f"Figure: {folder / 'figures' / 'curve.png'}   Points: {folder / 'curve.json'}"
    console.print(where, soft_wrap=True)


def _price(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise InputError(f"--prices takes numbers above 0, separated by commas; got {text!r}.")
    return value


@dataclasses.dataclass(frozen=True)
class _Own:
    """The run's own price: as its config says it, and the coefficient that training multiplies."""

    price: float
    coefficient: float

    def of(self, price: float) -> float:
        return self.coefficient * price / self.price


def _own_price(run: runs.Restored) -> _Own:
    settings = run.config.apd
    if FIELD not in settings or not settings[FIELD] > 0:
        raise InputError(
            f"method {run.method.name!r} has no {FIELD} above 0 in this run, so there is no price "
            "to go over; train with one, by a method with learned gates (spd, vpd, whole)."
        )
    return _Own(float(settings[FIELD]), float(getattr(run.method, FIELD)))


def _start(path: epath.Path, base: Decomposition, run: runs.Restored, worth: Callable) -> Any:
    """The first point, without training."""
    if path.exists():
        point = json.loads(path.read_text())
        if point["step"] != run.step:
            raise InputError(
                f"{path.parent} holds a curve from step {point['step']}, but the run is at step "
                f"{run.step} now; move that folder away."
            )
        return point
    own = _own_price(run)
    point = {"price": own.price, "coefficient": own.coefficient, "step": run.step, **worth(base)}
    parallel.from_primary(lambda: _keep(path, point))
    return point


def _points(
    folder: epath.Path,
    base: Decomposition,
    prices: list[float],
    own: _Own,
    steps: int,
    worth: Callable[[Decomposition], dict[str, Any]],
) -> Iterator[dict[str, Any]]:
    """One point after the other: kept, or trained from the one before."""
    before, begun = base, base.history
    last: epath.Path | None = None  # where the point before is kept, if it has not been opened
    for i, price in enumerate(prices):
        where = folder / "_".join(f"{p:g}" for p in prices[: i + 1])
        if (where / "point.json").exists():
            last = where
            yield json.loads((where / "point.json").read_text())
            continue
        if last is not None:
            before, last = _opened(last, base), None
        start = dataclasses.replace(before, history=begun)
        before = start.train(steps, workdir=where, **{FIELD: own.of(price)})
        step = before.history[-1]["step"]
        point = {"price": price, "coefficient": own.of(price), "step": step, **worth(before)}
        parallel.from_primary(lambda path=where, point=point: _keep(path / "point.json", point))
        yield point


def _opened(where: epath.Path, base: Decomposition) -> Decomposition:
    """The point of a folder, with the data of the run."""
    functions = Functions(base.problem.apply_fn, valid_fn=base.problem.valid_fn)
    _, found = workdirs.load(where, functions, base.problem.params)
    return dataclasses.replace(base, components=found.components, gate=found.gate)


def _keep(path: epath.Path, point: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, point)


def _write(folder: epath.Path, steps: int, points: list[dict[str, Any]], text: str) -> None:
    about = {"field": FIELD, "steps": steps, "text": text, "points": points}
    write_json(folder / "curve.json", about)
    figures.save(folder / "figures", {"curve": drawn.figure(points, text)})
