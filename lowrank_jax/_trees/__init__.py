"""Functions of parameter trees: init, combine, merge, quantize, specs, fingerprint."""
