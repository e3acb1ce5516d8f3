"""What torch.compile takes for each operator: never more kernels nor bytes than the eager baseline compiled, and right."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fused_ops import (
    REGISTRY,
    compile_with_aten,
    explain_compiled,
    fused_layernorm,
    fused_linear,
    fused_linear_fp8,
    fused_rmsnorm,
    fused_softmax,
)
from fused_ops._torch.compile_choice import decide, noting
from fused_ops._torch.compile_count import PERSISTENT, Cost, Step, count
from fused_ops._torch.compile_state import COMPILE_WITH_ATEN
from fused_ops.testing import assert_within_contract
from tests import process
from tests.contract import leaves
from tests.torch.inductor_count import costs
from tests.torch.transformer_blocks import BLOCKS, EAGER, OURS, Alone, B, Block, D, S

BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def _automatic() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    compile_with_aten(enabled=None)
    torch._dynamo.reset()


def chosen(function: Callable[..., Any], *args: Any) -> dict[str, list[str]]:
    """{operator: what was taken for each of its calls}."""
    found: dict[str, list[str]] = {}
    for choice in explain_compiled(function, *args):
        found.setdefault(choice.operator, []).append(choice.chosen)
    return found


def block(cls: type[Block], functions: Any, dtype: torch.dtype, train: bool) -> Block:
    return cls(functions).to(dtype).train(train)


def check(cls: type[Block], dtype: torch.dtype, train: bool, whole: bool = False) -> None:
    x = torch.randn(B, S, D, dtype=dtype, requires_grad=train)
    eager, ours = (costs(block(cls, functions, dtype, train), x, train=train) for functions in (EAGER, OURS))
    assert len(eager) == len(ours) == 1 + train
    if whole:  # forward and backward together: what one saves for the other is written by one and read by the other
        eager, ours = ([Cost(sum(c.kernels for c in each), sum(c.bytes for c in each))] for each in (eager, ours))
    for a, b in zip(ours, eager):
        assert a.within(b), f"{cls.__name__} {dtype} train={train}: {a}, the eager baseline {b}"


@pytest.mark.parametrize("train", [False, True])
def test_a_block_costs_no_more_than_the_eager_baseline(train: bool) -> None:
    check(BLOCKS[1], BF16, train)


@pytest.mark.slow
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
@pytest.mark.parametrize("cls", [*BLOCKS, Alone])
def test_no_block_costs_more_than_the_eager_baseline(cls: type[Block], dtype: torch.dtype, train: bool) -> None:
    check(cls, dtype, train, whole=cls is Alone)


def test_the_count_sees_what_an_opaque_operator_costs() -> None:
    """The count itself: with every operator opaque the same block costs more."""
    x = torch.randn(B, S, D, dtype=BF16)
    opaque = block(BLOCKS[0], OURS, BF16, False)
    compile_with_aten(enabled=False)
    (before,) = costs(opaque, x)
    compile_with_aten(enabled=None)
    (now,) = costs(opaque, x)
    assert before.kernels > now.kernels
    assert before.bytes > now.bytes


X, W, V = torch.randn(4, 8, 64), torch.randn(64, 64), torch.randn(64)


def attention(x: Tensor, softmax: Callable[..., Tensor] = fused_softmax) -> Tensor:
    return softmax(x @ x.transpose(-1, -2), -1) @ x


CASES: list[tuple[str, Callable[..., Tensor], tuple[Any, ...], dict[str, list[str]]]] = [
    ("between pointwise", lambda x, v: F.gelu(fused_layernorm(x + x, (64,), v, v)), (X, V), {"layer_norm_fwd": ["aten"]}),
    ("pointwise before", lambda x, w: fused_softmax(x @ w * 2, -1) @ w, (X, W), {"softmax_fwd": ["aten"]}),
    ("pointwise behind", lambda x, w: F.relu(fused_softmax(x @ w, -1)), (X, W), {"softmax_fwd": ["aten"]}),
    ("behind a view", lambda x, w: fused_softmax(x @ w, -1).view(32, 64).exp(), (X, W), {"softmax_fwd": ["aten"]}),
    ("between products", lambda x, w: fused_softmax(x @ w, -1) @ w, (X, W), {"softmax_fwd": ["ours"]}),
    ("attention", attention, (X,), {"softmax_fwd": ["aten"]}),
    ("one after the other", lambda x, v: fused_softmax(fused_rmsnorm(x, (64,), v)), (X, V),
     {"rms_norm_fwd": ["aten"], "softmax_fwd": ["aten"]}),
    ("a long row", lambda x: fused_layernorm(x, (4096,)), (torch.randn(2, 4096),), {"layer_norm_fwd": ["ours"]}),
    ("a short row", lambda x: fused_layernorm(x, (64,)), (X,), {"layer_norm_fwd": ["aten"]}),
    ("float64", lambda x: fused_softmax(x), (X.double(),), {"softmax_fwd": ["aten"]}),
    ("fp32 product", lambda x, w: fused_linear(x, w, None, "gelu"), (X, W), {"linear_fwd": ["aten"]}),
    ("16-bit product", lambda x, w: fused_linear(x, w, None, "gelu") * 2, (X.bfloat16(), W.bfloat16()), {"linear_fwd": ["ours"]}),
    ("16-bit product alone", lambda x, w: fused_linear(x, w), (X.bfloat16(), W.bfloat16()), {"linear_fwd": ["aten"]}),
]  # fmt: skip


@pytest.mark.parametrize(("function", "args", "expected"), [pytest.param(*case[1:], id=case[0]) for case in CASES])
def test_the_choice(function: Callable[..., Tensor], args: tuple[Any, ...], expected: dict[str, list[str]]) -> None:
    assert chosen(function, *args) == expected


def test_the_backward_has_a_choice_of_its_own() -> None:
    x, w = X.clone().requires_grad_(), W.clone().requires_grad_()
    assert chosen(lambda x, w: fused_softmax(x @ w, -1) @ w, x, w) == {"softmax_fwd": ["ours"], "softmax_bwd": ["ours"]}
    assert chosen(lambda x, w: fused_softmax((x @ w).relu(), -1) @ w, x, w)["softmax_bwd"] == ["aten"]
    v = V.clone().requires_grad_()
    found = chosen(lambda x, w, v: F.relu(fused_layernorm(x @ w, (64,), v)) @ w, x, w, v)
    assert found == {"layer_norm_fwd": ["aten"], "layer_norm_bwd": ["aten"]}


def test_fp8_stays_ours_and_a_switch_rules() -> None:
    spec = REGISTRY["linear_fp8"].example("cpu", BF16)
    assert chosen(lambda *a: fused_linear_fp8(*a, **spec.kwargs) * 2, *spec.args) == {"linear_fp8_fwd": ["ours"]}
    function = lambda x: fused_softmax(x + 1)  # noqa: E731
    compile_with_aten("softmax", enabled=False)
    assert chosen(function, X) == {"softmax_fwd": ["ours"]}
    assert explain_compiled(function, X)[0].reason == "compile_with_aten"
    compile_with_aten("softmax", enabled=True)
    assert chosen(function, X) == {}


def test_what_is_told() -> None:
    found = explain_compiled(lambda x, v: F.gelu(fused_layernorm(x + x, (64,), v)), X, V)
    assert str(found).startswith("layer_norm_fwd (4,8,64): ATen (Inductor fuses it with its neighbours; ours 3 kernels, ")
    choice = found[0]
    assert choice.ours is not None
    assert choice.aten == Cost(1, 2 * X.nbytes + V.nbytes)
    assert not choice.ours.within(choice.aten)
    assert found.as_json()[0]["aten"] == {"kernels": 1, "bytes": choice.aten.bytes}
    assert str(explain_compiled(torch.relu, X)) == "no operator of ours"


def test_dynamic_rows_make_one_graph() -> None:
    def function(x: Tensor, v: Tensor) -> Tensor:
        return F.gelu(fused_layernorm(x + 1, (64,), v))

    graphs = []

    def backend(graph: Any, example: Any) -> Any:
        from torch._inductor.compile_fx import compile_fx

        graphs.append(graph)
        return compile_fx(graph, example, inner_compile=lambda lowered, _, **__: lowered)

    compiled = torch.compile(function, fullgraph=True, backend=backend)
    for rows in (4, 7, 9):
        x, v = torch.randn(rows, 3, 64, requires_grad=True), V.clone().requires_grad_()
        torch._dynamo.mark_dynamic(x, 0)
        with noting() as found:
            got = compiled(x, v)
        assert [choice.chosen for choice in found] == (["aten", "aten"] if rows == 4 else [])
        expected = function(x, v)
        torch.testing.assert_close(got, expected)
        for a, b in zip(torch.autograd.grad(got.sum(), (x, v)), torch.autograd.grad(expected.sum(), (x, v))):
            torch.testing.assert_close(a, b)
    assert len(graphs) == 1


class Calls(TorchDispatchMode):
    """Notes the raw operators that are called, and their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "fused_ops":
            self.seen.append((func, args))
        return func(*args, **(kwargs or {}))


