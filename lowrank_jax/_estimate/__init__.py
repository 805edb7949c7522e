"""The memory of a step before it runs, as the compiler assigns it."""
