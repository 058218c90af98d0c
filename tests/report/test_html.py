"""What stands in the page, read without a browser."""

import base64
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import close, load_golden, make_method, make_problem

from apd_jax import components as components_lib
from apd_jax.decomposition import Decomposition
from apd_jax.errors import InputError
from apd_jax.report import drawn, html, words
from apd_jax.report.source import Source

HOSTILE = "</script><script>window.hacked=1</script>"


def embedded(path):
    """The data that the page's scripts read."""
    found = re.search(
        r'<script type="application/json" id="data">(.*?)</script>', path.read_text(), re.DOTALL
    )
    return json.loads(found[1])


def array(packed):
    return np.frombuffer(base64.b64decode(packed["f32"]), "<f4").reshape(packed["shape"])


def small(apply_fn=None, params=None, **fields):
    if params is None:
        params = {"in": jax.random.normal(jax.random.key(0), (6, 4)), "out": jnp.ones((4, 3))}
    components = components_lib.init(
        jax.random.key(1), params, num_components=7, rank=2, init_scale=5.0
    )
    method = make_method(num_components=7, topk=2.0, batch_size=16, **fields)
    apply_fn = apply_fn or (lambda p, x: jnp.tanh(x @ p["in"]) @ p["out"])
    return Decomposition(make_problem(apply_fn, params, None), components, method)


@pytest.fixture(scope="module")
def x():
    return jax.random.normal(jax.random.key(2), (16, 6))


def test_report_of_any_network(tmp_path, x):
    d = small()
    path = d.report(tmp_path / "mine.html", x)
    data, text = embedded(path), path.read_text()
    assert len(text.encode()) < html.LARGEST_PAGE
    assert (
        "<title>mine: decomposition report</title>" in text
        and "There is a live panel for networks that are" in text
    )
    # Offline: nothing refers to anywhere, except in the libraries' own comments and namespaces.
    assert not re.findall(r"<(?:script|img|link|iframe)[^>]*\b(?:src|href)=", text)
    assert "default-src 'none'" in text
    assert (
        len(data["components"]) == 7 and data["leaves"] == ["in", "out"] and data["panel"] is None
    )
    close(array(data["matrices"][0]["values"])[3], d.component(3)["in"])
    norm = float(jnp.linalg.norm(d.component(3)["in"]) / jnp.linalg.norm(d.problem.params["in"]))
    close(data["components"][3]["norms"][0], norm)
    close(data["components"][3]["firing_rate"], d.mask(x).mean(axis=0)[3])
    without = d.problem.apply_fn(
        jax.tree.map(
            lambda a, b: a - b,
            jax.tree.map(lambda *a: sum(a), *map(d.component, range(7))),
            d.component(3),
        ),
        x,
    )
    close(data["components"][3]["damage"], jnp.mean((without - d.ablate([], x)) ** 2), 1e-4)
    close(
        array(data["map"]["values"]),
        np.asarray(d.attributions(x))[np.ix_(data["map"]["rows"], data["map"]["columns"])],
        1e-4,
    )


def test_without_inputs_the_weights_are_shown(tmp_path):
    data = embedded(small().report(tmp_path / "report.html"))
    assert data["behaviour"] is None and data["map"] is None
    assert "damage" not in data["components"][0] and data["components"][0]["norms"]


def test_several_decompositions_must_be_chosen_from(tmp_path):
    d = small(num_instances=3)
    with pytest.raises(InputError, match=r"3 decompositions.*instance\(0\)"):
        d.report(tmp_path / "report.html")


INPUTS = {
    "vector": jnp.ones((5, 6)),
    "image": jax.random.uniform(jax.random.key(0), (5, 2, 3, 1)),
    "tokens": jnp.zeros((5, 4), jnp.int32),
    "other": {"a": jnp.ones((5, 3)), "b": jnp.ones((5, 3))},
}


@pytest.mark.parametrize("kind", INPUTS)
def test_inputs_are_shown_as_what_they_are(kind, tmp_path):
    def apply_fn(p, x):
        flat = (
            jnp.concatenate([x["a"], x["b"]], axis=1) if kind == "other" else x.reshape(len(x), -1)
        )
        return jnp.tanh(p["in"][flat].sum(1) if kind == "tokens" else flat @ p["in"]) @ p["out"]

    data = embedded(small(apply_fn).report(tmp_path / "report.html", INPUTS[kind]))
    assert data["behaviour"]["kind"] == kind
    if kind == "image":
        used = array(data["behaviour"]["inputs"])
        assert used.shape[1:] == (2, 3)
        close(used, np.asarray(INPUTS["image"])[: len(used), ..., 0])


