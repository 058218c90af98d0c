"""The benchmarks: their counting against numbers worked by hand, the fit against known ones.

And the quick forms as documented.
"""

import csv
import json
import runpy
import subprocess
import sys

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import pytest
from checkpoint_files import GPT2_CONFIG, gpt2_weights, write_folder
from conftest import ROOT

from apd_jax import components
from apd_jax.language import load

sys.path.insert(0, str(ROOT / "benchmarks"))

import bounds
import common
import erase
import language
import pod
import recovery
import robustness
import scaling


def test_products_are_counted_with_the_loops_around_them():
    a, b = jnp.ones((3, 4)), jnp.ones((4, 5))

    def program(a, b):
        def body(total, _):
            return total + a @ b, None  # 2·3·4·5 = 120 operations and 15 additions, seven times

        total, _ = jax.lax.scan(body, jnp.zeros((3, 5)), length=7)
        return (
            jnp.einsum("bij,bjk->bik", jnp.ones((2, 3, 5)), jnp.ones((2, 5, 6))).sum() + total.sum()
        )  # 2·2·3·5·6 = 360

    found = bounds.count(program, a, b)
    assert found["flops"] == 7 * 120 + 360
    assert found["elementwise_ops"] == 7 * 15 + 1
    assert sum(found["dots"].values()) == 8


def test_loops_of_unknown_length():
    # Carries thresholds as the mask's does: 20 passes of six additions, with one comparison each.
    def search(a):
        return jax.lax.while_loop(lambda s: s[0] < 5, lambda s: s + s, a)

    def rounds(a):
        return jax.lax.while_loop(lambda s: s[0, 0] < 5, lambda s: s @ a, a)

    assert bounds.count(search, jnp.ones(6, jnp.uint32))["elementwise_ops"] == 20 * (6 + 1)
    assert bounds.count(rounds, jnp.ones((2, 2)))["flops"] == 0


def test_bound_adds_the_resources_and_names_the_largest():
    peaks = common.Peaks(
        matmul_gflops=100.0, memory_gb_s=10.0, elementwise_gops=50.0, dispatch_us=2.0
    )
    found = bounds.bound({"flops": 4e9, "elementwise_ops": 1e8}, 1_000_000, peaks)
    # 4 GFLOP at 100/s = 40 ms; 8 passes over 4 MB at 10 GB/s = 3.2 ms; 0.1 Gop at 50/s = 2 ms;
    # 2 µs.
    assert found["bound_parts_ms"] == pytest.approx(
        {"matmul": 40.0, "memory": 3.2, "elementwise": 2.0, "dispatch": 0.002}
    )
    assert found["bound_ms"] == pytest.approx(45.202) and found["binds"] == "matmul"


def test_the_cost_model_finds_known_coefficients():
    rng, truth = np.random.default_rng(0), np.array([3.0, 5.0, 2.0, 0.7, 1.5])
    design = rng.uniform(0.1, 2.0, (12, 4))
    rows = [dict(zip([*scaling.TERMS, "params_m"], map(float, row), strict=True)) for row in design]
    for row, values in zip(rows, design, strict=True):
        row["ms"] = float(values @ truth[:4] + truth[4])
    model = scaling.fit(rows)
    found = [*model["ms_per_gflop"].values(), model["ms_per_million_params"], model["constant_ms"]]
    np.testing.assert_allclose(found, truth, rtol=1e-6)
    assert model["largest_relative_error"] < 1e-6


def test_the_transformer_on_paper_by_hand():
    a = pod.Assumptions()
    # Per layer q, k, v, o: 4·768; up: 768; down: 3072 inputs, so 6,912; twelve layers. GPT-2 small
    # has 84.9M weights in them.
    assert a.width == 12 * 6912 and a.decomposed == 84_934_656
    row = pod.predict(a, 8, {name: 1.0 for name in scaling.TERMS})
    # 1024 components of rank 4 per chip: 1024·4·2·82,944 = 679M parameters, four arrays of 4 bytes
    # each: 10.9 GB.
    assert row["parameters per chip, G"] == pytest.approx(0.679477, rel=1e-5)
    assert row["state GB"] == pytest.approx(10.8716, rel=1e-4)
    # Faithfulness: 6 · 4096 · 84.9M operations = 2.087e12, at 197e12 per second.
    assert row["faithfulness ms"] == pytest.approx(10.596, rel=1e-3)
    # 8 passes over 2.72 GB at 819 GB/s.
    assert row["optimizer ms"] == pytest.approx(26.549, rel=1e-3)


def test_peaks_are_positive():
    looped = common.looped_s(lambda a, i, _: a + 1.0, jnp.zeros(4), None, 3)
    assert looped > 0 and common.peak_memory_gib() > 0.05


