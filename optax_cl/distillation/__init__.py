"""Distillation: old outputs as targets, for whoever keeps no data.

The network that finished the old tasks is the teacher. ``lwf_loss`` (learning without
forgetting) holds the outputs for old classes to the teacher's, on the inputs of the new
task; ``confidence_weights`` leaves out the examples on which the teacher is unsure.
"""

from optax_cl.distillation._lwf import confidence_weights as confidence_weights
from optax_cl.distillation._lwf import lwf_loss as lwf_loss

__all__ = ["confidence_weights", "lwf_loss"]
