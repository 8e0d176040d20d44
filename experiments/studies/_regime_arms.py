"""The arms of the regime map: a routing, a rule, and one number.

All arms of a routing share one compilation: the rule is picked by a traced index, its
number is traced, and so are learning rates. Plain Adam is the constant rule at zero.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import optax

import optax_cl

# Routing -> (second moment, whether the modifier stands after the moments).
ROUTINGS = {
    "max": ("max", False),
    "raw": ("raw", False),
    "shared": ("routed", False),
    "post": ("routed", True),
}
# Rules by the index that picks them, and what their number is called.
RULES: dict[str, Callable[[Any], optax_cl.Rule]] = {
    "constant": optax_cl.constant,
    "one_minus": optax_cl.one_minus,
    "proportional": optax_cl.proportional,
    "ratchet": optax_cl.ratchet,
    "balance": optax_cl.balance,
    "spring": optax_cl.spring,
}
B2 = 0.99  # decay of Adam's second moment, carried over boundaries


class Arm(NamedTuple):
    """One column of the map.

    Attributes:
      name: As tables and figures call it.
      routing: A key of ``ROUTINGS``, or ``"replay"``.
      rule: A key of ``RULES``; unread by ``"replay"``.
      strength: The rule's number, or the share of the replay gradient.
      temperature: Of the logits under which curvature is taken.
    """

    name: str
    routing: str
    rule: str = "constant"
    strength: float = 0.0
    temperature: float = 1.0


def _arms() -> dict[str, Arm]:
    arms = [Arm("vanilla", "max")]
    for routing in ("max", "post", "raw", "shared"):
        for a in (0.25, 0.5, 0.75, 0.9, 1.0):
            arms.append(Arm(f"{routing} {a:g}", routing, "constant", a))
    arms.append(Arm("one_minus .5", "max", "one_minus", 0.5))
    arms.append(Arm("proportional 1", "max", "proportional", 1.0))
    for a in (0.5, 0.75, 0.9):
        arms.append(Arm(f"ratchet {a:g}", "max", "ratchet", a))
    for kappa in (0.3, 1.0, 3.0, 10.0, 30.0):
        arms.append(Arm(f"balance {kappa:g}", "max", "balance", kappa))
    for t in (2.0, 4.0):
        arms.append(Arm(f"balance 1, T={t:g}", "max", "balance", 1.0, t))
    arms.append(Arm("raw balance 3", "raw", "balance", 3.0))
    arms.append(Arm("post balance 1", "post", "balance", 1.0))
    arms.append(Arm("spring 1", "max", "spring", 1.0))
    for share in (0.5, 0.8):
        arms.append(Arm(f"replay {share:g}", "replay", "constant", share))
    return {arm.name: arm for arm in arms}


ARMS = _arms()
CONSTANTS = tuple(
    arm.name
    for arm in ARMS.values()
    if arm.rule == "constant" and arm.routing in ("max", "post") and arm.strength
)


def choice(index: chex.Array, rules: tuple[optax_cl.Rule, ...]) -> optax_cl.Rule:
    """The rule at a traced index; outside ``vmap`` only that one is computed."""

    def apply(coeffs, context, states):
        def branch(i, rule):
            def run(coeffs, context, states):
                new, state = rule.apply(coeffs, context, states[i])
                return new, (*states[:i], state, *states[i + 1 :])

            return run

        branches = [branch(i, rule) for i, rule in enumerate(rules)]
        return jax.lax.switch(index, branches, coeffs, context, states)

    return optax_cl.Rule(
        apply,
        frozenset().union(*(rule.needs for rule in rules)),
        lambda params: tuple(rule.init(params) for rule in rules),
    )


def optimizer(
    routing: str, rank: int, rule: chex.Array, strength: chex.Array, rate: chex.Array
) -> optax.GradientTransformationExtraArgs:
    """An arm's optimizer; all but the routing and the rank may be tracers.

    Args:
      routing: A key of ``ROUTINGS``, or ``"replay"``.
      rank: Columns of every basis.
      rule: int32 [], index into ``RULES``.
      strength: float32 [], the rule's number.
      rate: float32 [], the learning rate.

    Returns:
      The optimizer.
    """
    descend = optax.scale_by_learning_rate(rate)
    if routing == "replay":
        moments = optax_cl.scale_by_decoupled_adam(b2=B2)
        return optax_cl.chain(optax_cl.mix_replay(strength), moments, descend)
    second, post = ROUTINGS[routing]
    moments = optax_cl.scale_by_decoupled_adam(b2=B2, second_moment=second)
    rules = tuple(make(strength) for make in RULES.values())
    modifier = optax_cl.attenuate(choice(rule, rules))
    links = (moments, modifier) if post else (modifier, moments)
    return optax_cl.protect(rank, optax_cl.measure("overlap"), *links, descend)
