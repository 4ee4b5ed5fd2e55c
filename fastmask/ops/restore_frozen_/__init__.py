"""restore_frozen_: contract in op.py, meaning in reference.py."""
