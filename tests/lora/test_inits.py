"""The other starts of adapters, and what all of them share."""

import functools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import scipy.fft
from flax import nnx

from optax_cl import lora, matrix_views
from optax_cl.lora import _loram

# Two kernels are one matrix shape: an operation on its own is compiled for every shape.
SHAPES = {"conv": (3, 3, 2, 10), "stack": (2, 9, 8), "tall": (18, 10)}
RULE = matrix_views(stacked="stack")
RANK = 3


def normal(rng, shape, dtype=jnp.float32):
    return jnp.asarray(rng.normal(size=shape).astype(dtype))


def case(dtype=jnp.float32, rank=RANK, seed=0):
    rng = np.random.default_rng(seed)
    params = {p: normal(rng, s, dtype) for p, s in SHAPES.items()}
    params["bias"] = normal(rng, (9,), dtype)
    chosen = lora.targets(params, {"": rank}, alpha=2.0, matrices=RULE)
    g = {p: normal(rng, t.matrix_shape) for p, t in chosen.items()}
    return chosen, params, g


def starts(chosen, params, g):
    """One start of every kind."""
    key = jax.random.key(0)
    return {
        "slice": lora.slice_init(chosen, params, g, jax.tree.map(lambda x: x + 1, g)),
        "lora_ga": lora.lora_ga_init(chosen, params, g),
        "loram": lora.loram_init(chosen, params),
        "pissa": lora.pissa_init(chosen, params),
        "lora": lora.lora_init(chosen, params, key),
        "orthogonal": lora.orthogonal_init(chosen, params, key),
    }


STARTS = jax.jit(starts)
# Where a kernel is bfloat16, `lora.merge` is called op by op: a compiler may leave
# roundings out.
merge = jax.jit(lora.merge)


@functools.cache
def starts_op_by_op():
    return starts(*case())


def bits(tree):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


def matrices(params):
    return {
        "conv": np.float64(params["conv"]).reshape(18, 10),
        "stack": np.float64(params["stack"]),
        "tall": np.float64(params["tall"]),
    }


def test_every_start_leaves_the_model_as_it_was():
    chosen, params, _ = case()
    for name, start in starts_op_by_op().items():
        assert start.adapters.keys() == chosen.keys()
        merged = merge(chosen, start.params, start.adapters)
        for path, leaf in params.items():
            np.testing.assert_allclose(merged[path], leaf, atol=1e-6, err_msg=name)
        np.testing.assert_array_equal(start.params["bias"], params["bias"])


def test_absorption_in_bfloat16_is_within_its_rounding():
    chosen, params, g = case(jnp.bfloat16)
    for name, start in STARTS(chosen, params, g).items():
        merged = lora.merge(chosen, start.params, start.adapters)
        for path, adapter in start.adapters.items():
            assert adapter.a.dtype == adapter.b.dtype == jnp.float32
            assert start.params[path].dtype == jnp.bfloat16
            w, frozen, back = (
                matrices(t)[path] for t in (params, start.params, merged)
            )
            ab = chosen[path].scale * np.float64(lora.product(adapter))
            bound = 2.0**-7 * (np.abs(w) + np.abs(ab))
            assert (np.abs(back - w) <= bound).all(), name
            # The difference is taken in float32 and rounded once: a product rounded to
            # bfloat16 before would be off by twice that where the two cancel.
            assert (np.abs(frozen - (w - ab)) <= 2.0**-8 * np.abs(w - ab) + 1e-6).all()


def test_float64_kernels_get_float64_adapters(x64):
    _, params, g = case(jnp.float64)
    chosen, g = lora.targets(params, {"tall": RANK}, alpha=2.0), {"tall": g["tall"]}
    for start in STARTS(chosen, params, g).values():
        assert all(x.dtype == jnp.float64 for x in jax.tree.leaves(start.adapters))
        merged = merge(chosen, start.params, start.adapters)
        np.testing.assert_allclose(merged["tall"], params["tall"], atol=1e-14)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_initial_factors_and_weights_restore_the_frozen_weights_exactly(
    tmp_path, dtype
):
    chosen, params, g = case(dtype)
    start = lora.slice_init(chosen, params, g)
    trained = jax.tree.map(lambda x: np.asarray(x) + np.float32(0.1), start.adapters)
    expected = merge(chosen, start.params, trained)
    saved = {
        "params": params,
        "initial": {p: a._asdict() for p, a in start.adapters.items()},
        "trained": {p: a._asdict() for p, a in trained.items()},
    }
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "adapters", saved)
        checkpointer.wait_until_finished()
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, saved)
        back = checkpointer.restore(tmp_path / "adapters", abstract)
    initial, again = (
        {p: lora.LoRA(**a) for p, a in back[part].items()}
        for part in ("initial", "trained")
    )
    frozen = lora.absorb(chosen, back["params"], initial)
    assert bits(frozen) == bits(start.params)
    assert bits(merge(chosen, frozen, again)) == bits(expected)
    # Merged on the original weights, the start would be counted twice.
    twice = merge(chosen, back["params"], again)
    assert np.abs(np.float32(twice["tall"]) - np.float32(expected["tall"])).max() > 0.1


