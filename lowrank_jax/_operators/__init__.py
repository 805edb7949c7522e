"""Weight operators: what stands for an adapted or quantized weight while a jaxpr is evaluated."""