FORMULAS = [
    pytest.param(
        name, dtype, marks=() if (name, dtype) == ("layer_norm", BF16) else pytest.mark.slow, id=f"{name}-{str(dtype)[6:]}"
    )
    for name, op in REGISTRY.items()
    if op.trains
    for dtype in (torch.float32, BF16)
]


@pytest.mark.parametrize(("op", "dtype"), FORMULAS)
def test_the_formula_as_inductor_compiles_it_is_within_the_contract(op: str, dtype: torch.dtype) -> None:
    """Forward and backward of an op's example, but for the formulas that are never taken."""
    spec = REGISTRY[op]
    sample = spec.example("cpu", dtype)
    args, wanted = leaves(sample.args)
    with Calls() as calls:
        out = spec.public(*args, **sample.kwargs)
        torch.autograd.grad(out, wanted, torch.randn_like(out))
    raws = {raw.overload: raw for each in REGISTRY.values() for raw in each.raw}
    checked = 0
    for overload, given in calls.seen:
        raw = raws[overload]
        choice = explain_compiled(lambda *a, run=overload: run(*a), *given)[0]
        if "rounds a product" in choice.reason:
            assert choice.chosen == "ours"
            continue
        given = tuple(a.detach() if isinstance(a, Tensor) else a for a in given)
        results = torch.compile(raw.formula, fullgraph=True, dynamic=False)(*given)
        results = results if isinstance(results, tuple) else (results,)
        expected = overload(*given)
        expected = expected if isinstance(expected, tuple) else (expected,)
        for result, like, bound in zip(results, expected, raw.bound(*given)):
            assert (result.shape, result.dtype) == (like.shape, like.dtype)
            if bound is not None and result.numel():
                assert_within_contract(result, bound, f"{raw.name}")
        checked += 1
    assert checked or dtype is BF16


