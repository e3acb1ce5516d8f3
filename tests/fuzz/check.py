"""What must hold of a call: `check` answers "valid" or "refused", or raises a Failure that says what does not hold."""

from __future__ import annotations

import dataclasses
import inspect
import re
from typing import Any

import torch
from torch import Tensor

from .calls import Call, function_of, parameters
from .faults import fault_of, with_fault
from .forms import FLOATS
from .numbers import Watch, far, is_moderate, is_ordinary, misplaced, same_bits, storages, tolerance, within_contract
from .ways import WAYS, Function, context, module_of

REFUSALS = (RuntimeError, TypeError, IndexError, ValueError)  # NotImplementedError is a RuntimeError
LONGEST = 400
BY_ORDER = r"got (nan|-?inf), exact (nan|-?inf)$"  # an infinity times what underflows in fp32, or infinities that are summed
DIRECT = ("no_grad", "inference", "module", "grad", "autocast_bfloat16", "autocast_float16")
"""Ways whose first results are the function's own."""


SPEC_BROKEN, CONTRACT_BROKEN = "a raw operator breaks its SPEC", "the public function breaks the contract"
MISPLACED, FAR = "NaN or infinities in other places than the fp64 formula's", "far from the fp64 formula"
NUMERIC = frozenset((SPEC_BROKEN, CONTRACT_BROKEN, MISPLACED, FAR))


class Failure(Exception):  # noqa: N818
    """check: what was looked at, in a few words. text: what was seen."""

    def __init__(self, check: str, text: str) -> None:
        super().__init__(f"{check}: {text}")
        self.check, self.text = check, text


def check(call: Call) -> str:
    """Make the call and hold it to what is promised. Failure where it is not kept."""
    torch.manual_seed(0)
    return _wrong(call) if call.fault else _right(call)


def _right(call: Call) -> str:
    op, arguments = call.spec, call.build()
    tensors = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
    before = {name: memory.clone() for name, memory in storages(tensors).items()}
    run = WAYS[call.way].run
    theirs, refusal = _torch(call, run, op.torch_fn, arguments, tensors)
    ours = _ours(call, arguments)
    try:
        results = run(ours, tensors, call)
    except Exception as error:
        said = f"{type(error).__name__}: {_first_line(error)}"
        transformed = not WAYS[call.way].watched and type(error) is type(refusal)
        if refusal is None or (_words(error, call) and not transformed):
            raise Failure("refuses a valid call", said) from error
        return "refused"
    for name, memory in storages(tensors).items():
        if not torch.equal(memory, before[name]):
            raise Failure("changes an input", name)
        if call.way in DIRECT and memory.numel() and any(_shares(r, memory) for r in results):
            raise Failure("a result shares an input's memory", name)
    for i, (first, second) in enumerate(zip(results, run(ours, tensors, call))):
        if not same_bits(first, second):
            raise Failure("other bits the second time", f"result {i}")
    _attributes(call, results, theirs)
    if WAYS[call.way].watched:
        _watched(call, results, tensors, ours)
    rounded = dataclasses.replace(call, dy_dtype=results[0].dtype) if call.needs else call
    exact = _exact(rounded, arguments, tensors) if op.trains else theirs
    _numbers(call, results, exact or theirs)
    return "valid"


def _ours(call: Call, arguments: dict[str, Any]) -> Function:
    if call.way == "module" and (kind := module_of(call.spec)) is not None:
        made = kind(**_constructor(kind, call, arguments))
        for name, _ in list(made.named_parameters()):
            setattr(made, name, None if arguments[name] is None else torch.nn.Parameter(arguments[name], requires_grad=False))
        return lambda given: [made(given[parameters(call.op)[0].name])]
    return function_of(call.spec.public, call, arguments)


def _constructor(kind: Any, call: Call, arguments: dict[str, Any]) -> dict[str, Any]:
    known = inspect.signature(kind).parameters
    given = {name: value for name, value in arguments.items() if name in known and not isinstance(value, Tensor)}
    given.pop("dtype", None)
    if "in_features" in known:
        given |= {"in_features": 1, "out_features": 1}
    return given | ({"bias": arguments["bias"] is not None} if "bias" in known else {})


def _torch(call: Call, run: Any, function: Any, arguments: dict[str, Any], tensors: dict[str, Any]) -> tuple[Any, Any]:
    """(torch's results, None), or (None, its exception)."""
    try:
        return run(function_of(function, call, arguments), tensors, call), None
    except Exception as error:
        return None, error


def _exact(call: Call, arguments: dict[str, Any], tensors: dict[str, Tensor]) -> Any:
    """torch's results in fp64, or None where it has none."""
    arguments, first = dict(arguments), next(iter(tensors.values()))
    for p in parameters(call.op):
        if p.kind == "dtype":
            arguments[p.name] = None
        elif p.kind == "eps" and arguments[p.name] is None:
            arguments[p.name] = torch.finfo(torch.float64 if first.dtype is torch.float64 else torch.float32).eps
    way = "grad" if call.needs and "autocast" in call.way and call.spec.trains else call.way
    run = WAYS["no_grad" if "autocast" in way else way].run
    double = {name: t.double() for name, t in tensors.items()}
    try:
        return run(function_of(call.spec.torch_fn, call, arguments), double, call)
    except Exception:
        return None


def _shares(result: Any, memory: Tensor) -> bool:
    return isinstance(result, Tensor) and result.untyped_storage().data_ptr() == memory.data_ptr() and result.numel() > 0


