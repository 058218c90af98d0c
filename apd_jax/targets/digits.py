"""Digits: a small convolutional network on scikit-learn's 1797 scanned digits of 8 x 8 pixels (real data, no download).

two times max_pool( ReLU( conv3x3(h) + b ) ), 8 x 8 -> 4 x 4 -> 2 x 2, then logits = h W + b

Shapes: B images, C components, 10 classes; an image is [8, 8, 1] with values from 0 to 1. The kernels are decomposed, the biases are not.
No truth is known. One may hope for components that serve one class each: that is measured, by ablation and by how often each is kept.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree, Shaped

from apd_jax.decomposition import Decomposition
from apd_jax.errors import InputError
from apd_jax.methods.config import Config
from apd_jax.targets.base import Panel, Score, Target, at_least_one
from apd_jax.targets.scoring import CORRELATION_LABELS, accuracy_labels, rank_correlations

Batch = dict[str, Any]  # {"image": [B, 8, 8, 1], "label": [B]}
NUM_CLASSES = 10
NUM_TEST = 360  # of 1797 images
ONE_CLASS = 0.5  # a component is one class's if more than this part of the accuracy that it costs falls on that class

LABELS = {
    **accuracy_labels("test accuracy"),
    "components_of_one_class": "share of alive components whose ablation mostly costs one class; 1",
    "num_classes_served": "classes that such a component serves; 10",
    **CORRELATION_LABELS,
}


class ConvNet(nn.Module):
    """Returns logits [B, 10] and nothing hidden."""

    channels: Sequence[int]

    @nn.compact
    def __call__(
        self, images: Float[Array, "B 8 8 1"]
    ) -> tuple[Float[Array, "B 10"], dict[str, Array]]:
        h = images
        for i, width in enumerate(self.channels):
            h = nn.max_pool(
                nn.relu(nn.Conv(width, (3, 3), name=f"conv_{i}")(h)), (2, 2), strides=(2, 2)
            )
        return nn.Dense(NUM_CLASSES, name="dense")(h.reshape(h.shape[0], -1)), {}


@functools.cache
def load(split_seed: int) -> tuple[Batch, Batch]:
    """(training, test) images and labels, split at random by `split_seed`."""
    from sklearn.datasets import load_digits  # takes a second: only for who needs it

    pixels, labels = load_digits(return_X_y=True)
    images, labels = (
        np.asarray(pixels, np.float32).reshape(-1, 8, 8, 1) / 16,
        np.asarray(labels, np.int32),
    )
    order = np.random.default_rng(split_seed).permutation(len(labels))
    training, test = order[NUM_TEST:], order[:NUM_TEST]
    return {"image": images[training], "label": labels[training]}, {
        "image": images[test],
        "label": labels[test],
    }


def by_class(
    values: Shaped[np.ndarray, "B C"], labels: Int[np.ndarray, " B"]
) -> Float[np.ndarray, "10 C"]:
    """The mean over the images of each class."""
    return np.stack([values[labels == k].mean(axis=0) for k in range(NUM_CLASSES)])


def score(
    decomposition: Decomposition, key: Array, alive: Bool[np.ndarray, " C"], *, test: Batch
) -> Score:
    """Which classes every component serves, on the test images; nothing is drawn.

    Metrics
      {target,sparse,all}_accuracy: by the target, with the mask of training, with all components.
      components_of_one_class: share of alive components of whose damage, when ablated, more than ONE_CLASS falls on one class. Damage
        is the fall in accuracy on each class, rises left out. num_classes_served: how many classes have such a component.
      attribution_rank_correlation_{kind}: see `scoring.rank_correlations`.

    Cost: C + 3 forward passes on 360 images, and the attributions.
    """
    problem, images, labels = (
        decomposition.problem,
        jnp.asarray(test["image"]),
        np.asarray(test["label"]),
    )

    def right(result) -> np.ndarray:
        return np.asarray(jnp.argmax(result[0], axis=-1)) == labels

    scores = jax.jit(decomposition.attributions)(images)
    mask = decomposition.mask_of(scores, images)
    answers = {
        "target": right(problem.apply_fn(problem.params, images)),
        "sparse": right(jax.jit(decomposition.sparse_output)(images, mask)),
        "all": right(decomposition.ablate([], images)),
    }
    without = np.stack(
        [
            right(decomposition.ablate([c], images))
            for c in range(decomposition.components.num_components)
        ],
        axis=1,
    )
    damage = np.maximum(
        by_class(answers["all"][:, None].astype(float) - without, labels), 0
    )  # [10, C]
    firing = by_class(np.asarray(mask & (scores > 0)), labels)
    own = alive & (damage.max(axis=0) > ONE_CLASS * damage.sum(axis=0))
    metrics = {
        **{f"{who}_accuracy": float(answer.mean()) for who, answer in answers.items()},
        "components_of_one_class": float(own[alive].mean()) if alive.any() else 0.0,
        "num_classes_served": len(set(damage.argmax(axis=0)[own])),
        **rank_correlations(decomposition, images, alive),
    }
    return Score(metrics, LABELS, panels(decomposition, damage, firing, alive))


def panels(
    decomposition: Decomposition, damage: np.ndarray, firing: np.ndarray, alive: np.ndarray
) -> dict[str, Panel]:
    """Damage and firing by class, and the first layer's filters, of the alive components, ordered by the class that keeps them most."""
    order = [int(c) for c in np.argsort(firing.argmax(axis=0), kind="stable") if alive[c]]
    names = [str(c) for c in order]
    kernels = [decomposition.component(c)["conv_0"]["kernel"] for c in order]
    rows = [
        np.asarray(kernel)[:, :, 0]
        for kernel in [decomposition.problem.params["conv_0"]["kernel"], *kernels]
    ]  # [3, 3, channels]
    tiles = [
        np.pad(row, ((0, 1), (0, 1), (0, 0))).transpose(0, 2, 1).reshape(4, -1) for row in rows
    ]
    return {
        "damage_by_class": Panel(
            title="Accuracy that an ablated component costs, by class",
            caption="Fall in test accuracy on each digit when one component is taken from the sum of all. Good: one bright cell in "
            "each column, and every row has one.",
            xlabel="component",
            ylabel="digit",
            matrix=damage[:, order],
            unit="loss of accuracy",
            columns=names,
        ),
        "firing_by_class": Panel(
            title="How often components are kept, by class",
            caption="Share of the test images of each digit on which a component is kept. Good: components that answer for one digit, or "
            "for a feature that a few digits share.",
            xlabel="component",
            ylabel="digit",
            matrix=firing[:, order],
            unit="share of images",
            columns=names,
        ),
        "filters": Panel(
            title="Filters of the first convolution",
            caption="Target (top) and the alive components: 3 x 3 weights of every channel. With the dead ones they sum to "
            "the target. Good: a component holds a few of the target's filters, not a bit of all.",
            xlabel="channel",
            ylabel="",
            matrix=np.concatenate(tiles),
            unit="weight",
            columns=[str(i // 4) if i % 4 == 1 else "" for i in range(tiles[0].shape[1])],
            rows=["target", "", "", "", *(text for name in names for text in (name, "", "", ""))],
        ),
    }


def build(config: Config, batch_size: int) -> Target:
    """The digits target of `config` (fields: configs/digits.py).

    Raises:
      InputError: a size below 1, or other than one to three convolutions.
    """
    channels = tuple(config.channels)
    at_least_one(**{f"channels[{i}]": width for i, width in enumerate(channels)})
    if len(channels) not in (1, 2, 3):
        raise InputError(
            f"target.channels must name one to three convolutions, since each halves the 8 x 8 pixels; got {channels}."
        )
    model = ConvNet(channels)
    training, test = load(config.split_seed)

    def apply_fn(params: PyTree, images: Array):
        return model.apply({"params": params}, images)

    def loss_fn(params: PyTree, batch: Batch):
        logits = apply_fn(params, batch["image"])[0]
        return -jnp.mean(
            jnp.take_along_axis(jax.nn.log_softmax(logits), batch["label"][:, None], axis=1)
        )

    def sampler(batch_size: int) -> Callable[..., Batch]:
        """Training images drawn with replacement."""
        at_least_one(batch_size=batch_size)

        def draw(rng, step):
            index = jax.random.randint(
                jax.random.fold_in(rng, step), (batch_size,), 0, len(training["label"])
            )
            return {name: jnp.asarray(array)[index] for name, array in training.items()}

        return draw

    pretrain_sample_fn, labelled = sampler(config.pretrain.batch_size), sampler(batch_size)
    return Target(
        name="digits",
        init_fn=lambda key: model.init(key, jnp.zeros((1, 8, 8, 1)))["params"],
        apply_fn=apply_fn,
        loss_fn=loss_fn,
        sample_fn=lambda rng, step: labelled(rng, step)["image"],
        pretrain_sample_fn=pretrain_sample_fn,
        select=("*.kernel",),
        score_fn=functools.partial(score, test=test),
    )
