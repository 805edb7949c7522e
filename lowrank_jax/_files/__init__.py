"""Files of tensors, and how torch's parameters lie in them."""
