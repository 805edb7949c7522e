"""File formats: safetensors, GGUF, shards, torch's weight layout, and atomic file replacement."""
