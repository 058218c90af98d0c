"""examples/nano_apd.py is the method: equal to the package and to the released code's arrays.

To 1e-5 of the largest entry. The golden arrays are those of tests/test_goldens.py.
"""

import ast
import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import GOLDEN, ROOT, close, load_golden

import apd_jax
from apd_jax import attributions, losses, masks, sparse
from apd_jax import components as components_lib

PATH = ROOT / "examples" / "nano_apd.py"
F, H, C, B = 6, 3, 7, 64


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def nano():
    return load(PATH)


def apply_fn(params, x):
    return jax.nn.relu(x @ params["W"] @ params["W"].T + params["b"][None, :])


def factors(components):
    """The package's components as the example's."""
    return {"U": components.factors["W"].U, "V": components.factors["W"].V}


def compare(actual, expected):
    for name in ("U", "V"):
        close(actual[name], expected[name], err_msg=name)


def attribute(nano, target, components, x):
    run = jax.vmap(nano.attributions, (None, None, 0))
    return jax.jit(run)(target, nano.matrices(components), x)


# Equal to the package


def test_one_step_is_the_packages(nano):
    key = jax.random.key(0)
    params = {
        "W": jax.random.normal(key, (F, H)) / H**0.5,
        "b": jnp.linspace(-0.2, 0.1, F),
    }
    components = components_lib.init(
        key, params, num_components=C, rank=4, select="W", uses={"W": 2}, init_scale=2.0
    )
    x = nano.sample(jax.random.key(1), B, F)
    ours = factors(components)

    scores = attributions.gradient(apply_fn, params, components, x)
    found = attribute(nano, params, ours, x)
    close(found, scores)

    k = nano.ACTIVE_PER_FEATURE * F
    mask = masks.batch_topk(scores, k)
    assert mask.sum() == 16  # ⌊0.0422 · 6 · 64⌋ = ⌊16.2⌋
    np.testing.assert_array_equal(nano.batch_topk(found, k), mask)

    def package_loss(components):
        sparse_out = sparse.apply(apply_fn, params, components, mask, x)
        terms = (
            losses.faithfulness(components, params),
            losses.minimality(sparse_out, apply_fn(params, x)),
            losses.simplicity(components, mask, nano.SCHATTEN_P),
        )
        coeffs = (1.0, nano.MINIMALITY_COEFF, nano.SIMPLICITY_PER_FEATURE * F)
        return sum(c * term for c, term in zip(coeffs, terms, strict=True)), (terms, sparse_out)

    (total, (terms, sparse_out)), gradient = jax.jit(
        jax.value_and_grad(package_loss, has_aux=True)
    )(components)
    (nano_total, nano_terms), nano_gradient = jax.jit(
        jax.value_and_grad(nano.total_loss, has_aux=True)
    )(ours, params, mask, x)
    P = nano.matrices(ours)
    close(P.sum(0), components_lib.total(components, params)["W"])
    close(jax.vmap(nano.sparse_forward, (None, None, 0, 0))(params, P, mask, x), sparse_out)
    for ours_alone, theirs in zip(nano_terms, terms, strict=True):
        close(ours_alone, theirs)
    close(nano_total, total)
    compare(nano_gradient, factors(gradient))

    optimizer = optax.adam(0.01)
    updates, _ = optimizer.update(gradient, optimizer.init(components))
    stepped, _, step_terms = jax.jit(functools.partial(nano.step, optimizer))(
        ours, optimizer.init(ours), params, x
    )
    compare(stepped, factors(optax.apply_updates(components, updates)))
    close(jnp.stack(step_terms), jnp.stack(terms))


@pytest.mark.parametrize(("num_examples", "k"), [(100, 0.29), (64, 0.0), (64, 7.0), (5, 0.1)])
def test_masks_agree_on_ties_and_counts(nano, num_examples, k):
    """Half of all scores are 0, as of examples without features; 0.29 · 100 must be 29."""
    drawn = np.random.default_rng(2).normal(size=(num_examples, C)).round(1)
    scores = jnp.asarray(np.maximum(drawn, 0), jnp.float32)
    found, expected = (jax.jit(fn, static_argnums=1) for fn in (nano.batch_topk, masks.batch_topk))
    np.testing.assert_array_equal(found(scores, k), expected(scores, k))


def test_components_begin_as_small_as_the_packages(nano):
    """U: sqrt(2 / (31 · 40 · 20)) = 0.00898. V: sqrt(2 / (31 · 20 · 25)) = 0.01136.

    The std of n = 30 · 20 · 25 entries is off by 1 / sqrt(2n) = 0.6 %.
    """
    W = jnp.zeros((40, 25))
    package = components_lib.init(
        jax.random.key(0), {"W": W}, num_components=30, rank=20, uses={"W": 2}
    )
    found = nano.init_components(jax.random.key(0), 30, 40, 25, 20)
    for one in (found, factors(package)):
        assert one["U"].shape == (30, 40, 20) and one["V"].shape == (30, 20, 25)
        np.testing.assert_allclose(one["U"].std(), 0.00898, rtol=0.02)
        np.testing.assert_allclose(one["V"].std(), 0.01136, rtol=0.02)


def test_simplicity_has_a_gradient_at_dead_components(nano):
    """Without EPS it is 0.5 · 0^(-1/2) · 0: NaN."""
    dead = {"U": jnp.zeros((C, F, H)), "V": jnp.zeros((C, H, H))}
    gradient = jax.jit(jax.grad(nano.simplicity))(dead, jnp.ones((2, C), bool))
    compare(gradient, dead)


# Equal to the released code