def _attributes(call: Call, results: list[Any], theirs: list[Any] | None) -> None:
    if call.way in DIRECT and not results[0].is_contiguous():
        raise Failure("a result is not contiguous", f"strides {results[0].stride()}")
    if theirs is None:
        return
    if len(theirs) != len(results):
        raise Failure("another number of results than torch's", f"{len(results)}, torch's {len(theirs)}")
    for i, (mine, other) in enumerate(zip(results, theirs)):
        if (mine is None) != (other is None):
            if call.way != "in_place" or mine is None:  # torch's function keeps its output: one that does not may go on
                raise Failure("a gradient is None where torch's is not, or the other way", f"result {i}: {mine is None}")
        elif mine is not None and not _alike(mine, other, call):
            got, want = f"{mine.dtype} {tuple(mine.shape)}", f"{other.dtype} {tuple(other.shape)}"
            raise Failure("another dtype or shape than torch's", f"result {i}: {got}, torch's {want}")


def _alike(mine: Tensor, other: Tensor, call: Call) -> bool:
    """Whether two results have one shape and dtype. Of mixed dtypes torch takes few, and promotes some: ours is input's."""
    mixed = len({form.dtype for form in call.tensors.values() if form is not None}) > 1
    return mine.shape == other.shape and (mixed or mine.dtype is other.dtype)


def _watched(call: Call, results: list[Any], tensors: dict[str, Any], ours: Function) -> None:
    """The same call with every raw operator held to its SPEC, then the results that came without that."""
    try:
        with Watch() as watch:
            WAYS[call.way].run(ours, tensors, call)
    except AssertionError as error:
        if not re.search(BY_ORDER, str(error)):
            raise Failure(SPEC_BROKEN, _first_line(error)) from error
    except Exception as error:
        raise Failure("refuses through the dispatcher", f"{type(error).__name__}: {_first_line(error)}") from error
    if not watch.forwards:
        raise Failure("no raw operator ran", call.way)
    if call.way in DIRECT:
        try:
            within_contract(results[:1] if call.needs else results, *watch.forwards[0])
        except AssertionError as error:
            if not re.search(BY_ORDER, str(error)):
                raise Failure(CONTRACT_BROKEN, _first_line(error)) from error


def _numbers(call: Call, results: list[Any], exact: list[Any] | None) -> None:
    if exact is None:
        return
    relative = tolerance(call, results)
    factors = list(call.tensors.values())[1:]  # an infinite one is multiplied by what may underflow outside fp64
    underflows = call.way not in DIRECT or any(form is not None and form.values in ("special", "infinite") for form in factors)
    for i, (mine, want) in enumerate(zip(results, exact)):
        if mine is None or want is None:
            continue
        if mine.shape != want.shape:
            raise Failure("another shape than the fp64 formula's", f"result {i}: {tuple(mine.shape)}, {tuple(want.shape)}")
        if is_moderate(call) and (text := misplaced(mine, want, by_order=i > 0 or underflows)):
            raise Failure(MISPLACED, f"result {i}: {text}")
        if is_ordinary(call) and (text := far(mine, want, relative)):
            raise Failure(FAR, f"result {i}: {text}")


def _wrong(call: Call) -> str:
    function, other = call.spec.public, call.spec.torch_fn
    mine, error = _try(call, function)
    inner = error
    if call.fault and call.fault[1] != "meta":  # of a meta tensor there are no numbers to hold to anything
        with Watch():
            _, inner = _try(call, function)
    theirs, refusal = _try(call, other)
    if error is not None and (what := _words(error, call, refusal)):
        raise Failure(f"refusal: {what}", f"{type(error).__name__}: {_first_line(error)}")
    if isinstance(inner, AssertionError) and str(inner).startswith("fused_ops."):
        raise Failure(SPEC_BROKEN, _first_line(inner))
    if (error is None) != (inner is None) or (inner is not None and _words(inner, call, refusal)):
        said = " | ".join("taken" if e is None else f"{type(e).__name__}: {_first_line(e)}" for e in (error, inner))
        raise Failure("the fast path and the dispatcher disagree", said)
    if error is not None:
        if refusal is None and not fault_of(call).refused:
            raise Failure("refuses what torch takes", f"{type(error).__name__}: {_first_line(error)}")
        return "refused"
    if refusal is not None and not fault_of(call).taken:
        raise Failure("takes what torch refuses", f"{type(refusal).__name__}: {_first_line(refusal)}")
    if theirs is not None and mine is not None:
        _attributes(dataclasses.replace(call, way="wrong"), mine, theirs)
        for i, (a, b) in enumerate(zip(mine, theirs)):
            if not a.is_meta and (text := misplaced(a, b) or far(a, b, tolerance(call, mine))):
                raise Failure("far from torch's result", f"result {i}: {text}")
    return "valid"


def _try(call: Call, function: Any) -> tuple[list[Any] | None, Exception | None]:
    arguments = with_fault(call)
    tensors = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
    for name in call.needs:
        if name in tensors and tensors[name].dtype in FLOATS:
            tensors[name] = tensors[name].detach().requires_grad_()
    try:
        with context(call.way):
            return function_of(function, call, arguments)(tensors), None
    except Exception as error:
        return None, error


def _words(error: Exception, call: Call, refusal: Exception | None = None) -> str | None:
    """What is wrong with the words of a refusal, or None. refusal: torch's, whose type is as good."""
    message, op = str(error), call.spec.public.__name__
    if not isinstance(error, REFUSALS) and type(error) is not type(refusal):
        return f"an exception of type {type(error).__name__}"
    if len(message) > LONGEST:
        return f"a message of more than {LONGEST} characters"
    if not message.startswith(f"{op}: "):
        return "it does not begin with the op's name"
    if not re.match(rf"{op}: ({'|'.join(p.name for p in parameters(call.op))})\b", message):
        return "it names no argument"
    if "\n" in message or re.search(r"\. [A-Z]", message):
        return "more than one sentence"
    return None


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:300]
