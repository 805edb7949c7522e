"""The nodes that take the place of an array: adapters, adapted and quantized leaves."""

from lowrank_jax._nodes.adapted import UNADAPTED as UNADAPTED
from lowrank_jax._nodes.adapted import Adapted as Adapted
from lowrank_jax._nodes.adapted import Normed as Normed
from lowrank_jax._nodes.adapted import add_depth as add_depth
from lowrank_jax._nodes.adapted import as_dense as as_dense
from lowrank_jax._nodes.adapted import attach_norms as attach_norms
from lowrank_jax._nodes.adapted import collect_adapters as collect_adapters
from lowrank_jax._nodes.adapted import explain_combined as explain_combined
from lowrank_jax._nodes.adapted import find_adapters as find_adapters
from lowrank_jax._nodes.adapted import find_frozen as find_frozen
from lowrank_jax._nodes.adapted import has_adapter as has_adapter
from lowrank_jax._nodes.adapted import init_full as init_full
from lowrank_jax._nodes.adapted import is_adapter as is_adapter
from lowrank_jax._nodes.adapted import is_node as is_node
from lowrank_jax._nodes.adapted import strip_norms as strip_norms
from lowrank_jax._nodes.full import Full as Full
from lowrank_jax._nodes.low_rank import LowRank as LowRank
