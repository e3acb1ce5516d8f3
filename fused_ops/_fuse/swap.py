"""Changing a module's class in place, and back.

The module object stays the same, and with it parameters, buffers, hooks and every reference to it. Each fuse leaves one record
on each module that it changes; they are undone from the last to the first, and only while the module still has the class
that the record says was put there.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from types import MethodType
from typing import Any, Optional, Union

from torch import nn

from .conditions import repeats_class_forward
from .edit import Made
from .source import SourceError

UNDO = "_fuse_undo"
Class = Union[type[nn.Module], Made]
_runs = itertools.count(1)


def next_run() -> int:
    """A number for one call of fuse."""
    return next(_runs)


@dataclass(frozen=True)
class Undo:
    """What one fuse did to a module: the class before, the class put there, attributes added and removed. Pickles with it.

    previous: the record of the fuse before it, which is put back as it was.
    """

    run: int
    before: Class
    put: Class
    added: tuple[str, ...]
    removed: dict[str, Any]
    previous: Optional[Undo]


def as_class(cls: Class) -> type[nn.Module]:
    return cls.cls() if isinstance(cls, Made) else cls


def class_of(module: nn.Module) -> Class:
    """The module's class in the form that pickles."""
    made = vars(type(module)).get("_fuse_made")
    return type(module) if made is None else made


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class that the module had before every fuse."""
    record: Undo | None = module.__dict__.get(UNDO)
    if record is None:  # made by type(module)(...) of a fused one
        made = class_of(module)
        return made.base if isinstance(made, Made) else made
    while record.previous is not None:
        record = record.previous
    return as_class(record.before)


def swap(run: int, module: nn.Module, put: Class, remove: Iterable[str] = (), **attributes: Any) -> None:
    """Give module the class and the attributes, take others away, and remember it.

    The class comes after the attributes that it needs: another thread may be calling the module.
    """
    new = as_class(put)
    removed = {name: module.__dict__[name] for name in (*remove, *attributes) if name in module.__dict__}
    added = tuple(name for name in attributes if name not in removed)
    record = Undo(run, class_of(module), put, added, removed, module.__dict__.get(UNDO))
    module.__dict__.update({UNDO: record, **attributes})
    module.__class__ = new
    for name in remove:
        module.__dict__.pop(name, None)


def changed_since(module: nn.Module) -> str | None:
    """A reason when the module is no longer what fuse made of it, so that taking fuse back would destroy something."""
    last: Undo | None = module.__dict__.get(UNDO)
    if last is None:
        return None
    try:
        put = as_class(last.put)
    except SourceError as error:
        return f"its class cannot be made again: {error}"
    if type(module) is not put and type(module) is not as_class(last.before):
        return f"its class is {type(module).__name__} now, where fuse had put {put.__name__}"
    forward: Any = put.forward
    if forward is not as_class(last.before).forward:  # accelerate's hooks keep a bound forward, and go on calling it
        for name, value in module.__dict__.items():
            bound = isinstance(value, MethodType) and value.__self__ is module and value.__func__ is forward
            if bound and name != "forward":
                return f"its attribute {name} holds the forward that fuse put there"
    return None


def restore(module: nn.Module, run: int | None = None) -> bool:
    """Undo the fuse of that number and those after it, or all of them. Returns whether there was anything to undo."""
    record: Undo | None = module.__dict__.get(UNDO)
    if record is None and run is None and isinstance(made := class_of(module), Made):
        module.__class__ = made.base
        return True
    if record is None or (run is not None and not _has(record, run)):
        return False
    while record is not None:
        if repeats_class_forward(module):
            module.__dict__.pop("forward")
        for name in record.added:
            module.__dict__.pop(name, None)
        module.__dict__.update(record.removed)
        module.__class__ = as_class(record.before)
        done, record = record.run == run, record.previous
        if done:
            break
    if record is None:
        module.__dict__.pop(UNDO, None)
    else:
        module.__dict__[UNDO] = record
    return True


def _has(record: Undo | None, run: int) -> bool:
    while record is not None and record.run != run:
        record = record.previous
    return record is not None


def restore_all(modules: Iterable[tuple[str, nn.Module]], run: int | None = None) -> int:
    """Undo on all the modules or, where one of them was changed since, on none.

    Raises:
        RuntimeError: a module that something else changed after fuse: its name, and what to take back first.
    """
    named = list(modules)
    for name, module in named:
        if (reason := changed_since(module)) is not None:
            raise RuntimeError(
                f"unfuse: {name or 'the model'}: {reason}. Something else (a parametrisation, fully_shard, accelerate's hooks)"
                " changed it after fuse: take that back first, then unfuse; or call unfuse before it next time"
            )
    return sum(restore(module, run) for _, module in named)
