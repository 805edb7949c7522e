"""`python -m lowrank_jax`: the command line, on the CPU whatever devices there are."""

import sys

import jax

from lowrank_jax._cli import main

if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    sys.exit(main())
