"""Products of arrays with labeled axes, and the JAX primitives that implement them."""
