"""ATen's formula or our operator: what torch.compile makes of each raw operator of a graph, by what stands next to it.

Where: a pass at the head of Inductor's list of passes over the joint graph, before the graph is cut into forward and backward and
before Inductor looks for attention. It is one entry of a list, so it takes no slot that a user may own; what it replaces is gone
before Inductor computes the graph's key, and the partitioner sees ATen's formula as it sees the eager baseline's. Forward and
backward of an op are decided apart: either may read the statistics that the other form saves. Everything that Inductor compiles
goes through it, dynamic shapes, training and AOTInductor alike; torch.export, other backends and what FUSED_OPS_INLINE has put in
an operator's place do not.

What: an operator and its neighbours, as far as Inductor could fuse them, are counted both ways (`compile_count`). Ours is taken
where it launches no more kernels and moves no more bytes, and not where both are equal and a neighbour could fuse. Before counting:

    ours    the formula would round a product to 16 bits before the activation, beyond the numerics contract;
            a result is fp8, which ATen has no formula for
    ATen's  a product and nothing else, or one in fp32: cuBLAS computes it on both sides;
            a dtype or a backend without kernels of ours; softmax between batched products, which Inductor may turn into SDPA

The same is decided on a CPU, where our operator is ATen's eager formula, as on a GPU. In doubt it is ATen's formula: then the graph
is what Inductor makes of the eager baseline.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from .._runtime.backend import chosen
from .._runtime.device import KERNEL_DTYPES
from .._runtime.notices import LOGGER
from .compile_count import Cost, Step, count
from .compile_graph import (
    Formula,
    backward_of,
    base_of,
    fake_args,
    is_batched_product,
    kind_of,
    nbytes,
    numel,
    producers,
    put,
    readers,
    step_of,
)
from .compile_state import COMPILE_WITH_ATEN, cache_key
from .regions import outside_autocast
from .spec import REGISTRY, Raw

REACH, MOST = 3, 48  # how far a neighbour is from an operator at most, and how many there are


@dataclass(frozen=True)
class Choice:
    """What was decided of one raw operator: "ours" or "aten", and why; what both cost with their neighbours, if it was counted."""

    operator: str
    shapes: tuple[tuple[Any, ...], ...]
    chosen: str
    reason: str
    ours: Cost | None = None
    aten: Cost | None = None

    def __str__(self) -> str:
        shape = " ".join(str(s).replace(" ", "") for s in self.shapes)
        costs = f"; ours {self.ours}; ATen's {self.aten}" if self.ours and self.aten else ""
        return f"{self.operator} {shape}: {'ATen' if self.chosen == 'aten' else self.chosen} ({self.reason}{costs})"


def decide(ours: Cost, aten: Cost, neighbours: bool) -> tuple[str, str]:
    """("ours" or "aten", why) by the costs of both; neighbours: whether something could fuse with ATen's formula."""
    if not ours.within(aten):
        return "aten", "Inductor fuses it with its neighbours" if neighbours else "ours moves or launches more"
    if ours != aten:
        return "ours", "fewer kernels or bytes"
    return (
        ("aten", "the same cost, and neighbours to fuse with")
        if neighbours
        else ("ours", "the same cost, nothing to fuse with")
    )


def kernels_of(raw: Raw, args: tuple[Any, ...]) -> int:
    """How many kernels a raw operator launches: one a product or pass over rows, and one more that adds partial column sums."""
    roles = raw.roles_of(args)
    outputs = [o[0] for o in roles.outputs.split() if not o[1:] or args[int(o[1:])]]
    if raw.forward:
        return max(1, len({"w", "W"} & set(roles.inputs)))
    return max(1, sum(o in "wWx" for o in outputs) if roles.multiplies else 1) + any(o in "vbB" for o in outputs)


