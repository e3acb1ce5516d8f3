"""Modules whose whole forward is one op, such as LayerNorm and Softmax: they have a fused class of their own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from .. import nn as fused
from .._torch.spec import REGISTRY
from . import conditions
from .edit import Made
from .norm_formula import NormFormula, norm_formula
from .report import ALREADY, FUSED, LEFT
from .run import Run
from .swap import class_of, original_class


@dataclass(frozen=True)
class Whole:
    """The op a torch.nn class belongs to, and the class that replaces it."""

    op: str
    cls: type[nn.Module]


def _fused_class(base: type[nn.Module]) -> type[nn.Module]:
    """The one class of fused_ops.nn that is a base."""
    (found,) = [cls for cls in (getattr(fused, name) for name in fused.__all__) if issubclass(cls, base)]
    return found


WHOLE = {op.module: Whole(op.name, _fused_class(op.module)) for op in REGISTRY.values() if op.module is not None}
"""{torch.nn class: its op and its fused class}: of the ops whose classes fused_ops.nn has, which imports them."""
_FORWARDS = {base: base.forward for base in WHOLE}


def whole(run: Run, name: str, module: nn.Module) -> tuple[type[nn.Module] | None, Any]:
    """(the fused class to put in or to mix in, the formula of a norm), each None where there is none; enters the report's row."""
    cls = original_class(module)
    base = next((known for known in WHOLE if issubclass(cls, known)), None)
    if base is None:
        return None, _norm(run, name, module, cls)
    kind = WHOLE[base]
    if issubclass(cls, kind.cls):
        run.record(name, cls.__name__, kind.op, ALREADY, f"is a {kind.cls.__name__}", 1)
        return None, None
    inherits = cls.forward is _FORWARDS[base]
    if not inherits and not _calls_super(cls):  # a forward of its own, whose source is looked at as any module's
        return None, None
    reason = run.left_out(kind.op, module) or conditions.replaced_forward(module) or conditions.parameters(module)
    if hasattr(module, "parametrizations") or cls.__name__.startswith("FSDP"):
        reason = conditions.subclass(module, base)
    done = getattr(class_of(module), "mixin", None) is kind.cls
    if done or reason is None:
        note = "; its hooks stay" if conditions.hooks(module) else conditions.torch_fast_path(_parent(run.model, name))
        how = "" if inherits else ", which super().forward calls"
        run.record(name, cls.__name__, kind.op, ALREADY if done else FUSED, f"{kind.cls.__name__}{how}{note}", 1)
        return kind.cls, None
    run.record(name, cls.__name__, kind.op, LEFT, reason, 1)
    return None, None


def unknown_subclass(run: Run, name: str, module: nn.Module, cls: type[nn.Module]) -> None:
    """The row of a subclass whose own forward was found to call no op's function."""
    base = next((known for known in WHOLE if issubclass(cls, known)), None)
    if base is not None and not run.has(name, WHOLE[base].op):
        run.record(name, cls.__name__, WHOLE[base].op, LEFT, conditions.subclass(module, base), 1)


def _calls_super(cls: type[nn.Module]) -> bool:
    """Whether a class's forward calls super().forward: the fused class, next in line, then runs."""
    code = getattr(cls.forward, "__code__", None)
    return code is not None and {"super", "forward"} <= set(code.co_names)


def _norm(run: Run, name: str, module: nn.Module, cls: type[nn.Module]) -> NormFormula | None:
    """The formula of a norm that has no torch.nn class, where a fused function computes it."""
    made = class_of(module)
    before = made.formula if isinstance(made, Made) else None
    found = norm_formula(module) if before is None else before
    if found is None:
        return None
    if isinstance(found, str):
        base: type[nn.Module] = nn.LayerNorm if "a mean is subtracted" in found else nn.RMSNorm
        run.record(name, cls.__name__, WHOLE[base].op, LEFT, found, 1)
        return None
    reason = None if before is not None else run.left_out(found.op, module) or conditions.replaced_forward(module)
    if reason is not None:
        run.record(name, cls.__name__, found.op, LEFT, reason, 1)
        return None
    status = FUSED if before is None else ALREADY
    run.record(name, cls.__name__, found.op, status, f"{cls.__name__}.forward computes {found.op}, told by its formula", 1)
    return found


def _parent(model: nn.Module, name: str) -> nn.Module | None:
    return model.get_submodule(name.rpartition(".")[0]) if name else None
