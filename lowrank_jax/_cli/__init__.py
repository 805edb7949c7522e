"""The command line: inspect, merge and convert adapters and models on disk."""

from lowrank_jax._cli.main import main as main
