"""What can be read off the matrix of accuracies (or losses) after each task."""

from collections.abc import Callable

import numpy as np

from optax_cl.metrics import _arrays
from optax_cl.metrics._arrays import Array


def average_accuracy(matrix: Array) -> Array:
    r"""Mean over all tasks at the end of training (AA, or ACC).

    .. math:: \mathrm{AA} = \frac1T \sum_{j=1}^{T} a_{T,j}

    A level, so it keeps the matrix's unit: of losses it is the mean final loss.

    Args:
      matrix: ``[..., T + 1, T]``. Entry ``[i, j]`` is measured on task ``j + 1`` after
        training on ``i`` tasks; row 0 is the network at random initialisation.

    Returns:
      ``[...]``.

    Raises:
      ValueError: If the shape is another one, or the last row is not finite.

    Example:
      >>> from optax_cl import metrics
      >>> matrix = [[0.5, 0.5], [0.9, 0.4], [0.7, 0.8]]
      >>> round(float(metrics.average_accuracy(matrix)), 6)
      0.75

    References:
      Lopez-Paz and Ranzato, `Gradient Episodic Memory for Continual Learning
      <https://arxiv.org/abs/1706.08840>`_, 2017.
    """
    matrix = _read(matrix, "average_accuracy", _final)
    return matrix[..., -1, :].mean(-1)


def average_incremental_accuracy(matrix: Array) -> Array:
    r"""Mean over stages of the mean over the tasks seen so far.

    .. math::
      \frac1T \sum_{k=1}^{T} \mathrm{AA}_k,
      \qquad \mathrm{AA}_k = \frac1k \sum_{j \le k} a_{k,j}

    Another number than :func:`average_accuracy`, and as a rule a larger one, though
    papers call both "average accuracy". A level: it keeps the matrix's unit.

    Args:
      matrix: ``[..., T + 1, T]``, see :func:`average_accuracy`.

    Returns:
      ``[...]``.

    Raises:
      ValueError: If the shape is another one, or an entry of a task already learned is
        not finite.

    Example:
      >>> from optax_cl import metrics
      >>> matrix = [[0.5, 0.5], [0.9, 0.4], [0.7, 0.8]]
      >>> round(float(metrics.average_incremental_accuracy(matrix)), 6)
      0.825

    References:
      Rebuffi et al., `iCaRL: Incremental Classifier and Representation Learning
      <https://arxiv.org/abs/1611.07725>`_, 2017.
    """
    matrix = _read(matrix, "average_incremental_accuracy", _seen)
    xp, tasks = _arrays.namespace(matrix), matrix.shape[-1]
    stages = [matrix[..., k, :k].mean(-1) for k in range(1, tasks + 1)]
    return xp.stack(stages, -1).mean(-1)


def learning_accuracy(matrix: Array) -> Array:
    r"""Mean over tasks of the value right after learning each (LA).

    .. math:: \mathrm{LA} = \frac1T \sum_{j=1}^{T} a_{j,j}

    A method that learns less also forgets less, so forgetting should never be shown
    without it: :math:`\mathrm{AA} - \mathrm{LA} = \frac{T-1}{T} \mathrm{BWT}`. A level:
    it keeps the matrix's unit.

    Args:
      matrix: ``[..., T + 1, T]``, see :func:`average_accuracy`.

    Returns:
      ``[...]``.

    Raises:
      ValueError: If the shape is another one, or an entry ``[j + 1, j]`` is not finite.

    Example:
      >>> from optax_cl import metrics
      >>> matrix = [[0.5, 0.5], [0.9, 0.4], [0.7, 0.8]]
      >>> round(float(metrics.learning_accuracy(matrix)), 6)
      0.85

    References:
      Riemer et al., `Learning to Learn without Forgetting by Maximizing Transfer and
      Minimizing Interference <https://arxiv.org/abs/1810.11910>`_, 2019.
    """
    return _diagonal(_read(matrix, "learning_accuracy", _learned)).mean(-1)


def backward_transfer(matrix: Array, *, higher_is_better: bool = True) -> Array:
    r"""What later tasks did to earlier ones (BWT); negative is forgetting.

    .. math:: \mathrm{BWT} = \frac{1}{T-1} \sum_{j<T} (a_{T,j} - a_{j,j})

    Args:
      matrix: ``[..., T + 1, T]`` with at least two tasks, see
        :func:`average_accuracy`.
      higher_is_better: False for losses, whose differences change sign, so that
        positive still means that old tasks got better.

    Returns:
      ``[...]``.

    Raises:
      ValueError: If the shape is another one, there is one task only, or an entry that
        the formula reads is not finite.

    Example:
      >>> from optax_cl import metrics
      >>> matrix = [[0.5, 0.5], [0.9, 0.4], [0.7, 0.8]]
      >>> round(float(metrics.backward_transfer(matrix)), 6)
      -0.2

    References:
      Lopez-Paz and Ranzato, `Gradient Episodic Memory for Continual Learning
      <https://arxiv.org/abs/1706.08840>`_, 2017.

    Note:
      The divisor is the paper's :math:`T - 1`. The code published with the paper
      divides by :math:`T`; its numbers are :math:`(T-1)/T` of these.
    """
    matrix = _read(matrix, "backward_transfer", _final, _learned, least=2)
    change = matrix[..., -1, :-1] - _diagonal(matrix)[..., :-1]
    return _arrays.sign(higher_is_better) * change.mean(-1)


