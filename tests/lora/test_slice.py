"""Starts by gradient surgery: their invariants, against float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optax_cl import lora, matrix_views
from optax_cl._core import surgery

merge, dense = jax.jit(lora.merge), jax.jit(lora.dense)
OPTIONS = ("granularity", "gate", "selection", "scaling", "svd")
slice_init = jax.jit(lora.slice_init, static_argnames=OPTIONS)

SEEDS = st.integers(0, 2**31 - 1)
RANK = 3
SHAPES = {"tall": (14, 9), "wide": (8, 12)}


def normal(rng, shape, dtype=jnp.float32):
    return rng.normal(size=shape).astype(dtype)


def case(seed=0, *, conflict=True, dtype=jnp.float32, rank=RANK):
    """Parameters, targets, gradients and a reference, conflicting or not."""
    rng = np.random.default_rng(seed)
    params = {p: normal(rng, s, dtype) for p, s in SHAPES.items()}
    g = {p: normal(rng, s, dtype) for p, s in SHAPES.items()}
    sign = -1 if conflict else 1
    r = {p: sign * g[p] + normal(rng, s, dtype) / 2 for p, s in SHAPES.items()}
    chosen = lora.targets(params, {"": rank}, alpha=2.0, rslora=True)
    return chosen, params, g, r


def project_in_float64(g, r, c):
    g, r = np.float64(g), np.float64(r)
    return g - c * min((g * r).sum(), 0.0) / (r * r).sum() * r


def blocks_in_float64(gradient, rank):
    """Orthonormal columns: the published A0.T and B0, of the [out, in] gradient."""
    u, _, vt = np.linalg.svd(np.float64(gradient).T)
    return vt[rank : 2 * rank].T, u[:, :rank]


def cosine(x, y):
    return (x * y).sum() / np.linalg.norm(x) / np.linalg.norm(y)


def bits(tree):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


def products(start):
    return {p: np.float64(x.a) @ np.float64(x.b) for p, x in start.adapters.items()}


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_the_factors_span_the_published_blocks_of_the_operated_gradient(strength):
    chosen, params, g, r = case()
    start = lora.slice_init(chosen, params, g, r, strength=strength)
    for path, adapter in start.adapters.items():
        kept = project_in_float64(g[path], r[path], strength)
        a0, b0 = blocks_in_float64(kept, RANK)
        # A and B swapped would span other spaces; compared free of the signs.
        for found, expected in ((adapter.a, a0), (adapter.b.T, b0)):
            found = np.float64(found)
            beta2 = np.linalg.norm(found) ** 2 / RANK
            np.testing.assert_allclose(
                found @ found.T / beta2, expected @ expected.T, atol=2e-4
            )


def test_the_top_selection_takes_the_first_block_of_both():
    chosen, params, g, r = case()
    start = lora.slice_init(chosen, params, g, r, selection="top", scaling="none")
    for path in start.adapters:
        kept = project_in_float64(g[path], r[path], 1.0)
        v, _, ut = np.linalg.svd(kept, full_matrices=False)
        # Free of signs, since both factors change theirs together.
        np.testing.assert_allclose(
            products(start)[path], v[:, :RANK] @ ut[:RANK], atol=1e-4
        )


def test_signs_are_fixed_by_the_largest_entry_of_the_input_side():
    # The product of disjoint blocks depends on the signs; a convention settles it.
    chosen, params, g, _ = case()
    start = lora.slice_init(chosen, params, g, scaling="none")
    for path, adapter in start.adapters.items():
        v, _, ut = np.linalg.svd(np.float64(g[path]), full_matrices=False)
        signs = np.sign(v[np.abs(v).argmax(axis=0), np.arange(v.shape[1])])
        v, ut = v * signs, signs[:, None] * ut
        np.testing.assert_allclose(adapter.a, v[:, RANK : 2 * RANK], atol=1e-4)
        np.testing.assert_allclose(adapter.b, ut[:RANK], atol=1e-4)


@given(SEEDS)
@settings(max_examples=10)
def test_the_function_is_preserved(seed):
    chosen, params, g, r = case(seed)
    start = lora.slice_init(chosen, params, g, r)
    merged = merge(chosen, start.params, start.adapters)
    x = normal(np.random.default_rng(seed), (5, 14))
    for path, kernel in params.items():
        assert np.abs(np.asarray(start.params[path]) - kernel).max() > 1e-2
        np.testing.assert_allclose(merged[path], kernel, atol=1e-6)
    np.testing.assert_allclose(
        dense(x, start.params["tall"], start.adapters["tall"], chosen["tall"].scale),
        x @ params["tall"],
        atol=1e-5,
    )


def test_the_absorbed_share_of_the_weights_is_the_scale_times_root_rho():
    rng = np.random.default_rng(0)
    params, g = ({"w": normal(rng, (64, 64))} for _ in range(2))
    chosen = lora.targets(params, {"w": 8}, alpha=2.0, rslora=True)
    start = lora.slice_init(chosen, params, g)
    share = np.linalg.norm(
        params["w"] - np.asarray(start.params["w"])
    ) / np.linalg.norm(params["w"])
    rho = np.log(8) / np.log(64)
    np.testing.assert_allclose(share, chosen["w"].scale * rho**0.5, rtol=2e-2)
    assert 0.49 < share < 0.51


@given(SEEDS)
@settings(max_examples=10)
def test_the_product_has_the_variance_of_the_kernel_times_rho(seed):
    chosen, params, g, r = case(seed)
    start = lora.slice_init(chosen, params, g, r)
    for path, ab in products(start).items():
        rho = np.log(RANK) / np.log(min(ab.shape))
        kernel = np.float64(params[path])
        np.testing.assert_allclose(ab.var(ddof=1), rho * kernel.var(ddof=1), rtol=1e-4)


def test_the_magnitude_is_the_published_one():
    # With unbiased variances; their ratio would be the same with biased ones.
    chosen, params, g, r = case()
    start = lora.slice_init(chosen, params, g, r)
    for path, adapter in start.adapters.items():
        kept = project_in_float64(g[path], r[path], 1.0)
        v, _, ut = np.linalg.svd(kept, full_matrices=False)
        signs = np.sign(v[np.abs(v).argmax(axis=0), np.arange(v.shape[1])])
        v, ut = v * signs, signs[:, None] * ut
        ab = v[:, RANK : 2 * RANK] @ ut[:RANK]
        rho = np.log(RANK) / np.log(min(ab.shape))
        kernel = np.float64(params[path])
        beta = (rho * kernel.var(ddof=1) / ab.var(ddof=1)) ** 0.25
        np.testing.assert_allclose(
            np.linalg.norm(adapter.a, axis=0), np.full(RANK, beta), rtol=1e-4
        )


def test_every_singular_value_is_the_same_since_the_gradients_are_not_used(x64):
    chosen, params, g, r = case(dtype=jnp.float64)
    start = lora.slice_init(chosen, params, g, r)
    for path, adapter in start.adapters.items():
        a, b = np.asarray(adapter.a), np.asarray(adapter.b)
        assert a.dtype == np.float64
        s = np.linalg.svd(a @ b)[1][:RANK]
        np.testing.assert_allclose(s, s[0], rtol=1e-12)
        for gram in (a.T @ a, b @ b.T):
            np.testing.assert_allclose(gram, s[0] * np.eye(RANK), atol=1e-12)
        # The gradient's own are spread, so the wrong form would be seen.
        spread = np.linalg.svd(g[path])[1][:RANK]
        assert spread[0] / spread[-1] > 1.1


def test_the_first_step_along_the_operated_gradient_is_its_best_approximation(x64):
    chosen, params, g, r = case(dtype=jnp.float64)
    eta = 1e-7
    for selection, blocks in (("disjoint", 2), ("top", 1)):
        start = lora.slice_init(chosen, params, g, r, selection=selection)
        for path, adapter in start.adapters.items():
            a, b = map(np.asarray, adapter)
            kept, scale = project_in_float64(g[path], r[path], 1.0), chosen[path].scale
            a2, b2 = a - eta * scale * kept @ b.T, b - eta * scale * a.T @ kept
            moved = scale * (a2 @ b2 - a @ b)
            u, s, vt = np.linalg.svd(kept, full_matrices=False)
            best = (u * s)[:, : blocks * RANK] @ vt[: blocks * RANK]
            beta2 = np.linalg.norm(a) ** 2 / RANK
            factor = 3 - blocks  # twice as long where both factors see one block
            np.testing.assert_allclose(
                moved,
                -factor * eta * scale**2 * beta2 * best,
                atol=1e-5 * np.abs(moved).max(),
            )


def test_disjoint_blocks_give_a_product_orthogonal_to_the_operated_gradient(x64):
    chosen, params, g, r = case(dtype=jnp.float64)
    for selection, low, high in (("disjoint", -1e-12, 1e-12), ("top", 0.5, 1.0)):
        start = lora.slice_init(chosen, params, g, r, selection=selection)
        for path, ab in products(start).items():
            kept = project_in_float64(g[path], r[path], 1.0)
            assert low <= cosine(ab, kept) <= high


@pytest.mark.parametrize("granularity", ["leaf", "global"])
def test_without_conflict_it_is_lora_ga_to_the_bit(granularity):
    chosen, params, g, agreeing = case(conflict=False)
    _, _, _, opposing = case()
    expected = lora.lora_ga_init(chosen, params, g, order="A2rBr", scaling="loram")
    zeros = jax.tree.map(np.zeros_like, g)
    for reference, strength in (
        (None, 1.0),
        (zeros, 1.0),
        (agreeing, 1.0),
        (opposing, 0.0),
    ):
        start = lora.slice_init(
            chosen, params, g, reference, strength=strength, granularity=granularity
        )
        assert bits(start[:2]) == bits(expected[:2])
        assert not any(np.asarray(x) for x in start.diagnostics.gate_open.values())
    other = lora.slice_init(chosen, params, g, opposing, granularity=granularity)
    assert bits(other.adapters) != bits(expected.adapters)


def test_the_gate_reads_every_kernel_or_all_of_them_at_once():
    chosen, params, g, r = case()
    # One kernel conflicts strongly, the other agrees a little.
    r = {"tall": r["tall"], "wide": g["wide"] / 100}
    leaf = lora.slice_init(chosen, params, g, r).diagnostics
    assert {p: bool(x) for p, x in leaf.gate_open.items()} == {
        "tall": True,
        "wide": False,
    }
    np.testing.assert_allclose(leaf.cosine["wide"], 1.0, rtol=1e-5)
    assert leaf.cosine["tall"] < 0 and leaf.overall_cosine < 0
    joint = lora.slice_init(chosen, params, g, r, granularity="global").diagnostics
    assert all(joint.gate_open.values())
    # A stronger agreement elsewhere shuts the one gate for all.
    r["wide"] = 100 * g["wide"]
    joint = lora.slice_init(chosen, params, g, r, granularity="global").diagnostics
    assert not any(joint.gate_open.values())


def test_the_gate_can_be_held_open():
    chosen, params, g, agreeing = case(conflict=False)
    start = lora.slice_init(chosen, params, g, agreeing, gate="always")
    for path, adapter in start.adapters.items():
        g64, r64 = np.float64(g[path]), np.float64(agreeing[path])
        kept = g64 - (g64 * r64).sum() / (r64**2).sum() * r64
        _, b0 = blocks_in_float64(kept, RANK)
        b = np.float64(adapter.b.T)
        gram = b @ b.T / (np.linalg.norm(b) ** 2 / RANK)
        np.testing.assert_allclose(gram, b0 @ b0.T, atol=1e-3)


def test_the_opposite_gradient_has_the_same_subspaces():
    # The start holds no direction of descent: it is absorbed.
    chosen, params, g, _ = case()
    one = lora.slice_init(chosen, params, g, scaling="none")
    two = lora.slice_init(chosen, params, jax.tree.map(np.negative, g), scaling="none")
    for path in g:
        (a, b), (a2, b2) = (map(np.asarray, t.adapters[path]) for t in (one, two))
        np.testing.assert_allclose(a2, a, atol=1e-5)
        np.testing.assert_allclose(b2.T @ b2, b.T @ b, atol=1e-5)


def test_the_first_real_step_still_harms_the_old_task_in_most_conflicts(x64):
    # What the start does not do. The figures stand in the docstring.
    rng = np.random.default_rng(0)
    pairs, n, o, rank = 500, 32, 24, 2

    def low_rank(k):
        return rng.normal(size=(2000, n, k)) @ rng.normal(size=(2000, k, o))

    g, r = low_rank(6), low_rank(3)
    picked = np.flatnonzero((g * r).sum(axis=(1, 2)) < 0)[:pairs]
    g, r = {"w": g[picked]}, {"w": r[picked]}
    params = {"w": rng.normal(size=(pairs, n, o))}
    chosen = lora.targets(
        params, {"w": rank}, alpha=2.0, matrices=matrix_views(stacked="w")
    )

    def harmed(start):
        a, b = map(np.asarray, start.adapters["w"])
        step = -(g["w"] @ b.mT @ b + a @ a.mT @ g["w"])
        return np.mean((step * r["w"]).sum(axis=(1, 2)) > 0)

    with_surgery = harmed(lora.slice_init(chosen, params, g, r))
    without = harmed(lora.slice_init(chosen, params, g))
    np.testing.assert_allclose((with_surgery, without), (0.866, 0.890), atol=0.005)


def test_a_stack_of_layers_is_the_layers_one_by_one():
    rng = np.random.default_rng(0)
    params, g, noise = ({"w": normal(rng, (3, 9, 8))} for _ in range(3))
    signs = np.float32([[[-1]], [[1]], [[-1]]])
    r = {"w": signs * g["w"] + noise["w"] / 3}
    rule = matrix_views(stacked="w")
    chosen = lora.targets(params, {"w": 2}, alpha=2.0, matrices=rule)
    start = slice_init(chosen, params, g, r)
    np.testing.assert_array_equal(start.diagnostics.gate_open["w"], [True, False, True])
    for i in range(3):
        p, gi, ri = ({"w": t["w"][i]} for t in (params, g, r))
        one = slice_init(lora.targets(p, {"w": 2}, alpha=2.0), p, gi, ri)
        for stacked, single in zip(
            jax.tree.leaves(start), jax.tree.leaves(one), strict=True
        ):
            if stacked.ndim > 0:
                np.testing.assert_allclose(np.asarray(stacked)[i], single, atol=2e-5)


def test_it_works_under_jit_and_vmap_over_seeds():
    chosen, params, g, r = case()
    expected = lora.slice_init(chosen, params, g, r)
    for path, found in slice_init(chosen, params, g, r).adapters.items():
        np.testing.assert_allclose(found.a, expected.adapters[path].a, atol=1e-5)
    twice = jax.tree.map(lambda x: np.stack([x, x]), (params, g, r))
    found = jax.jit(jax.vmap(lora.slice_init, (None, 0, 0, 0)))(chosen, *twice)
    np.testing.assert_allclose(
        np.asarray(found.adapters["tall"].b)[1], expected.adapters["tall"].b, atol=1e-5
    )


@pytest.mark.parametrize("fault", [0.0, np.nan, np.inf])
def test_a_useless_gradient_is_named_outside_jit_and_never_nan_inside(fault):
    chosen, params, g, r = case()
    bad = dict(g, wide=np.full(SHAPES["wide"], fault, np.float32))
    with pytest.raises(ValueError, match="`wide`"):
        lora.slice_init(chosen, params, bad, r)
    start = slice_init(chosen, params, bad, r)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(start))
    merged = merge(chosen, start.params, start.adapters)
    np.testing.assert_allclose(merged["wide"], params["wide"], atol=1e-5)
    good = lora.slice_init(chosen, params, g, r).adapters["tall"]
    np.testing.assert_allclose(start.adapters["tall"].b, good.b, atol=1e-5)


def test_a_gradient_that_surgery_leaves_nothing_of_is_named():
    chosen, params, g, _ = case()
    with pytest.raises(ValueError, match="leaves nothing"):
        lora.slice_init(chosen, params, g, jax.tree.map(np.negative, g))
    # What rounding alone leaves is nothing either.
    against = jax.tree.map(lambda x: np.float32(-0.3) * x, g)
    kept = jax.jit(surgery.project_conflict)(g["tall"], against["tall"])
    assert 0 < np.abs(kept).max() < 1e-5
    with pytest.raises(ValueError, match="leaves nothing"):
        lora.slice_init(chosen, params, g, against)


def test_a_rank_without_room_for_two_blocks_is_named_with_both_ways_out():
    chosen, params, g, r = case(rank=5)
    with pytest.raises(ValueError, match=r"`tall`.* at most 4.*selection='top'"):
        lora.slice_init(chosen, params, g, r)
    lora.slice_init(chosen, params, g, r, selection="top")


def test_rank_one_and_constant_kernels_have_no_magnitude():
    chosen, params, g, r = case(rank=1)
    with pytest.raises(ValueError, match=r"rank 1.*would be zero"):
        lora.slice_init(chosen, params, g, r)
    lora.slice_init(chosen, params, g, r, scaling="none")
    chosen, params, g, r = case()
    params["wide"] = np.ones(SHAPES["wide"], np.float32)
    with pytest.raises(ValueError, match="`wide` the kernel is constant"):
        lora.slice_init(chosen, params, g, r)
    start = slice_init(chosen, params, g, r)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(start))


def test_gradients_of_another_model_are_refused():
    chosen, params, g, r = case()
    with pytest.raises(ValueError, match="`gradients` must map the paths"):
        lora.slice_init(chosen, params, {"tall": g["tall"]}, r)
    with pytest.raises(ValueError, match=r"`reference` .*`wide` expected"):
        lora.slice_init(chosen, params, g, dict(r, wide=r["wide"].T))
    for bad in (
        {"selection": "both"},
        {"scaling": "stable"},
        {"svd": "fast"},
        {"gate": "x"},
        {"granularity": "module"},
        {"strength": 2.0},
    ):
        with pytest.raises(ValueError, match=f"`{next(iter(bad))}` must be"):
            lora.slice_init(chosen, params, g, r, **bad)


def test_the_randomized_decomposition_meets_the_exact_one():
    rng = np.random.default_rng(0)
    shape = (96, 80)
    # A spectrum that falls, as that of gradients does.
    u, _, vt = np.linalg.svd(rng.normal(size=shape), full_matrices=False)
    g = {"w": np.float32((u * 0.8 ** np.arange(80)) @ vt)}
    params = {"w": normal(rng, shape)}
    chosen = lora.targets(params, {"w": 4}, alpha=2.0)
    exact = lora.slice_init(chosen, params, g, svd="exact").adapters["w"]
    for key in (None, jax.random.key(1)):
        found = lora.slice_init(chosen, params, g, svd="randomized", key=key)
        np.testing.assert_allclose(found.adapters["w"].a, exact.a, atol=1e-3)
        np.testing.assert_allclose(found.adapters["w"].b, exact.b, atol=1e-3)


@pytest.mark.parametrize("size", [1e-30, 1e30])
@pytest.mark.parametrize("svd", ["exact", "randomized"])
def test_gradients_of_any_size_give_the_same_start(size, svd):
    chosen, params, g, _ = case()
    expected = lora.slice_init(chosen, params, g, svd=svd).adapters["tall"]
    scaled = jax.tree.map(lambda x: np.float32(size) * x, g)
    found = lora.slice_init(chosen, params, scaled, svd=svd).adapters["tall"]
    np.testing.assert_allclose(found.a, expected.a, atol=1e-4)
