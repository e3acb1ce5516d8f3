"""Modules whose whole forward is one op, such as LayerNorm and Softmax: they have a fused class of their own."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from .. import nn as fused
from .._torch.spec import REGISTRY
from . import conditions
from .report import ALREADY, FUSED, LEFT
from .run import Run


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


def fuse_whole(run: Run) -> None:
    """Change the class of every module of WHOLE that can be fused. Report each RMS norm that is no such module."""
    for name, module in run.model.named_modules():
        base = next((cls for cls in WHOLE if isinstance(module, cls)), None)
        before = type(module).__name__
        if base is None:
            if "RMSNorm" in before or before == "T5LayerNorm":
                run.record(name, before, "rms_norm", LEFT, f"fused_ops has no op for {before}")
            continue
        whole = WHOLE[base]
        if type(module) is whole.cls:
            run.record(name, before, whole.op, ALREADY, f"is a {before}")
            continue
        reason = run.left_out(whole.op, name, module) or _unfit(module, base)
        if reason is None:
            run.swap(module, whole.cls)
            note = "; its hooks stay" if conditions.hooks(module) else conditions.torch_fast_path(_parent(run.model, name))
            run.record(name, before, whole.op, FUSED, f"{whole.cls.__name__}{note}")
        else:
            run.record(name, before, whole.op, LEFT, reason)


def _parent(model: nn.Module, name: str) -> nn.Module | None:
    return model.get_submodule(name.rpartition(".")[0]) if name else None


def _unfit(module: nn.Module, base: type[nn.Module]) -> str | None:
    if type(module) is not base:
        return conditions.subclass(module, base)
    return conditions.replaced_forward(module) or conditions.parameters(module)
