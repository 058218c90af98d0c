r"""A prompt graph in the JSON that circuit-tracer's frontend reads.

Its schema version 1: class Model of circuit_tracer/frontend/graph_models.py, commit 196e2ce of
safety-research/circuit-tracer (metadata, qParams, nodes, links). What there is a transcoder's
feature at a layer is here a component at a site:

  layer, feature    the number of the site, in the order in which the network uses them; and the
                    Cantor pairing of that and the component
  activation        a_c;  clerp  the site and the component, or a label of one's own
  influence         what the strongest nodes down to this one have together of all influence on the
                    logit, in [0, 1], as circuit-tracer prunes by: of |edges| as shares of all that
                    arrive at a node, summed over all ways to the logit
  weight            the edge, with its sign; to the logit: of the token above the mean of all

Its "mlp reconstruction error" is here what the nodes at a site and a position leave over of what
the target hands on there, where that reaches a node or the logit; links begin at it, and none end.
Tokens of the prompt are nodes without links: edges begin at sites.

Shapes: n nodes. Sources: the nodes, then the errors. Rows: the nodes, and the logit last.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from apd_jax.interpretation.edges import PromptEdges
from apd_jax.interpretation.prompt_graph import PromptGraph

VERSION = 1
_FEATURE = "cross layer transcoder"  # the one kind that the frontend draws as a component
_ERROR = "mlp reconstruction error"


def to_json(
    graph: PromptGraph,
    words: Sequence[str],
    next_word: str,
    *,
    name: str,
    slug: str = "graph",
    labels: Mapping[int, str] | None = None,
) -> dict[str, Any]:
    """The graph as a value that `json.dumps` writes.

    Args:
      words: the prompt's tokens. next_word: the one that comes next.
      name: of the decomposition (`scan`). slug: of this graph. labels: of components, in words.
    Raises:
      InputError: not one word for every token.
    """
    graph.must_be_named_by(words)
    found, labels = graph.edges, labels or {}
    top, at = len(found.sites) + 1, graph.position
    logit = f"{top}_{graph.token}_{at}"
    ids = [
        f"{s}_{c}_{t}" for s, c, t in zip(found.site, found.component, found.position, strict=True)
    ]
    nodes = [
        _node(node, _paired(s, c), str(s), t, _FEATURE, f"{s}_{c}-0")
        for node, s, c, t in zip(
            ids, found.site.tolist(), found.component.tolist(), found.position.tolist(), strict=True
        )
    ]
    for i, node in enumerate(nodes):
        c = int(found.component[i])
        node |= {
            "clerp": labels.get(c, f"{found.sites[found.site[i]]} {c}"),
            "activation": float(found.activation[i]),
        }
    for t, s in errors(found).tolist():
        ids.append(f"{s}_-1_{t}")
        nodes.append(_node(ids[-1], -1, str(s), t, _ERROR, f"{s}_-1-{t}"))
        nodes[-1]["clerp"] = f"{found.sites[s]}, what is left over"
    for node, reached in zip(nodes, influence(found).tolist(), strict=True):
        node["influence"] = reached
    for t, token in enumerate(graph.tokens.tolist()):
        nodes.append(_node(f"E_{token}_{t}", t, "E", t, "embedding", f"E_{token}-{t}"))
    last = _node(logit, graph.token, str(top), at, "logit", f"L_{graph.token}-{at}")
    nodes.append(
        last
        | {
            "token_prob": graph.probability,
            "is_target_logit": True,
            "clerp": f'Output "{next_word}" (p={graph.probability:.3f})',
        }
    )
    return {
        "metadata": {
            "slug": slug,
            "scan": name,
            "transcoder_list": [],
            "prompt_tokens": list(words),
            "prompt": "".join(words),
            "node_threshold": None,
            "schema_version": VERSION,
        },
        "qParams": {
            "pinnedIds": [],
            "supernodes": [],
            "linkType": "both",
            "clickedId": "",
            "sg_pos": "",
        },
        "nodes": nodes,
        "links": _links(found, ids, logit),
    }


def _links(found: PromptEdges, ids: Sequence[str], logit: str) -> list[dict[str, Any]]:
    targets = [*ids[: len(found.component)], logit]
    return [
        {"source": ids[j], "target": targets[i], "weight": float(weight)}
        for i, row in enumerate(rows(found))
        for j, weight in enumerate(row)
        if weight != 0
    ]


def errors(found: PromptEdges) -> Int[np.ndarray, "errors 2"]:
    """Position and site of everything left over that reaches a node or the logit."""
    if found.rest is None:
        return np.zeros((0, 2), int)
    return np.argwhere(_above(found.rest, found.rest_to_output).any(axis=0))


def rows(found: PromptEdges) -> Float[np.ndarray, "rows sources"]:
    """The edges to every node, and to the logit last: from every node, then from every error."""
    own = _above(found.weight, found.to_output)
    if found.rest is None:
        return own
    t, s = errors(found).T
    return np.concatenate([own, _above(found.rest, found.rest_to_output)[:, t, s]], axis=1)


def _above(nodes: np.ndarray, logit: np.ndarray | None) -> np.ndarray:
    return nodes if logit is None else np.concatenate([nodes, logit[None]])


def shares(found: PromptEdges) -> Float[np.ndarray, "rows sources"]:
    """|edges| as shares of all that arrives at a node; rows of 0 stay 0."""
    size = np.abs(rows(found))
    total = size.sum(axis=1, keepdims=True)
    return np.divide(size, total, out=np.zeros_like(size), where=total > 0)


def influence(found: PromptEdges) -> Float[np.ndarray, " sources"]:
    """See above. The strongest has the least, its own share."""
    part, n = shares(found), len(found.component)
    within, step = part[:n], part[-1]
    total = np.zeros_like(step)
    for _ in range(n + 1):  # no way is longer
        total = total + step
        step = step[:n] @ within
        if not step.any():
            break
    order = np.argsort(-total, kind="stable")
    reached = np.empty_like(total)
    reached[order] = np.cumsum(total[order]) / max(float(total.sum()), 1e-30)
    return np.minimum(reached, 1.0)


def _node(node_id: str, feature: int, layer: str, t: int, kind: str, js_id: str) -> dict[str, Any]:
    return {
        "node_id": node_id,
        "feature": int(feature),
        "layer": layer,
        "ctx_idx": t,
        "feature_type": kind,
        "token_prob": 0.0,
        "is_target_logit": False,
        "run_idx": 0,
        "reverse_ctx_idx": 0,
        "jsNodeId": js_id,
        "clerp": "",
        "influence": None,
        "activation": None,
    }


def _paired(x: int, y: int) -> int:
    """Cantor's pairing, by which the frontend tells layer and feature."""
    return (x + y) * (x + y + 1) // 2 + y
