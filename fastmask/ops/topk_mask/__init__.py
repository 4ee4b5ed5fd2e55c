"""topk_mask: contract in op.py, meaning in reference.py."""
