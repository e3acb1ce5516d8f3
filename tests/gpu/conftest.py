"""These tests exist only where there is a CUDA device; elsewhere they are not collected, and the summary says so."""

from __future__ import annotations

import torch

collect_ignore_glob = [] if torch.cuda.is_available() else ["test_*.py"]
