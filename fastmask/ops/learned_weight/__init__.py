"""learned_conv2d: contract in op.py, meaning in reference.py."""
