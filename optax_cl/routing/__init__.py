"""The heart: two gradients in one chain.

``capture_raw`` and ``chain`` bind the raw gradient; ``scale_by_decoupled_adam`` and its
kin let each moment read the raw or the routed one.
"""

from optax_cl.routing._adam import (
    ScaleByDecoupledAdamState as ScaleByDecoupledAdamState,
)
from optax_cl.routing._adam import (
    ScaleByDecoupledAmsgradState as ScaleByDecoupledAmsgradState,
)
from optax_cl.routing._adam import scale_by_decoupled_adam as scale_by_decoupled_adam
from optax_cl.routing._adam import (
    scale_by_decoupled_amsgrad as scale_by_decoupled_amsgrad,
)
from optax_cl.routing._capture import capture_raw as capture_raw
from optax_cl.routing._capture import chain as chain
