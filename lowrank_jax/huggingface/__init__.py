"""Models as Hugging Face keeps them, both ways: a folder of safetensors files <-> a tree.

Source: transformers 5.23 and safetensors 0.8. Nothing is unpickled, and neither is needed.
"""

from lowrank_jax.huggingface._load import load as load
from lowrank_jax.huggingface._merge import merge as merge
from lowrank_jax.huggingface._save import save as save
