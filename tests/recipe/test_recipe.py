"""The recipe: reference points by hand, stages, and resuming."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import get_config
from rich.console import Console
from toys import DIAGONAL, linear_problem, small, three_features

import apd_jax
from apd_jax import targets
from apd_jax.commands import experiment, runs
from apd_jax.errors import InputError
from apd_jax.methods import registry
from apd_jax.methods.optimizers import Trained
from apd_jax.network.problem import Problem
from apd_jax.recipe import budget, modes, numbers, scales, stages
from apd_jax.recipe.beginning import accepted
from apd_jax.recipe.numbers import STAGES
from apd_jax.train import checkpoint, loop


@pytest.fixture(autouse=True)
def fewer_examples(monkeypatch):
    monkeypatch.setattr(modes, "NUM_EXAMPLES", 2048)


# Reference points


def test_scales_by_hand():
    """faithfulness of nothing: (9 + 4)/4; distance without W: E mean_o (x W)_o² = (9 + 4)/2;
    simplicity of W: (3^p + 2^p)/4."""
    method, _ = small()
    s = scales.measure(linear_problem(), method)
    assert s.faithfulness == pytest.approx(13 / 4)
    assert s.minimality == pytest.approx(13 / 2, rel=0.05)
    assert s.simplicity == pytest.approx((3**0.9 + 2**0.9) / 4, rel=1e-5)
    x = np.random.default_rng(0).normal(size=(1000, 2)).astype(np.float32)
    assert scales.measure(linear_problem([x]), method).minimality == pytest.approx(
        np.mean((x @ DIAGONAL) ** 2), rel=1e-5
    )


def test_hidden_scale_by_hand():
    """Hidden activation x W: the squares of x W, mean over examples and widths.

    That is what the outputs are without their constant.
    """
    problem, (method, _) = linear_problem(), small()
    hidden = Problem(
        lambda p, x: (x @ p["W"], {"h": x @ p["W"]}), problem.params, problem.sample_fn
    )
    s = scales.measure(hidden, method)
    assert s.hidden == pytest.approx(s.minimality, rel=1e-6)
    with pytest.raises(InputError, match="no hidden activations"):
        scales.measure(problem, method.replace(hidden_reconstruction_coeff=1.0))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_outputs_that_are_not_finite(bad):
    problem = linear_problem()
    broken = Problem(problem.apply_fn, {**problem.params, "b": jnp.full(2, bad)}, problem.sample_fn)
    with pytest.raises(InputError, match="not finite"):
        scales.measure(broken, small()[0])


def test_outputs_that_do_not_depend_on_the_weights():
    problem = Problem(
        lambda p, x: x + 0 * p["W"].sum(),
        {"W": jnp.asarray(DIAGONAL)},
        lambda key, step: jnp.ones((1000, 2)),
        select=["W"],
    )
    with pytest.raises(InputError, match="nothing to decompose"):
        scales.measure(problem, small()[0])


# Stages


def test_relative_coefficients_become_absolute():
    method, r = small()
    s = scales.Scales(faithfulness=2.0, minimality=0.5, hidden=0.2, simplicity=4.0)
    explore = numbers.stage_method(method, r, "explore", s)
    assert (explore.faithfulness_coeff, explore.minimality_coeff) == (
        0.5,
        pytest.approx(2 * r.minimality_coeff),
    )
    assert (explore.simplicity_coeff, explore.simplicity_coeff_final) == (5.0, 1.75)
    assert explore.num_instances == 2 and explore.mask == "batch_topk"
    assert explore.hidden_reconstruction_coeff == 0
    says = method.replace(hidden_reconstruction_coeff=10.0)  # whether, not how strongly
    strength = pytest.approx(5 * r.hidden_reconstruction_coeff)
    assert numbers.stage_method(says, r, "explore", s).hidden_reconstruction_coeff == strength
    polish, refine = [numbers.stage_method(method, r, stage, s) for stage in ("polish", "refine")]
    assert (polish.inactive, refine.inactive, refine.mask) == ("drop", "uniform", "threshold")
    assert polish.simplicity_coeff == 0 and polish.mask == "threshold" and polish.num_instances == 1
    assert explore.threshold == pytest.approx(r.threshold * 0.5**0.5)
    assert polish.threshold == pytest.approx(r.polish.threshold * explore.threshold)


def test_stages_run_and_resume_bit_for_bit(tmp_path):
    """Of five components W has four, and the second site two. Their numbers stay what they are."""
    method, r = small()
    method = method.replace(num_instances=2, num_components=5)
    problem = Problem(
        lambda p, x: x @ p["W"] @ p["V"],
        {"W": jnp.asarray(DIAGONAL), "V": jnp.eye(2)},
        linear_problem().sample_fn,
        select={"W": {"components": range(4)}, "V": {"components": [1, 4]}},
    )
    run = tmp_path / "run"
    whole, rows, last = stages.fit(problem, method, r, workdir=run)
    assert rows[-1]["step"] == 6 and last.num_instances == 2
    factors = whole.components.factors
    assert factors["W"].U.shape == (2, 4, 2, 2)
    assert {name: f.ids for name, f in factors.items()} == {"W": range(0, 4), "V": (1, 4)}
    assert whole.components.num_components == last.num_components == 5
    shutil.rmtree(run / "checkpoints")  # as if it had been stopped in the middle of the third stage
    shutil.rmtree(run / "stages" / "clean" / "checkpoints" / "6")
    (run / "metrics.jsonl").unlink()
    again, _, _ = stages.fit(problem, method, r, workdir=run)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_budget_cuts_all_stages_by_one_share_that_is_kept(tmp_path, monkeypatch):
    """Of 4 h that are needed the budget leaves 1; a resumed run is not timed again."""
    problem, method, r = three_features()  # begins at modes: `refine` alone is left
    r.budget, r.refine.num_steps, r.polish.num_steps = "1h", 60, 60
    monkeypatch.setattr(budget, "_needed", lambda *_: 4 * 3600.0)
    run = tmp_path / "run"
    whole, rows, last = stages.fit(problem, method, r, workdir=run)
    assert last.num_steps == 15 and rows[-1]["step"] == last.num_steps
    assert r.refine.num_steps == 60
    for same in (budget.kept(r, run), budget.as_trained(r, last.num_steps)):
        assert same.refine.num_steps == same.polish.num_steps == last.num_steps and not same.budget
    shutil.rmtree(run / "checkpoints")
    monkeypatch.setattr(budget, "_needed", None)
    again, _, same = stages.fit(problem, method, r, workdir=run)
    assert same == last
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)
    (run / budget.SHARE).write_text("{")
    with pytest.raises(InputError, match=r"steps\.json, .* is torn"):
        budget.within(problem, method, r, ["refine"], scales.Scales(1.0, 1.0, 1.0, 1.0), run, 0.0)
    r.budget = "soon"
    with pytest.raises(InputError, match="a time like 90s"):
        stages.check(method, r)


def test_what_stages_need_is_counted_by_the_size_of_their_steps(monkeypatch):
    """Two restarts: 0.4 s a step in the first two stages, 0.1 s in the others."""
    method, r = small()
    timed = []

    def advance(problem, method, *, until, title):
        timed.append((method.num_instances, until))
        row = {"seconds_per_step": 0.4 if method.num_instances == 2 else 0.1}
        return None, [{"seconds_per_step": 9.0}, row]

    monkeypatch.setattr(loop, "advance", advance)
    needed = budget._needed(linear_problem(), method, r, STAGES, scales.Scales(1.0, 1.0, 1.0, 1.0))
    assert needed == pytest.approx(12 * 0.4 + 18 * 0.1) and timed == [(2, 6), (1, 6)]


def test_restarts_differ_in_seed_and_in_how_many_components_they_keep():
    method, r = small(restarts=3)
    r.explore.topk_last = 1.5
    one = scales.Scales(1.0, 1.0, 1.0, 1.0)
    explore = numbers.stage_method(method.replace(topk=2.0, seed=7), r, "explore", one)
    assert explore.topk == 3.0  # the largest, for which the step makes room
    spread = stages._spread(explore, r, 2)
    np.testing.assert_allclose(spread["topk"], [2, 2.5, 3] * 2)
    assert len(set(spread["seed"])) == 6
    r.restarts = 1  # as an only restart of an only instance has it
    np.testing.assert_allclose(stages._spread(explore, r, 2)["topk"], [3, 3])


def test_a_restart_that_is_lost_is_not_chosen():
    method = small()[0].replace(num_steps=6)
    assert stages._best([{"step": 6, "total": [np.nan, 2.0]}], method, 1, 2).tolist() == [1]


def test_the_best_restart_is_chosen_by_its_loss():
    method = small()[0].replace(num_steps=10)
    rows = [
        {"step": s, "total": [5.0, 1.0, 2.0, 9.0] if s > 8 else [0.0, 9.0, 9.0, 0.0]}
        for s in range(1, 11)
    ]
    assert stages._best(rows, method, 2, 2).tolist() == [1, 2]


def test_what_the_recipe_sets_is_not_silently_replaced():
    method, r = small()
    with pytest.raises(InputError, match=r"learning_rate is set by the recipe"):
        stages.fit(linear_problem(), method.replace(learning_rate=1.0), r)


def test_another_method_needs_no_recipe():
    with pytest.raises(InputError, match="the recipe trains by method 'apd'; got 'spd'"):
        stages.fit(linear_problem(), "spd", small()[1])


def test_a_stage_that_cannot_run_is_refused_before_the_first():
    method, r = small()
    method = method.replace(topk=3.0)
    r.clean.topk = 1.5
    with pytest.raises(InputError, match=r"recipe.clean: topk must be above 0 and at most 4"):
        numbers.check(method, r)
    r.restarts = 0
    with pytest.raises(InputError, match="restarts must be at least 1"):
        numbers.check(method, r)


def test_decompose_with_a_recipe_save_and_train_again(tmp_path):
    problem, method, r = three_features()
    d = apd_jax.decompose(problem.apply_fn, problem.params, problem.sample_fn, method, recipe=r)
    assert d.method.mask == "threshold" and d.mask(jnp.ones((3, 3))).shape == (3, 4)
    d.save(tmp_path / "saved")
    loaded = apd_jax.Decomposition.load(
        tmp_path / "saved", problem.apply_fn, sample_fn=problem.sample_fn
    )
    # By the recipe, from the modes; not by the settings of its last stage, from random ones.
    again = loaded.train_again(loaded.problem)
    for a, b in zip(jax.tree.leaves(d.trained), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)


def test_learned_masks(tmp_path, monkeypatch):
    """Both stages learn thresholds, each from its own, at the stage's own rate.

    However exact the components are. A price on what is active counts in neither the rate nor the
    choice of stages.
    """
    problem, method, r = three_features()
    given = get_config("recipe", "tms,5-2,learned").recipe
    for stage in ("polish", "refine"):
        r[stage].update({n: given[stage][n] for n in ("mask", "inactive", "importance_coeff")})
    assert given.nearly_exact == r.nearly_exact > 1e-8
    r.nearly_exact = 0.0
    reference = scales.measure(problem, method)
    refine = numbers.stage_method(method, r, "refine", reference)
    assert refine.importance_coeff == pytest.approx(
        r.minimality_coeff * (r.threshold * r.refine.threshold) ** 2, rel=0.05
    )
    begun = Trained(accepted(problem, method, r, reference).components)
    assert stages._loss(problem, refine, begun) < 1e-8
    used, advance = [], loop.advance
    monkeypatch.setattr(
        loop,
        "advance",
        lambda problem, stage, **options: used.append(stage) or advance(problem, stage, **options),
    )
    trained, rows, last = stages.fit(problem, method, r, workdir=tmp_path)
    assert [path.name for path in (tmp_path / "stages").iterdir()] == ["polish"]
    assert last.mask == "learned"
    # They stay where `refine` begins: no attribution is near it.
    np.testing.assert_allclose(np.exp(trained.gate["log_thresholds"]), refine.threshold, rtol=0.01)
    assert [s.threshold_learning_rate for s in used] == [None, r.refine.learning_rate]
    assert used[1].learning_rate < r.refine.learning_rate
    raw = checkpoint.read(tmp_path / "stages" / "polish" / "checkpoints")[2]["gate"]
    polish = numbers.stage_method(method, r, "polish", reference)
    moved = np.exp(raw["log_thresholds"]) / polish.threshold - 1
    assert np.ptp(raw["log_thresholds"]) > 1e-4 and np.abs(moved).max() < 0.1
    assert rows[-1]["importance"] == pytest.approx(rows[-1]["mean_active"], abs=0.1)


def test_steps_are_in_proportion_to_how_far_the_weights_are_off():
    """Components that are exact stay as they are.

    The loss that is measured is that of the first step, on fresh data.
    """
    problem, method, r = three_features()
    reference = scales.measure(problem, method)
    settings = numbers.stage_method(method, r, "refine", reference)
    begun = Trained(accepted(problem, method, r, reference).components)
    assert stages._loss(problem, settings, begun) < 1e-8
    # The sum is θ*/2: a quarter of the faithfulness loss of nothing.
    half = jax.tree.map(lambda a: a * 0.5**0.5, begun)
    assert stages._loss(problem, settings, half) == pytest.approx(
        10 / 4 + r.minimality_coeff / 4, rel=0.02
    )
    # A KL that is nothing may be rounded below 0.
    exact, far = (stages.in_proportion(problem, settings, half, loss) for loss in (-1e-11, 4.0))
    assert 0 < exact.learning_rate <= 1e-5 * far.learning_rate
    assert far.learning_rate == settings.learning_rate
    trained, _, _ = stages.fit(problem, method, r)
    begun, after = (jax.tree.leaves(t.components) for t in (begun, trained))
    for a, b in zip(begun, after, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


# Configs


@pytest.mark.parametrize(
    "arg",
    [
        "tms,5-2,told,id",
        "tms,20-5,smoke",
        "resid_mlp,2layer",
        "resid_mlp,60-30,split",
        "gated,short",
        "tms_coactive",
    ],
)
def test_configs_take_only_sizes_from_the_target(arg):
    config = get_config("recipe", arg)
    numbers.check(config.apd, config.recipe)
    other = get_config("recipe", "tms,40-10")
    assert set(config.apd) == set(other.apd)
    differing = {name for name in config.apd if config.apd[name] != other.apd[name]}
    sizes = {"num_components", "num_always_on", "rank", "topk", "batch_size"}
    sizes |= {"hidden_reconstruction_coeff"}
    if "smoke" in arg:
        sizes |= {"steps_per_call", "log_every_steps", "checkpoint_every_steps"}
    assert differing <= sizes
    assert config.recipe == other.recipe or "smoke" in arg or "split" in arg
    told = {"tms,5-2,told,id": pytest.approx(0.25), "gated,short": pytest.approx(0.2)}
    assert config.apd.topk == told.get(arg, 0.0)
    targets.build(config.target, config.apd.batch_size)
    assert registry.of(config.apd).name == "apd"


def test_what_is_made_of_a_targets_field_follows_it():
    """k that is told, C, and the data; data may differ from what the target is trained on."""
    config = get_config("recipe", "tms,40-10,told")
    config.target.feature_probability = 0.1
    assert config.target.data.feature_probability == 0.1 and config.apd.topk == pytest.approx(4)
    config.update_from_flattened_dict({"target.data.feature_probability": 0.2})
    config.target.num_features = 20
    assert config.apd.topk == pytest.approx(4) and config.apd.num_components == 40
    assert config.target.feature_probability == 0.1
    config.target.data.update(num_on=3, value="binary")
    target = targets.build(config.target, 64)
    x = target.sample_fn(jax.random.key(0), 0)
    assert set(np.unique(x)) == {0, 1} and (x.sum(1) == 3).all()
    trained_on = target.pretrain_sample_fn(jax.random.key(0), 0)
    assert np.mean(trained_on != 0) == pytest.approx(0.1, abs=0.01)
    config.target.data.update(num_on=0, frequency_ratio=4.0, feature_probability=0.1)
    x = targets.build(config.target, 20_000).sample_fn(jax.random.key(0), 0)
    often = np.mean(np.asarray(x) != 0, axis=0)
    assert often.mean() == pytest.approx(0.1, abs=2e-3)
    assert often[0] / often[-1] == pytest.approx(4, abs=0.5)
    for wrong, sentence in ({"num_on": 21}, "num_on must lie in"), ({"value": "x"}, "data.value"):
        with pytest.raises(InputError, match=sentence):
            config.target.data.update(wrong)
            targets.build(config.target, 8)


def test_unknown_recipe_targets_are_refused():
    with pytest.raises(InputError, match="recipe target"):
        get_config("recipe", "nonsense")


def test_a_run_comes_back_as_its_last_stage_left_it(tmp_path, monkeypatch):
    """From a workdir whose config leaves open how many components are active and always on."""
    reported = []
    monkeypatch.setattr(experiment, "_report", lambda run, *_: reported.append(run))
    experiment.run(get_config("recipe", "tms,5-2,id,smoke"), tmp_path, Console())
    restored, [run] = runs.restore(tmp_path), reported
    assert restored.config == run.config and restored.method == run.method
    assert restored.method.num_always_on == 1 and restored.method.topk > 0
    assert restored.step == 10
    jax.tree.map(np.testing.assert_array_equal, restored.trained, run.trained)
