"""Attribution-based Parameter Decomposition in one file, to be read beside the paper.

    python examples/nano_apd.py                                 TMS 5-2: about half a minute on 2 CPU cores
    python examples/nano_apd.py --features 10 --hidden 4        any other size, with the same settings

Braun et al. 2025, arXiv 2501.14926, on their toy model of superposition (TMS). A network with parameters θ* is split
into components P_1 ... P_C, each shaped like θ*, that sum to θ*, of which few are needed on any input, each of low rank.

Letters: B examples, F features, H hidden dimensions (H < F), O = F outputs, C components, m rank of a component's factors.
Functions of one example take x [F] and are mapped over the batch by `jax.vmap` where they are used.
"""

import argparse

import jax
import jax.numpy as jnp
import optax

FEATURE_PROBABILITY = 0.05  # every feature is on in one example of twenty
BATCH_SIZE = 2048
LEARNING_RATE, WARMUP_FRACTION = 0.03, 0.05
MINIMALITY_COEFF, SIMPLICITY_COEFF = 1.0, 0.7  # faithfulness has 1
SCHATTEN_P = 1.0
EPS = 1e-16  # inside the power of `simplicity`
USES = 2  # the forward pass multiplies with W twice: a tied weight counts twice in all sums over matrices


# The target network


def forward(params, x):
    """f(x, θ) = ReLU(W Wᵀ x + b): x [F] -> [O = F], with W [F, H] tied and b [F]. Row f of W is feature f's direction."""
    return jax.nn.relu(params["W"] @ (x @ params["W"]) + params["b"])


def sample(key, batch_size, num_features):
    """x [B, F]: every feature is U(0, 1) with probability `FEATURE_PROBABILITY`, else 0."""
    key_on, key_value = jax.random.split(key)
    on = jax.random.bernoulli(key_on, FEATURE_PROBABILITY, (batch_size, num_features))
    return on * jax.random.uniform(key_value, (batch_size, num_features))


def train_target(key, num_features, d_hidden, num_steps=5000, batch_size=1024):
    """θ* = {W [F, H], b [F]}, trained to reconstruct its input by AdamW at a rate that falls linearly to 0."""
    key_init, key_data = jax.random.split(key)
    W = jax.nn.initializers.glorot_normal()(key_init, (num_features, d_hidden))
    params = {"W": W, "b": jnp.zeros(num_features)}
    optimizer = optax.adamw(optax.linear_schedule(5e-3, 0.0, num_steps), weight_decay=0.01)

    def update(state, i):
        params, opt_state = state
        x = sample(jax.random.fold_in(key_data, i), batch_size, num_features)
        loss = lambda params: jnp.mean((jax.vmap(forward, (None, 0))(params, x) - x) ** 2)  # noqa: E731
        updates, opt_state = optimizer.update(jax.grad(loss)(params), opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), None

    run = jax.jit(lambda state: jax.lax.scan(update, state, jnp.arange(num_steps))[0])
    return run((params, optimizer.init(params)))[0]


# The components


def init_components(key, num_components, num_features, d_hidden, rank):
    """U [C, F, m] and V [C, m, H], normal with variance 2 / ((C + 1)·F·m) and 2 / ((C + 1)·m·H).

    Trap: this is far smaller than Glorot on one matrix, 2 / (F + m), and has to be. The paper's code takes the axis of
    components for one of the fans; from so small a beginning single features win a component each, one after the other.
    """
    key_U, key_V = jax.random.split(key)
    C, F, H, m = num_components, num_features, d_hidden, rank
    return {
        "U": jnp.sqrt(2 / ((C + 1) * F * m)) * jax.random.normal(key_U, (C, F, m)),
        "V": jnp.sqrt(2 / ((C + 1) * m * H)) * jax.random.normal(key_V, (C, m, H)),
    }


def matrices(components):
    """P_c = U_c V_c: [C, F, H]. Only W is decomposed; every sparse network has the target's bias."""
    return components["U"] @ components["V"]


# Which components matter for an input


def attributions(target, P, x):
    """A_c(x) = sqrt( mean_o (∂f_o(x, θ*)/∂W · P_c)² ): x [F], P [C, F, H] -> [C]      (eq. 3)

    To first order, how far the outputs move when P_c is taken away. One backward pass per output dimension o.
    """
    outputs, pullback = jax.vjp(lambda W: forward({**target, "W": W}, x), target["W"])
    (jacobian,) = jax.vmap(pullback)(jnp.eye(outputs.size))  # ∂f_o/∂W: [O, F, H], both uses of W
    moved = jnp.einsum("ofh,cfh->oc", jacobian, P)
    return jnp.sqrt(jnp.mean(moved**2, axis=0))


def batch_topk(scores, k):
    """s_c(x) of a batch: the k·B largest of all scores [B, C] -> bool [B, C]; k is the mean number per *example*.

    So an example without features keeps nothing and one with three may keep three. Ties go to the earlier entry.
    """
    num_kept = int(k * scores.shape[0] * (1 + 1e-12))  # trap: 0.29 · 100 is 28.999999999999996
    largest = jnp.argsort(scores.ravel(), descending=True, stable=True)[:num_kept]
    return jnp.zeros(scores.size, bool).at[largest].set(True).reshape(scores.shape)


def sparse_forward(target, P, s, x):
    """f(x, κ(x)) with κ(x) = Σ_c s_c(x) P_c: s [C], x [F] -> [O]. Every example runs through a network of its own."""
    return forward({**target, "W": jnp.einsum("c,cfh->fh", s.astype(P.dtype), P)}, x)


# The three losses, normalised as in the paper's code: its coefficients assume that. N = USES·F·H.


