"""The exported graph fits circuit-tracer's schema and says what edges say; the page shows it."""

import dataclasses
import json
import re
from xml.etree import ElementTree

import numpy as np
import pytest

from apd_jax.errors import InputError
from apd_jax.interpretation.circuit_tracer import influence, to_json
from apd_jax.interpretation.edges import PromptEdges
from apd_jax.interpretation.prompt_graph import PromptGraph, Pruned
from apd_jax.report import graph as report

# Of graph_models.py (schema version 1): every field with its type, none besides.
NUMBER = (float, int)
MAYBE = (float, int, type(None))
METADATA = {
    **{"slug": str, "scan": str, "transcoder_list": list, "prompt_tokens": list, "prompt": str},
    **{"node_threshold": MAYBE, "schema_version": int},
}
QPARAMS = {
    **{"pinnedIds": list, "supernodes": list, "linkType": str, "clickedId": str, "sg_pos": str}
}
NODE = {
    **{"node_id": str, "feature": int, "layer": str, "ctx_idx": int, "feature_type": str},
    **{"token_prob": NUMBER, "is_target_logit": bool, "run_idx": int, "reverse_ctx_idx": int},
    **{"jsNodeId": str, "clerp": str, "influence": MAYBE, "activation": MAYBE},
}
LINK = {"source": str, "target": str, "weight": NUMBER}

# Components 5 (W1, word 0), 5 again (word 1), 7 (W2, word 1). The first two drive the third by 3
# and -1, and the logit gets 1, 0 and 4.
EDGES = PromptEdges(
    sites=("W1", "W2"),
    position=np.array([0, 1, 1]),
    site=np.array([0, 0, 1]),
    component=np.array([5, 5, 7]),
    activation=np.array([0.5, -2.0, 1.5]),
    gate=np.array([1.0, 0.5, 1.0]),
    weight=np.array([[0, 0, 0], [0, 0, 0], [3.0, -1.0, 0]]),
    to_output=np.array([1.0, 0, 4.0]),
)
WORDS = ["<s>", " a&b"]


@pytest.fixture(scope="module")
def graph():
    gates = np.zeros((2, 9), np.float32)
    gates[EDGES.position, EDGES.component] = EDGES.gate
    return PromptGraph(
        tokens=np.array([3, 8]),
        position=1,
        token=4,
        probability=0.25,
        before=11,
        robust=Pruned(gates, 0.1, 0.2),
        plain=Pruned(gates * (gates == 1), 0.1, 3.0),
        edges=EDGES,
    )


@pytest.fixture(scope="module")
def exported(graph):
    return json.loads(json.dumps(to_json(graph, WORDS, "</svg>", name="mine", labels={7: "end"})))


def fits(value, fields):
    assert set(value) == set(fields)
    for name, kind in fields.items():
        assert isinstance(value[name], kind), (name, value[name])


def test_a_prompt_has_one_word_for_every_token(graph):
    for words in (WORDS[:1], [*WORDS, "more"]):
        for named in (to_json, report.page):
            with pytest.raises(InputError, match=f"{len(words)} names for a prompt of 2 tokens"):
                named(graph, words, "x", name="mine")


def test_it_fits_the_schema(exported):
    assert set(exported) == {"metadata", "qParams", "nodes", "links"}
    fits(exported["metadata"], METADATA)
    fits(exported["qParams"], QPARAMS)
    for node in exported["nodes"]:
        fits(node, NODE)
    for link in exported["links"]:
        fits(link, LINK)
    ids = [node["node_id"] for node in exported["nodes"]]
    assert len(ids) == len(set(ids)) == 3 + 2 + 1
    kinds = {node["feature_type"] for node in exported["nodes"]}
    assert kinds == {"cross layer transcoder", "embedding", "logit"}
    assert all(n["layer"].isdigit() for n in exported["nodes"] if n["feature_type"] != "embedding")


def test_it_says_what_the_edges_say(exported):
    got = {(link["source"], link["target"]): link["weight"] for link in exported["links"]}
    logit = "3_4_1"
    assert got == {
        ("0_5_0", "1_7_1"): 3.0,
        ("0_5_1", "1_7_1"): -1.0,
        ("0_5_0", logit): 1.0,
        ("1_7_1", logit): 4.0,
    }
    nodes = {node["node_id"]: node for node in exported["nodes"]}
    assert nodes["0_5_1"]["activation"] == -2.0 and nodes["0_5_1"]["clerp"] == "W1 5"
    assert nodes["1_7_1"]["clerp"] == "end" and nodes["E_8_1"]["ctx_idx"] == 1
    # Cantor: (1, 7) -> 8 · 9 / 2 + 7.
    assert nodes["1_7_1"]["feature"] == 43 and nodes["1_7_1"]["jsNodeId"] == "1_7-0"
    assert nodes[logit]["is_target_logit"] and nodes[logit]["token_prob"] == 0.25
    assert exported["metadata"]["prompt_tokens"] == WORDS