def test_starts_work_on_the_state_of_an_nnx_module():
    graph, state = nnx.split(nnx.Linear(8, 6, use_bias=False, rngs=nnx.Rngs(0)))
    chosen = lora.targets(state, {"kernel": 2}, alpha=2.0)
    x = np.random.default_rng(0).normal(size=(5, 8)).astype(np.float32)
    batches = [x, x[:3]]

    def loss(state, x):
        return (nnx.merge(graph, state)(x) ** 2).sum(axis=1)

    g = lora.mean_gradients(chosen, loss, state, batches)
    start = lora.slice_init(
        chosen, state, g, jax.tree.map(np.negative, g), strength=0.5
    )
    assert start.diagnostics.gate_open["kernel"]
    merged = nnx.merge(graph, merge(chosen, start.params, start.adapters))
    np.testing.assert_allclose(merged(x), nnx.merge(graph, state)(x), atol=1e-5)


@pytest.mark.parametrize(
    ("order", "first_a", "first_b"),
    [("ArB2r", 0, RANK), ("A2rBr", RANK, 0), ("ArBr", 0, 0)],
)
def test_lora_ga_takes_the_blocks_that_its_order_names(order, first_a, first_b):
    chosen, params, g = case()
    start = lora.lora_ga_init(chosen, params, g, order=order)
    for path, adapter in start.adapters.items():
        a, b = map(np.asarray, adapter)
        # As published, for the [out, in] gradient: A from V, B from U.
        transposed = np.swapaxes(np.float64(g[path]), -1, -2)
        u, _, vt = np.linalg.svd(transposed, full_matrices=False)
        out = transposed.shape[-2]
        size = out**0.5 / 16
        a0 = np.swapaxes(vt[..., first_a : first_a + RANK, :], -1, -2)
        b0 = u[..., first_b : first_b + RANK]
        for found, expected in ((a, a0), (np.swapaxes(b, -1, -2), b0)):
            np.testing.assert_allclose(
                found @ np.swapaxes(found, -1, -2),
                size * expected @ np.swapaxes(expected, -1, -2),
                atol=1e-4,
            )


def test_lora_ga_scales_with_gamma_alone():
    chosen, params, g = case()
    unit = lora.lora_ga_init(chosen, params, g, scaling="none").adapters["tall"]
    four = lora.lora_ga_init(chosen, params, g, gamma=4.0).adapters["tall"]
    np.testing.assert_allclose(
        np.linalg.norm(np.asarray(unit.b), axis=1), 1.0, rtol=1e-5
    )
    expected = 10**0.25 / 2 * np.asarray(unit.a)
    np.testing.assert_allclose(four.a, expected, rtol=1e-6)


def test_lora_ga_names_what_it_can_not_do():
    chosen, params, g = case(rank=5)
    with pytest.raises(ValueError, match=r"`stack`.* at most 4.*order='ArBr'"):
        lora.lora_ga_init(chosen, params, g)
    lora.lora_ga_init(chosen, params, g, order="ArBr")
    chosen, params, g = case()
    g["stack"] = np.asarray(g["stack"]) * [[[1.0]], [[0.0]]]
    with pytest.raises(ValueError, match=r"`stack` \(layer 1 of its stack\)"):
        lora.lora_ga_init(chosen, params, g)
    for bad in ({"order": "BrA2r"}, {"scaling": "big"}, {"gamma": 0.0}, {"svd": "no"}):
        with pytest.raises(ValueError, match=f"`{next(iter(bad))}` must be"):
            lora.lora_ga_init(chosen, params, g, **bad)


def test_loram_starts_in_the_sine_transform():
    chosen, params, _ = case()
    start = lora.loram_init(chosen, params)
    for path, kernel in matrices(params).items():
        for i in np.ndindex(kernel.shape[:-2]):
            a, b = (np.float64(x)[i] for x in start.adapters[path])
            bases = [
                scipy.fft.dst(np.eye(m), type=1, norm="ortho")[:, :RANK]
                for m in kernel.shape[-2:]
            ]
            ab = bases[0] @ bases[1].T
            rho = np.log(RANK) / np.log(min(ab.shape))
            beta = (rho * kernel[i].var(ddof=1) / ab.var(ddof=1)) ** 0.25
            np.testing.assert_allclose(a, beta * bases[0], atol=1e-5)
            np.testing.assert_allclose(b, beta * bases[1].T, atol=1e-5)


