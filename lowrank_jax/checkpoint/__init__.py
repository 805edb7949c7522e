"""Save an adapter, its config and optimizer state; restore them onto the base they belong to.

On disk: `manifest.json` and one Orbax directory of arrays, `arrays-<id>`, which the manifest names,
with the SHA-256 of each of its files and arrays. The arrays are addressed by the paths of leaves.
"""

from lowrank_jax.checkpoint._background import Saving as Saving
from lowrank_jax.checkpoint._restore import Checkpoint as Checkpoint
from lowrank_jax.checkpoint._restore import exists as exists
from lowrank_jax.checkpoint._restore import restore as restore
from lowrank_jax.checkpoint._save import save as save
from lowrank_jax.checkpoint._save import save_async as save_async

__all__ = ["Checkpoint", "Saving", "exists", "restore", "save", "save_async"]
