"""Isolation: every task has weights of its own, and old ones can't change.

``packnet`` packs tasks into one network: after a task ``packnet_prune`` frees the
weights that matter least to it for the next, and ``packnet_params`` are the parameters
as they were for a task. ``progressive`` gives every task a column of units, which
reads those of earlier tasks. Which task an input belongs to must be known.
"""

from optax_cl.isolation._packnet import PacknetState as PacknetState
from optax_cl.isolation._packnet import packnet as packnet
from optax_cl.isolation._packnet import packnet_params as packnet_params
from optax_cl.isolation._packnet import packnet_prune as packnet_prune
from optax_cl.isolation._progressive import ProgressiveState as ProgressiveState
from optax_cl.isolation._progressive import progressive as progressive

__all__ = [
    "PacknetState",
    "ProgressiveState",
    "packnet",
    "packnet_params",
    "packnet_prune",
    "progressive",
]
