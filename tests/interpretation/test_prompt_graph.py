"""Prompt graphs of a network whose needed components are known: see `cancelling`."""

import numpy as np
import pytest
from cancelling import PIECES, decomposition
from conftest import close

from apd_jax.errors import InputError
from apd_jax.interpretation.prompt_graph import Settings, prompt_graph

SETTINGS = Settings(num_steps=80, learning_rate=0.1, price=0.15)


@pytest.fixture(scope="module")
def graph():
    return prompt_graph(decomposition(), [0, 1], settings=SETTINGS)


def kl(written):
    """Of the target's logits after token 1, which are those of component 0, and these."""
    p, q = (z - np.log(np.exp(z).sum()) for z in (PIECES[0, 1], written))
    return (np.exp(p) * (p - q)).sum()


def test_the_adversary_keeps_what_cancels(graph):
    # Nothing is needed at token 0. Each node costs 0.15 / 2; one of random 1 and 2 costs KL about
    # 0.04 to 0.1, all of one and none of the other more.
    assert graph.before == 6
    assert graph.plain.nodes.tolist() == [[False] * 3, [True, False, False]]
    assert graph.robust.nodes.tolist() == [[False] * 3, [True, True, True]]
    assert (graph.plain.num_nodes, graph.robust.num_nodes) == (1, 3)
    assert ((graph.robust.gates >= 0) & (graph.robust.gates <= 1)).all()


def test_both_are_measured_and_attacked(graph):
    # The nodes alone give the target's logits; the worst of the plain graph brings in all of
    # component 2 or of component 1, whichever is worse.
    assert abs(graph.plain.kl) < 1e-6 and abs(graph.robust.kl) < 1e-6
    worst = max(kl(PIECES[0, 1] + PIECES[c, 1]) for c in (1, 2))
    assert worst > 0.2
    assert graph.plain.kl_attacked == pytest.approx(worst, rel=1e-3)
    assert abs(graph.robust.kl_attacked) < 1e-6


def test_what_is_asked_and_which_edges(graph):
    chances = np.exp(PIECES[0, 1]) / np.exp(PIECES[0, 1]).sum()
    assert (graph.position, graph.token) == (1, 4)
    assert graph.probability == pytest.approx(chances[4])
    # One site: no component drives another; to the logit above the mean goes what each writes.
    got = graph.edges
    assert got.component.tolist() == [0, 1, 2] and got.position.tolist() == [1, 1, 1]
    assert (got.weight == 0).all()
    own = PIECES[:, 1, 4] - PIECES[:, 1].mean(-1)
    close(got.to_output, own * graph.robust.gates[1])
    # The target writes what component 0 does; what the gates leave over of that, and the nodes that
    # cancel, is no node.
    close(got.rest_to_output, [[0], [own[0] - (own * graph.robust.gates[1]).sum()]])


def test_what_makes_no_graph():
    one = decomposition()
    for given, said in (
        ({"tokens": []}, "at least one"),
        ({"position": 2}, "position 2 is outside"),
        ({"token": 5}, "token 5 is outside"),
        ({"settings": Settings(num_steps=0)}, "at least 1; got 0"),
        ({"settings": Settings(p=0.0)}, "above 0"),
        ({"settings": Settings(distance="l2")}, "distance"),
    ):
        with pytest.raises(InputError, match=said):
            prompt_graph(one, **({"tokens": [0, 1]} | given))
