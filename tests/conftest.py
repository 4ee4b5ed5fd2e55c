"""One thread for each worker where tests run side by side; hypothesis without a clock."""

from __future__ import annotations

import os

import hypothesis
import torch

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

# Machines are shared: a slow example is no failure. Examples are the same in every run.
hypothesis.settings.register_profile("fastmask", deadline=None, derandomize=True, max_examples=60)
hypothesis.settings.load_profile("fastmask")