def test_tables_as_text_and_markdown(capsys):
    common.show("Title", [{"a": "x", "b": 1234.5}], {"name": "a", "value": "b"}, markdown=True)
    assert capsys.readouterr().out == "**Title**\n\n| name | value |\n|---|---|\n| x | 1,234 |\n\n"


def test_the_quick_form_of_scaling_runs(tmp_path):
    command = [
        sys.executable,
        "benchmarks",
        "--quick",
        "--markdown",
        "--only",
        "scaling",
        "--json",
        str(tmp_path / "bench.json"),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("|---|") >= 4
    found = json.loads((tmp_path / "bench.json").read_text())["scaling"]
    one, *more = found["devices"]
    assert one["gradient_bytes"] == 0 and all(row["loss_differs_by"] < 1e-5 for row in more)
    # Every component's U and V, in float32: C = 16, W_in 40x6 and W_out 6x40 of rank 16.
    assert {row["gradient_bytes"] for row in more} == {4 * 16 * 16 * 2 * (40 + 6)}


def test_a_row_of_the_language_models(monkeypatch):
    peaks = common.Peaks(100.0, 10.0, 50.0, 2.0)  # measured where scaling runs
    monkeypatch.setattr(language, "measure_peaks", lambda: peaks)
    row = language.measure("glassllm", "spd", 1.0, quick=True)
    assert set(language.COLUMNS.values()) <= set(row)
    assert row["components"] == 32  # of one matrix [16, 16]: SPD gives it twice its rank
    times = [row[f"{part}_ms"] for part in ("target", "gate", "masked", "dispatch", "gradient")]
    assert min(times) > 0 and row["temporaries_gib"] > 0
    assert row["ratio"] == pytest.approx(min(row["masked_ms"], row["dispatch_ms"]) / times[0])
    assert row["tokens_per_s"] == pytest.approx(8 * 64 * 1000 / row["step_ms"])


def test_what_is_left_of_a_behaviour_is_measured(tmp_path):
    """Against the same numbers in numpy, of a random model whose 'digits' are two of its words."""
    model = load(write_folder(tmp_path / "gpt2", GPT2_CONFIG, gpt2_weights())[0])
    digits, rng = np.array([3, 4]), np.random.default_rng(0)
    rows = rng.choice(8, (30, 6), p=[0.1, 0.1, 0.1, 0.2, 0.2, 0.1, 0.1, 0.1]).astype(np.int32)
    measure = erase._Measure(model, rows, digits)
    assert measure(model.params)["P before"] == measure(model.params)["P after"]
    name = model.matrices("mlp", [0])[0]
    changed = model.params | {name: 0.3 * model.params[name]}
    found = measure(changed)

    def probabilities(params):
        logits = np.concatenate([model.apply_fn(params, rows[i : i + 10]) for i in (0, 10, 20)])
        exp = np.exp(np.float64(logits))
        return exp / exp.sum(-1, keepdims=True)

    before, after = probabilities(model.params), probabilities(changed)
    kl = (before * np.log(before / after)).sum(-1)
    digit, early, late = [], [], []
    for b, t in np.ndindex(rows.shape):
        seen = set(rows[b, : t + 1]) & set(digits)
        if rows[b, t] in digits and t < 5 and rows[b, t + 1] in digits:
            digit.append(after[b, t, digits].sum())
        if not seen:
            early.append(kl[b, t])
        elif rows[b, t] not in digits:
            late.append(kl[b, t])
    assert found["digits"] == len(digit) and found["P after"] == pytest.approx(np.mean(digit))
    for kind, values in (("before digits", early), ("after digits", late)):
        assert found[f"{kind}, positions"] == len(values)
        assert found[kind] == pytest.approx(np.mean(values), rel=1e-3)
        assert found[f"{kind}, 99 %"] == pytest.approx(np.quantile(values, 0.99), rel=1e-3)
    assert erase._cells(found)[-1].startswith(f"{len(digit)}, ")


@pytest.mark.parametrize(
    ("script", "name", "sentence"),
    [
        ("benchmarks/language.py", "GPT-5", "unknown networks ['GPT-5']"),
        ("benchmarks", "speed", "unknown parts ['speed']"),
    ],
)
def test_what_is_unknown_is_refused(script, name, sentence, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [script, "--only", name])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    assert stopped.value.code == 2 and sentence in capsys.readouterr().err


def test_when_a_seed_succeeds():
    tms = {
        "num_features": 5,
        "num_features_owned": 5,
        "mmcs_one_to_one": 0.9995,
        "ml2r_one_to_one": 0.991,
    }
    assert recovery.succeeds("tms", tms)
    assert not any(
        recovery.succeeds("tms", tms | worse)
        for worse in ({"ml2r_one_to_one": 1.02}, {"num_features_owned": 4})
    )
    resid = {
        "num_features": 3,
        "num_features_owned": 0,
        "distinct": 3,
        "within_margin": 3,
        "cosine_w_in": 0.995,
        "norm_ratio_w_in": 1.01,
    }
    resid |= {"scrub_topk": 1e-5, "scrub_scrubbed": 1.4e-5, "scrub_antiscrubbed": 1.5e-4}
    assert recovery.succeeds("resid_mlp", resid)
    for worse in (
        {"distinct": 2},
        {"cosine_w_in": 0.98},
        {"norm_ratio_w_in": 0.97},
        {"scrub_topk": 9e-6},
        {"scrub_antiscrubbed": 1.3e-4},
    ):
        assert not recovery.succeeds("resid_mlp", resid | worse)


def test_what_a_component_reads_and_writes_apart():
    """Two features on two neurons with W_E = W_U = 1.

    Each component has its row of W_in, and half of its column of W_out.
    """
    eye = np.eye(2, dtype=np.float32)
    w_in, w_out = (
        np.array([[3.0, 4.0], [0.0, 1.0]], np.float32),
        np.array([[1.0, 0.0], [2.0, 1.0]], np.float32),
    )
    P_in, P_out = (
        np.stack([np.diag(e) @ w_in for e in eye]),
        np.stack([0.5 * w_out @ np.diag(e) for e in eye]),
    )
    parts = components.from_materialized(
        {"mlp_in_0": jnp.asarray(P_in), "mlp_out_0": jnp.asarray(P_out)}
    )
    found = recovery.sides(
        {"W_E": eye, "W_U": eye, "mlp_in_0": w_in, "mlp_out_0": w_out}, parts, np.array([0, 1])
    )
    assert found == pytest.approx(
        {
            "distinct": 2,
            "cosine_w_in": 1,
            "norm_ratio_w_in": 1,
            "cosine_w_out": 1,
            "norm_ratio_w_out": 0.5,
        }
    )


def test_rows_are_kept_and_drawn(tmp_path):
    """Of every seed a line and a point, failures included.

    Runs with changed settings, and such as ended in an error, have no point.
    """
    names = {
        "tms.py:5-2": ("paper's settings", "tms,5-2"),
        "recipe.py:tms,5-2": ("recipe", "tms,5-2"),
    }
    names |= {
        "recipe.py:tms,5-2,told,learned": ("recipe with learned masks", "tms,5-2"),
        "resid_mlp.py": ("paper's settings", "resid_mlp"),
    }
    assert {name: recovery.recipe_and_target(name) for name in names} == names
    found = {
        "mmcs_one_to_one": 0.9876543219,
        "ml2r_one_to_one": 0.9,
        "minimality_topk": 1e-4,
        "scrub_scrubbed": 2e-4,
        "seconds": 60.0,
    }
    rows = [{"config": name, "seed": 0, "changes": {}, "success": False} | found for name in names]
    rows += [rows[0] | {"seed": 1, "changes": {"apd.topk": 2.0}}]
    rows += [
        {"config": "tms.py:5-2", "seed": 2, "changes": {}, "success": False, "error": "not finite"}
    ]
    recovery.write_csv(rows, str(tmp_path / "rows.csv"))
    with open(tmp_path / "rows.csv", newline="") as file:
        read = list(csv.DictReader(file))
    assert [row["config"] for row in read] == [row["config"] for row in rows] and read[0][
        "mmcs_one_to_one"
    ] == "0.987654"
    assert (read[4]["changes"], read[5]["error"], read[5]["seconds"]) == (
        '{"apd.topk": 2.0}',
        "not finite",
        "",
    )
    recovery.draw(rows, str(tmp_path / "rows.png"))
    figure = plt.gcf()
    assert [axis.get_title() for axis in figure.axes] == [
        "tms,5-2\n0 of 1, 0 of 1, 0 of 1 succeed",
        "resid_mlp\n0 of 1 succeed",
    ]
    assert [len(kind.get_offsets()) for axis in figure.axes for kind in axis.collections[:3]] == [
        1,
        1,
        1,
        1,
        0,
        0,
    ]
    assert recovery.summary(rows).row_count > 5 and (tmp_path / "rows.png").stat().st_size > 1000
    plt.close(figure)


def test_settings_are_multiplied_and_counted():
    assert robustness.changed(robustness.PAPER, ("apd.topk", "apd.rank"), 0.1) == pytest.approx(
        {"apd.topk": 0.0211, "apd.rank": 1}
    )
    row = {
        "config": robustness.OURS,
        "setting": "k",
        "factor": 1.0,
        "num_features": 5,
        "num_features_owned": 5,
        "mmcs_one_to_one": 0.995,
    }
    rates = robustness.rates([row, row | {"mmcs_one_to_one": 0.9}], robustness.found)
    assert rates["k"][robustness.OURS][2] == 0.5 and np.isnan(rates["k"][robustness.PAPER][2])
