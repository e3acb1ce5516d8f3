"""norm_formula(module): which norm a module computes, told by running its forward on symbols and by trying it on numbers."""

from __future__ import annotations

import dis
import inspect
from dataclasses import dataclass
from types import FunctionType
from typing import Any, Union
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from .norm_code import RefusedError, check_code, find, is_constant, own_functions
from .norm_match import Rms, e_form, reason
from .norm_symbols import Number, Run

_F32, _BF16 = torch.float32, torch.bfloat16
_SINGLE = (_F32, _BF16, torch.float16)
_DTYPES = (*_SINGLE, torch.float64)
# What code may raise on values it was not made for. Nothing wider: a timeout's or an interrupt's exception passes.
_ERRORS = (
    RefusedError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    NameError,
    RuntimeError,
    TypeError,
    ValueError,
)
_ALONE = frozenset(("rsqrt", "norm", "vector_norm", "normalize", "var", "std", "var_mean", "std_mean"))
_WITH_MEAN = frozenset(("sqrt", "pow", "square"))


@dataclass(frozen=True)
class NormFormula:
    """A module that computes what a fused norm does: y = x * rsqrt(mean(x^2) + eps) * weight, in fp32, rounded once to x's dtype.

    op: the SPEC's name, "rms_norm". weight: the attribute that holds the weight, of shape (N,), or None.
    eps: the attribute (a str) that holds it, or its value (a float).
    pairs: (input dtype, weight dtype or None) for which fused_rmsnorm(x, (N,), weight, eps) is the same function.
    input: the name of forward's argument.
    constants: (attribute, value) that the formula holds only with: another value means another function.

    What the pairs leave to the caller, at each call: x is an ordinary tensor whose last dimension is N (the module itself
    broadcasts), autocast is off (fused_rmsnorm returns fp32 there, the module x's dtype), the result may be contiguous.
    """

    op: str
    weight: str | None
    eps: str | float
    pairs: frozenset[tuple[torch.dtype, torch.dtype | None]]
    input: str
    constants: tuple[tuple[str, Any], ...]


Verdict = Union[NormFormula, str, None]
_VERDICTS: WeakKeyDictionary[type, dict[Any, NormFormula | str]] = WeakKeyDictionary()


def norm_formula(module: nn.Module) -> Verdict:
    """The norm that module computes by its own code; a reason (str) for a norm that no fused function computes; None for no norm.

    Modules with children, torch.nn's own classes and subclasses of nn.LayerNorm are None, and so is what only calls torch's
    norm functions. Runs nothing of module but its forward, on symbols and then on a copy with random weights on the CPU.
    """
    cls = type(module)
    if isinstance(module, (nn.LayerNorm, torch.jit.ScriptModule)) or str(cls.forward.__module__).startswith("torch."):
        return None
    if module._modules and list(module._modules) != ["parametrizations"]:
        return None
    try:
        functions = own_functions(module)
        if not functions or not _is_norm(module, functions):
            return None
        if hasattr(cls.forward, "__wrapped__"):
            raise RefusedError("forward is decorated")
        _check_input(functions[0])
        check_code(module, functions)
        known = _VERDICTS.setdefault(cls, {})
        key = _key(module, functions)
        if key not in known:
            known[key] = _verdict(module, functions)
        return known[key]
    except _ERRORS as stop:  # a RefusedError, or what a strange parameter raises when it is looked at
        return unknown(stop)


def unknown(why: Exception) -> str:
    return f"its forward is a norm that fuse does not know: {str(why).splitlines()[0] if str(why) else type(why).__name__}"


def _is_norm(module: nn.Module, functions: list[FunctionType]) -> bool:
    """Whether the names in the code suggest a norm: a reciprocal root, a norm, or a mean of squares. Raises where it only calls one."""
    names = {name for function in functions for name in function.__code__.co_names}
    words = names.difference(vars(module), module._parameters, module._buffers)
    several = _inputs(functions[0]) != 1 and "norm" not in type(module).__name__.lower()  # a loss, perhaps
    if "rsqrt" in words or (words & _ALONE and not several):
        return True
    if "mean" in words and not several:
        return bool(words & _WITH_MEAN) or any(
            instruction.opname == "BINARY_POWER" or instruction.argrepr == "**"
            for function in functions
            for instruction in dis.get_instructions(function)
        )
    known = functions[0].__globals__
    called = {name: known.get(name, getattr(F, name, None)) for name in sorted(words) if "norm" in name}
    called = {name: value for name, value in called.items() if isinstance(value, FunctionType)}
    if called and not any(str(value.__module__).startswith("torch.") for value in called.values()):
        raise RefusedError(f"it calls {next(iter(called))}")
    return False


def _inputs(forward: FunctionType) -> int:
    """How many arguments besides self forward has, *args and **kwargs counted."""
    code = forward.__code__
    variable = bool(code.co_flags & inspect.CO_VARARGS) + bool(code.co_flags & inspect.CO_VARKEYWORDS)
    return code.co_argcount + code.co_kwonlyargcount + variable - 1


