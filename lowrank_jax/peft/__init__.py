"""Load and save adapters in PEFT's format: adapter_config.json and adapter_model.safetensors.

Source: peft 0.21.2. Pickles are not read.
"""

from lowrank_jax.peft._load import load as load
from lowrank_jax.peft._save import save as save
from lowrank_jax.peft._save import servable as servable
from lowrank_jax.peft._save import tensors as tensors
