"""Random forwards: fused, each computes, records and raises what it does unfused, in the same order."""

from __future__ import annotations

import collections
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from torch import nn

from fused_ops import fuse
from fused_ops._fuse import calls
from fused_ops._fuse.methods import parsed

pytestmark = pytest.mark.filterwarnings("ignore")
EXAMPLES = 160
HEAD = """
import contextlib
import torch
import torch.nn.functional as F
from tests.fuse.test_random_forwards import Parts, RECORDED


class Program(Parts):
    def forward(self, x):
        a, b, c, i, rounds = x * 1, x * 2, x * 3, 0, 0
"""
RECORDED: list[Any] = []


class Noisy(nn.Module):
    """A layer that records its calls and changes its input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        RECORDED.append(x.detach().clone())
        return x.mul_(0.5)


class Recording(nn.Module):
    """Stands in a child's place and records its calls."""

    def __init__(self, name: str, child: nn.Module) -> None:
        super().__init__()
        self.name, self.child = name, child

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        RECORDED.append((self.name, x.detach().clone()))
        return self.child(x)


RECORDING = ("l0", "l1", "silu", "drop0")


class Parts(nn.Module):
    """What a program calls."""

    def __init__(self) -> None:
        super().__init__()
        self.l0, self.l1, self.l2 = (nn.Linear(4, 4, bias=bias) for bias in (True, False, True))
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Identity(), nn.Linear(4, 4)])
        self.narrow = nn.Linear(3, 4)
        self.noisy = Noisy()
        self.relu, self.gelu, self.silu = nn.ReLU(inplace=True), nn.GELU(), nn.SiLU()
        self.drop, self.drop0 = nn.Dropout(0.5), nn.Dropout(0.0)
        self.kept: list[Any] = []

    def note(self, x: torch.Tensor) -> torch.Tensor:
        RECORDED.append(x.detach().clone())
        return x


LINEARS = ("self.l0", "self.l1", "self.l2", "self.layers[0]", "self.layers[i]")
ACTIVATIONS = (
    "self.relu({})", "self.gelu({})", "self.silu({})", "F.relu({})", "F.gelu({}, approximate='tanh')", "F.silu({}, inplace=True)",
    "torch.tanh({})", "({}).sigmoid()", "({}).relu_()",
)  # fmt: skip
DROPS = ("self.drop({})", "self.drop0({})", "F.dropout({}, 0.3, self.training)", "F.dropout({}, p=0.0)")
OTHERS = (
    "self.noisy({})", "self.note({})", "({}).clone()", "torch.softmax({}, -1)", "(lambda t: t + 1)({})",
    "self.l0((yy := {})) + yy", "sum([self.gelu(layer({})) for layer in (self.l0, self.l1)])", "(torch.zeros(()) if i else {})",
    "(i > 1 and a or {})", "({}).add_(0.25)", "[{}, self.note(a)][0]", "({}) + RECORDED[-1]",
)  # fmt: skip
USES = ("self.noisy({u}) + {a}", "{u} * 2 + {a}", "{a} + self.noisy({u})", "({a} if i else {u})", "(i and {a}) + {u}")
EFFECTS = (
    "{}.add_(0.5)", "self.kept.append({})", "RECORDED.append({}.detach().clone())", "del {}", "self.last = {}", "{}[0] = 1.0",
    "self.note({})", "self.relu({})", "{} += a", "b = self.narrow(a[..., :3])",
)  # fmt: skip
HARMLESS = ("i = 0", "i = i", "c = a", "a = b", "n = a.shape[0]", "c = b = a", "n = (a, b)")
HEADS = (
    "for i in range(2)", "for _ in (0, 2)", "while (rounds := rounds + 1) < 3", "if i == 0", "with torch.no_grad()", "with contextlib.suppress(Exception)",
    "with contextlib.nullcontext()", "if float(a.detach().flatten()[0]) > 0",
)  # fmt: skip
EXITS = ("break", "continue", "return a", "return b", "raise ValueError(i)", "raise RuntimeError('x')", "b = self.narrow(a)")