def test_the_count() -> None:
    """x + r, layer norm and gelu: one kernel, or three with two tensors more; a long row is read twice."""
    T, rows = 4096, (8, 64)
    tensor = Step("buffer", (), T, 512)

    def formula(over: int, numel: int) -> dict[str, Step]:
        return {
            "x": Step("buffer", (), T, numel), "r": Step("buffer", (), T, numel), "h": Step("pointwise", ("x", "r"), T, numel),
            "m": Step("row", ("h",), 64, rows[0], over), "y": Step("pointwise", ("h", "m"), T, numel),
            "z": Step("pointwise", ("y",), T, numel, kept=True),
        }  # fmt: skip

    assert count(formula(64, 512)) == Cost(1, 3 * T)
    assert count(formula(PERSISTENT + 1, 8 * (PERSISTENT + 1))) == Cost(1, 5 * T)
    opaque = {
        "x": tensor, "r": tensor, "h": Step("pointwise", ("x", "r"), T, 512), "n": Step("call", ("h",), T, kernels=1),
        "y": Step("part", ("n",), T, 512), "z": Step("pointwise", ("y",), T, 512, kept=True),
    }  # fmt: skip
    assert count(opaque) == Cost(3, 7 * T)
    sums = {"x": tensor, "a": Step("row", ("x",), 64, 8, 64, kept=True), "b": Step("column", ("x",), 64, 64, 8, kept=True)}
    assert count(sums) == Cost(2, 2 * T + 128)
    assert count({"x": tensor, "dead": Step("row", ("x",), 64, 8, 64)}) == Cost(0, 0)


def test_the_decision() -> None:
    a, b = Cost(1, 100), Cost(2, 100)
    assert decide(a, b, True)[0] == decide(a, b, False)[0] == decide(a, a, False)[0] == "ours"
    assert decide(a, a, True)[0] == decide(b, a, False)[0] == decide(Cost(1, 300), b, True)[0] == "aten"


def test_the_pass_is_there_once_and_only_with_inductor(tmp_path: Path) -> None:
    code = (
        "import sys, torch, fused_ops\n"
        "from fused_ops._torch.compile_choice import register_when_used\n"
        "register_when_used(); assert not any(m.startswith('torch._inductor') for m in sys.modules)\n"
        "from torch._inductor.fx_passes.joint_graph import pass_patterns\n"
        "before = list(pass_patterns); register_when_used(); register_when_used()\n"
        "assert pass_patterns[1:] == before, pass_patterns\n"
    )
    process.output(code, cwd=tmp_path)


def test_the_caches_are_told_before_they_look() -> None:
    """At Dynamo's trace, whatever the backend: each setting its own key."""
    keys = set()
    for enabled in (None, True, False):
        compile_with_aten("softmax", enabled=enabled)
        torch.compile(lambda x: fused_softmax(x), backend="eager")(X)
        keys.add(torch._inductor.config.unsafe_marked_cacheable_functions["fused_ops.compile_with_aten"])
    assert len(keys) == 3


@pytest.mark.slow
def test_a_process_with_another_setting_takes_no_code_from_the_caches(tmp_path: Path) -> None:
    """One folder of caches, three processes: ours, what is decided, ours again. The third finds the first's code."""
    code = (
        "import torch\n"
        "from torch._dynamo.utils import counters\n"
        "from torch._inductor.utils import run_and_get_code\n"
        "from fused_ops import compile_with_aten, fused_softmax\n"
        "compile_with_aten(enabled={state})\n"
        "f = torch.compile(lambda x: fused_softmax(x + 1), fullgraph=True)\n"
        "with torch.no_grad():\n"
        "    _, code = run_and_get_code(f, torch.randn(4, 8))\n"
        "print('torch.ops.fused_ops.softmax_fwd' in code[0] if code else None, counters['aot_autograd']['autograd_cache_hit'])\n"
    )
    env = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    found = [process.output(code.format(state=state), env=env).split()[-2:] for state in (False, None, False)]
    assert found[0] == ["True", "0"]
    assert found[1] == ["False", "0"]
    assert found[2][1] == "1"


def test_every_op_starts_undecided() -> None:
    assert set(COMPILE_WITH_ATEN) == set(REGISTRY)
    assert sys.modules["fused_ops"].compile_with_aten is compile_with_aten
