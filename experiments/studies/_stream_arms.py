"""The arms of the domain stream: what is compared, and how each optimizer is built.

An arm is a family and numbers. All arms of a family share one compilation, so whatever
differs between them (strength, learning rate) is traced.

Routings, by what a modifier's result reaches:

=============  ================  =================
name           first moment      second moment
=============  ================  =================
shared         routed            routed
raw            routed            raw
max            routed            max(raw, routed)
denominator    raw               routed
post           raw, and the modifier acts on the update
=============  ================  =================
"""

from collections.abc import Callable
from typing import NamedTuple

import chex
import optax

import optax_cl
from experiments.studies._stream_program import Family
from optax_cl import penalties, projections, replay


class Arm(NamedTuple):
    """One row of the results.

    Attributes:
      name: As ``--arms`` takes it.
      family: Name of its family.
      routing: Name of its routing; ``"none"`` where nothing is modified.
      second_moment: What the second moment reads: ``"raw"``, ``"max"``, ``"routed"``;
        ``"same"`` where raw and routed are the same at that place.
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


# First and second moment of each routing; after the moments they see one gradient.
MOMENTS = {
    "shared": ("routed", "routed"),
    "raw": ("routed", "raw"),
    "max": ("routed", "max"),
    "denominator": ("raw", "routed"),
    "post": ("routed", "routed"),
}
STRENGTHS = (0.25, 0.5, 0.75, 1.0)
# Rules that decide the strength, and the one number that each of them takes.
RULES: dict[str, tuple[Callable, float]] = {
    "one_minus": (optax_cl.one_minus, 0.5),
    "proportional": (optax_cl.proportional, 1.0),
    "ratchet": (optax_cl.ratchet, 0.75),
    "balance": (optax_cl.balance, 1.0),
    "spring": (optax_cl.spring, 1.0),
}
# Chosen by final loss on three tuning seeds and five domains: replay among .1, .2, .3
# and .5 (at .5 the buffer is learned by heart), EWC among .3, 1 and 3, EWC after the
# moments, where it is in units of Adam's direction, among 30, 100 and 300; for EWC the
# latest anchor too, which beat the sum over all anchors: early solutions of a model
# trained from scratch are poor places to be pulled to.
REPLAY_SHARE = 0.2
EWC_STRENGTH = 1.0
EWC_POST_STRENGTH = 100.0
EWC_ANCHORS = "latest"


def _second(routing: str) -> str:
    return "same" if routing == "post" else MOMENTS[routing][1]


def _adam(common, routing):
    first, second = MOMENTS[routing]
    return optax_cl.scale_by_decoupled_adam(
        b2=common.b2, first_moment=first, second_moment=second
    )


def _plain(common, strength, rate):
    del strength
    return optax.adam(rate, b2=common.b2)


def _placed(modifier, moments, routing):
    """Modifier and moments in the order that the routing wants."""
    return (moments, modifier) if routing == "post" else (modifier, moments)


def _subspace_family(rule: str, routing: str) -> Family:
    make = optax_cl.constant if rule == "constant" else RULES[rule][0]
    pre = routing != "post"

    def build(common, strength, rate):
        modifier = optax_cl.attenuate(make(strength))
        if pre:
            modifier = optax.chain(modifier, optax_cl.measure("strength"))
        moments = optax_cl.measure_gain(_adam(common, routing))
        return optax_cl.protect(
            common.rank,
            optax_cl.measure("overlap"),
            *_placed(modifier, moments, routing),
            optax_cl.measure("leak"),
            optax.scale_by_learning_rate(rate),
            matrices=optax_cl.matrix_views(embeddings="skip"),
        )

    meters = ("overlap", "leak", "gain_inflation", *(("strength",) if pre else ()))
    return Family(f"{rule}-{routing}", build, meters=meters)


def _agem_family(routing: str) -> Family:
    def build(common, strength, rate):
        del strength
        links = _placed(projections.agem(), _adam(common, routing), routing)
        return optax_cl.chain(*links, optax.scale_by_learning_rate(rate))

    return Family(f"agem-{routing}", build, memory="reference_updates")


def _ewc_family(routing: str) -> Family:
    def build(common, strength, rate):
        penalty = penalties.ewc(strength, anchors=EWC_ANCHORS, estimator="sampled")
        links = _placed(penalty, _adam(common, routing), routing)
        return optax_cl.chain(*links, optax.scale_by_learning_rate(rate))

    return Family(f"ewc-{routing}", build)


def _replay_family(routing: str) -> Family:
    def build(common, strength, rate):
        links = replay.mix_replay(strength), _adam(common, routing)
        return optax_cl.chain(*links, optax.scale_by_learning_rate(rate))

    return Family(f"replay-{routing}", build, memory="replay_updates")


def _replay_and_balance(common, strength, rate) -> optax.GradientTransformation:
    # What protects the old domains acts on the current gradient alone; the gradient of
    # the replay batch joins after it.
    return optax_cl.protect(
        common.rank,
        optax_cl.attenuate(optax_cl.balance(strength)),
        replay.mix_replay(REPLAY_SHARE),
        _adam(common, "max"),
        optax.scale_by_learning_rate(rate),
        matrices=optax_cl.matrix_views(embeddings="skip"),
    )


_RULE_ROUTINGS = ("shared", "raw", "max", "post")
_MEMORY_ROUTINGS = ("shared", "raw", "max")

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family("plain", _plain),
        *(_subspace_family("constant", routing) for routing in MOMENTS),
        *(_subspace_family(rule, r) for rule in RULES for r in _RULE_ROUTINGS),
        *(_agem_family(routing) for routing in _RULE_ROUTINGS),
        *(_ewc_family(routing) for routing in _RULE_ROUTINGS),
        *(_replay_family(routing) for routing in _MEMORY_ROUTINGS),
        Family("replay+balance-max", _replay_and_balance, memory="replay_updates"),
    )
}


def _modified(name: str, family: str, routing: str, strength: chex.Numeric) -> Arm:
    return Arm(name, family, routing, _second(routing), strength)


ARMS: dict[str, Arm] = {
    arm.name: arm
    for arm in (
        Arm("vanilla", "plain"),
        *(Arm(f"vanilla-lr*{x}", "plain", learning_rate=x) for x in (0.25, 0.5, 2.0)),
        *(
            _modified(f"{routing}-{a}", f"constant-{routing}", routing, a)
            for routing in MOMENTS
            for a in STRENGTHS
        ),
        *(
            _modified(f"{rule}-{routing}", f"{rule}-{routing}", routing, RULES[rule][1])
            for rule in RULES
            for routing in _RULE_ROUTINGS
        ),
        *(_modified(f"agem-{r}", f"agem-{r}", r, 0.0) for r in _RULE_ROUTINGS),
        *(_modified(f"ewc-{r}", f"ewc-{r}", r, EWC_STRENGTH) for r in _MEMORY_ROUTINGS),
        _modified("ewc-post", "ewc-post", "post", EWC_POST_STRENGTH),
        *(
            _modified(f"replay-{r}", f"replay-{r}", r, REPLAY_SHARE)
            for r in _MEMORY_ROUTINGS
        ),
        _modified("replay+balance-max", "replay+balance-max", "max", 1.0),
        Arm("joint", "plain", joint=True),
    )
}

QUICK = ("vanilla", "shared-0.5", "max-0.5", "balance-max", "replay-max")
CORE = (
    "vanilla",
    "vanilla-lr*0.25",
    "vanilla-lr*0.5",
    "shared-0.5",
    "raw-0.5",
    "max-0.5",
    "post-1.0",
    "one_minus-raw",
    "balance-max",
    "agem-shared",
    "ewc-shared",
    "ewc-raw",
    "replay-shared",
    "replay-raw",
    "replay+balance-max",
    "joint",
)
