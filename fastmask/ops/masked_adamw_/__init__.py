"""masked_adamw_: contract in op.py, meaning in reference.py."""
