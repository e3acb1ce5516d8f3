"""The door to transformers' own classes: opened only when the program has loaded transformers itself."""

from __future__ import annotations

import sys
from typing import Any


def classes() -> Any:
    """The module hf_classes, or None while transformers' layers are not loaded: then no model can hold one."""
    if "transformers.pytorch_utils" not in sys.modules and "transformers.activations" not in sys.modules:
        return None
    from . import hf_classes

    return hf_classes
