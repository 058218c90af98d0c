"""Digits: a small convolutional network on scikit-learn's 1797 scanned digits.

The images have 8 x 8 pixels; the data is real and comes with scikit-learn, without a download.

  two times h -> max_pool( ReLU( conv3x3(h) + b ) ), 8 x 8 -> 4 x 4 -> 2 x 2;   logits = h W + b

Shapes: B images, C components, 10 classes. An image is [8, 8, 1] with values from 0 to 1.
The kernels are decomposed, the biases are not.

The true decomposition is not known. `score` measures whether components serve one class each:
what their ablation costs every class, and how often each class's images keep them.
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
from apd_jax.targets.base import Config, Panel, Score, Target, at_least_one
from apd_jax.targets.scoring import CORRELATION_LABELS, accuracy_labels, rank_correlations

Batch = dict[str, Any]  # {"image": [B, 8, 8, 1], "label": [B]}
NUM_CLASSES = 10
NUM_TEST = 360  # of 1797 images
# A component serves one class if more than this share of its damage falls on that class.
ONE_CLASS = 0.5

LABELS = {
    **accuracy_labels("test accuracy"),
    "components_of_one_class": "share of alive components whose ablation mostly costs one class; 1",
    "num_classes_served": "classes served by such a component; 10",
    **CORRELATION_LABELS,
}


class ConvNet(nn.Module):
    """Returns logits [B, 10] and no hidden activations."""

    channels: Sequence[int]

    @nn.compact
    def __call__(
        self, images: Float[Array, "B 8 8 1"]
    ) -> tuple[Float[Array, "B 10"], dict[str, Array]]:
        h = images
        for i, width in enumerate(self.channels):
            h = nn.relu(nn.Conv(width, (3, 3), name=f"conv_{i}")(h))
            h = nn.max_pool(h, (2, 2), strides=(2, 2))
        return nn.Dense(NUM_CLASSES, name="dense")(h.reshape(h.shape[0], -1)), {}


@functools.cache
def load(split_seed: int) -> tuple[Batch, Batch]:
    """(training, test) images and labels, split at random by `split_seed`."""
    from sklearn.datasets import load_digits  # here, because this import takes a second

    pixels, labels = load_digits(return_X_y=True)
    images = np.asarray(pixels, np.float32).reshape(-1, 8, 8, 1) / 16
    labels = np.asarray(labels, np.int32)
    order = np.random.default_rng(split_seed).permutation(len(labels))
    training, test = (
        {"image": images[part], "label": labels[part]}
        for part in (order[NUM_TEST:], order[:NUM_TEST])
    )
    return training, test


def by_class(
    values: Shaped[np.ndarray, "B C"], labels: Int[np.ndarray, " B"]
) -> Float[np.ndarray, "10 C"]:
    """The mean over the images of each class."""
    return np.stack([values[labels == k].mean(axis=0) for k in range(NUM_CLASSES)])


def score(
    decomposition: Decomposition, key: Array, alive: Bool[np.ndarray, " C"], *, test: Batch
) -> Score:
    """Which classes every component serves, on the test images. `key` is not used.

    damage [10, C]: fall in the accuracy on each class when one component is ablated. A class whose
    accuracy rises counts as 0.

    Metrics:
      {target,sparse,all}_accuracy: of the target, with the mask of training, with all components.
      components_of_one_class: share of alive components with more than ONE_CLASS of their damage
        on one class.
      num_classes_served: number of classes that have such a component.
      attribution_rank_correlation_{kind}: see `scoring.rank_correlations`.
    Cost: C + 3 forward passes on 360 images, the gate, and attributions of every kind.
    """
    problem = decomposition.problem
    images, labels = jnp.asarray(test["image"]), np.asarray(test["label"])

    def right(result) -> np.ndarray:
        return np.asarray(jnp.argmax(result[0], axis=-1)) == labels

    activity = decomposition.activity(images)
    answers = {
        "target": right(problem.apply_fn(problem.params, images)),
        "sparse": right(decomposition.sparse_output(images, activity.active)),
        "all": right(decomposition.ablate([], images)),
    }
    C = decomposition.components.num_components
    without = np.stack([right(decomposition.ablate([c], images)) for c in range(C)], axis=1)
    lost = answers["all"][:, None].astype(float) - without  # [B, C]
    damage = np.maximum(by_class(lost, labels), 0)
    firing = by_class(np.asarray(activity.active & (activity.scores > 0)), labels)
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
    """Three figures of the alive components, ordered by the class that keeps them most often.

    Damage by class, firing rate by class (both [10, C]), and the filters of the first layer.
    """
    order = [int(c) for c in np.argsort(firing.argmax(axis=0), kind="stable") if alive[c]]
    names = [str(c) for c in order]
    kernels = [
        decomposition.problem.params["conv_0"]["kernel"],
        *(decomposition.component(c)["conv_0"]["kernel"] for c in order),
    ]
    rows = [np.asarray(kernel)[:, :, 0] for kernel in kernels]  # [3, 3, channels]
    tiles = [
        np.pad(row, ((0, 1), (0, 1), (0, 0))).transpose(0, 2, 1).reshape(4, -1) for row in rows
    ]
    return {
        "damage_by_class": Panel(
            title="Accuracy lost by ablating a component, by class",
            caption="Fall in test accuracy on each digit when one component is taken from the sum "
            "of all. Good: one bright cell in each column, and at least one in each row.",
            xlabel="component",
            ylabel="digit",
            matrix=damage[:, order],
            unit="fall in accuracy",
            columns=names,
        ),
        "firing_by_class": Panel(
            title="How often components are kept, by class",
            caption="Share of the test images of each digit on which a component is kept. Good: "
            "each component is kept for one digit, or for a few digits that share a feature.",
            xlabel="component",
            ylabel="digit",
            matrix=firing[:, order],
            unit="share of images",
            columns=names,
        ),
        "filters": Panel(
            title="Filters of the first convolution",
            caption="The 3 x 3 weights of every channel, of the target (top) and of each alive "
            "component. Alive and dead components together sum to the target. Good: a component "
            "holds a few of the target's filters whole, not a small part of each.",
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
            "target.channels must name one to three convolutions, since each halves the 8 x 8 "
            f"pixels; got {channels}."
        )
    model = ConvNet(channels)
    training, test = load(config.split_seed)

    def apply_fn(params: PyTree, images: Array):
        return model.apply({"params": params}, images)

    def loss_fn(params: PyTree, batch: Batch):
        log_p = jax.nn.log_softmax(apply_fn(params, batch["image"])[0])
        return -jnp.mean(jnp.take_along_axis(log_p, batch["label"][:, None], axis=1))

    def sampler(batch_size: int) -> Callable[..., Batch]:
        """Training images drawn with replacement."""
        at_least_one(batch_size=batch_size)

        def draw(rng, step):
            key = jax.random.fold_in(rng, step)
            index = jax.random.randint(key, (batch_size,), 0, len(training["label"]))
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
