"""Low-rank adapters, their geometry, their starts, and methods that train them.

The base parameters are not trained; adapters are a dictionary beside them, and an
optimizer sees the adapters only.
"""

from optax_cl._core.growth import grow_memory as grow_memory
from optax_cl.lora._absorb import Start as Start
from optax_cl.lora._absorb import absorb as absorb
from optax_cl.lora._adapters import Adapter as Adapter
from optax_cl.lora._adapters import Adapters as Adapters
from optax_cl.lora._adapters import LoRA as LoRA
from optax_cl.lora._adapters import Spectral as Spectral
from optax_cl.lora._adapters import count as count
from optax_cl.lora._adapters import dense as dense
from optax_cl.lora._adapters import merge as merge
from optax_cl.lora._adapters import product as product
from optax_cl.lora._adapters import unmerge as unmerge
from optax_cl.lora._convert import labels as labels
from optax_cl.lora._convert import to_lora as to_lora
from optax_cl.lora._convert import to_spectral as to_spectral
from optax_cl.lora._eblora import eblora as eblora
from optax_cl.lora._eblora_init import eblora_init as eblora_init
from optax_cl.lora._eblora_state import EbloraState as EbloraState
from optax_cl.lora._frozen_a import FrozenAState as FrozenAState
from optax_cl.lora._frozen_a import frozen_a as frozen_a
from optax_cl.lora._frozen_a_init import frozen_a_init as frozen_a_init
from optax_cl.lora._gradients import Conflict as Conflict
from optax_cl.lora._gradients import conflict as conflict
from optax_cl.lora._gradients import mean_gradients as mean_gradients
from optax_cl.lora._init import lora_init as lora_init
from optax_cl.lora._init import orthogonal_init as orthogonal_init
from optax_cl.lora._inputs import input_covariances as input_covariances
from optax_cl.lora._lora_ga import lora_ga_init as lora_ga_init
from optax_cl.lora._loram import loram_init as loram_init
from optax_cl.lora._memory import GradientMemory as GradientMemory
from optax_cl.lora._memory import memory as memory
from optax_cl.lora._olora import OloraState as OloraState
from optax_cl.lora._olora import olora as olora
from optax_cl.lora._olora import olora_loss as olora_loss
from optax_cl.lora._olora_project import OloraProjectState as OloraProjectState
from optax_cl.lora._olora_project import olora_project as olora_project
from optax_cl.lora._olora_project import project_start as project_start
from optax_cl.lora._peft import load_peft as load_peft
from optax_cl.lora._peft import save_peft as save_peft
from optax_cl.lora._pissa import pissa_init as pissa_init
from optax_cl.lora._prototypes import Prototypes as Prototypes
from optax_cl.lora._prototypes import Router as Router
from optax_cl.lora._prototypes import Routes as Routes
from optax_cl.lora._prototypes import mahalanobis as mahalanobis
from optax_cl.lora._prototypes import nearest_mean as nearest_mean
from optax_cl.lora._prototypes import prototypes_add as prototypes_add
from optax_cl.lora._prototypes import prototypes_init as prototypes_init
from optax_cl.lora._prototypes import route as route
from optax_cl.lora._slice import SliceDiagnostics as SliceDiagnostics
from optax_cl.lora._slice import slice_init as slice_init
from optax_cl.lora._stack import select as select
from optax_cl.lora._stack import stack as stack
from optax_cl.lora._stack import store as store
from optax_cl.lora._targets import Target as Target
from optax_cl.lora._targets import Targets as Targets
from optax_cl.lora._targets import kernels as kernels
from optax_cl.lora._targets import replace_kernels as replace_kernels
from optax_cl.lora._targets import targets as targets
