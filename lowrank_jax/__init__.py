"""Low-rank adapters for any JAX function: weights are adapted, not modules."""

from lowrank_jax import checkpoint as checkpoint
from lowrank_jax import initializers as initializers
from lowrank_jax._adapters import combine as combine
from lowrank_jax._adapters import init as init
from lowrank_jax._adapters import merge as merge
from lowrank_jax._adapters import partition as partition
from lowrank_jax._configs import LoraConfig as LoraConfig
from lowrank_jax._configs import QuantConfig as QuantConfig
from lowrank_jax._errors import AxesError as AxesError
from lowrank_jax._errors import CheckpointError as CheckpointError
from lowrank_jax._errors import ConfigError as ConfigError
from lowrank_jax._errors import LowrankError as LowrankError
from lowrank_jax._errors import MaterializeError as MaterializeError
from lowrank_jax._errors import MaterializeWarning as MaterializeWarning
from lowrank_jax._errors import PatternError as PatternError
from lowrank_jax._errors import StateError as StateError
from lowrank_jax._errors import TreeError as TreeError
from lowrank_jax._fingerprint import Fingerprint as Fingerprint
from lowrank_jax._fingerprint import fingerprint as fingerprint
from lowrank_jax._functional import functional as functional
from lowrank_jax._functional import functional_with_state as functional_with_state
from lowrank_jax._interpret import Record as Record
from lowrank_jax._lift import lift as lift
from lowrank_jax._nodes import Adapted as Adapted
from lowrank_jax._nodes import Full as Full
from lowrank_jax._nodes import LowRank as LowRank
from lowrank_jax._optim import factor_labels as factor_labels
from lowrank_jax._optim import lora_plus as lora_plus
from lowrank_jax._optim import only_adapters as only_adapters
from lowrank_jax._optim import trainable_mask as trainable_mask
from lowrank_jax._plan import Plan as Plan
from lowrank_jax._plan import Use as Use
from lowrank_jax._plan import plan as plan
from lowrank_jax._quantize import dequantize as dequantize
from lowrank_jax._quantize import quantize as quantize
from lowrank_jax._quantized import Quantized as Quantized
from lowrank_jax._report import LeafReport as LeafReport
from lowrank_jax._report import Memory as Memory
from lowrank_jax._report import Report as Report
from lowrank_jax._report import report as report
from lowrank_jax._specs import specs as specs

__version__ = "0.1.0"
