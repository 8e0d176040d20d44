"""DER: the logits of replayed examples are held to those stored with them."""

import chex
import jax.numpy as jnp

from optax_cl._core import checks
from optax_cl._core import logits as logits_lib


def der_loss(
    logits: chex.Array, stored_logits: chex.Array, *, reduction: str = "mean"
) -> chex.Array:
    r"""Loss of dark experience replay, one number per replayed example.

    With logits :math:`h(x) \in \mathbb R^C` and those stored with :math:`x`,
    :math:`z`, when it was seen first,

    .. math:: \ell = \frac1C \sum_c (h_c(x) - z_c)^2

    The two objectives built of it differ in what is drawn from the memory:

    .. math::
      \text{DER:} &\quad \mathrm{CE}(\text{batch}) + \alpha\, \mathbb E_{(x, z)}\,\ell
      \\
      \text{DER++:} &\quad \mathrm{CE}(\text{batch}) + \alpha\, \mathbb E_{(x, z)}\,
      \ell + \beta\, \mathbb E_{(x', y')}\, \mathrm{CE}(x', y')

    The first term is on the *current* batch; labels of the memory are used by DER++
    alone, on a second draw, independent of the first. It needs no task boundaries.

    Keep inputs, logits (and for DER++ labels) in a ``replay.reservoir_init`` buffer,
    and add a batch with the logits of the step that used it: those from *before* its
    update, in training mode. They are not refreshed. Logits are matched as they are: a
    constant added to all of them is an error here, as it is not for a softmax.

    **Placement.** In the loss: its gradient is part of the raw gradient. To keep the
    raw gradient that of the current batch, give the gradient of the memory's terms to
    ``mix_replay`` instead.

    **Memory** is C numbers per stored example beside its input, **time** one forward
    and backward pass on the replay batch, two for DER++.

    Args:
      logits: ``[..., C]``, of the network in training, on replayed inputs. Any real
        floating-point dtype; arithmetic is in float32 at least.
      stored_logits: ``[..., C]``, the same shape. Gets no gradient.
      reduction: Over classes: ``"mean"``, which the :math:`\alpha` of the authors'
        repository belong to, or ``"sum"``, the squared norm, for which they are C
        times too large.

    Returns:
      The losses, ``[...]``, in float32 at least. Infinite logits count as the largest
      finite number, NaN gives NaN.

    Raises:
      ValueError: For logits of two shapes, or an unknown reduction.
      TypeError: For logits that are not real floating-point arrays.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_cl import replay
      >>> logits = jnp.array([[1., 2.], [0., 3.]])
      >>> stored = jnp.array([[1., 0.], [0., 3.]])
      >>> print(replay.der_loss(logits, stored))
      [2. 0.]
      >>> print(replay.der_loss(logits, stored, reduction="sum"))
      [4. 0.]

    References:
      Buzzega et al, `Dark Experience for General Continual Learning: a Strong, Simple
      Baseline <https://arxiv.org/abs/2004.07211>`_, 2020

    Differs from the paper:
      1. The paper writes the squared norm, its code takes the mean over classes too;
         the default is the code's, which made the published numbers.
    """
    checks.check_choice("reduction", reduction, ("mean", "sum"))
    z = logits_lib.check_logits("logits", logits)
    stored = logits_lib.check_partner("stored_logits", stored_logits, z)
    squares = jnp.square(logits_lib.finite(z) - logits_lib.finite(stored))
    return squares.mean(axis=-1) if reduction == "mean" else squares.sum(axis=-1)
