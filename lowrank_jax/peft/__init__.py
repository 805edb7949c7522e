"""Adapters as `peft` saves them, both ways: adapter_config.json and adapter_model.safetensors.

Source: peft 0.21.2. Nothing is unpickled.
"""

from lowrank_jax.peft._load import load as load
from lowrank_jax.peft._save import save as save
from lowrank_jax.peft._save import servable as servable
