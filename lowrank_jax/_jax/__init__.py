"""The seam to JAX: what drifts between its releases, and trees of arrays."""
