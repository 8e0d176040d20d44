"""Penalties: quadratic pulls towards past solutions.

Soft constraints for whoever keeps no data: an importance for each parameter and an
anchor, consolidated at task boundaries. ``ewc``, ``mas`` and ``si`` add the pull to the
gradient or the step, and differ in where the importance comes from;
``kronecker_laplace`` has two matrices for each kernel instead; ``ewc_proximal`` takes
the pull of ``ewc`` implicitly, ``rescale_by_importance`` only slows important
coordinates down.
"""

from optax_cl._core.ewc_state import EwcState as EwcState
from optax_cl._core.statistics import Fisher as Fisher
from optax_cl._core.statistics import fisher_diagonal as fisher_diagonal
from optax_cl.penalties._ewc import ewc as ewc
from optax_cl.penalties._ewc import ewc_loss as ewc_loss
from optax_cl.penalties._ewc_proximal import ewc_proximal as ewc_proximal
from optax_cl.penalties._kronecker_laplace import (
    KroneckerLaplaceState as KroneckerLaplaceState,
)
from optax_cl.penalties._kronecker_laplace import kronecker_laplace as kronecker_laplace
from optax_cl.penalties._kronecker_laplace import (
    kronecker_laplace_loss as kronecker_laplace_loss,
)
from optax_cl.penalties._mas import MasState as MasState
from optax_cl.penalties._mas import mas as mas
from optax_cl.penalties._mas import mas_loss as mas_loss
from optax_cl.penalties._rescale import (
    RescaleByImportanceState as RescaleByImportanceState,
)
from optax_cl.penalties._rescale import rescale_by_importance as rescale_by_importance
from optax_cl.penalties._si import SiState as SiState
from optax_cl.penalties._si import si as si
from optax_cl.penalties._si import si_loss as si_loss
