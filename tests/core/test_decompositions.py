"""Decompositions of stacks: right, and one matrix at a time on a CPU."""

import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_cl._core import decompositions


def _positive(x):
    return x @ x.mT + jnp.broadcast_to(jnp.eye(5), (*x.shape[:-2], 5, 5))


def _steep(x):
    return x[..., 1:, :] + 3 * jnp.broadcast_to(jnp.eye(4), (*x.shape[:-2], 4, 4))


FUNCTIONS = {
    "svd": (
        decompositions.svd,
        lambda x: tuple(jnp.linalg.svd(x, full_matrices=False)),
    ),
    "eigh": (
        lambda x: decompositions.eigh(x[..., :3, :3] + x[..., :3, :3].mT),
        lambda x: tuple(jnp.linalg.eigh(x[..., :3, :3] + x[..., :3, :3].mT)),
    ),
    "qr": (decompositions.qr, lambda x: tuple(jnp.linalg.qr(x))),
    "inv": (
        lambda x: decompositions.inv(x[..., :3, :3]),
        lambda x: jnp.linalg.inv(x[..., :3, :3]),
    ),
    "cholesky": (
        lambda x: decompositions.cholesky(_positive(x)),
        lambda x: jnp.linalg.cholesky(_positive(x)),
    ),
    "solve_lower": (
        lambda x: decompositions.solve_lower(_steep(x), x.mT),
        lambda x: jax.scipy.linalg.solve_triangular(_steep(x), x.mT, lower=True),
    ),
    "solve_transposed": (
        lambda x: decompositions.solve_transposed(_steep(x), x.mT),
        lambda x: jax.scipy.linalg.solve_triangular(
            _steep(x), x.mT, trans=1, lower=True
        ),
    ),
}


@pytest.fixture(scope="module")
def stack():
    return jax.random.normal(jax.random.key(0), (3, 2, 5, 4))


@pytest.fixture(params=FUNCTIONS)
def pair(request):
    return FUNCTIONS[request.param]


def ranks(function, x):
    """Number of batch axes of each LAPACK call that a CPU would run."""
    text = jax.jit(function).trace(x).lower(lowering_platforms=("cpu",)).as_text()
    return {int(n) for n in re.findall(r'num_batch_dims = "(\d+)"', text)}


def test_a_stack_gives_what_its_matrices_give(pair, stack):
    ours, theirs = pair
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        jax.jit(ours)(stack),
        jax.jit(theirs)(stack),
    )


@pytest.mark.parametrize("mapped", [lambda f: f, jax.vmap], ids=["plain", "vmap"])
def test_a_cpu_never_gets_more_than_one_matrix_in_a_call(pair, stack, mapped):
    ours, theirs = pair
    assert ranks(mapped(ours), stack) == {0}
    assert ranks(mapped(theirs), stack) == {2}  # so the search finds what it looks for


def test_accelerators_get_the_whole_stack(pair, stack):
    ours, _ = pair
    lowered = jax.jit(ours).trace(stack).lower(lowering_platforms=("cuda",))
    assert "while" not in lowered.as_text()


def test_derivatives_are_those_of_jax(pair, stack):
    def slope(function):
        def loss(x):
            return sum(jnp.sum(jnp.abs(y) ** 3) for y in jax.tree.leaves(function(x)))

        return jax.jit(jax.vmap(jax.grad(loss)))(stack)

    ours, theirs = map(slope, pair)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_stacks_on_two_devices_do_not_wait_for_each_other():
    # With `jnp.linalg.svd` this hangs within a few rounds on two cores.
    code = """
import sys
sys.path.insert(0, sys.argv[1])
import jax, jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec as P
from optax_cl._core import decompositions
jax.config.update("jax_num_cpu_devices", 2)
mesh = jax.make_mesh((2,), ("lanes",), axis_types=(AxisType.Auto,))
def one(seed):
    x = jax.random.normal(jax.random.key(seed), (12, 4, 32, 32))
    return [decompositions.svd(x[i])[1] for i in range(12)]
run = jax.jit(jax.shard_map(jax.vmap(one), mesh=mesh, in_specs=P("lanes"),
                            out_specs=P("lanes"), check_vma=False))
for i in range(15):
    jax.block_until_ready(run(jnp.arange(8) + i))
"""
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", code, str(root)], check=True, timeout=180)
