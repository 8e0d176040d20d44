"""What a pre-trained model pays for learning on: probes after every stage."""

from typing import NamedTuple

import jax
import numpy as np

from optax_cl.metrics import _arrays
from optax_cl.metrics._arrays import Array


class AbilityTax(NamedTuple):
    """Losses of ability after each of S stages on each of J probes."""

    total: Array  # [..., S, J], lost since the base model.
    hop: Array  # [..., S, J], lost in this stage; the hops add up to the total.
    mean: Array  # [..., S], of the total over probes.
    worst: Array  # [..., S], the largest total of any probe.
    retained: (
        Array | None
    )  # [..., S, J], share of the ability above chance that is left.


def ability_tax(
    probes: Array, *, chance: Array | None = None, higher_is_better: bool = True
) -> AbilityTax:
    r"""Abilities that a model had before the first task, and lost since.

    With :math:`a_{s,j}` on probe :math:`j` (a benchmark of no task) after stage
    :math:`s`, where stage 0 is the model as it came, and chance level :math:`c_j`:

    .. math::
      \mathrm{tax}_{s,j} = a_{0,j} - a_{s,j} = \sum_{k \le s} (a_{k-1,j} - a_{k,j}),
      \qquad \mathrm{retained}_{s,j} = \frac{a_{s,j} - c_j}{a_{0,j} - c_j}

    A mean over probes hides one that collapsed: read ``worst`` beside it. A tax below
    zero is an ability gained. Retained shares can be compared between probes, taxes
    only where probes share a unit.

    Args:
      probes: ``[..., S + 1, J]``, the base model in row 0.
      chance: ``[J]`` or ``[..., J]``: what a model without the ability reaches (one
        over the number of answers, the log of it for a loss). None: no ``retained``.
      higher_is_better: False for losses.

    Returns:
      An :class:`AbilityTax`.

    Raises:
      TypeError: If an argument does not hold real numbers.
      ValueError: If ``probes`` has fewer than two rows, an entry is not finite, or the
        base model is not better than chance on some probe.

    Example:
      >>> from optax_cl import metrics
      >>> tax = metrics.ability_tax([[0.75, 0.5], [0.5, 0.625]], chance=[0.25, 0.25])
      >>> print(tax.total[-1], tax.worst[-1], tax.retained[-1])
      [ 0.25  -0.125] 0.25 [0.5 1.5]

    References:
      Wang et al., `TRACE: A Comprehensive Benchmark for Continual Learning in Large
      Language Models <https://arxiv.org/abs/2310.06762>`_, 2023: the difference of
      general ability.
    """
    probes = _arrays.as_float("probes", probes)
    if probes.ndim < 2 or probes.shape[-2] < 2 or probes.shape[-1] < 1:
        raise ValueError(
            "`probes` must have shape [..., S + 1, J], the base model in row 0 and at "
            f"least one stage after it; got {probes.shape}."
        )
    _arrays.check_finite("probes", probes, "ability_tax")
    scores = _arrays.sign(higher_is_better) * probes
    base, later = scores[..., :1, :], scores[..., 1:, :]
    total = base - later
    retained = None
    if chance is not None:
        floor = _arrays.like_last_axis(
            "chance", chance, probes[..., 0, :], "ability_tax", per="probe"
        )
        ability = base - _arrays.sign(higher_is_better) * floor[..., None, :]
        _check_ability(ability)
        retained = 1.0 - total / ability
    return AbilityTax(
        total=total,
        hop=scores[..., :-1, :] - later,
        mean=total.mean(-1),
        worst=total.max(-1),
        retained=retained,
    )


def _check_ability(ability):
    if isinstance(ability, jax.core.Tracer):
        return
    values = np.asarray(ability)
    if (values <= 0).any():
        probe = int(np.argwhere(values <= 0)[0][-1])
        raise ValueError(
            "the base model must be better than `chance` on every probe, since a "
            f"share of nothing has no value; on probe {probe} it is not. Leave it out, "
            "or pass `chance=None`."
        )
