"""Save an adapter with its config and optimizer state, and restore it onto the same base.

A checkpoint is a directory with `manifest.json` and one Orbax directory, `arrays-<id>`. The
manifest names that directory, and holds the SHA-256 of each of its files and arrays. Arrays are
stored under the paths of their leaves.
"""

from lowrank_jax.checkpoint._background import Saving as Saving
from lowrank_jax.checkpoint._restore import Checkpoint as Checkpoint
from lowrank_jax.checkpoint._restore import exists as exists
from lowrank_jax.checkpoint._restore import restore as restore
from lowrank_jax.checkpoint._save import save as save
from lowrank_jax.checkpoint._save import save_async as save_async

__all__ = ["Checkpoint", "Saving", "exists", "restore", "save", "save_async"]
