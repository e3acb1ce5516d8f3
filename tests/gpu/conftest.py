"""Tests that need a GPU: collected only where there is one, so that their absence elsewhere is not counted as a pass."""

from __future__ import annotations

import torch

collect_ignore_glob = [] if torch.cuda.is_available() else ["test_*.py"]