class Chooser:
    """Decides a graph, one raw operator after the other."""

    def __init__(self, graph: fx.Graph) -> None:
        self.raw = {raw.overload: (op.name, raw) for op in REGISTRY.values() for raw in op.raw}
        self.graph = graph
        self.order = {node: i for i, node in enumerate(graph.nodes)}
        self.operators = [node for node in graph.nodes if node.op == "call_function" and node.target in self.raw]
        self.backward = backward_of(graph) if self.operators else set()
        self.formulas: dict[Any, Formula | None] = {}
        self.choices: dict[fx.Node, Choice] = {}

    def choose(self) -> dict[fx.Node, Choice]:
        """The choice for every raw operator, in their order."""
        for node in self.operators:
            ours = aten = None
            verdict = self._forced(node)
            if verdict is None:
                around = self._around(node)
                ours, aten = count(self._steps(node, around, True)), count(self._steps(node, around, False))
                verdict = decide(ours, aten, len(around) > 1)
            tensors = [a.meta["val"] for a in node.args if isinstance(a, fx.Node)]
            shapes = tuple(tuple(t.shape) for t in tensors[:1])
            self.choices[node] = Choice(self.raw[node.target][1].name, shapes, *verdict, ours, aten)
        return self.choices

    def formula(self, node: fx.Node) -> Formula | None:
        """ATen's formula of a raw operator; None where it cannot be traced. The same for all of the same arguments."""
        args = fake_args(node)
        if args is None:
            return None
        key = (
            node.target,
            *((str(a.shape), str(a.stride()), a.dtype, a.device) if isinstance(a, torch.Tensor) else a for a in args),
        )
        if key not in self.formulas:
            try:
                self.formulas[key] = Formula(outside_autocast(self.raw[node.target][1].formula), args)
            except Exception as error:  # whatever the reason, the operator itself is right
                LOGGER.debug("fused_ops: no formula of %s: %s: %s", node.target, type(error).__name__, error)
                self.formulas[key] = None
        return self.formulas[key]

    def _forced(self, node: fx.Node) -> tuple[str, str] | None:
        """What is decided before anything is counted."""
        name = self.raw[node.target][0]
        asked = COMPILE_WITH_ATEN[name]
        if asked is False:
            return "ours", "compile_with_aten"
        formula = self.formula(node)
        if formula is None:
            return "ours", "ATen's formula cannot be traced"
        if asked:
            return "aten", "compile_with_aten"
        values = [n.meta["val"] for n in formula.placeholders]
        values += [n.meta["val"] for n in formula.outputs if isinstance(n, fx.Node)]
        if any(v.dtype.is_floating_point and v.dtype.itemsize == 1 for v in values):
            return "ours", "ATen has no formula for fp8"
        if values[0].dtype not in KERNEL_DTYPES:
            return "aten", f"no kernel of ours takes {str(values[0].dtype)[6:]}"
        if values[0].is_cuda and chosen("cuda")[0] == "aten":
            return "aten", "no kernel of ours runs here"
        if formula.rounds_early:
            return "ours", "ATen's formula rounds a product to 16 bits, or takes one in fp32"
        if formula.products:
            return "aten", "cuBLAS computes the product either way"
        if self._reaches_batched_product(node, True) and self._reaches_batched_product(node, False):
            return "aten", "it is attention's, which Inductor may fuse whole"
        return None

    def _reaches_batched_product(self, node: fx.Node, up: bool) -> bool:
        near = self._next(node, up)
        return any(is_batched_product(n) or (self._fuses(n) and any(map(is_batched_product, self._next(n, up)))) for n in near)

    def _next(self, node: fx.Node, up: bool) -> list[fx.Node]:
        near: Iterable[fx.Node] = producers(node) if up else readers(node)
        return [n for n in near if (n in self.backward) == (node in self.backward)]

    def _fuses(self, node: fx.Node) -> bool:
        """Whether Inductor could fuse a node: its own steps, and raw operators that are ATen's, or may yet be."""
        if node.op == "call_function" and node.target in self.raw:
            formula = self.formula(node)
            settled = self.choices[node].chosen if node in self.choices else "aten"
            return (
                settled == "aten"
                and formula is not None
                and not formula.products
                and COMPILE_WITH_ATEN[self.raw[node.target][0]] is not False
            )
        return kind_of(node) in ("pointwise", "row", "column")

    def _around(self, node: fx.Node) -> list[fx.Node]:
        """An operator and what Inductor could fuse near it, of the same half, in the graph's order."""
        seen, edge = {node}, [node]
        for _ in range(REACH):
            near = [m for n in edge for up in (True, False) for m in self._next(n, up)]
            edge = []
            for m in near:
                if m not in seen and len(seen) < MOST and self._fuses(m):
                    seen.add(m)
                    edge.append(m)
        return sorted(seen, key=self.order.__getitem__)

    def _steps(self, node: fx.Node, around: list[fx.Node], ours: bool) -> dict[str, Step]:
        """The neighbourhood as steps, node itself as our operator or as ATen's formula."""
        inside = set(around)
        steps: dict[str, Step] = {}
        named: dict[fx.Node, str] = {}  # what a node, or a view, is called where it is read

        def name(n: fx.Node) -> str:
            if n in named:
                return named[n]
            base = n if n.op != "call_function" or n.all_input_nodes == [] else base_of(n)
            if base in named:
                return named[base]
            for view in _views(n):
                if view in named:
                    return named[view]
            steps.setdefault(base.name, Step("buffer", (), nbytes(n.meta.get("val")), numel(n.meta.get("val"))))
            return named.setdefault(base, base.name)

        for n in around:
            inputs = tuple(name(i) for i in n.all_input_nodes)
            if n.target not in self.raw:
                steps[n.name] = replace(step_of(n, inputs), kept=any(r not in inside for r in readers(n)))
                named[n] = n.name
                continue
            results = {u: u.args[1] for u in n.users} if isinstance(n.meta["val"], (tuple, list)) else {n: 0}
            if ours and n is node:
                raw, args = self.raw[n.target][1], fake_args(n)
                assert args is not None
                steps[n.name] = Step("call", inputs, nbytes(n.meta["val"]), kept=True, kernels=kernels_of(raw, args))
                for result in results:
                    part = f"{result.name}.part"
                    steps[part] = Step("part", (n.name,), nbytes(result.meta["val"]), numel(result.meta["val"]))
                    named[result] = part
                continue
            formula = self.formula(n)
            assert formula is not None
            inner = dict(zip(formula.placeholders, (name(a) for a in n.args if isinstance(a, fx.Node))))
            for step in formula.nodes:
                if step.op == "call_function" and base_of(step) is not step:
                    inner[step] = inner[base_of(step)]
                    continue
                inner[step] = f"{n.name}.{step.name}"
                steps[inner[step]] = step_of(step, tuple(inner[i] for i in step.all_input_nodes))
            for result, index in results.items():
                named[result] = inner[base_of(formula.outputs[index])]  # type: ignore[index]
                if any(r not in inside for r in readers(result)):
                    steps[named[result]] = replace(steps[named[result]], kept=True)
        return steps


