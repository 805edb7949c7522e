"""Load, save and merge models in Hugging Face's format: a folder of safetensors files.

Source: transformers 5.23 and safetensors 0.8. Neither is needed, and nothing is unpickled.
"""

from lowrank_jax.huggingface._load import load as load
from lowrank_jax.huggingface._merge import merge as merge
from lowrank_jax.huggingface._save import save as save
