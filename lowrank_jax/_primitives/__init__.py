"""Products of bare arrays whose axes carry labels, and the primitives that they are."""