def negated_backward_transfer(matrix: Array, *, higher_is_better: bool = True) -> Array:
    """Forgetting against the value right after learning: minus BWT.

    Negative where old tasks got better. See :func:`backward_transfer` for the
    arguments, and :func:`chaudhry_forgetting` for the other common definition.

    Args:
      matrix: ``[..., T + 1, T]`` with at least two tasks.
      higher_is_better: False for losses; positive still means forgetting.

    Returns:
      ``[...]``.

    Raises:
      ValueError: As :func:`backward_transfer`.

    Example:
      >>> from optax_cl import metrics
      >>> losses = [[2.0, 2.0], [0.5, 2.1], [0.9, 0.6]]  # task 1 rises: .5 to .9
      >>> forgetting = metrics.negated_backward_transfer(
      ...     losses, higher_is_better=False)
      >>> round(float(forgetting), 6)
      0.4
    """
    return -backward_transfer(matrix, higher_is_better=higher_is_better)


def chaudhry_forgetting(matrix: Array, *, higher_is_better: bool = True) -> Array:
    r"""Forgetting against the best value seen before the last task.

    .. math::
      F = \frac{1}{T-1} \sum_{j<T} \bigl(\max_{1 \le l < T} a_{l,j} - a_{T,j}\bigr)

    Never below :func:`negated_backward_transfer`. It can be negative, since the last
    row takes no part in the maximum. The maximum does run over rows before task ``j``
    was learned, so the upper triangle has to be measured; row 0 takes no part.

    Args:
      matrix: ``[..., T + 1, T]`` with at least two tasks, see
        :func:`average_accuracy`.
      higher_is_better: False for losses, where the best is the lowest and positive
        still means forgetting.

    Returns:
      ``[...]``.

    Raises:
      ValueError: As :func:`backward_transfer`.

    Example:
      >>> from optax_cl import metrics
      >>> matrix = [[0.5] * 3, [0.8, 0.4, 0.3], [0.9, 0.7, 0.4], [0.6, 0.5, 0.9]]
      >>> round(float(metrics.chaudhry_forgetting(matrix)), 6)  # (.9-.6 + .7-.5) / 2
      0.25

    References:
      Chaudhry et al., `Riemannian Walk for Incremental Learning
      <https://arxiv.org/abs/1801.10112>`_, 2018.
    """
    matrix = _read(matrix, "chaudhry_forgetting", _old_tasks, least=2)
    score = _arrays.sign(higher_is_better) * matrix[..., 1:, :-1]
    return (score[..., :-1, :].max(-2) - score[..., -1, :]).mean(-1)


def forward_transfer(matrix: Array, *, higher_is_better: bool = True) -> Array:
    r"""How well a task is solved before it is learned, above random init (FWT).

    .. math::
      \mathrm{FWT} = \frac{1}{T-1} \sum_{j=2}^{T} (a_{j-1,j} - b_j),
      \qquad b_j = a_{0,j}

    The baseline is the network at its random initialisation, before any update: row 0
    of the matrix, explicitly. :math:`a_{j-1,j}` is zero-shot, so a network trained on
    task ``j`` alone is no baseline for it; that comparison is
    :func:`gain_over_independent`, which some papers call forward transfer too.

    Args:
      matrix: ``[..., T + 1, T]`` with at least two tasks, see
        :func:`average_accuracy`.
      higher_is_better: False for losses; positive still means that earlier tasks
        helped.

    Returns:
      ``[...]``.

    Raises:
      ValueError: As :func:`backward_transfer`.

    Example:
      >>> from optax_cl import metrics
      >>> matrix = [[0.5, 0.25], [0.9, 0.4], [0.7, 0.8]]
      >>> round(float(metrics.forward_transfer(matrix)), 6)
      0.15

    References:
      Lopez-Paz and Ranzato, `Gradient Episodic Memory for Continual Learning
      <https://arxiv.org/abs/1706.08840>`_, 2017.
    """
    matrix = _read(matrix, "forward_transfer", _zero_shot, least=2)
    # Row i, column i (from 0) is task i + 1 after training on i tasks.
    zero_shot = _diagonal(matrix[..., :-1, 1:])
    return _arrays.sign(higher_is_better) * (zero_shot - matrix[..., 0, 1:]).mean(-1)


