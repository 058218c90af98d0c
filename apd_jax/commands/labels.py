"""`--mode=labels`: what the components of a harvest are on, in words, with scores.

Without an endpoint by rules, which need no model: DIR/harvest/labels_rules.json. With one by its
model: labels_MODEL.json. Stopped, the same command goes on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
from collections.abc import Callable, Iterator

import numpy as np
from absl import flags
from etils import epath
from rich.console import Console
from rich.table import Table

from apd_jax.commands.given import Given
from apd_jax.commands.harvest import FOLDER, language_target
from apd_jax.commands.runs import Restored, restore
from apd_jax.errors import InputError
from apd_jax.interpretation import harvest as harvest_lib
from apd_jax.interpretation import labels as labels_lib
from apd_jax.interpretation.endpoint import Endpoint
from apd_jax.interpretation.harvest import Harvest
from apd_jax.interpretation.questions import CHANCE, quiet_windows
from apd_jax.paths import user_path
from apd_jax.train.progress import ProgressDisplay

NAMES = ("endpoint", "model", "key_variable", "num_labels", "only_cost")
QUIET = "quiet.npz"  # beside the harvest
_BATCHES = 50  # in which windows where components are off are looked for, at most


@dataclasses.dataclass(frozen=True)
class Options:
    """What the flags of this mode say."""

    endpoint: str
    model: str
    key_variable: str
    num_labels: int
    only_cost: bool


def define_flags() -> Callable[[], Options]:
    """The flags of --mode=labels; the result reads them."""
    holders = [
        flags.DEFINE_string(
            "endpoint",
            "",
            "Of --mode=labels: the URL of an OpenAI-compatible chat model, e.g. "
            "http://localhost:8000/v1; without one labels are rules.",
        ),
        flags.DEFINE_string("model", "", "Of --mode=labels: the model's name at the endpoint."),
        flags.DEFINE_string(
            "key_variable",
            "OPENAI_API_KEY",
            "Of --mode=labels: the environment's variable that holds the endpoint's key.",
        ),
        flags.DEFINE_integer(
            "num_labels",
            0,
            "Of --mode=labels: how many components, those most often on; 0: all that are ever on.",
        ),
        flags.DEFINE_bool(
            "only_cost", False, "Of --mode=labels: say what it would ask for, and end."
        ),
    ]
    return lambda: Options(*(holder.value for holder in holders))


def labels(
    workdir: epath.PathLike, console: Console, given: Given | None, options: Options
) -> None:
    """Labels the components of a run's harvest, and prints the scores beside chance.

    Raises:
      InputError: no language model, no harvest yet, or an endpoint that does not answer.
    """
    if options.num_labels < 0:
        raise InputError(f"--num_labels must be at least 0; got {options.num_labels}.")
    endpoint = None
    if options.endpoint:
        endpoint = Endpoint(options.endpoint, options.model, options.key_variable)
    run, folder = restore(workdir, given), user_path(workdir) / FOLDER
    target = language_target(run, "--mode=labels")
    strings = target.tokens.tokenizer.strings
    harvest = harvest_lib.load(folder)
    quiet = _quiet(run, harvest, folder / QUIET)
    numbers = labels_lib.chosen(harvest, None)
    if 0 < options.num_labels < len(numbers):
        order = np.argsort(-harvest.firing_rate, kind="stable")[: options.num_labels]
        numbers = sorted(order.tolist())
    asked = {"components": numbers, "seed": run.seed}
    unfinished = folder / f".labels_{labels_lib.file_name(options.model)}.unfinished"
    if endpoint is None:
        found = labels_lib.by_rules(harvest, quiet, strings, **asked)
    else:
        said = labels_lib.cost(harvest, quiet, strings, max_tokens=endpoint.max_tokens, **asked)
        console.print(f"{endpoint.address}, {endpoint.model}: {said}.", soft_wrap=True)
        if options.only_cost:
            return
        with _shown(len(numbers)) as told:
            found = labels_lib.by_model(
                harvest, quiet, strings, endpoint, progress=unfinished, on_row=told, **asked
            )
    path = labels_lib.save(found, folder)
    if endpoint is not None:  # now that all is there
        unfinished.unlink(missing_ok=True)
    console.print(table(found))
    console.print(f"Labels: {path}", soft_wrap=True)


@contextlib.contextmanager
def _shown(count: int) -> Iterator[Callable[[dict], None]]:
    """Tells the progress of every labelled component."""
    done = 0

    with ProgressDisplay("labels", count) as display:

        def told(row: dict) -> None:
            nonlocal done
            done += 1
            display.update(done, {k: row[k] for k in CHANCE if row[k] is not None})

        yield told


def _quiet(run: Restored, harvest: Harvest, path: epath.Path) -> np.ndarray:
    """Windows of the same text in which components are off, kept beside the harvest."""
    one = run.decomposition(0)
    harvest.must_be_of(one)
    whose = harvest.fingerprint + harvest.settings
    if path.exists():
        with np.load(io.BytesIO(path.read_bytes())) as kept:
            if str(kept["harvest"]) == whose:
                return kept["tokens"]
    target = language_target(run, "--mode=labels")
    size = min(run.method.batch_size, len(target.rows))
    batches = (target.rows.batch(size, run.seed + 1, step) for step in range(_BATCHES))
    found = quiet_windows(
        one,
        batches,
        width=harvest.top_tokens.shape[-1],
        threshold=harvest.threshold,
        seed=run.seed,
    )
    content = io.BytesIO()
    np.savez_compressed(content, tokens=found, harvest=whose)
    path.write_bytes(content.getvalue())
    return found


def table(found: dict) -> Table:
    """Mean scores beside chance."""
    count = len(found["components"])
    by = "rules" if found["method"] == "rules" else found["model"]
    shown = Table(title=f"{count:,} components labelled by {by}")
    for column in ("score", "mean", "chance", "components"):
        shown.add_column(column, justify="left" if column == "score" else "right")
    for kind, chance in found["chance"].items():
        mean = found["mean"][kind]
        scored = sum(row[kind] is not None for row in found["components"])
        shown.add_row(kind, "–" if mean is None else f"{mean:.1%}", f"{chance:.0%}", str(scored))
    return shown