class Tokenizer:
    """As `tokenizers` has it: decode leaves special tokens out."""

    def decode(self, numbers):
        return "" if numbers == [0] else f" w{numbers[0]}"

    def id_to_token(self, number):
        return "[PAD]"


@pytest.mark.parametrize(
    ("tokens", "first"),
    [(Tokenizer(), "[PAD]"), (["<0>", "b"], "<0>"), ({0: "null"}, "null")],
)
def test_tokens_have_names(tokens, first):
    word = words.of(tokens)
    assert word(0) == first and word(999) in ("999", " w999")
    assert words.of(["c\n"])(0) == "c⏎"
    x = np.array([[0, 2], [1, 0]])
    assert words.of_outputs(word, x, 3) is word and words.of_outputs(word, x, 2) is None


def test_what_cannot_name_tokens_is_refused():
    for wrong in (7, "a string", object()):
        with pytest.raises(InputError, match="tokens must be a list of names"):
            words.of(wrong)


def test_a_list_of_names_fits_the_network():
    """Of vectors it names outputs, of tokens both; a {number: name} may leave some out."""
    vectors, rows = np.ones((2, 6)), np.array([[0, 2], [1, 0]])
    of_vectors, of_tokens = small(), small(lambda p, x: p["in"][x] @ p["out"])  # 3 outputs each
    for d, x in ((of_vectors, vectors), (of_tokens, rows)):
        for wrong in (list("ab"), [*"abcd"], np.array([*"abcd"]), []):
            with pytest.raises(InputError, match=f"tokens has {len(wrong)} names, but the "):
                words.fitting(wrong, d, x)
        assert words.fitting(["x", "y", "z"], d, x)(2) == "z"
        assert words.fitting({1: "b"}, d, x)(1) == "b"
    with pytest.raises(InputError, match="the inputs hold the number 9"):
        words.fitting([*"abc"], of_tokens, None, np.array([9, -1]))
    many = words.fitting([*"abcdef"], of_tokens, rows + 3)  # tokens that the outputs are not
    assert many(5) == "f" and words.of_outputs(many, rows, 3) is None
    with pytest.raises(InputError, match=r"it is \{name: number\}, as 'a' is one of its keys"):
        words.of({"a": 0})


def test_positions_are_pointed_at(tmp_path):
    d = small(
        lambda p, tokens: jnp.tanh(p["in"][tokens].cumsum(1)) @ p["out"],
        mask_per="position",
        attribution_mode="reverse",
    )
    tokens = jax.random.randint(jax.random.key(3), (8, 5), 0, 6)
    page = d.report(tmp_path / "report.html", tokens, [f"w{i}" for i in range(6)])
    behaviour = embedded(page)["behaviour"]
    assert behaviour["words"]["5"] == "w5" and behaviour["names"] == {}  # 3 outputs are no tokens
    attributions = np.asarray(d.attributions(tokens))  # [8, 5, 7]
    for c in (0, 6):
        best = np.unravel_index(attributions[..., c].argmax(), (8, 5))
        assert behaviour["positions"][c][0] == best[1]
        close(array(behaviour["attributions"])[c][0], attributions[(*best, c)], 1e-4)


def test_whatever_is_named_is_escaped(tmp_path, x):
    source = html.Source(
        HOSTILE,
        small(),
        x,
        settings={"target": {"weights_path": HOSTILE}},
        metrics={"step": 3, "mmcs": 0.5},
    )
    text = html.write(tmp_path / "report.html", source).read_text()
    assert "window.hacked" in text and HOSTILE not in text and "<script>window" not in text


def check(number, title, passed, **said):
    empty = {"values": {}, "text": "", "why": "", "budget": ""}
    return {
        "number": number,
        "name": title.lower(),
        "title": title,
        "passed": passed,
        "bar": "≤ 1",
        **empty,
        **said,
    }


