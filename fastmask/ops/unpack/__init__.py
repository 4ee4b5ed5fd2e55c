"""unpack: contract in op.py, meaning in reference.py."""
