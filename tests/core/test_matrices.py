"""Leaves as matrices: the fan-in side by layout, and the way there and back."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optax_cl import MatrixView, matrix_views
from optax_cl._core.matrices import from_matrix, matrix_shape, to_matrix, tree_views


def counting(*shape):
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


@settings(max_examples=12)
@given(st.permutations(range(4)), st.integers(1, 2), st.integers(0, 1))
def test_round_trip_for_every_assignment_of_axes(axes, n_in, n_batch):
    batch, rest = tuple(axes[:n_batch]), tuple(axes[n_batch:])
    view = MatrixView(rest[:n_in], rest[n_in:], batch)
    x = np.arange(24.0).reshape(2, 3, 4, 1)
    matrix = to_matrix(x, view)
    assert matrix.shape == matrix_shape(view, x.shape)
    np.testing.assert_array_equal(from_matrix(matrix, view, x.shape), x)


def test_dense_kernels_by_layout():
    x = counting(3, 5)
    np.testing.assert_array_equal(to_matrix(x, matrix_views()("w", (3, 5))), x)
    out_in = matrix_views(layout="out_in")("w", (3, 5))
    np.testing.assert_array_equal(to_matrix(x, out_in), x.T)


def test_convolutions_by_layout():
    hwio, oihw = counting(2, 3, 4, 5), counting(5, 4, 2, 3)
    view = matrix_views()("conv/kernel", hwio.shape)
    np.testing.assert_array_equal(to_matrix(hwio, view), hwio.reshape(24, 5))
    view = matrix_views(layout="out_in")("conv/weight", oihw.shape)
    np.testing.assert_array_equal(to_matrix(oihw, view), oihw.reshape(5, 24).T)


def test_convolution_matrix_multiplies_patches():
    # The protected side is that of the inputs: a convolution is patches @ matrix.
    x, w = counting(1, 2, 3, 4), counting(2, 3, 4, 5)
    y = jax.lax.conv_general_dilated(
        x, w, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    matrix = to_matrix(w, matrix_views()("conv", w.shape))
    np.testing.assert_allclose(
        np.asarray(y).reshape(1, 5), x.reshape(1, 24) @ matrix, rtol=1e-6
    )


def test_stacked_kernels_have_a_batch_axis():
    rule = matrix_views(stacked="^layers/")
    assert rule("layers/w", (7, 3, 5)) == MatrixView((1,), (2,), (0,))
    assert rule("layers/conv", (7, 2, 2, 3, 5)) == MatrixView((1, 2, 3), (4,), (0,))
    assert rule("layers/b", (7, 5)) is None
    assert rule("head/w", (3, 5)) == MatrixView((0,), (1,))
    out_in = matrix_views(stacked="^layers/", layout="out_in")
    assert out_in("layers/w", (7, 5, 3)) == MatrixView((2,), (1,), (0,))


def test_vectors_and_scalars_are_unprotected():
    assert matrix_views()("b", (5,)) is None
    assert matrix_views()("scale", ()) is None


@pytest.mark.parametrize("path", ["bias", "attn/query/bias", "layers/norm/scale"])
def test_a_bias_of_several_heads_is_no_kernel(path):
    assert matrix_views()(path, (4, 8)) is None
    assert matrix_views(stacked="layers|attn")(path, (3, 4, 8)) is None
    named = matrix_views(override={"bias|scale": MatrixView((0,), (1,))})
    assert named(path, (4, 8)) == MatrixView((0,), (1,))
    assert matrix_views()(f"{path}_of_a_table/kernel", (4, 8)) is not None


def test_embeddings_are_refused_skipped_or_protected_on_their_feature_side():
    with pytest.raises(ValueError, match=r"`Embed_0/embedding`.*embeddings='skip'"):
        matrix_views()("Embed_0/embedding", (100, 8))
    assert matrix_views(embeddings="skip")("embed", (100, 8)) is None
    features = matrix_views(embeddings="features")
    assert matrix_shape(features("embed", (100, 8)), (100, 8)) == (8, 100)
    # A table of positions with a leading axis.
    assert matrix_shape(features("pos_embed", (1, 9, 8)), (1, 9, 8)) == (8, 9)


def test_skip_and_override():
    rule = matrix_views(skip="head", override={"attn/q": MatrixView((0,), (1, 2))})
    assert rule("head/w", (3, 5)) is None
    assert matrix_shape(rule("attn/q", (6, 2, 3)), (6, 2, 3)) == (6, 6)


@pytest.mark.parametrize("shape", [(3, 4, 5), (2, 2, 2, 3, 4)])
def test_unknown_number_of_axes_names_the_ways_out(shape):
    with pytest.raises(ValueError, match=r"`attn/q`.*override="):
        matrix_views()("attn/q", shape)


@pytest.mark.parametrize(
    "view",
    [
        MatrixView((0,), (1,)),
        MatrixView((0,), (1, 1)),
        MatrixView((), (0, 1, 2)),
        MatrixView((0, 1), (3,)),
    ],
)
def test_views_that_do_not_share_out_the_axes_are_refused(view):
    rule = matrix_views(override={"w": view})
    with pytest.raises(ValueError, match="`w` of shape"):
        rule("w", (2, 3, 4))


@pytest.mark.parametrize(
    ("kwargs", "name"),
    [
        ({"layout": "io"}, "layout"),
        ({"embeddings": "keep"}, "embeddings"),
        ({"stacked": "("}, "stacked"),
        ({"skip": 3}, "skip"),
        ({"override": {"[": MatrixView((0,), (1,))}}, "override"),
    ],
)
def test_bad_argument_is_named(kwargs, name):
    with pytest.raises(ValueError, match=f"`{name}`"):
        matrix_views(**kwargs)


def test_equal_rules_are_one_static_node():
    # Otherwise two optimizers built alike would compile twice.
    assert matrix_views(skip="head") == matrix_views(skip="head")
    assert hash(matrix_views(skip="head")) == hash(matrix_views(skip="head"))
    assert jax.tree.leaves(matrix_views()) == []


def test_tree_views_follow_the_order_of_leaves():
    views = tree_views(matrix_views(), {"a": np.zeros((2, 3)), "b": np.zeros(3)})
    assert views == [MatrixView((0,), (1,)), None]