def _check_input(forward: FunctionType) -> None:
    names = forward.__code__.co_varnames[1 : _inputs(forward) + 1]
    if len(names) != 1 or forward.__code__.co_argcount != 2:
        takes = ", ".join(names) or "nothing"
        raise RefusedError(f"forward takes {takes}: a fused norm takes one input (no gate, no mask, no scale)")


def _key(module: nn.Module, functions: list[FunctionType]) -> Any:
    """What the verdict depends on: the code, the constants that it names, and which parameters and buffers there are."""
    constants = []
    for name in sorted({name for function in functions for name in function.__code__.co_names}):
        try:
            value = find(module, name)
        except RefusedError:
            continue
        constants.append((name, repr(value) if is_constant(value) else type(value).__name__))
    tensors = [*module._parameters.items(), *module._buffers.items()]
    return *functions, *constants, *((name, None if t is None else t.dim()) for name, t in tensors)


def _verdict(module: nn.Module, functions: list[FunctionType]) -> NormFormula | str:
    try:
        runs = {(x, w): _run(module, functions, x, w) for x in _DTYPES for w in _DTYPES}
        forms = {pair: form for pair, run in runs.items() if not run.asked and (form := e_form(run)) is not None}
        if not all((dtype, dtype) in forms for dtype in _SINGLE):
            return reason(runs[_F32, _F32], runs[_BF16, _BF16], runs[_BF16, _F32])
        return _formula(module, functions[0], runs, forms)
    except _ERRORS as error:  # of the forward on symbols, or of the trial
        return unknown(error)


def _run(module: nn.Module, functions: list[FunctionType], x: torch.dtype, weight: torch.dtype) -> Run:
    try:
        return Run(module, functions, x, weight)
    except RefusedError:
        raise
    except _ERRORS:  # a check of the shape, perhaps, that must hold
        return Run(module, functions, x, weight, answer=True)


def _formula(module: nn.Module, forward: FunctionType, runs: dict[Any, Run], forms: dict[Any, Rms]) -> NormFormula | str:
    form = forms[_F32, _F32]
    eps = _named(form)
    if any((other.weight, _named(other)) != (form.weight, eps) for other in forms.values()):
        raise RefusedError("it takes another weight or eps for another dtype")
    weight = None if form.weight is None else module._parameters[form.weight]
    if weight is not None and weight.dim() != 1:
        return f"its weight has {weight.dim()} dimensions, its mean goes over one: fused_rmsnorm has both over the same"
    for (x, w), tried in forms.items():
        if not _equals(module, tried, x, w):
            raise RefusedError(f"it is not its formula when tried with {x} input and {w} weight")
    pairs = frozenset((x, w if form.weight else None) for x, w in forms)
    constants = {name: value for run in runs.values() for name, value in run.fixed.items()}
    return NormFormula("rms_norm", form.weight, eps, pairs, forward.__code__.co_varnames[1], tuple(sorted(constants.items())))


def _named(form: Rms) -> str | float:
    """form's eps: the attribute that holds it, or its value."""
    return form.eps.name if isinstance(form.eps, Number) else float(form.eps)


def _equals(module: nn.Module, form: Rms, x_dtype: torch.dtype, weight_dtype: torch.dtype) -> bool:
    """Whether module's forward, on the CPU with random numbers, gives the bits of the formula as torch computes it."""
    generator = torch.Generator("cpu").manual_seed(0)
    weight = None if form.weight is None else module._parameters[form.weight]
    N = 48 if weight is None else weight.shape[0]
    copy = object.__new__(type(module))
    copy.__dict__.update(module.__dict__)
    with torch.no_grad(), torch.autocast("cpu", enabled=False), _disable_current_modes():
        scales = torch.tensor([[1.0], [1e-3], [30.0]], device="cpu", dtype=_F32)
        x = (torch.randn(3, N, generator=generator, device="cpu", dtype=_F32) * scales).to(x_dtype)
        if weight is not None:
            w = torch.randn(N, generator=generator, device="cpu", dtype=_F32).to(weight_dtype)
            copy.__dict__["_parameters"] = {**module._parameters, form.weight: nn.Parameter(w)}
        wide = x.to(torch.float64 if x_dtype is torch.float64 else _F32)
        eps = getattr(module, form.eps.name) if isinstance(form.eps, Number) else form.eps
        expected = _ROOTS[form.root](wide, wide.square().mean(-1, keepdim=True) + eps)
        if weight is not None:
            expected = expected * w.to(wide.dtype)
        got = type(module).forward(copy, x)
        return isinstance(got, Tensor) and got.dtype is x_dtype and torch.equal(got, expected.to(x_dtype))


_ROOTS = {
    "rsqrt": lambda x, v: x * torch.rsqrt(v),
    "pow": lambda x, v: x * torch.pow(v, -0.5),
    "1/sqrt": lambda x, v: x * (1 / torch.sqrt(v)),
    "1/pow": lambda x, v: x * (1 / torch.pow(v, 0.5)),
    "x/sqrt": lambda x, v: x / torch.sqrt(v),
    "x/pow": lambda x, v: x / torch.pow(v, 0.5),
}