def gain_over_independent(
    matrix: Array, independent: Array, *, higher_is_better: bool = True
) -> Array:
    r"""What the earlier tasks added to learning each task, against learning it alone.

    .. math:: \frac1T \sum_{j=1}^{T} (a_{j,j} - a^{\mathrm{ind}}_j)

    Some papers call this forward transfer; see :func:`forward_transfer` for the
    quantity of that name here.

    Args:
      matrix: ``[..., T + 1, T]``, see :func:`average_accuracy`.
      independent: ``[T]`` or ``[..., T]``: task ``j`` after training a fresh network
        on it alone.
      higher_is_better: False for losses; positive still means that earlier tasks
        helped.

    Returns:
      ``[...]``.

    Raises:
      ValueError: If a shape is another one or an entry read is not finite.

    Example:
      >>> from optax_cl import metrics
      >>> matrix = [[0.5, 0.5], [0.9, 0.4], [0.7, 0.8]]
      >>> gain = metrics.gain_over_independent(matrix, [0.9, 0.7])
      >>> round(float(gain), 6)
      0.05

    References:
      Lin et al., `Beyond Not-Forgetting: Continual Learning with Backward Knowledge
      Transfer <https://arxiv.org/abs/2211.00789>`_, 2022.
    """
    name = "gain_over_independent"
    learned = _diagonal(_read(matrix, name, _learned))
    independent = _arrays.like_last_axis("independent", independent, learned, name)
    return _arrays.sign(higher_is_better) * (learned - independent).mean(-1)


def intransigence(
    matrix: Array, joint: Array, *, higher_is_better: bool = True
) -> Array:
    r"""What each task falls short of, when learned in sequence and not jointly.

    .. math:: I_k = a^*_k - a_{k,k}

    Args:
      matrix: ``[..., T + 1, T]``, see :func:`average_accuracy`.
      joint: ``[T]`` or ``[..., T]``: task ``k`` after joint training on tasks 1 to
        ``k``, which takes a reference run per stage.
      higher_is_better: False for losses; positive still means that the sequence
        learned the task less well.

    Returns:
      ``[..., T]``, one value per task.

    Raises:
      ValueError: If a shape is another one or an entry read is not finite.

    Example:
      >>> from optax_cl import metrics
      >>> matrix = [[0.5, 0.5], [0.875, 0.4], [0.7, 0.75]]
      >>> print(metrics.intransigence(matrix, [0.875, 0.875]))
      [0.    0.125]

    References:
      Chaudhry et al., `Riemannian Walk for Incremental Learning
      <https://arxiv.org/abs/1801.10112>`_, 2018.
    """
    learned = _diagonal(_read(matrix, "intransigence", _learned))
    joint = _arrays.like_last_axis("joint", joint, learned, "intransigence")
    return _arrays.sign(higher_is_better) * (joint - learned)


# Which entries a formula reads, as masks over rows (from 0, the random init) and
# columns (from 0, the first task) of a matrix of T tasks.
_Entries = Callable[[np.ndarray, np.ndarray, int], np.ndarray]


def _final(row, column, tasks):
    return (row == tasks) & (column >= 0)


def _learned(row, column, tasks):
    return row == column + 1


def _seen(row, column, tasks):
    return row > column


def _old_tasks(row, column, tasks):
    return (row >= 1) & (column < tasks - 1)


def _zero_shot(row, column, tasks):
    return (column >= 1) & ((row == 0) | (row == column))


def _read(matrix: Array, reader: str, *entries: _Entries, least: int = 1) -> Array:
    """The matrix as floats, its shape and the entries that are read checked."""
    matrix = _arrays.as_float("matrix", matrix)
    shape = matrix.shape
    if len(shape) < 2 or shape[-2] != shape[-1] + 1:
        square = len(shape) >= 2 and shape[-2] == shape[-1]
        raise ValueError(
            "`matrix` must have shape [..., T + 1, T]: one column per task, row 0 "
            "measured at random initialisation, row i after training on i tasks; got "
            f"{shape}."
            + (" Prepend row 0 (NaN if it was not measured)." if square else "")
        )
    tasks = shape[-1]
    if tasks < least:
        raise ValueError(
            f"`{reader}` needs a `matrix` of at least {least} tasks; got shape {shape}."
        )
    row, column = np.ogrid[: tasks + 1, :tasks]
    read = np.any([select(row, column, tasks) for select in entries], axis=0)
    _arrays.check_finite("matrix", matrix, reader, read)
    return matrix


def _diagonal(matrix: Array) -> Array:
    """Each task right after it was learned, ``[..., T]``."""
    xp = _arrays.namespace(matrix)
    return xp.diagonal(matrix[..., 1:, :], axis1=-2, axis2=-1)
