import jax.numpy as jnp
import numpy as np
import pytest

from optax_cl._core import places


def test_stacked_states_are_full_where_one_of_them_is():
    places.check_left(np.int32([0, 1]), 2, "`overflow='drop'`")
    with pytest.raises(ValueError, match=r"all 2 places.*build .* `overflow='drop'`"):
        places.check_left(np.int32([2, 1]), 2, "`overflow='drop'`")


@pytest.mark.parametrize("stack", [(), (3,)])
def test_added_places_are_empty_and_behind_those_that_are_taken(stack):
    stored = {"w": np.ones((*stack, 2, 4), np.float32), "b": np.ones((*stack, 2))}
    more = places.add(stored, jnp.zeros(stack, jnp.int32), 5)
    assert more["w"].shape == (*stack, 5, 4) and more["b"].shape == (*stack, 5)
    for x in (more["w"][..., 0], more["b"]):
        np.testing.assert_array_equal(x, np.broadcast_to([1, 1, 0, 0, 0], (*stack, 5)))