def faithfulness(components, target):
    """‖θ* - Σ_c P_c‖² / N, over both uses of W: the components sum to the target.      (eq. 5)"""
    error = target["W"] - jnp.sum(matrices(components), axis=0)
    return USES * jnp.sum(error**2) / (USES * error.size)


def minimality(sparse_out, target_out):
    """mean_b mean_o (f(x_b, κ(x_b)) - f(x_b, θ*))²: the few that are kept suffice. [B, O] each.      (eq. 6)"""
    return jnp.mean((sparse_out - target_out) ** 2)


def simplicity(components, s):
    """Σ_b Σ_c s_c(x_b) Σ_j (‖U_c[:, j]‖² ‖V_c[j, :]‖²)^(p/2) / (N·B), over both uses of W; s [B, C].      (eq. 8)

    An upper bound of Σ_j σ_j^p, the Schatten norm (to the p) of the active P_c; minimal over U and V it is equal to it.
    Trap: EPS keeps the gradient of the power finite at 0. It counts for active pairs only, or p = 0.5 shows a constant.
    """
    squares = jnp.sum(components["U"] ** 2, axis=1) * jnp.sum(components["V"] ** 2, axis=2)  # [C, m]
    norms = jnp.sum((squares + EPS) ** (SCHATTEN_P / 2), axis=1)  # [C]
    N = USES * components["U"].shape[1] * components["V"].shape[2]
    return USES * jnp.sum(s, axis=0) @ norms / (N * s.shape[0])


def total_loss(components, target, s, x):
    """faithfulness + α · minimality + β · simplicity at a given mask s [B, C], and the three by name."""
    P = matrices(components)
    target_out = jax.vmap(forward, (None, 0))(target, x)
    sparse_out = jax.vmap(sparse_forward, (None, None, 0, 0))(target, P, s, x)
    losses = {
        "faithfulness": faithfulness(components, target),
        "minimality": minimality(sparse_out, target_out),
        "simplicity": simplicity(components, s),
    }
    weighted = (
        losses["faithfulness"]
        + MINIMALITY_COEFF * losses["minimality"]
        + SIMPLICITY_COEFF * losses["simplicity"]
    )
    return weighted, losses


# Training


def step(optimizer, components, opt_state, target, x):
    """The algorithm: attributions, top-k mask, losses of the sparse network, one update. x [B, F]."""
    A = jax.vmap(attributions, (None, None, 0))(target, matrices(components), x)  # [B, C]
    s = batch_topk(A, FEATURE_PROBABILITY * x.shape[1])  # k: as many as features are on, on average
    # Trap: the mask is a constant of the loss. No gradient flows through attributions into what is kept.
    gradient, losses = jax.grad(total_loss, has_aux=True)(components, target, s, x)
    updates, opt_state = optimizer.update(gradient, opt_state)
    return optax.apply_updates(components, updates), opt_state, losses


def learning_rate(i, num_steps):
    """Linear from 0 to the peak, then cos(½π t), t from 0 to 1. Trap: a *quarter* wave, not the usual half."""
    warmup = int(WARMUP_FRACTION * num_steps)
    t = jnp.maximum(i - warmup, 0) / max(num_steps - warmup - 1, 1)
    return LEARNING_RATE * jnp.minimum(i / max(warmup, 1), 1.0) * jnp.cos(0.5 * jnp.pi * t)


def decompose(key, target, num_components, num_steps):
    """P_c [C, F, H] after `num_steps` steps from small random components of full rank."""
    F, H = target["W"].shape
    key_init, key_data = jax.random.split(key)
    components = init_components(key_init, num_components, F, H, rank=min(F, H))
    optimizer = optax.adam(lambda i: learning_rate(i, num_steps))
    opt_state = optimizer.init(components)

    @jax.jit
    def run(components, opt_state, i):
        x = sample(jax.random.fold_in(key_data, i), BATCH_SIZE, F)
        return step(optimizer, components, opt_state, target, x)

    for i in range(num_steps):
        components, opt_state, losses = run(components, opt_state, i)
        if (i + 1) % max(num_steps // 10, 1) == 0:
            print(f"step {i + 1:6d}  " + "  ".join(f"{k} {v:.2e}" for k, v in losses.items()))
    return matrices(components)


def print_table(P, W):
    """Of every feature f the component c with the best cos(P_c[f], W[f]), and ‖P_c[f]‖ / ‖W[f]‖; both are 1 for the truth."""
    lengths = jnp.linalg.norm(P, axis=2), jnp.linalg.norm(W, axis=1)[None]  # [C, F] and [1, F]
    cosines = jnp.einsum("cfh,fh->cf", P, W) / jnp.maximum(lengths[0] * lengths[1], 1e-30)
    best, features = jnp.argmax(cosines, axis=0), jnp.arange(len(W))
    cosine, ratio = cosines[best, features], (lengths[0] / lengths[1])[best, features]
    print("feature  component  cosine  norm ratio")
    for f in features:
        print(f"{f:7d}  {best[f]:9d}  {cosine[f]:6.4f}  {ratio[f]:10.3f}")
    print(f"MMCS {jnp.mean(cosine):.4f}   ML2R {jnp.mean(ratio):.3f}")


def main(argv=None):
    """Trains a target, decomposes it, prints the table."""
    parser = argparse.ArgumentParser(description="APD on a toy model of superposition")
    for name, default in {"features": 5, "hidden": 2, "steps": 8_000, "seed": 0}.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    args = parser.parse_args(argv)
    key_target, key_components = jax.random.split(jax.random.key(args.seed))
    target = train_target(key_target, args.features, args.hidden)
    P = decompose(key_components, target, args.features, args.steps)
    print_table(P, target["W"])


if __name__ == "__main__":
    main()
