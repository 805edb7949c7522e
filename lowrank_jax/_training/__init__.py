"""Optax over adapters: what is trained, and optimizer states that need little memory."""