def test_influence_is_the_share_of_all_ways_to_the_logit():
    # Straight: .2, 0, .8. By way of the third: .8 · (.75, .25, 0). In all .8, .2, .8 of 1.8.
    assert influence(EDGES) == pytest.approx([0.8 / 1.8, 1.0, 1.6 / 1.8])


# Beside these W1 leaves over at word 1 what drives the third by 4, and W2 there what adds 3 to the
# logit.
REST = np.zeros((3, 2, 2))
REST[2, 1, 0] = 4.0
LEFT = dataclasses.replace(EDGES, rest=REST, rest_to_output=np.array([[0, 0], [0, 3.0]]))


def test_what_is_left_over_is_a_node(graph, exported):
    one = dataclasses.replace(graph, edges=LEFT)
    found = json.loads(json.dumps(to_json(one, WORDS, "x", name="mine")))
    nodes = {node["node_id"]: node for node in found["nodes"]}
    more = [nodes[i] for i in nodes if i not in {n["node_id"] for n in exported["nodes"]}]
    assert [(n["node_id"], n["jsNodeId"]) for n in more] == [
        ("0_-1_1", "0_-1-1"),
        ("1_-1_1", "1_-1-1"),
    ]
    for node, clerp in zip(more, ("W1, what is left over", "W2, what is left over"), strict=True):
        fits(node, NODE)
        assert node["feature_type"] == "mlp reconstruction error" and node["feature"] == -1
        assert node["clerp"] == clerp and node["ctx_idx"] == 1
    links = [link for link in found["links"] if link not in exported["links"]]
    assert links == [
        {"source": "0_-1_1", "target": "1_7_1", "weight": 4.0},
        {"source": "1_-1_1", "target": "3_4_1", "weight": 3.0},
    ]
    # Straight: 1, 0, 4 of 8, and 3 from W2. By way of the third: half of (3, 1, 0), and 4 from W1,
    # of 8. In all .3125, .0625, .5, and .25 and .375 left over, of 1.5.
    reached = np.array([0.5 + 0.375 + 0.3125, 1.5, 0.5, 1.4375, 0.5 + 0.375]) / 1.5
    assert influence(LEFT) == pytest.approx(reached)
    assert [n["influence"] for n in more] == pytest.approx(reached[3:])
    page = report.page(one, WORDS, "x", name="mine")
    assert "of all that arrives at the next word it is 38 %" in page
    svg = ElementTree.fromstring(re.search(r"<svg.*</svg>", page, re.DOTALL)[0])
    lines = {(e.get("data-source"), e.get("data-target")): e for e in svg.iter("line")}
    shares = {("0", "2"): 3 / 8, ("1", "2"): 1 / 8, ("4", "2"): 4 / 8}
    shares |= {("0", "3"): 1 / 8, ("2", "3"): 4 / 8, ("5", "3"): 3 / 8}
    widths = {ends: float(line.get("stroke-width")) for ends, line in lines.items()}
    assert widths == pytest.approx({k: 0.3 + 5 * share for k, share in shares.items()}, abs=0.01)
    squares = {s.get("data-node"): s for s in svg.iter("rect")}
    assert set(squares) == {"4", "5"} and "leave over at W2" in squares["5"].find("title").text
    middle = [float(squares["4"].get(axis)) + 4.5 for axis in ("x", "y")]
    assert middle == [float(lines["4", "2"].get(end)) for end in ("x1", "y1")]
    assert lines["4", "2"].get("class") == "more"


def test_the_page_draws_nodes_and_edges(graph):
    page = report.page(graph, WORDS, "</svg>", name="mine", labels={7: "end"})
    svg = ElementTree.fromstring(re.search(r"<svg.*</svg>", page, re.DOTALL)[0])
    circles = {c.get("data-node"): c for c in svg.iter("circle")}
    lines = {(e.get("data-source"), e.get("data-target")): e for e in svg.iter("line")}
    assert len(circles) == 4 and set(lines) == {("0", "2"), ("1", "2"), ("0", "3"), ("2", "3")}
    for (source, target), line in lines.items():
        ends = [(circles[i].get("cx"), circles[i].get("cy")) for i in (source, target)]
        assert ends == [(line.get("x1"), line.get("y1")), (line.get("x2"), line.get("y2"))]
    widths = {ends: float(line.get("stroke-width")) for ends, line in lines.items()}
    assert widths["0", "2"] == pytest.approx(0.3 + 5 * 0.75, abs=0.01)
    assert lines["1", "2"].get("class") == "less" and lines["0", "2"].get("class") == "more"
    assert float(circles["2"].get("cy")) < float(circles["0"].get("cy"))  # later sites above
    assert float(circles["0"].get("cx")) < float(circles["1"].get("cx"))  # later words right
    said = circles["2"].find("title").text
    assert "end at W2" in said and "activation 1.5" in said
    assert (
        "leave over" not in page
        and "<td>without</td>" in page
        and ">3.000<" in page
        and "://" not in page
    )
