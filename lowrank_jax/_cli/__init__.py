"""The command line: inspect, merge and convert folders."""

from lowrank_jax._cli.main import main as main
