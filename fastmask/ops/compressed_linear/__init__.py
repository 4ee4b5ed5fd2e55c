"""compressed_linear: contract in op.py, meaning in reference.py."""
