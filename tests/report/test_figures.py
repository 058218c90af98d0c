"""Figures from tiny arrays: what they show, and that `save_all` writes those that apply."""

import matplotlib.image
import numpy as np
import pytest
from conftest import make_method, make_problem
from matplotlib.figure import Figure

from apd_jax import SPD, Components
from apd_jax.decomposition import Decomposition
from apd_jax.evaluation import Evaluation
from apd_jax.evaluation.geometry import norm_ratios
from apd_jax.report import columns, figures
from apd_jax.targets.base import Panel

F, C, V = 3, 5, 7
FEATURE_OF_COMPONENT = np.array([2, -1, 0, 1, 0])
HISTORY = [
    {
        "step": s,
        "total": 1.0 / (s + 1),
        "faithfulness": 0.1 / (s + 1),
        "minimality": 0.0,
        "mean_active": 1.0,
    }
    for s in (0, 10, 20)
]


def make_arrays(d, *, scrub=False):
    rng = np.random.default_rng(0)

    def draw(*shape):
        return rng.uniform(0.1, 1, shape).astype(np.float32)

    names = ("topk", "scrubbed", "antiscrubbed", "random", "zero", "monosemantic")
    return {
        "feature_weights_target": draw(F, d) - 0.5,
        "feature_weights_sum": draw(F, d) - 0.5,
        "feature_weights_components": draw(C, F, d) - 0.5,
        "attributions_one_hot": draw(F, C),
        "mask_one_hot": np.eye(F, C, dtype=bool),
        "component_of_feature": np.array([2, 3, 0]),
        "feature_of_component": FEATURE_OF_COMPONENT,
        **{f"per_feature_loss_{name}": draw(F) for name in ("target", "top1", "none")},
        **{f"active_feature_loss_{name}": draw(F) for name in ("target", "topk")},
        "sweep_values": np.linspace(0, 1, V),
        **{f"sweep_{name}": draw(V, F) for name in ("label", "target", "top1")},
        **{f"scrub_{name}": np.append(draw(30), np.float32(0)) for name in names if scrub},
    }


def decomposed(method, history=()):
    """What figures read of a decomposition: its method and its log."""
    problem = make_problem(lambda p, x: x, {}, None)
    return Decomposition(problem, Components({}, C), method, history)


def drawn_texts(figure):
    """Every title, label, legend and caption of a figure."""
    return " ".join(
        text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text"))
    )


@pytest.mark.parametrize(
    ("name", "d", "history", "extra"),
    [
        ("tms", 2, HISTORY, ["losses"]),
        ("tms", 4, [], []),
        ("resid_mlp", 4, HISTORY, ["neuron_contributions", "scrub", "losses"]),
    ],
)
def test_save_all(tmp_path, name, d, history, extra):
    arrays = make_arrays(d, scrub=name == "resid_mlp")
    decomposition = decomposed(make_method(topk=1.28, num_always_on=1), history)
    paths = figures.save_all(tmp_path / "figures", Evaluation({}, arrays), decomposition)
    assert [path.stem for path in paths] == [
        "columns",
        "attributions",
        "per_feature_loss",
        "responses",
        *extra,
    ]
    for path in paths:
        pixels = matplotlib.image.imread(path)
        assert pixels.shape[0] > 200 and pixels.std() > 0.01, f"{path} is blank"


def test_without_k_the_mean_number_of_active_components_is_drawn(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "save", lambda folder, found: drawn.append(found) or [])
    evaluation = Evaluation({"mean_active_components": 2.5}, make_arrays(2))
    figures.save_all(tmp_path, evaluation, decomposed(SPD()))
    assert "k = 2.5" in drawn_texts(drawn[0]["per_feature_loss"])


def test_component_order():
    # Feature 0 has components 2 and 4 (attributions at most 0.3 and 0.9: the stronger first), then
    # come 3 and 0; 1 is dead.
    attributions = np.zeros((F, C))
    attributions[0] = [0.1, 5.0, 0.3, 0.2, 0.9]
    np.testing.assert_array_equal(
        columns.component_order(FEATURE_OF_COMPONENT, attributions), [4, 2, 3, 0, 1]
    )
    one_always_on = np.where(np.arange(C) == 2, columns.ALWAYS_ON, FEATURE_OF_COMPONENT)
    np.testing.assert_array_equal(
        columns.component_order(one_always_on, attributions), [4, 3, 0, 1, 2]
    )


@pytest.mark.parametrize(("draw", "d"), [(columns.polygons, 2), (columns.heat_maps, 4)])
def test_columns_show_target_sum_and_components_in_order(draw, d):
    arrays = make_arrays(d)
    weights, order = (
        [arrays[f"feature_weights_{name}"] for name in ("target", "sum", "components")],
        np.array([4, 2, 3, 0, 1]),
    )
    figure = draw(*weights, order, FEATURE_OF_COMPONENT)
    assert isinstance(figure, Figure)
    assert drawn_texts(columns.columns(*weights, order, FEATURE_OF_COMPONENT)) == drawn_texts(
        figure
    )  # the one chosen for d
    titles = [axes.get_title() for axes in figure.axes if axes.get_title()]
    assert titles == [
        "target",
        "sum",
        "4: feature 0",
        "2: feature 0",
        "3: feature 1",
        "0: feature 2",
        "1: dead",
    ]
    assert "Good:" in drawn_texts(figure)
    assert "2: always on" in drawn_texts(
        draw(*weights, order, np.where(np.arange(C) == 2, columns.ALWAYS_ON, FEATURE_OF_COMPONENT))
    )