def _views(node: fx.Node) -> Iterator[fx.Node]:
    """A node and what it is a view of, one after the other."""
    yield node
    base = base_of(node)
    while node is not base:
        node = node.all_input_nodes[0]
        yield node


_NOTED: list[list[Choice]] = []


@contextlib.contextmanager
def noting() -> Iterator[list[Choice]]:
    """A list of all that is decided in the region, in the order of the graphs."""
    found: list[Choice] = []
    _NOTED.append(found)
    try:
        yield found
    finally:
        _NOTED.remove(found)


def apply(graph: fx.Graph | fx.GraphModule) -> int:
    """Decide every raw operator of a graph, put ATen's formula in place of those that are ATen's, and say how many."""
    graph = graph.graph if isinstance(graph, fx.GraphModule) else graph
    chooser = Chooser(graph)
    choices = chooser.choose()
    changed = 0
    for node, choice in choices.items():
        formula = chooser.formula(node)
        if choice.chosen == "aten" and formula is not None:
            put(graph, node, formula)
            changed += 1
        LOGGER.debug("fused_ops: torch.compile: %s", choice)
    for noted in _NOTED:
        noted += choices.values()
    return changed


def register_when_used() -> None:
    """Take part in Inductor's compilations, and tell its caches with what settings, as far as Inductor has been imported.

    Under Dynamo the caches are told, before they look for the graph. The pass is registered when AOTAutograd comes to an operator.
    """
    if "torch._inductor.config" in sys.modules:
        marked = torch._inductor.config.unsafe_marked_cacheable_functions
        if marked.get(_NAME) != cache_key():
            marked[_NAME] = cache_key()
    if "torch._inductor.fx_passes.joint_graph" in sys.modules:
        register()


register_when_used._dynamo_marked_constant = True  # type: ignore[attr-defined]  # under Dynamo: run while tracing
_NAME = "fused_ops.compile_with_aten"


@functools.cache
def register() -> None:
    """Put the pass at the head of Inductor's passes over the joint graph, once."""
    from torch._inductor.fx_passes import joint_graph
    from torch._inductor.pattern_matcher import PatternMatcherPass

    class Pass(PatternMatcherPass):
        def apply(self, gm: Any) -> int:
            return apply(gm)

    joint_graph.pass_patterns.insert(0, Pass())
