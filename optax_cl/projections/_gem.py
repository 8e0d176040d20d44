"""GEM: never step against the gradient of any past task."""

import chex
import jax
import jax.numpy as jnp
import optax

from optax_cl._core import checks, surgery


def gem(
    *, margin: chex.Numeric = 0.0, sign: str = "gradient"
) -> optax.GradientTransformationExtraArgs:
    r"""Projects the update so that it works against none of the past tasks.

    With :math:`g` the gradient on the current batch and :math:`g_k` the gradient of the
    mean loss on the memory of task k, :math:`\tilde g = g` if no :math:`\langle g,
    g_k\rangle` is negative, and otherwise

    .. math::

        \tilde g = g + \sum_k v_k g_k, \qquad v = \operatorname{argmin}_{v \ge \gamma}\;
        \tfrac12 v^\top (M M^\top) v + (M g)^\top v,

    where M has the rows :math:`g_k` and :math:`\gamma` is the ``margin``. With
    :math:`\gamma = 0` this is the closest point to :math:`g` that opposes no
    :math:`g_k`. Then :math:`\langle\tilde g, g\rangle \ge 0`, :math:`\|\tilde g\| \le
    \|g\|`, only the directions of the :math:`g_k` matter, and for one memory it is
    ``agem``.

    A margin is a floor on v, not on the inner products: as soon as *one* task is
    opposed, at least :math:`\gamma g_k` of *every* task is added. It trades learning
    for backward transfer, and gives up the norm bound and the invariance to lengths:
    :math:`\tilde g` may be longer than :math:`g`, and halving :math:`g` does not halve
    it. The authors' code runs with 0.5, and it is worth trying: on digits that come two
    classes at a time it made .95 of a final accuracy of .73 (see the page on
    projections). The default is 0, for which all that is promised here holds.

    The update takes two keyword-only extra arguments. ``memory_updates`` is a tree like
    the updates with a leading axis of K memories, ``memory_mask`` tells which of the K
    are of past tasks, bool ``[K]``. K is a capacity: with K fixed and the mask growing
    nothing compiles again, and rows that the mask leaves out may hold anything. Compute
    the gradients anew at every step, by ``jax.vmap`` over a buffer ``[K, m, ...]``, and
    keep the current task out of the mask. The gradient on an empty slot is *not* zero:
    the mask is not optional. A memory whose gradient is zero, not finite, or too small
    or too large to square (lengths of about 1e-17 and 1e19) takes no part; if that is
    so of all, or :math:`g` is not finite, the update stays bit for bit as it is.

    In float32 the constraints hold to about :math:`\langle\tilde g, g_k\rangle \ge
    -4\cdot 10^{-6} v_k \|g_k\|^2`, for nearly parallel gradients and for lengths of
    1e-8 beside 1e4 too. Where gradients of tasks all but cancel each other (cosines
    under -0.9999), v is large and the ridge gives: up to 5e-4 :math:`\|g\|` there.

    **Placement.** As for ``agem``, by what is guaranteed there:

    * ``pre``, before the moments (the published form, made for SGD): the *routed
      gradient* opposes no task; a step of Adam may.
    * ``post``, after the moments and weight decay, before the learning rate: the *step*
      opposes none. A margin does not belong there: it adds gradients to a direction
      whose length has nothing to do with theirs.
    * ``post``, after the learning rate, where updates point downhill: say
      ``sign="descent"``, and :math:`\langle u, g_k\rangle \le 0` is held.

    Under ``optax.masked`` and ``optax.partition`` inner products run over the visible
    leaves; pass ``memory_updates`` whole. Under ``optax.MultiSteps`` the gradient is
    the mean over micro-steps, but the memories' are those of the *last* micro-step
    alone. With several devices give all gradients as global means.

    **Memory and cost.** No state. K backward passes a step and K trees like the
    parameters, which is more than the rest: K (K + 1) inner products, the sum of those
    gradients whose :math:`v_k` is not zero (none, without a conflict), and a program of
    K unknowns, whose handful of small systems does not grow with the parameters.
    ``agem`` needs one backward pass and one tree.

    Args:
      margin: :math:`\gamma`, at least 0. May be a tracer.
      sign: ``"gradient"`` where updates point along the gradient, ``"descent"`` where
        they are to be added to the parameters.

    Returns:
      A transformation without state.

    Raises:
      ValueError: At build time for a negative ``margin`` or an unknown ``sign``; at
        update for missing or mismatched ``memory_updates`` or ``memory_mask``.
      TypeError: If ``memory_mask`` is not boolean, or a leaf is not a real
        floating-point array.

    Example:
      Two past tasks in a memory for three. The first is opposed. Only to repair that
      would oppose the second, so both constraints are active:

      >>> import jax.numpy as jnp, optax
      >>> from optax_cl.projections import gem
      >>> tx = optax.chain(gem(), optax.sgd(1.0))
      >>> g = jnp.array([1.0, 1.0, 1.0])
      >>> tasks = jnp.array([[-2.0, 0.0, 0.0], [1.0, -0.5, 0.0], [9.0, 9.0, 9.0]])
      >>> seen = jnp.array([True, True, False])
      >>> updates, _ = tx.update(g, tx.init(g), memory_updates=tasks, memory_mask=seen)
      >>> print(updates.round(4) + 0.0)
      [ 0.  0. -1.]

    References:
      Lopez-Paz and Ranzato, `Gradient Episodic Memory for Continual Learning
      <https://arxiv.org/abs/1706.08840>`_, 2017

    Differs from the paper:
      1. The authors' code adds 1e-3 to the diagonal of :math:`M M^\top`, whatever its
         size: gradients shorter than .03 are then hardly protected. Here the gradients
         are normalised first, and the ridge is 4e-6 (32 machine epsilons) of their
         squared lengths; so the result does not depend on lengths.
      2. The margin is the floor on v of that code. The paper says that it is added to
         the solution.
      3. The program is solved by an active-set method inside the compiled step, not by
         a package on the host.
      4. A zero or non-finite memory gradient is left out. The memory, and the exclusion
         of the current task, are the caller's.
    """
    checks.check_number("margin", margin, low=0.0)
    checks.check_choice("sign", sign, ("gradient", "descent"))

    def update_fn(
        updates,
        state,
        params=None,
        *,
        memory_updates=None,
        memory_mask=None,
        **extra_args,
    ):
        del params, extra_args
        memories, mask = surgery.check_memories(
            "gem", updates, memory_updates, memory_mask
        )
        # One tree is negated twice, for the memories would be copied.
        flip = jnp.negative if sign == "descent" else jnp.asarray
        routed = surgery.project_conflicts(
            jax.tree.map(flip, updates), memories, mask, floor=margin
        )
        return jax.tree.map(flip, routed), state

    return optax.GradientTransformationExtraArgs(
        lambda params: optax.EmptyState(), update_fn
    )
