"""Low-rank adapters, their geometry, their starts, and methods that train them.

The base parameters are not trained; adapters are a dictionary beside them, and an
optimizer sees the adapters only.
"""

from optax_cl.lora._adapters import Adapter as Adapter
from optax_cl.lora._adapters import Adapters as Adapters
from optax_cl.lora._adapters import LoRA as LoRA
from optax_cl.lora._adapters import Spectral as Spectral
from optax_cl.lora._adapters import Target as Target
from optax_cl.lora._adapters import Targets as Targets
from optax_cl.lora._adapters import count as count
from optax_cl.lora._adapters import dense as dense
from optax_cl.lora._adapters import kernels as kernels
from optax_cl.lora._adapters import merge as merge
from optax_cl.lora._adapters import product as product
from optax_cl.lora._adapters import replace_kernels as replace_kernels
from optax_cl.lora._adapters import targets as targets
from optax_cl.lora._adapters import unmerge as unmerge
from optax_cl.lora._olora import OloraProjectState as OloraProjectState
from optax_cl.lora._olora import OloraState as OloraState
from optax_cl.lora._olora import olora as olora
from optax_cl.lora._olora import olora_loss as olora_loss
from optax_cl.lora._olora import olora_project as olora_project
from optax_cl.lora._olora import project_start as project_start
