"""`make demo`: which runs it makes, and what it shows of them. The runs themselves: test_main."""

import io
import json

from conftest import get_config
from etils import epath
from rich.console import Console

from apd_jax.commands import demo, experiment

RECIPE = {"num_features": 40, "num_components": 80, "num_features_owned": 40}
PUBLISHED = {"num_features": 40, "num_components": 50, "num_features_owned": 38}
MORE = dict.fromkeys(
    ("mmcs_one_to_one", "ml2r_one_to_one", "relative_parameter_error", "minimality_topk"), 0.5
)


def test_two_runs_one_table_and_one_page(tmp_path, monkeypatch):
    asked = {}

    def run(config, folder, console):
        folder.mkdir(parents=True)
        asked[folder.name] = config
        found = RECIPE if folder.name == "recipe" else PUBLISHED
        found = found | MORE | {"num_alive_components": 7, "minutes_decomposition": 0.25}
        (folder / "evaluation.json").write_text(json.dumps(found))

    monkeypatch.setattr(experiment, "run", run)
    out = io.StringIO()
    demo.run(epath.Path(tmp_path), Console(file=out, width=140))
    assert list(asked) == ["recipe", "published"]
    # The same network, and the published setting but for the steps, which the table tells.
    assert asked["recipe"].target.to_dict() == asked["published"].target.to_dict()
    whole = get_config("tms", "40-10")
    assert whole.apd.num_steps == 20_000
    whole.apd.num_steps = demo.PUBLISHED_STEPS
    assert asked["published"].to_json() == whole.to_json()
    shown = out.getvalue()
    assert "10,000 of its 20,000 steps" in shown
    row = next(line for line in shown.splitlines() if "component of their own" in line)
    assert "40 of 40" in row and "38 of 40" in row
    assert str(tmp_path / "recipe" / "report.html") in shown
