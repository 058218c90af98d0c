"""The recipe: reference points by hand, stages, and resuming."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import get_config
from rich.console import Console

import apd_jax
from apd_jax import targets
from apd_jax.commands import experiment
from apd_jax.errors import InputError
from apd_jax.methods.config import default_config
from apd_jax.network.problem import Problem
from apd_jax.recipe import modes, scales
from apd_jax.recipe import stages as recipe
from apd_jax.train import checkpoint
from apd_jax.train import loop as train

W = np.diag([3.0, 2.0]).astype(np.float32)


def linear_problem(data=None):
    """f(x) = x W + 1, x standard normal."""

    def sample(key, step):
        return jax.random.normal(jax.random.fold_in(key, step), (1000, 2))

    return Problem(
        lambda p, x: x @ p["W"] + p["b"][None],
        {"W": jnp.asarray(W), "b": jnp.ones(2)},
        data or sample,
    )


def small(**more):
    """Quick stages; components begin at random, as they do where modes explain too little."""
    r = recipe.default_recipe()
    r.update(
        {"restarts": 2, "least_explained": 2.0}
        | {stage: {"num_steps": 6} for stage in recipe.STAGES}
        | more
    )
    c = default_config()
    c.update(
        num_components=4,
        batch_size=1000,
        steps_per_call=3,
        log_every_steps=3,
        checkpoint_every_steps=3,
    )
    return c, r


def test_scales_by_hand():
    """faithfulness of nothing: (9 + 4)/4; distance without W: E mean_o (x W)_o² = (9 + 4)/2; simplicity of W: (3^p + 2^p)/4."""
    config, _ = small()
    s = scales.measure(linear_problem(), config)
    assert s.faithfulness == pytest.approx(13 / 4)
    assert s.minimality == pytest.approx(13 / 2, rel=0.05)
    assert s.simplicity == pytest.approx((3**0.9 + 2**0.9) / 4, rel=1e-5)
    x = np.random.default_rng(0).normal(size=(1000, 2)).astype(np.float32)
    assert scales.measure(linear_problem([x]), config).minimality == pytest.approx(
        np.mean((x @ W) ** 2), rel=1e-5
    )


def test_hidden_scale_by_hand():
    """Hidden activation x W: the squares of x W, mean over examples and widths, as the output without its constant."""
    problem, (config, _) = linear_problem(), small()
    hidden = Problem(
        lambda p, x: (x @ p["W"], {"h": x @ p["W"]}), problem.params, problem.sample_fn
    )
    s = scales.measure(hidden, config)
    assert s.hidden == pytest.approx(s.minimality, rel=1e-6)
    config.hidden_reconstruction_coeff = 1.0
    with pytest.raises(InputError, match="no hidden activations"):
        scales.measure(problem, config)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_outputs_that_are_not_finite(bad):
    problem = linear_problem()
    broken = Problem(problem.apply_fn, {**problem.params, "b": jnp.full(2, bad)}, problem.sample_fn)
    with pytest.raises(InputError, match="not finite"):
        scales.measure(broken, small()[0])


def test_relative_coefficients_become_absolute():
    config, r = small()
    s = scales.Scales(faithfulness=2.0, minimality=0.5, hidden=0.2, simplicity=4.0)
    explore = recipe.stage_config(config, r, "explore", s)
    assert (explore.faithfulness_coeff, explore.minimality_coeff) == (
        0.5,
        pytest.approx(2 * r.minimality_coeff),
    )
    assert (explore.simplicity_coeff, explore.simplicity_coeff_final) == (5.0, 1.75)
    assert (
        explore.num_instances == 2
        and explore.mask == "batch_topk"
        and explore.hidden_reconstruction_coeff == 0
    )
    config.hidden_reconstruction_coeff = 10.0  # says whether, not how strongly
    strength = pytest.approx(5 * r.hidden_reconstruction_coeff)
    assert recipe.stage_config(config, r, "explore", s).hidden_reconstruction_coeff == strength
    polish, refine = [recipe.stage_config(config, r, stage, s) for stage in ("polish", "refine")]
    assert (polish.inactive, refine.inactive, refine.mask) == ("drop", "uniform", "threshold")
    assert polish.simplicity_coeff == 0 and polish.mask == "threshold" and polish.num_instances == 1
    assert explore.threshold == pytest.approx(r.threshold * 0.5**0.5)
    assert polish.threshold == pytest.approx(r.polish.threshold * explore.threshold)


def test_stages_run_and_resume_bit_for_bit(tmp_path):
    config, r = small()
    config.num_instances = 2
    run = tmp_path / "run"
    whole, rows, settings = recipe.fit(linear_problem(), config, r, workdir=run)
    assert rows[-1]["step"] == 6 and settings.num_instances == 2
    assert whole.factors["W"].U.shape == (2, 4, 2, 2)
    shutil.rmtree(run / "checkpoints")  # as if it had been stopped in the middle of the third stage
    shutil.rmtree(run / "stages" / "clean" / "checkpoints" / "6")
    (run / "metrics.jsonl").unlink()
    again, _, _ = recipe.fit(linear_problem(), config, r, workdir=run)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)


def test_restarts_differ_in_seed_and_in_how_many_components_they_keep():
    config, r = small(restarts=3)
    config.topk, config.seed = 2.0, 7
    r.explore.topk_last = 1.5
    explore = recipe.stage_config(config, r, "explore", scales.Scales(1.0, 1.0, 1.0, 1.0))
    assert explore.topk == 3.0  # the largest, for which the step makes room
    spread = recipe._spread(explore, r, 2, 3)
    np.testing.assert_allclose(spread["topk"], [2, 2.5, 3] * 2)
    assert len(set(spread["seed"])) == 6
    np.testing.assert_allclose(
        recipe._spread(explore, r, 2, 1)["topk"], [3, 3]
    )  # as an only restart of an only instance has it


def test_a_restart_that_is_lost_is_not_chosen():
    config, _ = small()
    config.num_steps = 6
    assert recipe._best([{"step": 6, "total": [np.nan, 2.0]}], config, 1, 2).tolist() == [1]


def test_the_best_restart_is_chosen_by_its_loss():
    config, _ = small()
    config.num_steps = 10
    rows = [
        {"step": s, "total": [5.0, 1.0, 2.0, 9.0] if s > 8 else [0.0, 9.0, 9.0, 0.0]}
        for s in range(1, 11)
    ]
    assert recipe._best(rows, config, 2, 2).tolist() == [1, 2]


def test_what_the_recipe_sets_is_not_silently_replaced():
    config, r = small()
    config.learning_rate = 1.0
    with pytest.raises(InputError, match=r"learning_rate is set by the recipe"):
        recipe.fit(linear_problem(), config, r)


def test_a_stage_that_cannot_run_is_refused_before_the_first():
    config, r = small()
    config.topk = 3.0
    r.clean.topk = 1.5
    with pytest.raises(InputError, match=r"recipe.clean: topk must be above 0 and at most 4"):
        recipe.check(config, r)
    r.restarts = 0
    with pytest.raises(InputError, match="restarts must be at least 1"):
        recipe.check(config, r)


def test_outputs_that_do_not_depend_on_the_weights():
    problem = Problem(
        lambda p, x: x + 0 * p["W"].sum(),
        {"W": jnp.asarray(W)},
        lambda key, step: jnp.ones((1000, 2)),
    )
    with pytest.raises(InputError, match="nothing to decompose"):
        scales.measure(problem, small()[0])


def test_decompose_with_a_recipe_save_and_train_again(tmp_path):
    problem, config, r = one_feature_at_a_time(np.diag([3.0, 2.0, 1.0]).astype(np.float32))
    d = apd_jax.decompose(problem.apply_fn, problem.params, problem.sample_fn, config, recipe=r)
    assert d.config.mask == "threshold" and d.mask(jnp.ones((3, 3))).shape == (3, 4)
    d.save(tmp_path / "saved")
    loaded = apd_jax.Decomposition.load(
        tmp_path / "saved", problem.apply_fn, sample_fn=problem.sample_fn
    )
    again = loaded.train_again(
        loaded.problem
    )  # by the recipe, from the modes, not by the settings of its last stage from random ones
    for a, b in zip(jax.tree.leaves(d.components), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)


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
    recipe.check(config.apd, config.recipe)
    other = get_config("recipe", "tms,40-10")
    differing = {name for name in config.apd if config.apd[name] != other.apd[name]}
    smoke = (
        {"batch_size", "steps_per_call", "log_every_steps", "checkpoint_every_steps"}
        if "smoke" in arg
        else set()
    )
    assert (
        differing
        <= {
            "num_components",
            "num_always_on",
            "rank",
            "topk",
            "hidden_reconstruction_coeff",
            "batch_size",
        }
        | smoke
    )
    assert config.recipe == other.recipe or "smoke" in arg or "split" in arg
    assert config.apd.topk == {
        "tms,5-2,told,id": pytest.approx(0.25),
        "gated,short": pytest.approx(0.2),
    }.get(arg, 0.0)
    targets.build(config.target, config.apd.batch_size)


def test_unknown_recipe_targets_are_refused():
    with pytest.raises(InputError, match="recipe target"):
        get_config("recipe", "nonsense")


@pytest.fixture(autouse=True)
def fewer_examples(monkeypatch):
    monkeypatch.setattr(modes, "NUM_EXAMPLES", 2048)


def one_feature_at_a_time(W, num_instances=1):
    """f(x) = x W, x a single feature of random size: every row of W is a mechanism."""

    def sample(key, step):
        which, size = jax.random.split(jax.random.fold_in(key, step))
        return jax.nn.one_hot(
            jax.random.randint(which, 64, 0, len(W)), len(W)
        ) * jax.random.uniform(size, (64, 1), minval=0.5)

    config, r = small(least_explained=0.8)
    config.update(
        num_components=len(W) + 1, batch_size=64, topk=1.0, rank=2, num_instances=num_instances
    )
    return Problem(lambda p, x: x @ p["W"], {"W": jnp.asarray(W)}, sample), config, r


def test_components_begin_at_the_modes_and_are_only_refined(tmp_path):
    W = np.array([[3.0, 0, 0], [0, 2, 1], [1, 1, 0]], np.float32)
    problem, config, r = one_feature_at_a_time(W, num_instances=2)
    components, rows, _ = recipe.fit(problem, config, r, workdir=tmp_path)
    assert not (tmp_path / "stages").exists() and rows[-1]["step"] == 6
    P = np.asarray(components.factors["W"].U @ components.factors["W"].V)  # [2, 4, 3, 3]
    for one in P:  # instances
        order = [int(np.argmax(np.linalg.norm(one[:, j], axis=-1))) for j in range(3)]
        np.testing.assert_allclose(one[order], np.eye(3)[:, :, None] * W[None], atol=0.02)
        assert not one[3].any()


def test_where_modes_are_not_all_components_are_polished_first(tmp_path):
    problem, config, r = one_feature_at_a_time(np.diag([3.0, 2.0, 1.0]).astype(np.float32))
    r.nearly_exact = 0.0
    recipe.fit(problem, config, r, workdir=tmp_path)
    assert [path.name for path in (tmp_path / "stages").iterdir()] == ["polish"]


def test_learned_masks(tmp_path, monkeypatch):
    """Both stages learn thresholds, each from its own, at the stage's own rate however exact the components are; a price on what is active
    counts in neither the rate nor the choice of stages."""
    problem, config, r = one_feature_at_a_time(np.diag([3.0, 2.0, 1.0]).astype(np.float32))
    given = get_config("recipe", "tms,5-2,learned").recipe
    for stage in ("polish", "refine"):
        r[stage].update(
            {name: given[stage][name] for name in ("mask", "inactive", "importance_coeff")}
        )
    assert given.nearly_exact == r.nearly_exact > 1e-8
    r.nearly_exact = 0.0
    reference = scales.measure(problem, config)
    settings = recipe.stage_config(config, r, "refine", reference)
    assert settings.importance_coeff == pytest.approx(
        r.minimality_coeff * (r.threshold * r.refine.threshold) ** 2, rel=0.05
    )
    assert (
        recipe._loss(problem, settings, recipe.at_modes(problem, config, r, reference).components)
        < 1e-8
    )
    used, advance = [], train.advance
    monkeypatch.setattr(
        train,
        "advance",
        lambda problem, stage, **options: used.append(stage) or advance(problem, stage, **options),
    )
    components, rows, last = recipe.fit(problem, config, r, workdir=tmp_path)
    assert [path.name for path in (tmp_path / "stages").iterdir()] == [
        "polish"
    ] and last.mask == "learned"
    np.testing.assert_allclose(
        components.thresholds, settings.threshold, rtol=0.01
    )  # where `refine` begins: no attribution is near it
    assert [s.threshold_learning_rate for s in used] == [None, r.refine.learning_rate] and used[
        1
    ].learning_rate < r.refine.learning_rate
    raw = checkpoint.read(tmp_path / "stages" / "polish" / "checkpoints")[2]["components"][
        "log_thresholds"
    ]
    assert (
        np.ptp(raw) > 1e-4
        and np.abs(
            np.exp(raw) / recipe.stage_config(config, r, "polish", reference).threshold - 1
        ).max()
        < 0.1
    )
    assert rows[-1]["importance"] == pytest.approx(rows[-1]["mean_active"], abs=0.1)


def test_a_topk_far_from_what_the_modes_say_is_worth_a_warning(caplog):
    problem, config, r = one_feature_at_a_time(np.diag([3.0, 2.0, 2.0]).astype(np.float32))
    for topk, warned in ((1.0, False), (0.1, True), (4.0, True)):
        caplog.clear()
        config.topk = topk
        recipe.at_modes(problem, config, r, scales.measure(problem, config))
        assert ("topk should be about that" in caplog.text) == warned
    assert "topk = 4, but examples have 1 modes" in caplog.text


def features_of_their_own(F=5, p=0.2):
    """f(x) = x W, W diagonal, every feature on with probability p: F p of them on average. k is left open."""

    def sample(key, step):
        on, size = jax.random.split(jax.random.fold_in(key, step))
        return jax.random.bernoulli(on, p, (256, F)) * jax.random.uniform(size, (256, F))

    _, config, r = one_feature_at_a_time(np.eye(F))
    config.update(batch_size=256, topk=0.0)
    return (
        Problem(
            lambda params, x: x @ params["W"], {"W": jnp.diag(jnp.linspace(1.0, 2.0, F))}, sample
        ),
        config,
        r,
    )


@pytest.mark.parametrize("num_instances", [1, 2])
def test_k_is_found_where_it_is_left_open(tmp_path, num_instances):
    """As many modes as examples have on average; the run is then the one that is told this k, and comes back as such."""
    problem, config, r = features_of_their_own()
    config.num_instances = num_instances
    components, rows, settings = recipe.fit(problem, config, r, workdir=tmp_path)
    assert config.topk == 0 and settings.topk == pytest.approx(1.0, abs=0.05)
    assert recipe.last_config(problem, recipe.found_config(config, tmp_path), r) == settings
    for tear in (lambda file: file.write_text(file.read_text()[:9]), lambda file: file.unlink()):
        tear(tmp_path / "recipe.json")
        with pytest.raises(
            InputError,
            match=r"recipe\.json, which says what k the recipe found, is missing or torn",
        ):
            recipe.found_config(config, tmp_path)
    told = config.copy_and_resolve_references()
    told.topk = settings.topk
    again, same, _ = recipe.fit(problem, told, r)
    jax.tree.map(np.testing.assert_array_equal, components, again)
    assert rows[-1]["total"] == same[-1]["total"]


def test_k_that_nobody_says():
    """Not the config, and not the modes, which are left out, or explain too little; without a recipe there are none."""
    problem, config, r = twelve_dimensions()
    config.topk = 0.0
    wanted = "set topk to the mean number of components that an example should need"
    for least, why in (
        (2.0, "recipe.least_explained = 2.0 leaves them out"),
        (0.8, "explain too little of this network"),
    ):
        r.least_explained = least
        with pytest.raises(InputError, match=f"topk = 0 leaves k to the modes.*{why}.*{wanted}"):
            apd_jax.decompose(problem.apply_fn, problem.params, problem.sample_fn, config, recipe=r)
    with pytest.raises(InputError, match="topk must be above 0"):
        apd_jax.decompose(problem.apply_fn, problem.params, problem.sample_fn, config)


def test_steps_are_in_proportion_to_how_far_the_weights_are_off():
    """Components that are exact stay as they are; the loss that is measured is that of the first step, on fresh data."""
    W = np.diag([3.0, 2.0, 1.0]).astype(np.float32)
    problem, config, r = one_feature_at_a_time(W)
    settings = recipe.stage_config(config, r, "refine", scales.measure(problem, config))
    begun = recipe.at_modes(problem, config, r, scales.measure(problem, config)).components
    assert recipe._loss(problem, settings, begun) < 1e-8
    half = jax.tree.map(
        lambda a: a * 0.5**0.5, begun
    )  # the sum is θ*/2: a quarter of the faithfulness loss of nothing
    assert recipe._loss(problem, settings, half) == pytest.approx(
        10 / 4 + r.minimality_coeff / 4, rel=0.02
    )
    components, _, _ = recipe.fit(problem, config, r)
    for a, b in zip(jax.tree.leaves(begun), jax.tree.leaves(components), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def twelve_dimensions():
    """x is standard normal in twelve dimensions: hardly any two examples have a cosine of 0.95."""
    config, r = small(least_explained=0.8)
    sample = lambda key, step: jax.random.normal(
        jax.random.fold_in(key, step), (config.batch_size, 12)
    )  # noqa: E731
    return Problem(lambda p, x: x @ p["W"], {"W": jnp.eye(12)}, sample), config, r


def test_where_modes_do_not_explain_the_network_they_are_not_used():
    problem, config, r = twelve_dimensions()
    assert recipe.at_modes(problem, config, r, scales.measure(problem, config)) is None


def test_what_is_always_on_is_not_explained_by_modes(caplog):
    """Gated functions all read the same x. With one component always on, which could hold anything, the components sum to the network."""
    config = get_config("recipe", "gated,short")
    target = targets.build(config.target, config.apd.batch_size)
    problem = target.problem(target.init_fn(jax.random.key(0)))
    with caplog.at_level("INFO"):
        assert (
            recipe.at_modes(problem, config.apd, config.recipe, scales.measure(problem, config.apd))
            is None
        )
    assert "beside 1 always on" in caplog.text


def six_features_that_share_a_layer(C):
    """f(x) = x W H, every row of W a mechanism, H of rank 3."""
    W = np.array([[3.0, 0, 0], [0, 2, 0], [0, 0, 2], [1, 1, 0], [0, 1, -1], [-1, 0, 1]], np.float32)
    one, config, r = one_feature_at_a_time(W)
    config.num_components = C
    return (
        Problem(
            lambda p, x: x @ p["W"] @ p["H"],
            one.params | {"H": jnp.diag(jnp.array([1.0, 2.0, 3.0]))},
            one.sample_fn,
        ),
        config,
        r,
    )


def test_a_layer_that_modes_share_is_held_by_as_many_as_it_takes(tmp_path):
    """H, of rank 3, by two components of rank 2, which are then always on; the workdir says so, and the settings that come back."""
    problem, config, r = six_features_that_share_a_layer(8)
    components, _, settings = recipe.fit(problem, config, r, workdir=tmp_path)
    assert config.num_always_on == 0 and settings.num_always_on == 2
    assert recipe.last_config(problem, recipe.found_config(config, tmp_path), r) == settings
    assert json.loads((tmp_path / "recipe.json").read_text()) == {
        "num_always_on": 2,
        "modes_per_example": 1.0,
    }
    P = {name: np.asarray(f.U @ f.V) for name, f in components.factors.items()}
    np.testing.assert_allclose(P["H"][:2].sum(0), problem.params["H"], atol=1e-3)
    features = np.abs(P["W"][2:]).sum(2).argmax(1)
    assert sorted(features) == list(range(6))
    np.testing.assert_allclose(
        P["W"][2:], np.eye(6)[features][:, :, None] * np.asarray(problem.params["W"]), atol=1e-3
    )


@pytest.mark.parametrize(
    ("C", "given", "found"), [(7, 0, True), (9, 0, False), (9, 2, True), (9, 1, True)]
)
def test_a_leaf_that_modes_share_is_said_with_what_could_hold_it(caplog, C, given, found):
    """Nothing is found where there is no room for it, or where it shall not be; nothing is said where something is always on."""
    problem, config, r = six_features_that_share_a_layer(C)
    config.num_always_on, r.find_always_on, config.rank = given, found, 2 if given != 1 else 3
    begun = recipe.at_modes(problem, config, r, scales.measure(problem, config))
    assert begun.num_always_on == given
    said = "6 modes share H: each part does less than the whole on its own mode; num_always_on = 2 of at least 8 components could hold it"
    assert (said in caplog.text) == (given == 0)


def test_a_run_comes_back_as_its_last_stage_left_it(tmp_path, monkeypatch):
    """From a workdir whose config leaves open how many components are active, and how many are always on."""
    reported = []
    monkeypatch.setattr(experiment, "_report", lambda run, *_: reported.append(run))
    experiment.run(get_config("recipe", "tms,5-2,id,smoke"), tmp_path, Console())
    restored, [run] = experiment.restore(tmp_path), reported
    assert (
        restored.config == run.config
        and restored.config.apd.num_always_on == 1
        and restored.config.apd.topk > 0
        and restored.step == 10
    )
    jax.tree.map(np.testing.assert_array_equal, restored.components, run.components)
