"""Where the recipe begins: at modes or separated codes, if these stand the test."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import get_config
from toys import (
    features_of_their_own,
    mixtures_of_three,
    one_feature_at_a_time,
    six_features_that_share_a_layer,
    three_features,
    twelve_dimensions,
)

import apd_jax
from apd_jax import components, targets
from apd_jax.errors import InputError
from apd_jax.methods import registry
from apd_jax.methods.optimizers import Trained
from apd_jax.recipe import beginning, modes, scales, stages
from apd_jax.recipe.beginning import accepted
from apd_jax.recipe.judge import Judge


@pytest.fixture(autouse=True)
def fewer_examples(monkeypatch):
    monkeypatch.setattr(modes, "NUM_EXAMPLES", 2048)


@pytest.fixture
def few_examples(monkeypatch):
    """Where the search goes on to sixteen times as many, and finds nothing among those either."""
    monkeypatch.setattr(modes, "NUM_EXAMPLES", 512)


def begun(problem, method, r):
    return accepted(problem, method, r, scales.measure(problem, method))


def test_components_begin_at_the_modes_and_are_only_refined(tmp_path):
    W = np.array([[3.0, 0, 0], [0, 2, 1], [1, 1, 0]], np.float32)
    problem, method, r = one_feature_at_a_time(W, num_instances=2)
    trained, rows, _ = stages.fit(problem, method, r, workdir=tmp_path)
    assert not (tmp_path / "stages").exists() and rows[-1]["step"] == 6
    factors = trained.components.factors["W"]
    for one in np.asarray(factors.U @ factors.V):  # instances, [4, 3, 3] each
        order = [int(np.argmax(np.linalg.norm(one[:, j], axis=-1))) for j in range(3)]
        np.testing.assert_allclose(one[order], np.eye(3)[:, :, None] * W[None], atol=0.02)
        assert not one[3].any()


def test_mixtures_are_separated():
    """Three of sixteen features are on in every example, so none is ever alone."""
    problem, method, r = mixtures_of_three()
    found = begun(problem, method, r)
    assert found.active == pytest.approx(3, abs=0.5)
    f = found.components.factors["W"]
    P, W = np.asarray(f.U @ f.V), np.asarray(problem.params["W"])
    order = np.abs(P).sum(2)[:16].argmax(1)
    assert sorted(order) == list(range(16)) and np.abs(P[16:]).max() < 1e-3
    np.testing.assert_allclose(P[:16], np.eye(16)[order][:, :, None] * W[None], atol=0.05)


def test_examples_in_place_of_modes_are_refused(monkeypatch, caplog):
    """Eight examples span all that is read, and components at them sum to the network."""

    def drawn(e):
        kept = modes.with_effect(e.effect)
        directions = {name: a[kept[:8]] for name, a in e.ins.items()}
        return modes.described(e.ins, e.effect, kept, directions, np.ones(8))

    monkeypatch.setattr(beginning, "KINDS", {"examples": drawn})
    problem, method, r = mixtures_of_three()
    assert begun(problem, method.replace(topk=3.0), r) is None
    assert "components begin at random: examples" in caplog.text


def test_a_stage_that_leaves_one_component_of_three_is_undone():
    problem, method, r = three_features()
    reference = scales.measure(problem, method)
    judge = Judge(problem, method, r, reference)
    found = accepted(problem, method, r, reference, judge)
    assert found is not None
    apart = Trained(found.components)
    f = apart.components.factors["W"]
    P = np.asarray(f.U @ f.V)
    u, s, vt = np.linalg.svd(P.sum(0))
    U, V = np.zeros_like(f.U), np.zeros_like(f.V)
    U[0], V[0] = u[:, :2] * s[:2], vt[:2]  # rank 2 of 3: all that one component has room for
    one = dataclasses.replace(f, U=jnp.asarray(U), V=jnp.asarray(V))
    whole = Trained(components.map_sites(lambda _: one, apart.components))
    run = stages._Stages(problem, method, r, reference, None, stages.STAGES[-2:], judge)
    jax.tree.map(np.testing.assert_array_equal, run._unless_worse(apart, whole), apart)
    jax.tree.map(np.testing.assert_array_equal, run._unless_worse(whole, apart), apart)


def test_a_topk_far_from_what_the_modes_say_is_worth_a_warning(caplog):
    problem, method, r = one_feature_at_a_time(np.diag([3.0, 2.0, 2.0]).astype(np.float32))
    for topk, warned in ((1.0, False), (0.1, True), (4.0, True)):
        caplog.clear()
        begun(problem, method.replace(topk=topk), r)
        assert ("topk should be about that" in caplog.text) == warned
    assert "topk = 4, but examples have 1 modes" in caplog.text


def test_k_is_found_where_it_is_left_open(tmp_path):
    """As many modes as examples have on average.

    The run is then the one that is told this k, and comes back as such.
    """
    problem, method, r = features_of_their_own()
    method = method.replace(num_instances=2)
    trained, rows, last = stages.fit(problem, method, r, workdir=tmp_path)
    assert method.topk == 0 and last.topk == pytest.approx(1.0, abs=0.05)
    assert stages.last_method(problem, stages.found_method(method, tmp_path), r) == last
    for tear in (lambda file: file.write_text(file.read_text()[:9]), lambda file: file.unlink()):
        tear(tmp_path / "recipe.json")
        with pytest.raises(
            InputError,
            match=r"recipe\.json, which says what k the recipe found, is missing or torn",
        ):
            stages.found_method(method, tmp_path)
    again, same, _ = stages.fit(problem, method.replace(topk=last.topk), r)
    jax.tree.map(np.testing.assert_array_equal, trained, again)
    assert rows[-1]["total"] == same[-1]["total"]


def test_k_that_nobody_says(few_examples, capsys):
    """Not the settings, and not the modes, which are left out, or explain too little.

    Without a recipe there are none.
    """
    problem, method, r = twelve_dimensions()
    method = method.replace(topk=0.0)
    wanted = "set topk to the mean number of components that an example should need"

    def decompose(**options):
        args = (problem.apply_fn, problem.params, problem.sample_fn, method)
        apd_jax.decompose(*args, **options)

    for least, why in (
        (2.0, "recipe.least_explained = 2.0 leaves none but a random one"),
        (0.8, "there is none to begin at: .* num_components = 4 has no room"),
    ):
        r.least_explained = least
        with pytest.raises(
            InputError, match=f"topk = 0 leaves k to the beginning.*{why}.*{wanted}"
        ):
            decompose(recipe=r)
    said = capsys.readouterr().err  # from the first second, for the search may be long
    assert said.index("recipe: measuring") < said.index("recipe: looking for modes among")
    with pytest.raises(InputError, match="topk must be above 0"):
        decompose()


def test_where_modes_do_not_explain_the_network_they_are_not_used(few_examples):
    assert begun(*twelve_dimensions()) is None


def test_what_is_always_on_is_not_explained_by_modes(caplog, monkeypatch):
    """Gated functions all read the same x.

    With one component always on, which could hold anything, the components sum to the network.
    """
    config = get_config("recipe", "gated,short")
    monkeypatch.setattr(beginning, "_LOOKS", (4,))  # at once, not after looks at fewer
    target = targets.build(config.target, config.apd.batch_size)
    problem = target.problem(target.init_fn(jax.random.key(0)))
    with caplog.at_level("INFO"):
        assert begun(problem, registry.of(config.apd), config.recipe) is None
    assert "beside 1 always on" in caplog.text


def test_a_layer_that_modes_share_is_held_by_as_many_as_it_takes(tmp_path):
    """H, of rank 3, by two components of rank 2, which are then always on.

    The workdir says so, and the settings that come back.
    """
    problem, method, r = six_features_that_share_a_layer(8)
    trained, _, last = stages.fit(problem, method, r, workdir=tmp_path)
    assert method.num_always_on == 0 and last.num_always_on == 2
    assert stages.last_method(problem, stages.found_method(method, tmp_path), r) == last
    assert json.loads((tmp_path / "recipe.json").read_text()) == {
        "num_always_on": 2,
        "modes_per_example": 1.0,
    }
    P = {name: np.asarray(f.U @ f.V) for name, f in trained.components.factors.items()}
    np.testing.assert_allclose(P["H"][:2].sum(0), problem.params["H"], atol=1e-3)
    features = np.abs(P["W"][2:]).sum(2).argmax(1)
    assert sorted(features) == list(range(6))
    np.testing.assert_allclose(
        P["W"][2:], np.eye(6)[features][:, :, None] * np.asarray(problem.params["W"]), atol=1e-3
    )


@pytest.mark.parametrize(("C", "given", "found"), [(7, 0, True), (9, 0, False), (9, 2, True)])
def test_a_leaf_that_modes_share_is_said_with_what_could_hold_it(caplog, C, given, found):
    """Nothing is found where there is no room for it, or where it shall not be.

    Nothing is said where something is always on.
    """
    problem, method, r = six_features_that_share_a_layer(C)
    r.find_always_on = found
    assert begun(problem, method.replace(num_always_on=given), r).num_always_on == given
    said = (
        "6 modes share H: each part does less than the whole on its own mode; num_always_on = 2 of "
        "at least 8 components could hold it"
    )
    assert (said in caplog.text) == (given == 0)