@pytest.fixture(scope="module")
def tms():
    return load_golden("tms_small")


@pytest.fixture
def nano_as_golden(nano, tms):
    """With the settings of the golden arrays."""
    num_features = tms.x.shape[1]
    nano.MINIMALITY_COEFF = tms["meta/coeff_topk_recon"]
    nano.SIMPLICITY_PER_FEATURE = tms["meta/coeff_schatten"] / num_features
    nano.SCHATTEN_P = tms["meta/schatten_p_in_total"]
    nano.ACTIVE_PER_FEATURE = tms["meta/topk"] / num_features
    return nano


def test_golden_forward_passes(nano, tms):
    components, mask = factors(tms.components), tms["mask/batch_topk"]
    close(jax.vmap(nano.forward, (None, 0))(tms.params, tms.x), tms["target_out"])
    found = attribute(nano, tms.params, components, tms.x)
    close(found, tms["attributions/gradient_sqrt_mean"])
    np.testing.assert_array_equal(nano.batch_topk(found, tms["meta/topk"]), mask)
    run = jax.vmap(nano.sparse_forward, (None, None, 0, 0))
    for kind in ("batch_topk", "per_example_topk"):
        out = run(tms.params, nano.matrices(components), tms[f"mask/{kind}"], tms.x)
        close(out, tms[f"sparse_out/{kind}"])


def test_golden_losses(nano, tms):
    components, mask = factors(tms.components), tms["mask/batch_topk"]
    close(nano.faithfulness(components, tms.params), tms["loss/param_match"])
    close(nano.minimality(tms["sparse_out/batch_topk"], tms["target_out"]), tms["loss/topk_recon"])
    for p in (0.5, 0.9, 1.0):
        nano.SCHATTEN_P = p
        # The released code adds 1e-16^(p/2) for the m = 4 parts of every pair that is off, too.
        # The two uses of W cancel: (32 · 7 - 40) pairs · 4 parts / (6 · 3 entries · 32 examples).
        off = (32 * 7 - 40) * 4 / (18 * 32) * 1e-16 ** (p / 2)
        close(nano.simplicity(components, mask) + off, tms[f"loss/schatten_p{p}"])


def test_golden_step(nano_as_golden, tms):
    nano, components, mask = nano_as_golden, factors(tms.components), tms["mask/batch_topk"]
    gradient, _ = jax.jit(jax.grad(nano.total_loss, has_aux=True))(
        components, tms.params, mask, tms.x
    )
    compare(gradient, tms.matrices("grad/total")["W"])
    optimizer = optax.adam(tms["meta/lr"])
    stepped, _, _ = jax.jit(functools.partial(nano.step, optimizer))(
        components, optimizer.init(components), tms.params, tms.x
    )
    compare(stepped, tms.matrices("after_adamw")["W"])


def test_golden_learning_rate(nano):
    with np.load(GOLDEN / "lr_schedules.npz") as file:
        steps, expected = jnp.asarray(file["step"]), file["cosine"]
    close(nano.learning_rate(steps, len(expected)), nano.LEARNING_RATE * expected)


# As a file and a command


def test_it_stands_alone_and_is_short():
    lines = PATH.read_text().splitlines()
    assert len(lines) <= 200
    assert max(map(len, lines)) <= 100
    imported = {
        alias.name
        for node in ast.walk(ast.parse(PATH.read_text()))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    assert imported == {"argparse", "jax", "jax.numpy", "optax"}


def test_the_table_of_a_true_decomposition(nano, pentagon, capsys):
    """Component c is row c of W, one of them at half its length: ML2R (4 · 1 + 0.5) / 5 = 0.9."""
    halved = pentagon.weights["W"].at[3].multiply(0.5)
    nano.print_table(halved, pentagon.params["W"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["0", "0", "1.0000", "1.000"]
    assert lines[4].split() == ["3", "3", "1.0000", "0.500"]
    assert lines[-1].startswith("MMCS 1.0000   ML2R 0.900")


def test_the_command_ends_in_the_table(nano, monkeypatch, capsys):
    train = functools.partial(nano.train_target, num_steps=30, batch_size=64)
    monkeypatch.setattr(nano, "train_target", train)
    monkeypatch.setattr(nano, "BATCH_SIZE", 64)
    nano.main(["--features", "4", "--hidden", "2", "--steps", "20", "--seed", "1"])
    lines = capsys.readouterr().out.splitlines()
    progress, table = lines[:10], lines[10:]
    assert [line.split()[1] for line in progress] == [str(i) for i in range(2, 21, 2)]
    faithfulness = [float(line.split()[3]) for line in progress]
    assert faithfulness[-1] < 0.5 * faithfulness[0]
    assert table[0].split() == ["feature", "component", "cosine", "norm", "ratio"]
    assert [line.split()[0] for line in table[1:]] == ["0", "1", "2", "3", "MMCS"]
    assert np.isfinite([float(word) for line in table[1:5] for word in line.split()]).all()


def test_the_language_model_beside_it():
    """Its text, its model, the settings that are chosen for it, and its table."""
    module = load(PATH.with_name("language_model.py"))
    rows, held, tokenizer = module.text()
    assert rows.shape[1] == held.shape[1] == module.LENGTH
    assert tokenizer.get_vocab_size() == module.VOCABULARY > rows.max()
    assert "statement" in tokenizer.decode([int(t) for t in rows[:50].ravel()])
    model, params = module.trained(0, steps=2)
    chosen = apd_jax.suggest(model.apply, params, rows, select="*Block*.kernel")
    assert (chosen.name, chosen.mask_per, chosen.num_components) == ("spd", "position", 0)
