"""Networks by name, their pretrained weights."""
