"""masked_sgd_: contract in op.py, meaning in reference.py."""
