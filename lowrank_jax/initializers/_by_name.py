"""The initializers that need no data, by name."""

from __future__ import annotations

from lowrank_jax.initializers._random import gaussian, kaiming, lookup, orthogonal
from lowrank_jax.initializers._spectral import olora, pissa

BY_NAME = {
    function.__name__: function
    for function in (gaussian, kaiming, lookup, olora, orthogonal, pissa)
}
