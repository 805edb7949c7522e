"""Functions of trees: init, combine, merge, quantize, specs, fingerprints."""
