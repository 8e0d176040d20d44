"""How much of a step lies inside the subspace, by where the protection stands."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_cl
from tests.arrays import orthonormal
from tests.routing.helpers import install, run

ADAM = optax_cl.scale_by_decoupled_adam
AWAY = optax_cl.attenuate(1.0)

# A stream as in the study `alpha_sweep`: .6 of the energy inside a rotated subspace,
# then scales of the coordinates over a decade, which leaves .46 of it there.

DIM, RANK, STEPS, SEEDS, B2 = 64, 8, 600, 4, 0.99


@functools.cache
def streams():
    """Gradients ``[seeds, steps, dim, 1]`` and bases, drawn in NumPy."""
    rng = np.random.default_rng(0)
    scales = 10 ** np.linspace(-0.5, 0.5, DIM)
    grads, bases = [], []
    for seed in range(SEEDS):
        basis = np.asarray(orthonormal(seed, DIM, RANK), np.float64)
        inside = rng.normal(size=(STEPS, RANK)) @ basis.T
        outside = rng.normal(size=(STEPS, DIM))
        outside -= outside @ basis @ basis.T
        both = (0.6 / RANK) ** 0.5 * inside + (0.4 / (DIM - RANK)) ** 0.5 * outside
        grads.append(both * scales)
        bases.append(basis)
    grads, bases = np.stack(grads), np.stack(bases)
    share = ((grads @ bases) ** 2).sum() / (grads**2).sum()
    assert abs(share - 0.46) < 0.03
    return jnp.asarray(grads[..., None], jnp.float32), jnp.asarray(bases, jnp.float32)


def leak(*links):
    """Share of the updates' energy inside, over all steps and seeds."""

    def one(grads, basis):
        tx = optax_cl.protect(RANK, *links)
        state = install(tx.init(grads[0]), basis=basis)
        return run(tx, grads, state=state)[0][..., 0]

    grads, bases = streams()
    updates = np.asarray(jax.jit(jax.vmap(one))(grads, bases), np.float64)
    inside = updates @ np.asarray(bases, np.float64)
    return (inside**2).sum() / (updates**2).sum()


@pytest.mark.parametrize(
    ("links", "published", "band"),
    [
        ([ADAM(b2=B2)], 0.557, 0.04),
        ([AWAY, ADAM(b2=B2, second_moment="routed")], 0.060, 0.015),
        ([AWAY, ADAM(b2=B2)], 0.092, 0.02),
        ([AWAY, ADAM(b2=B2, second_moment="raw")], 0.158, 0.03),
        (
            [AWAY, ADAM(b2=B2, first_moment="raw", second_moment="routed")],
            0.380,
            0.04,
        ),
        ([ADAM(b2=B2), AWAY], 0.0, 1e-12),
        ([ADAM(b2=B2), optax_cl.project()], 0.0, 1e-12),
    ],
    ids=["adam", "shared", "max", "raw", "denominator", "post", "project"],
)
def test_leak_of_each_place_is_what_the_docs_say(links, published, band):
    assert abs(leak(*links) - published) < band


# A small matrix, half of it protected, and ten steps of noise. The share is of the norm
# here, the mean over 200 draws; single draws of "shared" lie between .12 and .42.


@functools.cache
def toy(*names):
    links = {
        "project": optax_cl.project(),
        "shared": ADAM(second_moment="routed"),
        "raw": ADAM(second_moment="raw"),
        "decay": optax.add_decayed_weights(0.1),
    }

    def one(seed):
        draws = jax.random.normal(jax.random.key(seed), (12, 6, 3))
        basis = jnp.linalg.qr(draws[10])[0]
        tx = optax_cl.protect(3, *(links[name] for name in names))
        state = install(tx.init(draws[0]), basis=basis)
        last = run(tx, draws[:10], draws[11], state)[0][-1]
        return jnp.linalg.norm(basis.T @ last) / jnp.linalg.norm(last)

    return float(jax.jit(jax.vmap(one))(jnp.arange(200)).mean())


@pytest.mark.parametrize(("moments", "share"), [("shared", 0.25), ("raw", 0.14)])
def test_adam_leaks_behind_a_projection_and_not_in_front_of_one(moments, share):
    assert abs(toy("project", moments) - share) < 0.04
    assert toy("project", moments, "project") < 1e-6


def test_decay_leaks_behind_a_projection_and_not_in_front_of_one():
    assert abs(toy("shared", "project", "decay") - 0.29) < 0.05
    assert toy("shared", "decay", "project") < 1e-6
