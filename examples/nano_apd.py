"""Attribution-based Parameter Decomposition (APD) in one file, to be read beside the paper.

    python examples/nano_apd.py                                TMS 5-2, half a minute on 2 CPU cores
    python examples/nano_apd.py --features 10 --hidden 4       any other size

Braun et al. 2025, arXiv 2501.14926, on its toy model of superposition (TMS). A network with
parameters θ* is split into components P_1 ... P_C, each shaped like θ*. Together they sum to θ*,
few of them are needed on any one input, and each is of low rank.

Shapes: B examples, F features, H < F hidden dimensions, O = F outputs, C components, m rank.
Functions that take one example x [F] are mapped over the batch where they are called.
"""

import argparse

import jax
import jax.numpy as jnp
import optax

FEATURE_PROBABILITY = 0.05
BATCH_SIZE, LEARNING_RATE, WARMUP_FRACTION = 2048, 0.03, 0.05
ACTIVE_PER_FEATURE = 0.0422  # paper: k = 0.211 for 5; a share of 0.226 has any feature on
MINIMALITY_COEFF, SIMPLICITY_PER_FEATURE = 1.0, 0.14  # paper: 1 and, for 5 features, 0.7
SCHATTEN_P, EPS = 1.0, 1e-16
USES = 2  # the network uses W twice: a tied weight counts twice in all sums over matrices


# ---- The target network
def forward(params, x):
    """f(x, θ) = ReLU(W Wᵀ x + b), x [F] -> [O]. Row f of W [F, H] is the direction of feature f."""
    return jax.nn.relu(params["W"] @ (x @ params["W"]) + params["b"])


def sample(key, B, F):
    """x [B, F]: every feature is on with probability 0.05, and then uniform in (0, 1)."""
    key_on, key_value = jax.random.split(key)
    on = jax.random.bernoulli(key_on, FEATURE_PROBABILITY, (B, F))
    return on * jax.random.uniform(key_value, (B, F))


def train_target(key, F, H, num_steps=5000, batch_size=1024):
    """θ* = {W [F, H], b [F]}, trained to return its input, by AdamW at a rate falling to 0."""
    key_init, key_data = jax.random.split(key)
    params = {"W": jax.nn.initializers.glorot_normal()(key_init, (F, H)), "b": jnp.zeros(F)}
    optimizer = optax.adamw(optax.linear_schedule(5e-3, 0.0, num_steps), weight_decay=0.01)
    opt_state = optimizer.init(params)

    @jax.jit
    def update(params, opt_state, i):
        x = sample(jax.random.fold_in(key_data, i), batch_size, F)
        network = jax.vmap(forward, (None, 0))
        gradient = jax.grad(lambda p: jnp.mean((network(p, x) - x) ** 2))(params)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    for i in range(num_steps):
        params, opt_state = update(params, opt_state, i)
    return params


# ---- The components
def init_components(key, C, F, H, m):
    """U [C, F, m] and V [C, m, H], normal with variance 2 / ((C+1)·F·m) and 2 / ((C+1)·m·H)."""
    # Trap: much smaller than Glorot's 2 / (F + m), and on purpose (the paper's code counts the
    # axis of components as a fan). Only from so small a start do single features win.
    key_U, key_V = jax.random.split(key)
    U = jnp.sqrt(2 / ((C + 1) * F * m)) * jax.random.normal(key_U, (C, F, m))
    V = jnp.sqrt(2 / ((C + 1) * m * H)) * jax.random.normal(key_V, (C, m, H))
    return {"U": U, "V": V}


def matrices(components):
    """P_c = U_c V_c, [C, F, H]. Only W is decomposed: the bias is the target's everywhere."""
    return components["U"] @ components["V"]


# ---- Attributions, mask, sparse network
def attributions(target, P, x):
    """A_c(x) = sqrt( mean_o (∂f_o(x, θ*)/∂W · P_c)² ), x [F], P [C, F, H] -> [C].     (eq. 3)"""
    # To first order, how far the outputs move when P_c is ablated: one backward pass per output.
    outputs, pullback = jax.vjp(lambda W: forward({**target, "W": W}, x), target["W"])
    (jacobian,) = jax.vmap(pullback)(jnp.eye(outputs.size))  # [O, F, H], through both uses of W
    moved = jnp.einsum("ofh,cfh->oc", jacobian, P)
    return jnp.sqrt(jnp.mean(moved**2, axis=0))


def batch_topk(scores, k):
    """s [B, C]: True for the k·B largest scores [B, C] of the whole batch; ties go to the first."""
    # So k is a mean: an example with three features may keep three components, an empty one none.
    num_kept = int(k * len(scores) * (1 + 1e-12))  # trap: 0.29 * 100 is 28.999999999999996
    kept = jnp.argsort(scores.ravel(), descending=True, stable=True)[:num_kept]
    return jnp.zeros(scores.size, bool).at[kept].set(True).reshape(scores.shape)


def sparse_forward(target, P, s, x):
    """f(x, κ(x)), κ(x) = Σ_c s_c(x) P_c, s [C], x [F] -> [O]: a network of its own per example."""
    return forward({**target, "W": jnp.einsum("c,cfh->fh", s, P)}, x)


# ---- Losses, normalised as in the paper's code, whose coefficients assume it: N = USES·F·H
def faithfulness(components, target):
    """‖θ* - Σ_c P_c‖² / N, with W's error counted once per use.     (eq. 5)"""
    error = target["W"] - jnp.sum(matrices(components), axis=0)
    return USES * jnp.sum(error**2) / (USES * error.size)


