"""Penalties: quadratic pulls towards past solutions.

Soft constraints for whoever keeps no data: an importance for each parameter and an
anchor, consolidated at task boundaries.
"""

from optax_cl.penalties._ewc import EwcState as EwcState
from optax_cl.penalties._ewc import ewc as ewc
from optax_cl.penalties._ewc import ewc_loss as ewc_loss