class Writer:
    """Writes one program, by choices that hypothesis makes."""

    def __init__(self, draw: Callable[..., Any]) -> None:
        self.draw = draw
        self.lines: list[str] = []

    def number(self, most: int) -> int:
        return int(self.draw(st.integers(0, most)))

    def pick(self, options: Any) -> Any:
        return options[self.number(len(options) - 1)]

    def variable(self) -> str:
        return str(self.pick("aabbc"))

    def linear(self, inner: str) -> str:
        return f"{self.pick(LINEARS)}({inner})"

    def expression(self, depth: int = 2) -> str:
        kind = self.number(9) if depth else 0
        if kind <= 1:
            return self.variable()
        if kind <= 3:
            return self.linear(self.expression(depth - 1))
        if kind <= 5:
            return str(self.pick(ACTIVATIONS).format(self.linear(self.expression(depth - 1))))
        if kind == 6:
            return str(self.pick((*ACTIVATIONS, *DROPS, *OTHERS)).format(self.expression(depth - 1)))
        gate = self.pick(ACTIVATIONS).format(self.linear(v := self.variable()))
        up = self.linear(self.pick((v, v, self.variable())))
        form = self.pick(("{} * {}", "{} * {}", "torch.mul({}, {})", "({}).mul({})", "{} + {}"))
        return str(form.format(*((gate, up) if kind == 7 else (up, gate))))

    def block(self, indent: str, loops: bool, depth: int = 2) -> None:
        for _ in range(1 + self.number(2)):
            self.statement(indent, loops, depth)

    def statement(self, indent: str, loops: bool, depth: int) -> None:
        kind = self.number(11)
        if kind <= 1:
            self.lines.append(f"{indent}{self.pick(('{} = {}', '{} = c = {}', '{} += {}', '{}, c = {}, a', '{} *= {}'))}".format(
                self.variable(), self.expression()))  # fmt: skip
        elif kind <= 4:
            self.pattern(indent)
        elif kind == 5:
            self.guarded(indent)
        elif kind == 6:
            self.lines.append(indent + self.pick(EFFECTS).format(self.variable()))
        elif kind == 7:
            self.lines.append(indent + self.pick(HARMLESS))
        elif kind == 8 and depth < 2:
            exits = EXITS if loops else EXITS[2:]
            self.lines += [f"{indent}if i >= {self.number(1)}:", f"{indent}    {self.pick(exits)}"]
        elif kind == 9 and depth:
            self.lines.append(f"{indent}try:")
            self.block(indent + "    ", loops, depth - 1)
            self.lines.append(indent + self.pick(("except RuntimeError:", "except Exception:", "finally:")))
            self.block(indent + "    ", False, depth - 1)
        elif kind == 10:
            v = self.variable()
            self.lines += [f"{indent}for layer in self.layers:", f"{indent}    {v} = layer({v})"]
        elif depth:
            head = self.pick(HEADS)
            looping = loops or head.startswith(("for", "while"))
            self.lines.append(f"{indent}{head}:")
            self.block(indent + "    ", looping, depth - 1)
            if not head.startswith("with") and self.number(1):
                self.lines.append(f"{indent}else:")
                self.block(indent + "    ", loops, depth - 1)
        else:
            self.lines.append(f"{indent}{self.variable()} = {self.expression()}")

    def pattern(self, indent: str) -> None:
        """A linear layer, its activation, perhaps a dropout, and another layer or a product, each a statement of its own."""
        u, v, w = self.variable(), self.variable(), self.variable()
        h = self.pick(("h", v))
        activated = self.pick(ACTIVATIONS).format(h)
        t = self.pick((h, h, "t"))
        chain = [f"{h} = {self.linear(self.pick((u, u, self.expression(1))))}", f"{t} = {activated}"]
        if self.number(2) == 0:
            chain.append(f"{t} = {self.pick(DROPS).format(t)}")
        last = self.pick(
            ("{w} = {l}", "{t} *= {u}", "{w} = {t} * {u}", "{w} = {u} * {t}", "{w} = {w} + {l}", "{w} = {t} + {h}")
        )
        chain.append(last.format(w=w, h=h, t=t, l=self.linear(t), u=self.linear(self.pick((u, w)))))
        if self.number(4) == 0:
            chain[1:] = [f"{w} = {self.pick(USES).format(u=u, a=activated)}"]
        where = self.number(5)  # most often nothing stands between
        if 1 <= where < len(chain):
            line = self.pick((*EFFECTS, *HARMLESS, f"{w} = {self.expression(1)}")).format(self.pick((u, u, v, w, h)))
            chain.insert(where, line)
        self.lines += [indent + line for line in chain[: len(chain) - self.number(1)]]

    def guarded(self, indent: str) -> None:
        """A linear layer and its activation where what either raises is caught, and what they leave is read afterwards."""
        h, linear = self.pick(("h", "b")), self.pick(("self.narrow", "self.narrow", "self.l0"))
        between = self.pick(("pass", "i = 5", "c = a"))
        body = [f"{h} = {linear}({self.variable()})", between, f"{h} = {self.pick(ACTIVATIONS).format(h)}", f"c = {h}"]
        head, *ends = self.pick((
            ("with contextlib.suppress(RuntimeError):",), ("try:", "except RuntimeError:", "    pass"),
            ("try:", "except RuntimeError:", "    RECORDED.append(i)"), ("try:", "finally:", f"    RECORDED.append({h})"),
        ))  # fmt: skip
        lines = [f"{h} = a", head, *(f"    {line}" for line in body[: 3 + self.number(1)]), *ends]
        lines.append(self.pick((f"a = {h}", "RECORDED.append(i)", "pass")))
        self.lines += [indent + line for line in lines]


