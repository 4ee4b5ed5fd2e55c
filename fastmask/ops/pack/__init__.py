"""pack: contract in op.py, meaning in reference.py."""
