"""It finds the minimum of a small objective."""

import chex
import jax
import jax.numpy as jnp
import optax

from optax_cl.testing._streams import ExtraArgs, no_extra_args

OBJECTIVES = ("parabola", "rosenbrock", "matrix", "mixed")


def check_converges(
    tx: optax.GradientTransformation,
    objective: str = "mixed",
    *,
    extra_args: ExtraArgs = no_extra_args,
    num_steps: int = 3000,
    atol: float = 0.02,
) -> None:
    r"""It finds the minimum of a small objective, in one ``jax.lax.scan``.

    ``"parabola"``: :math:`\|x - (1, -1, 1)\|^2`. ``"rosenbrock"``: :math:`(1-x)^2 +
    100\,(y-x^2)^2`. ``"matrix"``: :math:`\|AX - B\|^2` for a well-conditioned A.
    ``"mixed"``: all three at once, in a tree of a tuple and a dict.

    Args:
      tx: The optimizer, without finished tasks.
      objective: One of ``OBJECTIVES``.
      extra_args: ``updates -> extra arguments`` that it needs; they should not
        contradict the objective.
      num_steps: Length of the scan.
      atol: Largest distance of any entry from the minimum.
    """
    if objective not in OBJECTIVES:
        raise ValueError(f"`objective` must be one of {OBJECTIVES}; got {objective!r}.")
    start, target, loss = _objective(objective)

    def body(carry, _):
        params, state = carry
        grads = jax.grad(loss)(params)
        updates, state = tx.update(grads, state, params, **extra_args(grads))
        return (optax.apply_updates(params, updates), state), None

    @jax.jit
    def run(params):
        return jax.lax.scan(body, (params, tx.init(params)), length=num_steps)[0][0]

    chex.assert_trees_all_close(run(start), target, rtol=0, atol=atol)


def _objective(name):
    a = jnp.array([[2.0, 0.5, 0.0], [0.5, 1.5, 0.0], [0.0, 0.5, 1.0]])
    solution = jnp.array([[1.0, -0.5], [0.5, 1.0], [-1.0, 0.0]])
    corner = jnp.array([1.0, -1.0, 1.0])

    def parabola(x):
        return jnp.sum((x - corner) ** 2)

    def rosenbrock(x):
        return (1.0 - x[0]) ** 2 + 100.0 * (x[1] - x[0] ** 2) ** 2

    def matrix(x):
        return jnp.sum((a @ (x - solution)) ** 2)

    def mixed(tree):
        (x, y), z = tree["vectors"], tree["matrix"]
        return parabola(x) + rosenbrock(y) + matrix(z)

    parts = {
        "parabola": (jnp.zeros(3), corner, parabola),
        "rosenbrock": (jnp.array([0.0, 0.5]), jnp.ones(2), rosenbrock),
        "matrix": (jnp.zeros((3, 2)), solution, matrix),
    }
    if name != "mixed":
        return parts[name]
    start, target = (
        {
            "vectors": (parts["parabola"][i], parts["rosenbrock"][i]),
            "matrix": parts["matrix"][i],
        }
        for i in (0, 1)
    )
    return start, target, mixed
