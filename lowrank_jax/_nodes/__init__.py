"""The nodes that stand where an array stood: what they hold, and the dense weight they mean."""

from lowrank_jax._nodes.adapted import Adapted as Adapted
from lowrank_jax._nodes.adapted import Normed as Normed
from lowrank_jax._nodes.adapted import as_dense as as_dense
from lowrank_jax._nodes.adapted import is_adapter as is_adapter
from lowrank_jax._nodes.adapted import is_node as is_node
from lowrank_jax._nodes.adapted import nodes_of as nodes_of
from lowrank_jax._nodes.adapted import normed as normed
from lowrank_jax._nodes.adapted import trained_whole as trained_whole
from lowrank_jax._nodes.adapted import unnormed as unnormed
from lowrank_jax._nodes.full import Full as Full
from lowrank_jax._nodes.low_rank import LowRank as LowRank
