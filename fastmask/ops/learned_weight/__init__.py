"""learned_weight: contract in op.py, meaning in reference.py."""
