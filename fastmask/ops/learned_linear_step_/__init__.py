"""learned_linear_step_: contract in op.py, meaning in reference.py."""
