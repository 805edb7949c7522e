"""Weights in flight: what a product meets where an adapted or quantized weight stands."""
