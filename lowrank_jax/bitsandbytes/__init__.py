"""Load and save bitsandbytes' 4-bit weights, byte for byte.

A torch weight [out, in] becomes a Quantized leaf [in, out], the orientation of a Flax kernel. Codes
are rearranged, and nothing is rounded. `load` reads a folder saved by transformers into a dict;
lowrank.huggingface.load reads it into a tree.
"""

from lowrank_jax.bitsandbytes._load import from_state_dict as from_state_dict
from lowrank_jax.bitsandbytes._load import load as load
from lowrank_jax.bitsandbytes._save import to_state_dict as to_state_dict
