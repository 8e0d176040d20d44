"""Replay: keep a few items of the stream, and let their gradient take part.

A reservoir holds a uniform sample of everything seen so far, in arrays of fixed size;
``mix_replay`` blends the gradient on a batch from it into the current one.
"""

from optax_cl.replay._mixing import MixReplayState as MixReplayState
from optax_cl.replay._mixing import mix_replay as mix_replay
from optax_cl.replay._reservoir import Reservoir as Reservoir
from optax_cl.replay._reservoir import reservoir_add as reservoir_add
from optax_cl.replay._reservoir import reservoir_init as reservoir_init
from optax_cl.replay._reservoir import reservoir_sample as reservoir_sample

__all__ = [
    "MixReplayState",
    "Reservoir",
    "mix_replay",
    "reservoir_add",
    "reservoir_init",
    "reservoir_sample",
]
