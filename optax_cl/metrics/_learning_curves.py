"""What can be read off curves of the first batches of every task."""

from optax_cl._core import checks
from optax_cl.metrics import _arrays
from optax_cl.metrics._arrays import Array


def learning_curve_area(learning_curves: Array, *, beta: int = 10) -> Array:
    r"""Area under the learning curve of the first batches (:math:`\mathrm{LCA}_\beta`).

    .. math::
      \mathrm{LCA}_\beta = \frac{1}{\beta+1} \sum_{b=0}^{\beta} Z_b,
      \qquad Z_b = \frac1T \sum_{j=1}^{T} z_{j,b}

    where :math:`z_{j,b}` is measured on task ``j`` after ``b`` batches of it; ``b = 0``
    is zero-shot and counts. A level: it keeps the unit of the curves.

    Args:
      learning_curves: ``[..., T, B]`` with ``B >= beta + 1``; later columns are not
        read.
      beta: Number of batches.

    Returns:
      ``[...]``.

    Raises:
      TypeError: If ``beta`` is no integer.
      ValueError: If ``beta`` is not positive, the curves are too short, or an entry
        read is not finite.

    Example:
      >>> from optax_cl import metrics
      >>> curves = [[0.25, 0.5, 0.75], [0.25, 0.75, 1.0]]
      >>> print(metrics.learning_curve_area(curves, beta=1))
      0.4375

    References:
      Chaudhry et al., `Efficient Lifelong Learning with A-GEM
      <https://arxiv.org/abs/1812.00420>`_, 2019.
    """
    checks.check_positive_int("beta", beta)
    curves = _arrays.as_float("learning_curves", learning_curves)
    if curves.ndim < 2 or curves.shape[-2] < 1 or curves.shape[-1] < beta + 1:
        raise ValueError(
            "`learning_curves` must have shape [..., T, B] with at least beta + 1 = "
            f"{beta + 1} columns (column 0 is before the first batch); got "
            f"{curves.shape}. Record more batches or lower `beta`."
        )
    curves = curves[..., : beta + 1]
    _arrays.check_finite("learning_curves", curves, "learning_curve_area")
    return curves.mean((-2, -1))
