"""The command line, `python -m lowrank_jax`; runs on the CPU even if there are other devices."""

import sys

import jax

from lowrank_jax._cli import main

if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    sys.exit(main())
