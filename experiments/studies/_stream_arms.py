"""The arms of the domain stream: what is compared, and how each optimizer is built.

An arm is a family and numbers. All arms of a family share one compilation, so whatever
differs between them (strength, learning rate) is traced.
"""

from typing import NamedTuple

import optax

import optax_cl
from experiments.studies._stream_program import Family
from optax_cl import replay

B2 = 0.99  # The second moment forgets within a task of 250 steps.


class Arm(NamedTuple):
    """One row of the results.

    Attributes:
      name: As ``--arms`` takes it.
      family: Name of its family.
      routing: Which gradient each moment reads, in words.
      second_moment: What the second moment reads: ``"raw"``, ``"max"``, ``"routed"``;
        ``"same"`` where no modifier makes a difference between them.
      strength: The family's number.
      learning_rate: Factor on the run's learning rate.
      joint: Train on all domains at once.
    """

    name: str
    family: str
    routing: str = "none"
    second_moment: str = "same"
    strength: float = 0.0
    learning_rate: float = 1.0
    joint: bool = False


def _plain(strength, rate):
    del strength
    return optax.adam(rate, b2=B2)


def _replay(second_moment):
    def build(strength, rate):
        return optax_cl.chain(
            replay.mix_replay(strength),
            optax_cl.scale_by_decoupled_adam(b2=B2, second_moment=second_moment),
            optax.scale_by_learning_rate(rate),
        )

    return build


_ROUTING = {"shared": "routed", "raw": "raw", "max": "max"}

FAMILIES = {
    family.name: family
    for family in (
        Family("plain", _plain),
        *(
            Family(f"replay-{name}", _replay(moment), memory="replay_updates")
            for name, moment in _ROUTING.items()
        ),
    )
}

ARMS = {
    arm.name: arm
    for arm in (
        Arm("vanilla", "plain"),
        Arm("vanilla-lr/4", "plain", learning_rate=0.25),
        Arm("vanilla-lr/2", "plain", learning_rate=0.5),
        Arm("vanilla-lr*2", "plain", learning_rate=2.0),
        Arm("joint", "plain", joint=True),
        *(
            Arm(f"replay-{name}", f"replay-{name}", name, moment, 0.5)
            for name, moment in _ROUTING.items()
        ),
    )
}

QUICK = ("vanilla", "replay-max")
CORE = ("vanilla", "vanilla-lr/2", "replay-shared", "replay-raw", "joint")
