"""Replay: keep a few items of the stream, and let their gradient take part.

A reservoir holds a uniform sample of everything seen so far, in arrays of fixed size;
``mix_replay`` blends the gradient on a batch from it into the current one; ``herding``
chooses by features instead of by chance. Two losses use what is stored: ``der_loss``
holds the outputs to old ones (DER, DER++), ``er_ace_loss`` keeps new examples from
pushing old classes down. ``icarl_loss`` and ``nearest_mean``, with ``herding``, are
iCaRL.
"""

from optax_cl.replay._der import der_loss as der_loss
from optax_cl.replay._er_ace import classes_in as classes_in
from optax_cl.replay._er_ace import er_ace_loss as er_ace_loss
from optax_cl.replay._herding import herding as herding
from optax_cl.replay._icarl import icarl_loss as icarl_loss
from optax_cl.replay._icarl import nearest_mean as nearest_mean
from optax_cl.replay._mixing import MixReplayState as MixReplayState
from optax_cl.replay._mixing import mix_replay as mix_replay
from optax_cl.replay._reservoir import Reservoir as Reservoir
from optax_cl.replay._reservoir import reservoir_add as reservoir_add
from optax_cl.replay._reservoir import reservoir_init as reservoir_init
from optax_cl.replay._reservoir import reservoir_sample as reservoir_sample

__all__ = [
    "MixReplayState",
    "Reservoir",
    "classes_in",
    "der_loss",
    "er_ace_loss",
    "herding",
    "icarl_loss",
    "mix_replay",
    "nearest_mean",
    "reservoir_add",
    "reservoir_init",
    "reservoir_sample",
]
