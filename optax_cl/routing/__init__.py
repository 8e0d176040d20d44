"""The heart: two gradients in one chain.

``capture_raw`` and ``chain`` bind the raw gradient; ``scale_by_decoupled_adam`` and its
kin let each moment read the raw or the routed one. ``protect`` owns the basis of a
protected subspace, which ``attenuate`` and ``project`` read; rules say how much they
take away.
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
from optax_cl.routing._aliases import decoupled_adamw as decoupled_adamw
from optax_cl.routing._aliases import multi_steps as multi_steps
from optax_cl.routing._attenuate import AttenuateState as AttenuateState
from optax_cl.routing._attenuate import ScaledProjectState as ScaledProjectState
from optax_cl.routing._attenuate import attenuate as attenuate
from optax_cl.routing._attenuate import project as project
from optax_cl.routing._capture import capture_raw as capture_raw
from optax_cl.routing._capture import chain as chain
from optax_cl.routing._factored import (
    ScaleByDecoupledFactoredRmsState as ScaleByDecoupledFactoredRmsState,
)
from optax_cl.routing._factored import (
    scale_by_decoupled_factored_rms as scale_by_decoupled_factored_rms,
)
from optax_cl.routing._meters import measure as measure
from optax_cl.routing._meters import measure_gain as measure_gain
from optax_cl.routing._protect import ProtectState as ProtectState
from optax_cl.routing._protect import protect as protect
from optax_cl.routing._rules import Context as Context
from optax_cl.routing._rules import Rule as Rule
from optax_cl.routing._rules import balance as balance
from optax_cl.routing._rules import constant as constant
from optax_cl.routing._rules import one_minus as one_minus
from optax_cl.routing._rules import proportional as proportional
from optax_cl.routing._rules import ratchet as ratchet
from optax_cl.routing._rules import spring as spring
from optax_cl.routing._subspace import Subspace as Subspace
