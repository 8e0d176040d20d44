"""The contract that every gradient transformation here keeps, as checks.

One function for one property, each raising ``AssertionError`` (or letting the error of
the transformation through) where it does not hold; ``check_contract`` runs them all.
They are public so that a transformation written elsewhere can be held to the same
contract, in one line of its test:

    optax_cl.testing.check_contract(lambda strength=0.5: my_optimizer(strength), params)

All checks feed one *stream*: gradients and parameters drawn once from a fixed seed, the
same for every way of running the transformation, with a task boundary in its middle.
So two runs see equal input whatever they return, and a rule that is discontinuous at
the anchor can't blow rounding up.
"""

from optax_cl.testing._contract import check_contract as check_contract
from optax_cl.testing._convergence import OBJECTIVES as OBJECTIVES
from optax_cl.testing._convergence import check_converges as check_converges
from optax_cl.testing._runs import check_jit_and_scan as check_jit_and_scan
from optax_cl.testing._runs import check_tasks as check_tasks
from optax_cl.testing._runs import check_vmap as check_vmap
from optax_cl.testing._single import (
    check_accepts_extra_args as check_accepts_extra_args,
)
from optax_cl.testing._single import check_empty_tree as check_empty_tree
from optax_cl.testing._single import check_map_params as check_map_params
from optax_cl.testing._single import check_state_is_stable as check_state_is_stable
from optax_cl.testing._single import check_update_dtypes as check_update_dtypes
from optax_cl.testing._streams import Collect as Collect
from optax_cl.testing._streams import ExtraArgs as ExtraArgs
from optax_cl.testing._streams import collect_synthetic as collect_synthetic
from optax_cl.testing._streams import no_extra_args as no_extra_args
from optax_cl.testing._wrappers import check_apply_if_finite as check_apply_if_finite
from optax_cl.testing._wrappers import check_explicit_raw as check_explicit_raw
from optax_cl.testing._wrappers import (
    check_inject_hyperparams as check_inject_hyperparams,
)
from optax_cl.testing._wrappers import check_masks as check_masks
from optax_cl.testing._wrappers import check_multi_steps as check_multi_steps
from optax_cl.testing._wrappers import check_schedules as check_schedules
