"""`make demo`: TMS 40-10 by the recipe and by APD's published setting, in one table and one page.

    python -m apd_jax.commands.demo [--workdir=runs/demo]

Each is a run of its own below the workdir, as `python -m apd_jax.main` makes it; the same command
goes on where it was stopped. The published setting is trained for half of its steps, so that all
is done in minutes on two cores; the table says so.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from typing import Any

from etils import epath
from rich.console import Console
from rich.table import Table

from apd_jax.commands import configs, experiment
from apd_jax.commands.cli import keep_programs, make_console, only_our_messages, told_in_a_sentence
from apd_jax.paths import user_path
from apd_jax.report import tables

PUBLISHED_STEPS = 10_000  # of 20,000
ROWS = (
    *("num_features_owned", "mmcs_one_to_one", "ml2r_one_to_one"),
    *("relative_parameter_error", "minimality_topk", "num_alive_components"),
)
COUNTS = ("num_features", "num_components")  # that rows are out of


def runs() -> dict[str, Any]:
    """{name of its folder: config} of the two."""
    recipe = configs.load("recipe").get_config("tms,40-10")
    published = configs.load("tms").get_config("40-10")
    published.apd.num_steps = PUBLISHED_STEPS
    return {"recipe": recipe, "published": published}


def show(results: Mapping[str, Mapping[str, Any]]) -> Table:
    """The table of both runs' evaluation.json, side by side."""
    table = Table(title="TMS 40-10: 40 features in 10 dimensions, to be found one by one")
    table.add_column("")
    table.add_column("our recipe", justify="right")
    table.add_column(
        f"published setting,\n{PUBLISHED_STEPS:,} of its 20,000 steps", justify="right"
    )
    table.add_column("good", style="dim")
    columns = [
        {row[0]: row for row in tables.result_rows({n: m[n] for n in (*ROWS, *COUNTS)})}
        for m in (results["recipe"], results["published"])
    ]
    for label, value, good in columns[0].values():
        table.add_row(label, value, columns[1][label][1], good)
    minutes = [f"{results[name]['minutes_decomposition']:.1f}" for name in ("recipe", "published")]
    table.add_row("minutes of training the components", *minutes, "")
    return table


def run(folder: epath.Path, console: Console) -> None:
    """Both runs, the table, and the path of the recipe's page."""
    for name, config in runs().items():
        console.print(f"[bold]{name}[/bold]")
        experiment.run(config, folder / name, Console(quiet=True))
    results = {name: json.loads((folder / name / "evaluation.json").read_text()) for name in runs()}
    console.print(show(results))
    page = (folder / "recipe" / "report.html").resolve()
    console.print(f"Every component, and the network to play with: {page}", soft_wrap=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="TMS 40-10 by the recipe and as published.")
    parser.add_argument("--workdir", default="runs/demo", help="folder of both runs")
    folder = parser.parse_args().workdir
    with told_in_a_sentence():
        only_our_messages()
        keep_programs(folder)
        run(user_path(folder), make_console())


if __name__ == "__main__":
    main()
