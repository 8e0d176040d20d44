"""What a method may register."""

from typing import Any, NamedTuple

import pytest

from optax_cl import boundaries


class State(NamedTuple):
    mu: Any


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((dict, boundaries.Boundary()), "`state_class` must be a NamedTuple class"),
        ((State(0), boundaries.Boundary()), "`state_class` must be a NamedTuple"),
        ((State, lambda state: state), r"`boundary` must be a `Boundary`; got <func"),
    ],
)
def test_what_cannot_take_part_in_a_boundary_is_refused(args, message):
    with pytest.raises(TypeError, match=message):
        boundaries.register_boundary(*args)


def test_moments_that_the_state_does_not_have_are_named():
    with pytest.raises(ValueError, match="State has no field nu; its fields are mu"):
        boundaries.register_moments(State, ("mu",), ("nu",))
    with pytest.raises(ValueError, match="has no field m, u"):
        boundaries.register_moments(State, "mu")
    with pytest.raises(TypeError, match="NamedTuple"):
        boundaries.register_moments(dict, ("mu",))
