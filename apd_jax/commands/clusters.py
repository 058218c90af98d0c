"""`--mode=clusters`: components of a harvest that fire together, into DIR/harvest/clusters.json."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable

import numpy as np
from absl import flags
from etils import epath
from rich.console import Console
from rich.table import Table

from apd_jax.commands.given import Given
from apd_jax.commands.harvest import FOLDER, language_target, stream
from apd_jax.commands.runs import restore
from apd_jax.interpretation import clusters as clusters_lib
from apd_jax.interpretation import harvest as harvest_lib
from apd_jax.interpretation.clusters import Clustering, Firings
from apd_jax.paths import user_path

NAMES = ("alpha", "restarts")


@dataclasses.dataclass(frozen=True)
class Options:
    """What the flags of this mode say."""

    alpha: float
    restarts: int


def define_flags() -> Callable[[], Options]:
    """The flags of --mode=clusters; the result reads them."""
    alpha = flags.DEFINE_float(
        "alpha", 0.2, "Of --mode=clusters: bits that a rank costs, where it fires; more merge less."
    )
    restarts = flags.DEFINE_integer(
        "restarts", 3, "Of --mode=clusters: how often it begins anew; the shortest counts."
    )
    return lambda: Options(alpha.value, restarts.value)


def clusters(
    workdir: epath.PathLike, console: Console, given: Given | None, options: Options
) -> None:
    """Groups a run's components by where they fire on the harvested text, and prints the numbers.

    Of several instances the first. On is what the harvest counted as on.

    Raises:
      InputError: no language model, no harvest yet or of another decomposition, no component that
        fires, or options out of range.
    Cost: the gate on as many tokens as the harvest has, then that of `clusters.cluster`.
    """
    run, folder = restore(workdir, given), user_path(workdir) / FOLDER
    target = language_target(run, "--mode=clusters")
    harvest, one = harvest_lib.load(folder), run.decomposition(0)
    harvest.must_be_of(one)
    batches, count = stream(run, target, harvest.num_tokens)
    firings = clusters_lib.firings(one, itertools.islice(batches, count), harvest.threshold)
    found = clusters_lib.cluster(
        firings, alpha=options.alpha, restarts=options.restarts, seed=run.seed
    )
    path = clusters_lib.save(found, folder, harvest, options.alpha)
    console.print(table(found, firings))
    console.print(f"Clusters: {path}   Their page: --mode=report", soft_wrap=True)


def table(found: Clustering, firings: Firings) -> Table:
    """What was merged, and what it saves."""
    fires, N = firings.counts > 0, firings.num_positions
    sizes = np.unique(found.partition[fires], return_counts=True)[1]
    rows = {
        "tokens": f"{N:,}",
        "components that are ever on": f"{int(fires.sum()):,}",
        "groups of these": f"{len(sizes):,}",
        "with more than one member": f"{int((sizes > 1).sum()):,}",
        "the largest": f"{int(sizes.max()):,}",
        "bits per token, every component alone": f"{found.single / N:.1f}",
        "bits per token, in groups": f"{found.length / N:.1f}",
    }
    if len(found.lengths) > 1:
        rows["components on which two restarts agree"] = f"{1 - found.distance:.1%}"
    shown = Table("clusters", "", title_justify="left")
    for row in rows.items():
        shown.add_row(*row)
    return shown
