"""All routings side by side on one stream of gradients, as functions for the engine."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

import optax_cl
from experiments.engine import Program
from experiments.studies._sweep_cases import ROUTINGS, Config


def program(config: Config) -> Program:
    """All routings on one stream of gradients.

    Args:
      config: the settings.

    Returns:
      The program: task 0 without, task 1 with the modifier.
    """
    dim, rank = config.dim, config.rank

    def transformation(routing, lane, basis, strength):
        first, second = ROUTINGS[routing]
        adam = optax_cl.scale_by_decoupled_adam(
            b2=config.b2, eps=lane["eps"], first_moment=first, second_moment=second
        )
        modifier = optax.stateless(lambda g, _: g - strength * (basis @ (basis.T @ g)))
        if routing == "vanilla":
            return optax_cl.chain(adam)
        if routing == "post":
            return optax_cl.chain(adam, modifier)
        return optax_cl.chain(modifier, adam)

    def fresh(lane, basis):
        zeros = jnp.zeros(dim)
        return {r: transformation(r, lane, basis, 0.0).init(zeros) for r in ROUTINGS}

    def sums():
        return {
            "moved": jnp.zeros((len(ROUTINGS), dim)),  # net displacement / lr
            "inside": jnp.zeros(len(ROUTINGS)),  # sum of ||U^T update||^2
            "total": jnp.zeros(len(ROUTINGS)),  # sum of ||update||^2
            "energy": jnp.zeros(2),  # the raw gradient's: inside U, total
        }

    def init(data, lane):
        basis = jnp.where(lane["aligned"], jnp.eye(dim, rank), data[lane["seed"]])
        return {"basis": basis, "states": fresh(lane, basis), "sums": sums()}

    def gradient(lane, basis, task, step):
        key = jax.random.fold_in(jax.random.key(1), lane["seed"])
        key = jax.random.fold_in(jax.random.fold_in(key, task), step)
        inner, outer = jax.random.split(key)
        inside = basis @ jax.random.normal(inner, (rank,))
        outside = jax.random.normal(outer, (dim,))
        outside = outside - basis @ (basis.T @ outside)
        s = lane["overlap"]
        g = jnp.sqrt(s * dim / rank) * inside
        g = g + jnp.sqrt((1 - s) * dim / (dim - rank)) * outside
        scales = 10.0 ** (lane["spread"] * jnp.linspace(-1.0, 1.0, dim))
        return g * scales * jnp.where(task == 0, lane["old_scale"], 1.0)

    def step(data, lane, carry, task, index):
        del data
        basis = carry["basis"]
        g = gradient(lane, basis, task, index)
        strength = jnp.where(task == 0, 0.0, lane["strength"])
        states, updates = {}, []
        for routing in ROUTINGS:  # not the carry's order: JAX sorts a dict's keys
            tx = transformation(routing, lane, basis, strength)
            update, states[routing] = tx.update(g, carry["states"][routing])
            updates.append(update)
        updates = jnp.stack(updates)
        old = carry["sums"]
        new = {
            "moved": old["moved"] + updates,
            "inside": old["inside"] + jnp.sum((updates @ basis) ** 2, axis=1),
            "total": old["total"] + jnp.sum(updates**2, axis=1),
            "energy": old["energy"]
            + jnp.stack([jnp.sum((basis.T @ g) ** 2), jnp.sum(g**2)]),
        }
        record = {
            "gain": inflation(
                basis,
                denominator(states["shared"], config.b2, lane["eps"]),
                denominator(states["vanilla"], config.b2, lane["eps"]),
            )
        }
        return {"basis": basis, "states": states, "sums": new}, record

    def boundary(data, lane, carry, task):
        del data, task
        basis, done = carry["basis"], carry["sums"]
        states = jax.tree.map(
            lambda kept, new: jnp.where(lane["reset"], new, kept),
            carry["states"],
            fresh(lane, basis),
        )
        record = {
            "moved": jnp.linalg.norm(done["moved"] @ basis, axis=1),
            "leak": done["inside"] / done["total"],
            "overlap": done["energy"][0] / done["energy"][1],
        }
        return {"basis": basis, "states": states, "sums": sums()}, record

    def evaluate(data, lane, carry):
        del data, lane, carry
        return {}

    return Program("sweep", 2, config.steps, init, step, boundary, evaluate)


def denominator(state: Any, b2: float, eps: jax.Array) -> jax.Array:
    """What Adam divides by, from its state, ``[dim]``."""
    nu, count = optax.tree.get(state, "nu"), optax.tree.get(state, "count")
    return jnp.sqrt(optax.tree.bias_correction(nu, b2, count)) + eps


def inflation(basis: jax.Array, shared: jax.Array, raw: jax.Array) -> jax.Array:
    """R: mean over the basis of the ratio of gains along its directions."""
    square = basis**2
    return jnp.mean(((1 / shared) @ square) / ((1 / raw) @ square))
