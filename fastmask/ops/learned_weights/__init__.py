"""learned_weights: contract in op.py, meaning in reference.py."""