def test_the_sine_basis_is_accurate_at_large_sizes():
    # In float32 the plain argument (i+1)(j+1) pi / (m+1) is off by 2e-5 here.
    sines = jax.jit(_loram._sines, static_argnums=(0, 1, 2))
    basis = np.float64(sines(6000, 128, jnp.float32))
    i, j = np.meshgrid(np.arange(1, 6001), np.arange(1, 129), indexing="ij")
    expected = np.sqrt(2 / 6001) * np.sin(i * j * np.pi / 6001)
    np.testing.assert_allclose(basis, expected, atol=5e-8)


def test_pissa_moves_the_principal_part_into_the_adapter():
    chosen, params, _ = case()
    start = lora.pissa_init(chosen, params)
    frozen = matrices(start.params)
    for path, kernel in matrices(params).items():
        u, s, vt = np.linalg.svd(kernel, full_matrices=False)
        principal = (u[..., :RANK] * s[..., None, :RANK]) @ vt[..., :RANK, :]
        np.testing.assert_allclose(frozen[path], kernel - principal, atol=1e-5)
        a, b = map(np.asarray, start.adapters[path])
        # Both factors carry half of the singular values, and the scale is undone.
        expected = s[..., :RANK] / chosen[path].scale
        np.testing.assert_allclose((a**2).sum(axis=-2), expected, rtol=1e-5)
        np.testing.assert_allclose((b**2).sum(axis=-1), expected, rtol=1e-5)


def test_pissa_refuses_a_kernel_without_a_principal_part():
    chosen, params, _ = case()
    for bad in (0.0, np.nan):
        with pytest.raises(ValueError, match="`tall` the kernel is zero or not finite"):
            lora.pissa_init(
                chosen, dict(params, tall=np.full(SHAPES["tall"], bad, np.float32))
            )


@pytest.mark.parametrize("init", [lora.lora_init, lora.orthogonal_init])
def test_starts_with_a_zero_side_leave_every_bit(init):
    chosen, params, _ = case(jnp.bfloat16)
    start = init(chosen, params, jax.random.key(0))
    assert bits(start.params) == bits(params)
    merged = lora.merge(chosen, start.params, start.adapters)
    assert bits(merged) == bits(params)
    assert not any(np.asarray(b).any() for _, b in start.adapters.values())
    # Layers of a stack, and kernels, start apart.
    a = np.asarray(start.adapters["stack"].a)
    assert np.abs(a[0] - a[1]).max() > 0.01
    other = init(chosen, params, jax.random.key(1))
    assert bits(other.adapters) != bits(start.adapters)


def test_the_plain_start_is_uniform_within_the_root_of_the_fan_in():
    params = {"w": np.zeros((400, 50), np.float32)}
    chosen = lora.targets(params, {"w": 40}, alpha=1.0)
    a = lora.lora_init(chosen, params, jax.random.key(0)).adapters["w"].a
    a = np.asarray(a)
    assert 0.049 < np.abs(a).max() <= 0.05
    np.testing.assert_allclose(a.var(), 0.05**2 / 3, rtol=0.03)
    np.testing.assert_allclose(a.mean(), 0.0, atol=1e-3)


def test_the_orthogonal_start_has_orthonormal_columns_in_every_layer():
    chosen, params, _ = case()
    start = lora.orthogonal_init(chosen, params, jax.random.key(0))
    for a in (np.asarray(adapter.a) for adapter in start.adapters.values()):
        gram = np.swapaxes(a, -1, -2) @ a
        np.testing.assert_allclose(
            gram, np.broadcast_to(np.eye(RANK), gram.shape), atol=1e-6
        )


def test_the_orthogonal_start_favours_no_sign():
    params = {"stack": np.zeros((400, 3, 3), np.float32)}
    chosen = lora.targets(params, {"stack": 3}, alpha=1.0, matrices=RULE)
    start = lora.orthogonal_init(chosen, params, jax.random.key(0))
    a = start.adapters["stack"].a
    # The bare Q of a QR decomposition has a first column of fixed sign.
    assert np.abs(np.asarray(a).mean(axis=0)).max() < 0.1


def test_every_start_works_under_jit():
    chosen, params, g = case()
    found = STARTS(chosen, params, g)
    for name, start in starts_op_by_op().items():
        for x, y in zip(
            jax.tree.leaves(found[name].adapters),
            jax.tree.leaves(start.adapters),
            strict=True,
        ):
            np.testing.assert_allclose(x, y, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("svd", ["exact", "randomized"])
def test_a_start_lowers_for_every_platform(svd):
    _, params, g = case()
    params, g = {"stack": params["stack"]}, {"stack": g["stack"]}
    chosen = lora.targets(params, {"": RANK}, alpha=2.0, matrices=RULE)

    def start(params, g):
        return lora.slice_init(chosen, params, g, g, svd=svd)

    jax.export.export(jax.jit(start), platforms=["cpu", "cuda", "tpu"])(params, g)
