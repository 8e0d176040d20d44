"""Projections: constraints on gradients or updates.

``agem`` keeps a step from working against a batch of the past, ``gem`` from working
against any single past task, ``ogd`` from changing what was said of stored examples.
``pcgrad`` adds the gradients of tasks without what conflicts among them.
"""

from optax_cl.projections._agem import AgemState as AgemState
from optax_cl.projections._agem import agem as agem
from optax_cl.projections._agem import reset_reference as reset_reference
from optax_cl.projections._gem import gem as gem
from optax_cl.projections._ogd import OgdState as OgdState
from optax_cl.projections._ogd import ogd as ogd
from optax_cl.projections._pcgrad import PcgradState as PcgradState
from optax_cl.projections._pcgrad import pcgrad as pcgrad
