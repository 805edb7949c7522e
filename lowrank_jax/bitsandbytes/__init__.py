"""4-bit files of bitsandbytes, both ways and byte for byte.

A torch weight [out, in] comes as a Quantized leaf [in, out], Flax's orientation of a kernel; what
moves is codes, so that nothing is rounded. `load` reads a folder that transformers saved, as it is;
lowrank.huggingface.load reads it into a tree.
"""

from lowrank_jax.bitsandbytes._load import from_state_dict as from_state_dict
from lowrank_jax.bitsandbytes._load import load as load
from lowrank_jax.bitsandbytes._save import to_state_dict as to_state_dict