def minimality(sparse_out, target_out):
    """Mean over b and o of (f_o(x_b, κ(x_b)) - f_o(x_b, θ*))², both [B, O].     (eq. 6)"""
    return jnp.mean((sparse_out - target_out) ** 2)


def simplicity(components, s):
    """Σ_b Σ_c s_c(x_b) Σ_j (‖U_c[:, j]‖² ‖V_c[j, :]‖²)^(p/2) / (N·B), s [B, C].     (eq. 8)"""
    U, V = components["U"], components["V"]
    squares = jnp.sum(U**2, axis=1) * jnp.sum(V**2, axis=2)  # [C, m]; at the SVD σ_j(P_c)²
    # Trap: EPS keeps the gradient finite at 0, of active pairs; of others it would be a constant.
    powers = jnp.sum((squares + EPS) ** (SCHATTEN_P / 2), axis=1)  # [C]
    N = USES * U.shape[1] * V.shape[2]
    return USES * jnp.sum(s, axis=0) @ powers / (N * len(s))


def total_loss(components, target, s, x):
    """The weighted sum of the three losses at a given mask s [B, C], and the three alone."""
    target_out = jax.vmap(forward, (None, 0))(target, x)
    sparse_out = jax.vmap(sparse_forward, (None, None, 0, 0))(target, matrices(components), s, x)
    faithful, simple = faithfulness(components, target), simplicity(components, s)
    minimal = minimality(sparse_out, target_out)
    total = faithful + MINIMALITY_COEFF * minimal + SIMPLICITY_PER_FEATURE * x.shape[1] * simple
    return total, (faithful, minimal, simple)


# ---- Training
def step(optimizer, components, opt_state, target, x):
    """The algorithm, on one batch x [B, F]."""
    # 1. How much does every component matter on every example?  [B, C]
    # (The paper's run of 5-2 takes the gradient at Σ_c P_c, which soon is θ*: the same result.)
    A = jax.vmap(attributions, (None, None, 0))(target, matrices(components), x)
    # 2. Keep what matters most. Trap: the mask is a constant, no gradient flows into it through A.
    s = batch_topk(A, ACTIVE_PER_FEATURE * x.shape[1])
    # 3. What do all components miss of θ*, what do the kept ones miss of f, how complex are these?
    gradient, losses = jax.grad(total_loss, has_aux=True)(components, target, s, x)
    # 4. Descend.
    updates, opt_state = optimizer.update(gradient, opt_state)
    return optax.apply_updates(components, updates), opt_state, losses


def learning_rate(i, num_steps):
    """Linear from 0 to the peak, then cos(½π t), t in [0, 1]. Trap: a quarter wave, not a half."""
    warmup = int(WARMUP_FRACTION * num_steps)
    t = jnp.maximum(i - warmup, 0) / max(num_steps - warmup - 1, 1)
    return LEARNING_RATE * jnp.minimum(i / max(warmup, 1), 1.0) * jnp.cos(0.5 * jnp.pi * t)


def decompose(key, target, C, num_steps):
    """P [C, F, H], trained from small random components of full rank."""
    F, H = target["W"].shape
    key_init, key_data = jax.random.split(key)
    components = init_components(key_init, C, F, H, m=min(F, H))
    optimizer = optax.adam(lambda i: learning_rate(i, num_steps))
    opt_state = optimizer.init(components)

    @jax.jit
    def update(components, opt_state, i):
        x = sample(jax.random.fold_in(key_data, i), BATCH_SIZE, F)
        return step(optimizer, components, opt_state, target, x)

    line = "step {:6d}   faithfulness {:.1e}   minimality {:.1e}   simplicity {:.1e}"
    for i in range(num_steps):
        components, opt_state, losses = update(components, opt_state, i)
        if (i + 1) % max(num_steps // 10, 1) == 0:
            print(line.format(i + 1, *losses))
    return matrices(components)


def print_table(P, W):
    """Per feature f: the c with the best cos(P_c[f], W[f]), and ‖P_c[f]‖ / ‖W[f]‖. Means last."""
    norms, true_norms = jnp.linalg.norm(P, axis=2), jnp.linalg.norm(W, axis=1)[None]
    cosines = jnp.einsum("cfh,fh->cf", P, W) / jnp.maximum(norms * true_norms, 1e-30)
    # Trap: as in the paper only the cosine chooses, and a tiny vector may point the right way.
    best, features = jnp.argmax(cosines, axis=0), jnp.arange(len(W))
    cosine, ratio = cosines[best, features], (norms / true_norms)[best, features]
    print("feature  component  cosine  norm ratio")
    for f in features:
        print(f"{f:7d}  {best[f]:9d}  {cosine[f]:6.4f}  {ratio[f]:10.3f}")
    print(f"MMCS {jnp.mean(cosine):.4f}   ML2R {jnp.mean(ratio):.3f}   (the truth: 1 and 1)")


def main(argv=None):
    """Train a target, decompose it into one component per feature, compare."""
    parser = argparse.ArgumentParser(description="APD on a toy model of superposition.")
    for name, default in {"features": 5, "hidden": 2, "steps": 10_000, "seed": 0}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args(argv)
    key_target, key_components = jax.random.split(jax.random.key(args.seed))
    target = train_target(key_target, args.features, args.hidden)
    print_table(decompose(key_components, target, args.features, args.steps), target["W"])


if __name__ == "__main__":
    main()