def test_large_columns_show_the_difference():
    target = np.ones((40, 30), np.float32)
    figure = columns.columns(
        target, 1.5 * target, np.stack([target, 0.5 * target]), np.arange(2), np.array([0, 1])
    )
    shown = [axes.images[0].get_array() for axes in figure.axes if axes.images]
    np.testing.assert_allclose(shown[2], 0.5)  # 1.5 - 1


def test_polygon_lines_end_at_the_weights():
    arrays = make_arrays(2)
    weights = [arrays[f"feature_weights_{name}"] for name in ("target", "sum", "components")]
    figure = columns.polygons(*weights, np.arange(C), FEATURE_OF_COMPONENT)
    sum_panel = figure.axes[1]
    ends = [
        line.get_xydata()[1]
        for line in sum_panel.lines
        if len(line.get_xydata()) == 2 and line.get_linestyle() == "-"
    ][:F]
    np.testing.assert_allclose(ends, arrays["feature_weights_sum"], rtol=1e-6)


def test_attributions_are_reordered():
    a = make_arrays(2)
    order = np.array([4, 2, 3, 0, 1])
    shares = norm_ratios(a["feature_weights_components"], a["feature_weights_target"])
    figure = figures.attributions(a["attributions_one_hot"], a["mask_one_hot"], order, shares)
    images = [axes.images[0].get_array() for axes in figure.axes if axes.images]
    np.testing.assert_allclose(images[0], a["attributions_one_hot"][:, order])
    np.testing.assert_allclose(images[2], shares.T[:, order])


def test_per_feature_loss_is_ordered_by_the_target_and_skips_missing():
    alone = {
        "target": np.array([3.0, 1.0, 2.0]),
        "top1": np.array([30.0, 10.0, 20.0]),
        "none": np.array([4.0, 4.0, 4.0]),
    }
    active = {"target": np.array([1.0, np.nan, 0.0]), "topk": np.array([2.0, np.nan, 1.0])}
    figure = figures.per_feature_loss(alone, active, 1.28)
    np.testing.assert_allclose(figure.axes[0].lines[1].get_ydata(), [10, 20, 30])
    # The loss of exactly 0 is drawn at the bottom of the log axis, and the missing feature last and
    # not at all.
    y = figure.axes[1].lines[0].get_ydata()
    assert 0 < y[0] < 1e-5 and y[1] == 1 and np.isnan(y[2])
    assert "k = 1.28" in drawn_texts(figure)


def test_responses_choose_features_evenly():
    outputs = {name: np.zeros((V, 100)) for name in ("label", "target", "top1")}
    figure = figures.responses(np.linspace(-1, 1, V), outputs, num_features=4)
    assert [axes.get_title() for axes in figure.axes] == [
        "feature 0",
        "feature 33",
        "feature 66",
        "feature 99",
    ]


def test_scrub_legend_has_the_means():
    values = {
        "topk": [1e-4, 3e-4],
        "scrubbed": [4e-4, 0],
        "antiscrubbed": [1e-3, 3e-3],
        "monosemantic": [5e-4, 7e-4],
    }
    text = drawn_texts(figures.scrub({name: np.array(loss) for name, loss in values.items()}))
    # (1e-4 + 3e-4)/2, (4e-4 + 0)/2, (1e-3 + 3e-3)/2, (5e-4 + 7e-4)/2
    for mean in (
        "top-k, mean 2.00e-04",
        "scrubbed, mean 2.00e-04",
        "antiscrubbed, mean 2.00e-03",
        "monosemantic, mean 6.00e-04",
    ):
        assert mean in text


def test_loss_curves_show_the_logged_losses():
    figure = figures.losses(HISTORY)
    lines = {line.get_label(): line.get_xydata() for line in figure.axes[0].lines}
    # "minimality" is 0 throughout and has no place on a log axis; "mean_active" is no loss.
    assert set(lines) == {"total", "faithfulness"}
    np.testing.assert_allclose(lines["total"], [[0, 1], [10, 1 / 11], [20, 1 / 21]])


def test_neuron_contributions_pair_each_feature_with_its_own_component():
    components = np.arange(2 * 3 * 4, dtype=np.float32).reshape(2, 3, 4)
    target = np.ones((3, 4), np.float32)
    figure = columns.neuron_contributions(target, 2 * target, components, np.array([1, 0, 1]))
    panels = {axes.get_title(): axes for axes in figure.axes}
    own = panels["All features: own component"].lines[1].get_ydata()
    np.testing.assert_allclose(
        own, np.concatenate([components[1, 0], components[0, 1], components[1, 2]])
    )
    np.testing.assert_allclose(panels["All features: sum of components"].lines[1].get_ydata(), 2)


def test_panels_of_a_target_are_drawn(tmp_path):
    heat = Panel(
        "Heat",
        "Good: dark.",
        "class",
        "component",
        matrix=np.eye(2, 3) - 0.5,
        unit="loss",
        rows=["a", "b"],
    )
    lines = Panel(
        "Lines",
        "Good: flat.",
        "step",
        "loss",
        x=np.arange(3),
        lines={"one": np.ones(3), "two": np.zeros(3)},
    )
    evaluation = Evaluation({}, {}, {"heat": heat, "lines": lines})
    paths = figures.save_all(tmp_path, evaluation, decomposed(make_method()))
    assert [path.name for path in paths] == ["heat.png", "lines.png"]
    assert "Good: dark." in drawn_texts(figures.panel(heat)) and "two" in drawn_texts(
        figures.panel(lines)
    )
