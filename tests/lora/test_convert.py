"""One form of adapters as the other."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_cl import lora
from tests.arrays import distance, normal


@pytest.mark.parametrize("batch", [(), (3,)])
@pytest.mark.parametrize("shape", [(7, 4), (4, 7), (4, 4)])
def test_to_spectral_is_the_thin_svd_of_the_product(batch, shape):
    adapter = lora.LoRA(normal(7, *batch, shape[0], 3), normal(8, *batch, 3, shape[1]))
    spectral = jax.jit(lora.to_spectral)({"w": adapter})["w"]
    a, b = (np.asarray(f, np.float64) for f in adapter)
    singular = np.linalg.svd(a @ b, compute_uv=False)[..., :3]
    np.testing.assert_allclose(spectral.s, singular, rtol=1e-5)
    np.testing.assert_allclose(lora.product(spectral), a @ b, rtol=1e-4, atol=1e-5)
    for side in (spectral.u, spectral.v):
        gram = np.swapaxes(side, -1, -2) @ side
        np.testing.assert_allclose(
            gram, np.broadcast_to(np.eye(3), gram.shape), atol=1e-5
        )


def test_signs_are_settled():
    a, b = normal(7, 5, 2), normal(8, 2, 4)
    convert = jax.jit(lora.to_spectral)
    one = convert({"w": lora.LoRA(a, b)})["w"]
    other = convert({"w": lora.LoRA(-a, -b)})["w"]
    chex.assert_trees_all_close(one, other, atol=1e-5)
    v = np.asarray(one.v)
    assert (v[np.abs(v).argmax(0), np.arange(2)] > 0).all()


@pytest.mark.parametrize("zero", ["a", "b", "both"])
def test_a_zero_update_has_orthonormal_sides_and_no_nan(zero):
    a = jnp.zeros((5, 2)) if zero != "b" else jnp.ones((5, 2))
    b = jnp.zeros((2, 4)) if zero != "a" else jnp.ones((2, 4))
    spectral = jax.jit(lora.to_spectral)({"w": lora.LoRA(a, b)})["w"]
    np.testing.assert_allclose(spectral.s, 0.0, atol=1e-6)
    for side in (spectral.u, spectral.v):
        np.testing.assert_allclose(side.T @ side, np.eye(2), atol=1e-5)


@pytest.mark.parametrize("s", [-2.0, np.array([3.0, -0.5])])
def test_to_lora_keeps_the_product_bitwise(s):
    (u, _), (v, _) = (np.linalg.qr(normal(9, n, 2)) for n in (5, 4))
    s = jnp.asarray(s, jnp.float32)
    adapters = {"w": lora.Spectral(s, jnp.asarray(u), jnp.asarray(v))}
    back = lora.to_lora(adapters)
    assert isinstance(back["w"], lora.LoRA)
    assert distance(lora.product(back["w"]), lora.product(adapters["w"])) == 0
    np.testing.assert_allclose(
        lora.product(lora.to_spectral(back)["w"]), lora.product(back["w"]), atol=1e-6
    )


def test_each_form_passes_through_its_own_conversion():
    adapter = lora.LoRA(jnp.ones((3, 1)), jnp.ones((1, 2)))
    assert distance(lora.to_lora({"w": adapter})["w"], adapter) == 0
    spectral = lora.to_spectral({"w": adapter})
    assert lora.to_spectral(spectral)["w"] is spectral["w"]


@pytest.mark.parametrize("convert", [lora.to_lora, lora.to_spectral])
def test_parameters_are_no_adapters(convert):
    with pytest.raises(TypeError, match="must hold LoRA or Spectral only"):
        convert({"kernel": jnp.ones((3, 2))})
