"""For those who write methods: how a state takes part in task boundaries.

A method registers one :class:`Boundary` for its state class, a ``NamedTuple``; from
then on ``optax_cl.collect``, ``optax_cl.end_task`` and ``optax_cl.begin_task`` reach
its states wherever they stand in a chain. A method that needs data names its
:class:`Pass` es over it. One whose state holds moments says so with
:func:`register_moments`. :func:`align` and :func:`align_structure` give what a method
stores the holes that a mask leaves in the updates.
"""

from optax_cl._core.boundaries import Boundary as Boundary
from optax_cl._core.boundaries import Pass as Pass
from optax_cl._core.boundaries import PassInput as PassInput
from optax_cl._core.boundaries import register_boundary as register_boundary
from optax_cl._core.boundaries import register_moments as register_moments
from optax_cl._core.task_functions import require as require
from optax_cl._core.trees import align as align
from optax_cl._core.trees import align_structure as align_structure
from optax_cl._core.trees import is_hole as is_hole
