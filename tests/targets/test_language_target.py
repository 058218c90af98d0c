"""Language models as targets: trained on text, or loaded; their text, and what is refused."""

import jax
import numpy as np
import pytest
from checkpoint_files import GPT2_CONFIG, gpt2_weights, write_folder
from conftest import get_config, method_of
from etils import epath

from apd_jax import evaluation, language, targets
from apd_jax.commands import experiment
from apd_jax.decomposition import Decomposition
from apd_jax.errors import InputError
from apd_jax.language.tokens import PAD
from apd_jax.network.problem import check_function
from apd_jax.train import loop

WORDS = [f"w{i}" for i in range(22)]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """40 documents of the words that the checkpoints of tests know."""
    folder, rng = tmp_path_factory.mktemp("text"), np.random.default_rng(0)
    for i in range(40):
        (folder / f"{i}.txt").write_text(" ".join(rng.choice(WORDS, 30)))
    return f"{folder}/*.txt"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("models") / "gpt2", GPT2_CONFIG, gpt2_weights())[0]


def config_of(arg, text, **target):
    config = get_config("language", arg)
    with config.unlocked():
        config.target.update(text=text, context=10, document_chars=1000, **target)
    return config


def build(config, folder=None):
    return targets.build(config.target, config.apd.batch_size, folder)


@pytest.fixture(scope="module")
def run(tmp_path_factory, text):
    """The smoke variant from its text to its components: (config, folder, decomposition)."""
    folder = epath.Path(tmp_path_factory.mktemp("runs") / "prose")
    config = config_of("prose,smoke,mlp", text, vocab_size=270)
    with config.unlocked():
        config.apd.update(num_components=3, faithfulness_warmup_steps=2, num_steps=10)
        config.apd.loss_units = "absolute"
        config.target.pretrain.num_steps = 5
    target, params = experiment.prepare(config, folder)
    problem, method = target.problem(params), method_of(config)
    trained, _ = loop.fit(problem, method)
    return config, folder, Decomposition(problem, trained.components, method, gate=trained.gate)


def test_the_evaluation_is_of_text_that_was_held_out(run):
    config, folder, decomposition = run
    target = targets.build(config.target, 2, folder)
    found = evaluation.evaluate(target, decomposition, num_batches=1, seed=0)
    metrics = found.metrics
    assert metrics["ce_zero"] != metrics["ce_target"]
    difference = metrics["ce_unmasked"] - metrics["ce_target"]
    assert metrics["delta_ce_unmasked"] == pytest.approx(difference)
    sites = [name for name in metrics if name.startswith("l0_pieces_at_")]
    assert len(sites) == 3 and all(".mlp." in name for name in sites)
    assert sum(metrics[name] for name in sites) == pytest.approx(metrics["l0_pieces_0"])
    assert 0 < metrics["num_predicted_tokens"] <= 2 * 9
    (grid,) = found.grids
    rows = [row[0] for row in grid.rows]
    assert rows[:2] == ["target", "all components on"] and rows[-1] == "matrices at zero"
    assert len(set(rows)) == 11 and len({len(row) for row in [grid.columns, *grid.rows]}) == 1


def test_the_folder_is_enough_without_the_text(run, text):
    config, folder, _ = run
    first = build(config)
    with config.unlocked():
        config.target.text = "/nowhere/*.txt"
    again = build(config, folder)
    with config.unlocked():
        config.target.text = text
    x = first.sample_fn(jax.random.key(0), 3)
    np.testing.assert_array_equal(again.sample_fn(jax.random.key(0), 3), x)
    np.testing.assert_array_equal(
        again.fresh_fn(jax.random.key(0), 0), first.fresh_fn(jax.random.key(0), 0)
    )
    assert again.model.tokenizer.sha256 == first.model.tokenizer.sha256
    # What is held out is in no batch of training.
    rows, out = (first.tokens.rows(10, held_out=h) for h in (False, True))
    trained = {tuple(row) for row in rows.take(np.arange(len(rows)))}
    held_out = {tuple(row) for row in out.take(np.arange(len(out)))}
    assert not trained & held_out and {tuple(row) for row in np.asarray(x)} <= trained
    assert PAD in np.asarray(x)


@pytest.mark.parametrize("arg", ["", ",vpd", ",whole", ",apd,attention", ",targeted,mlp,layer1"])
def test_methods_on_a_loaded_model(arg, model, text):
    config = config_of(f"{model}{arg},smoke", text)
    config.target.chosen = text.replace("*", "1*") if "targeted" in arg else ""
    method_of(config).check()
    target = build(config)
    assert target.loss_fn is None
    params = target.init_fn(jax.random.key(0))
    problem = target.problem(params)
    check_function(problem)
    names = set(problem.site_names)
    assert len(names) == (2 if "layer1" in arg else 4 if "attention" in arg else 8)
    assert (target.elsewhere_fn is None) == ("targeted" not in arg)
    assert set(params) == set(language.load(model).params)


def test_the_control_has_the_entries_of_each_matrix_in_random_places(model, text):
    params = language.load(model).params
    target = build(config_of(f"{model},smoke,mlp,shuffled", text))
    mixed = target.init_fn(jax.random.key(0))
    for name, leaf in params.items():
        if name not in target.select:
            np.testing.assert_array_equal(mixed[name], leaf)
            continue
        assert np.mean(np.asarray(mixed[name]) == np.asarray(leaf)) < 0.1
        np.testing.assert_array_equal(np.sort(mixed[name], None), np.sort(leaf, None))
    with pytest.raises(InputError, match="shuffled is for a model from a path"):
        build(config_of("prose,smoke,shuffled", text))


@pytest.mark.parametrize(
    ("arg", "message"),
    [
        ("prose,spdd", r"unknown language variant .*'spdd'; known: spd, .* Did you mean 'spd'"),
        ("prose,spd,vpd", "names spd and vpd; give one of them"),
        ("prose,mlp,attention", "names attention and mlp; give one of them"),
    ],
)
def test_arguments_that_do_not_fit(arg, message):
    with pytest.raises(InputError, match=message):
        get_config("language", arg)


def test_settings_that_do_not_fit(model, text):
    with pytest.raises(InputError, match="no text file matches"):
        build(config_of("prose,smoke", "/nowhere/*.txt"))
    config = config_of(str(model), text)
    config.target.context = 13
    with pytest.raises(InputError, match=r"target.context = 13, but the model's is 12"):
        build(config)
    with pytest.raises(InputError, match=r"target.layers names layer 2; there are 2"):
        build(config_of(f"{model},layer2", text))
    with pytest.raises(InputError, match="multiple of twice num_heads"):
        build(config_of("prose,smoke", text, d_model=18))
    with pytest.raises(InputError, match=r"model .* does not exist"):
        build(config_of("/nowhere/model", text))
