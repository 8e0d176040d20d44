"""Continual learning as Optax gradient transformations."""

from optax_cl import boundaries as boundaries
from optax_cl import distillation as distillation
from optax_cl import editing as editing
from optax_cl import isolation as isolation
from optax_cl import lora as lora
from optax_cl import metrics as metrics
from optax_cl import recipes as recipes
from optax_cl._core.matrices import MatrixView as MatrixView
from optax_cl._core.matrices import matrix_views as matrix_views
from optax_cl._core.schema import check_schema as check_schema
from optax_cl._core.schema import schema as schema
from optax_cl._core.sharding import state_sharding as state_sharding
from optax_cl._core.tasks import Statistics as Statistics
from optax_cl._core.tasks import Task as Task
from optax_cl._core.tasks import begin_task as begin_task
from optax_cl._core.tasks import classification as classification
from optax_cl._core.tasks import collect as collect
from optax_cl._core.tasks import describe as describe
from optax_cl._core.tasks import end_task as end_task
from optax_cl._core.tasks import grow as grow
from optax_cl._core.tasks import map_states as map_states
from optax_cl._core.tasks import regression as regression
from optax_cl._core.tasks import reset_state as reset_state
from optax_cl.penalties import ewc as ewc
from optax_cl.penalties import ewc_loss as ewc_loss
from optax_cl.penalties import ewc_proximal as ewc_proximal
from optax_cl.penalties import mas as mas
from optax_cl.penalties import mas_loss as mas_loss
from optax_cl.penalties import rescale_by_importance as rescale_by_importance
from optax_cl.penalties import si as si
from optax_cl.penalties import si_loss as si_loss
from optax_cl.projections import agem as agem
from optax_cl.projections import gem as gem
from optax_cl.projections import ogd as ogd
from optax_cl.projections import pcgrad as pcgrad
from optax_cl.replay import mix_replay as mix_replay
from optax_cl.replay import reservoir_add as reservoir_add
from optax_cl.replay import reservoir_init as reservoir_init
from optax_cl.replay import reservoir_sample as reservoir_sample
from optax_cl.routing import Context as Context
from optax_cl.routing import Rule as Rule
from optax_cl.routing import attenuate as attenuate
from optax_cl.routing import balance as balance
from optax_cl.routing import capture_raw as capture_raw
from optax_cl.routing import chain as chain
from optax_cl.routing import constant as constant
from optax_cl.routing import decoupled_adamw as decoupled_adamw
from optax_cl.routing import measure as measure
from optax_cl.routing import measure_gain as measure_gain
from optax_cl.routing import multi_steps as multi_steps
from optax_cl.routing import one_minus as one_minus
from optax_cl.routing import project as project
from optax_cl.routing import proportional as proportional
from optax_cl.routing import protect as protect
from optax_cl.routing import ratchet as ratchet
from optax_cl.routing import scale_by_decoupled_adam as scale_by_decoupled_adam
from optax_cl.routing import scale_by_decoupled_amsgrad as scale_by_decoupled_amsgrad
from optax_cl.routing import (
    scale_by_decoupled_factored_rms as scale_by_decoupled_factored_rms,
)
from optax_cl.routing import spring as spring

__version__ = "0.1.0"
