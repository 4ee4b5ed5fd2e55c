"""Collected only where Triton interprets: `TRITON_INTERPRET=1 pytest tests/triton/interpreted`."""

from __future__ import annotations

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]