EVIDENCE = {
    "provenance": {"step": 40, "device": "cpu"},
    "verdict": "Needed up to this budget.",
    "checks": [
        check(1, "First", True, text="Good.", values={"v": 0.5}),
        check(2, "Second", None, why="Not here."),
        check(3, "Third", False, text="Bad.", budget="20 steps"),
    ],
}


@pytest.mark.parametrize("instances", [False, True])
def test_the_evidence_comes_first_and_failures_before_the_rest(instances, tmp_path):
    evidence = (
        {"instances": [{**EVIDENCE, "verdict": "Another."}, EVIDENCE]} if instances else EVIDENCE
    )
    source = html.Source(
        "run",
        small(),
        evidence=evidence,
        instance=int(instances),
        instances=[("0", "a.html"), ("1", "b.html")] * instances,
    )
    text = html.write(tmp_path / "report.html", source).read_text()
    body = text[text.index("<body>") :]
    order = [
        body.index(words)
        for words in (
            "Needed up to this budget.",
            "✓ 1 passed",
            "✗ 1 failed",
            "Third",
            "First",
            "Not here.",
            "<h2>Components",
        )
    ]
    assert order == sorted(order) and "Another." not in text
    assert ('<a href="a.html">0</a>' in text) == instances


def test_without_evidence_the_command_is_named(tmp_path):
    source = html.Source(
        "run", small(), evidence_command="python -m apd_jax.evidence --workdir=runs/a"
    )
    assert (
        "python -m apd_jax.evidence --workdir=runs/a"
        in html.write(tmp_path / "report.html", source).read_text()
    )


def test_a_page_that_would_be_too_large_goes_without_its_panel(tmp_path, monkeypatch):
    golden = load_golden("tms_5_2")
    method = make_method(num_components=golden.components.num_components)
    d = Decomposition(golden.target.problem(golden.params), golden.components, method)
    source = html.Source("run", d, golden.x, target=golden.target)
    path = html.write(tmp_path / "report.html", source)
    assert embedded(path)["panel"] is not None
    monkeypatch.setattr(html, "LARGEST_PAGE", len(path.read_bytes()) - 1000)
    text = html.write(path, source).read_text()
    assert embedded(path)["panel"] is None and "above its limit of" in text


def test_large_matrices_and_many_components_are_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(drawn, "MATRIX_BYTES", 2000)
    d = small(params={"in": jnp.ones((6, 40)), "out": jnp.ones((40, 3))})
    data = embedded(d.report(tmp_path / "report.html"))
    # 6 x 8 and 8 x 3 entries in base64 are 384 bytes: 5 of the 7 components have pages, those of
    # the largest norm.
    assert max(data["matrices"][0]["values"]["shape"][1:]) == 8
    paged = [c for c, one in enumerate(data["components"]) if one["page"] is not None]
    norms = [sum(float(jnp.sum(leaf**2)) for leaf in d.component(c).values()) for c in range(7)]
    assert len(paged) == 5 and set(paged) == set(np.argsort(norms)[-5:])


def test_losses_are_thinned_and_of_one_instance():
    history = [{"step": step, "total": [1.0, 2.0], "faithfulness": 0.0} for step in range(5000)]
    points = drawn.losses(history, 1)
    assert len(points) == drawn.MAX_POINTS and {point["value"] for point in points} == {2.0}
    assert (points[0]["step"], points[-1]["step"]) == (0, 4999)
    assert drawn.losses(history) == []  # nobody said which instance


def test_encode():
    packed = html.encode({"a": np.arange(6).reshape(2, 3), "b": [float("nan"), 1.5, None, "text"]})
    close(array(packed["a"]), np.arange(6).reshape(2, 3))
    assert packed["b"] == [None, 1.5, None, "text"]


def test_many_components_are_measured_on_fewer_examples(monkeypatch, x):
    """7 components: of 56 rows in all 8 each, and of 7 rows the least that a page has."""
    d = small()
    monkeypatch.setattr(html, "MOST_ROWS", 56)
    page = html.collect(Source("few", d, x))
    assert page["num_examples"] == 8
    close(page["data"]["components"][3]["firing_rate"], d.mask(x[:8]).mean(axis=0)[3])
    monkeypatch.setattr(html, "MOST_ROWS", 7)
    assert html.collect(Source("fewer", d, x))["num_examples"] == html.LEAST_EXAMPLES
    assert html.collect(Source("none", d, None))["num_examples"] == 0
