"""Changing a module's class in place, and back.

The module object stays the same, and with it parameters, buffers, hooks and every reference to it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

UNDO = "_fuse_undo"


@dataclass(frozen=True)
class Undo:
    """What a module was: its class, the attributes that were added and those that were replaced. Pickles with the module."""

    cls: type[nn.Module]
    added: tuple[str, ...]
    replaced: dict[str, Any]


def swap(module: nn.Module, cls: type[nn.Module], **attributes: Any) -> None:
    """Give module the class cls and the attributes, and keep what they replace."""
    before = module.__dict__.get(UNDO) or Undo(type(module), (), {})
    new = [name for name in attributes if name not in before.added and name not in before.replaced]
    added = tuple(name for name in new if name not in module.__dict__)
    replaced = {name: module.__dict__[name] for name in new if name in module.__dict__}
    module.__dict__[UNDO] = Undo(before.cls, before.added + added, {**before.replaced, **replaced})
    module.__dict__.update(attributes)
    module.__class__ = cls


def restore(module: nn.Module) -> bool:
    """Undo swap. Returns whether there was anything to undo."""
    undo = module.__dict__.pop(UNDO, None)
    if undo is None:
        return False
    for name in undo.added:
        module.__dict__.pop(name, None)
    module.__dict__.update(undo.replaced)
    module.__class__ = undo.cls
    return True
