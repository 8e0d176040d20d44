"""Continual learning as Optax gradient transformations."""

from optax_cl.routing import capture_raw as capture_raw
from optax_cl.routing import chain as chain
from optax_cl.routing import scale_by_decoupled_adam as scale_by_decoupled_adam
from optax_cl.routing import scale_by_decoupled_amsgrad as scale_by_decoupled_amsgrad

__version__ = "0.1.0"