@st.composite
def programs(draw: Callable[..., Any]) -> str:
    writer = Writer(draw)
    indent = " " * 8
    for _ in range(2 + writer.number(2)):
        writer.statement(indent, False, 2)
    writer.lines.append(f"{indent}return {writer.pick(('a', 'b', 'c', 'a, b', writer.expression()))}")
    return HEAD + "\n".join(writer.lines) + "\n"


def outcome(model: Any, train: bool) -> list[Any]:
    """What one call gives: result or exception, what was recorded and kept, and the gradients."""
    RECORDED.clear()
    model.kept = []
    model.last = None
    model.train(train)
    model.zero_grad()
    torch.manual_seed(3)
    x = torch.linspace(-2, 2, 8, dtype=torch.float64).reshape(2, 4).requires_grad_(train)
    try:
        result = model(x)
    except Exception as error:
        result = (type(error), str(error))
    found = [result, *RECORDED, "kept", *model.kept, "last", model.last, "random", torch.rand(1)]
    tensors = [
        t for t in (result if isinstance(result, tuple) else (result,)) if isinstance(t, torch.Tensor) and t.requires_grad
    ]
    if tensors:
        try:
            torch.stack([t.sum() for t in tensors]).sum().backward()
        except RuntimeError:  # a value that the backward pass needs was changed: fused, another value may be needed
            return found
        found += ["gradients", x.grad, *(p.grad for p in model.parameters())]
    return found


def assert_equal(got: Any, expected: Any, program: str) -> None:
    if isinstance(expected, (list, tuple)):
        assert isinstance(got, (list, tuple)), program
        if "gradients" not in expected and "gradients" in got:
            got = got[: got.index("gradients")]
        assert len(got) == len(expected), program
        for a, b in zip(got, expected):
            assert_equal(a, b, program)
    elif isinstance(expected, torch.Tensor):
        assert isinstance(got, torch.Tensor), program
        assert (got.shape, got.requires_grad) == (expected.shape, expected.requires_grad), program
        assert torch.allclose(got, expected, rtol=1e-7, atol=1e-9, equal_nan=True), program
    else:
        assert type(got) is type(expected), program
        assert got == expected, program


def check(program: str, folder: Path, counts: collections.Counter[str]) -> None:
    """Run one program fused and unfused."""
    counts["programs"] += 1
    file = folder / f"program{counts['programs']}.py"
    file.write_text(program)
    space: dict[str, Any] = {"__name__": f"program{counts['programs']}"}
    exec(compile(program, str(file), "exec", dont_inherit=True), space)
    torch.manual_seed(1)
    model = space["Program"]().double()
    fused = copy.deepcopy(model)
    fuse(fused)
    made = getattr(type(fused), "_fuse_made", None)
    keys = {key for _, rewrite in made.methods for key, _ in rewrite} if made is not None else set()
    counts["fused"] += bool(keys)
    if keys:
        counts["over statements"] += any(s.captured for s in parsed(space["Program"].forward).sites if s.key in keys)
    for train in (True, False):
        expected = outcome(model, train)
        before = counts["calls"]
        got = outcome(fused, train)
        counts["ran fused"] += counts["calls"] > before
        counts["raised"] += isinstance(expected[0], tuple) and isinstance(expected[0][0], type)
        assert_equal(got, expected, program)
    for m in (model, fused):
        for name in RECORDING:
            setattr(m, name, Recording(name, getattr(m, name)))
    assert_equal(outcome(fused, False), outcome(model, False), program)


def counted(monkeypatch: pytest.MonkeyPatch, counts: collections.Counter[str]) -> None:
    """Count the calls of the fused functions."""
    for name in ("fused_linear", "fused_mlp", "fused_gated_linear"):
        real = getattr(calls, name)

        def call(*args: Any, real: Any = real, **options: Any) -> Any:
            counts["calls"] += 1
            return real(*args, **options)

        monkeypatch.setattr(calls, name, call)


def run(examples: int, folder: Path, counts: collections.Counter[str], **options: Any) -> None:
    @hypothesis.settings(
        max_examples=examples, deadline=None, database=None, suppress_health_check=list(hypothesis.HealthCheck), **options
    )
    @hypothesis.given(programs())
    def each(program: str) -> None:
        check(program, folder, counts)

    each()


def test_a_random_forward_computes_the_same_fused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    counts: collections.Counter[str] = collections.Counter()
    counted(monkeypatch, counts)
    run(EXAMPLES, tmp_path, counts, derandomize=True)
    assert counts["fused"] > EXAMPLES // 2, counts
    assert counts["over statements"] > EXAMPLES // 5, counts
    assert counts["ran fused"] > EXAMPLES // 2, counts  # of twice as many runs
    assert counts["raised"] < EXAMPLES, counts
