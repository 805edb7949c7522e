"""Optax over adapters: what is trained, and states that take little memory."""
