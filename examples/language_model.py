"""A two-layer language model of one's own, taken apart without choosing a coefficient.

    pip install -e '.[language]'
    python examples/language_model.py            train it on Python's own help texts, decompose it

`model` below is any Flax Linen module; nothing in it knows of apd_jax. What is found is measured
on text that neither the model nor its components were trained on.
"""

import argparse
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tokenizers
from flax import linen as nn

import apd_jax

VOCABULARY, LENGTH, WIDTH, HEADS, LAYERS = 400, 32, 64, 4, 2


class Block(nn.Module):
    """Attention and an MLP, each added to the residual stream."""

    @nn.compact
    def __call__(self, h):
        causal = nn.make_causal_mask(h[..., 0])
        h += nn.MultiHeadDotProductAttention(HEADS, use_bias=False)(nn.LayerNorm()(h), mask=causal)
        return h + nn.Dense(WIDTH)(nn.gelu(nn.Dense(4 * WIDTH)(nn.LayerNorm()(h))))


class Model(nn.Module):
    """tokens [B, T] -> logits [B, T, V]."""

    @nn.compact
    def __call__(self, tokens):
        h = nn.Embed(VOCABULARY, WIDTH)(tokens)
        h += self.param("positions", nn.initializers.normal(0.02), (1, LENGTH, WIDTH))
        for _ in range(LAYERS):
            h = Block()(h)
        return nn.Dense(VOCABULARY, name="unembed")(nn.LayerNorm()(h))


def cross_entropy(logits, tokens):
    """Of the next token, in nats."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:])
    return losses.mean()


@functools.cache
def text():
    """(tokens to train on [N, T], held out [M, T], the tokenizer) of Python's own help texts."""
    from pydoc_data.topics import topics

    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = sorted({c for t in topics.values() for c in t if ord(c) < 128} - {"\n"})
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCABULARY, show_progress=False, initial_alphabet=alphabet
    )
    pages = ["".join(c for c in topics[name] if ord(c) < 128) for name in sorted(topics)]
    tokenizer.train_from_iterator(pages, trainer)
    parts = [np.concatenate([tokenizer.encode(p).ids for p in pages[i::10]]) for i in range(10)]
    rows = [part[: len(part) // LENGTH * LENGTH].reshape(-1, LENGTH) for part in parts]
    return np.concatenate(rows[1:]), rows[0], tokenizer


def trained(seed, steps=1000, batch_size=64):
    """The model and its weights, after `steps` of Adam."""
    rows, model = text()[0], Model()
    params = model.init(jax.random.key(seed), rows[:1])
    optimizer = optax.adamw(optax.cosine_decay_schedule(3e-3, steps), weight_decay=0.1)

    def step(carry, key):
        params, state = carry
        batch = jnp.asarray(rows)[jax.random.randint(key, (batch_size,), 0, len(rows))]
        gradient = jax.grad(lambda p: cross_entropy(model.apply(p, batch), batch))(params)
        updates, state = optimizer.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), None

    keys = jax.random.split(jax.random.key(seed + 1), steps)
    run = jax.jit(lambda params: jax.lax.scan(step, (params, optimizer.init(params)), keys)[0][0])
    return model, run(params)


def table(found, held):
    """Cross-entropy on held-out text, in nats per token, and how much is active."""
    target, params = found.problem.apply_fn, found.problem.params
    zero = apd_jax.components.weighted_sum(
        found.components, params, jnp.zeros(found.components.num_components)
    )
    g = found.activity(held).values
    rows = {
        "the model": target(params, held),
        "its decomposed matrices at zero": target(zero, held),
    }
    masks = {"all components on": jnp.ones_like(g)}
    masks |= {f"on where their gate is above {t}": (g > t) * 1.0 for t in (0.0, 0.1, 0.5)}
    rows |= {name: found.sparse_output(held, mask) for name, mask in masks.items()}
    losses = {name: float(cross_entropy(logits, held)) for name, logits in rows.items()}
    best, worst = list(losses.values())[:2]
    print(f"{'':40}{'nats':>7}{'recovered':>11}{'active per token':>18}")
    for name, loss in losses.items():
        active = (
            f"{float(masks[name].sum(-1).mean()):.0f} of {g.shape[-1]}" if name in masks else ""
        )
        print(f"{name:40}{loss:7.3f}{(worst - loss) / (worst - best):11.1%}{active:>18}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1000, help="of training the model")
    args = parser.parse_args()
    rows, held, tokenizer = text()
    model, params = trained(args.seed, args.steps)
    found = apd_jax.decompose(model.apply, params, rows, select="*Block*.kernel")
    table(found, held[:128])
    example = held[0]
    on = np.asarray(found.mask(held[:1])[0].sum(-1))
    print("components on at each token: ", end="")
    print(" ".join(f"{tokenizer.decode([int(t)])!r}:{n}" for t, n in zip(example, on, strict=True)))


if __name__ == "__main__":
    main()
