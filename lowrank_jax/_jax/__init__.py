"""JAX utilities: access to jaxprs across releases, pytree paths, cache keys, and processes."""
