"""What `compile_choice` reads of a graph of ATen's operators: kinds of nodes, sizes, halves, and an operator's formula in ATen."""

from __future__ import annotations

import contextlib
import functools
import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import make_fx

from .compile_count import Step

HALF_DTYPES = frozenset((torch.float16, torch.bfloat16))
_PRODUCTS = frozenset(("mm", "addmm", "bmm", "baddbmm", "matmul", "linear", "_scaled_mm", "_grouped_mm", "_int_mm"))
_BATCHED = frozenset(("bmm", "baddbmm"))
_CALLS = ("convolution", "attention", "sort", "topk", "scatter", "index_put", "_fft", "linalg", "nonzero", "multinomial")
_DETOURS = frozenset(("view", "reshape", "_unsafe_view", "squeeze", "unsqueeze", "convert_element_type"))
_ATEN = frozenset(("aten", "prims", "inductor", "inductor_prims", "inductor_seeds"))
UNKNOWN = 4096  # what a size counts as that nothing is known of


def name_of(node: fx.Node) -> str:
    """The name of an operator without its overload: "mm"."""
    return str(getattr(node.target, "overloadpacket", node.target)).rsplit(".", 1)[-1]


def is_view(node: fx.Node) -> bool:
    """Whether a node only looks at its input in another way, or takes one tensor out of several."""
    if node.op != "call_function":
        return False
    if node.target is operator.getitem or name_of(node) in ("_unsafe_view", "alias"):
        return True
    return isinstance(node.target, torch._ops.OpOverload) and node.target.is_view


def base_of(node: fx.Node) -> fx.Node:
    """What a view looks at."""
    while is_view(node):
        node = node.all_input_nodes[0]
    return node


def is_product(node: fx.Node) -> bool:
    """Whether a node is a product of matrices."""
    return node.op == "call_function" and name_of(node) in _PRODUCTS


def is_batched_product(node: fx.Node) -> bool:
    """Whether a node is a product of batches of matrices, as attention has them."""
    return node.op == "call_function" and name_of(node) in _BATCHED


def kind_of(node: fx.Node) -> str:
    """A node's kind, as Step has it. What is none of ATen's known calls counts as pointwise: Inductor may fuse it."""
    if node.op != "call_function":
        return "buffer"
    if not isinstance(node.target, torch._ops.OpOverload):
        return "pointwise" if node.target is operator.getitem or not _tensors(node.meta.get("val")) else "call"
    name = name_of(node)
    if node.target.namespace not in _ATEN or name in _PRODUCTS or any(part in name for part in _CALLS):
        return "call"
    return _reduction(node) if torch.Tag.reduction in node.target.tags else "pointwise"


def _reduction(node: fx.Node) -> str:
    """ "row" for a reduction over the last dimensions, "column" for one over others."""
    rank = _tensors(node.all_input_nodes[0].meta["val"])[0].dim()
    dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    if dims is None or dims == [] or rank == 0:
        return "row"
    over = {d % rank for d in ([dims] if isinstance(dims, int) else dims) if isinstance(d, int)}  # type: ignore[union-attr]
    return "row" if over == set(range(rank - len(over), rank)) else "column"


def readers(node: fx.Node) -> Iterator[fx.Node]:
    """What reads a node's result, or a view of it: an operator, or the graph's output."""
    for user in node.users:
        if is_view(user):
            yield from readers(user)
        else:
            yield user


def producers(node: fx.Node) -> list[fx.Node]:
    """What computes a node's inputs."""
    return [base_of(i) for i in node.all_input_nodes]


def backward_of(graph: fx.Graph) -> set[fx.Node]:
    """The nodes of a joint graph that depend on a gradient: they are compiled apart from the others."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder":
            if str(node.target).startswith("tangents"):
                found.add(node)
        elif node.op != "output" and not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def _tensors(value: Any) -> list[Tensor]:
    return [t for t in (value if isinstance(value, (tuple, list)) else [value]) if isinstance(t, Tensor)]


def _number(size: Any) -> int:
    """A size, or what a dynamic one was when the graph was traced."""
    if isinstance(size, int):
        return size
    node = size.node
    return int(node.hint) if node.has_hint() else UNKNOWN


def numel(value: Any) -> int:
    """How many elements the first tensor of a node's value has."""
    total = 1
    for tensor in _tensors(value)[:1]:
        for size in tensor.shape:
            total *= _number(size)
    return total


def nbytes(value: Any) -> int:
    """The bytes of a node's value, of all its tensors."""
    return sum(numel(tensor) * tensor.element_size() for tensor in _tensors(value))


def step_of(node: fx.Node, inputs: tuple[str, ...]) -> Step:
    """A node as a Step, not kept."""
    kind, value = kind_of(node), node.meta.get("val")
    size = numel(value)
    over = max(1, numel(node.all_input_nodes[0].meta.get("val")) // max(1, size)) if kind in ("row", "column") else 1
    return Step(kind, inputs, nbytes(value), size, over)


class Formula:
    """A raw operator's reference as a graph of ATen's operators, decomposed as Inductor decomposes a model.

    graph: placeholders for the tensors among the arguments. outputs: the nodes of the results, None where there is none.
    """

    def __init__(self, reference: Callable[..., Any], args: tuple[Any, ...]) -> None:
        from torch._dispatch.python import enable_python_dispatcher
        from torch._guards import detect_fake_mode
        from torch._inductor.decomposition import select_decomp_table

        places = [i for i, a in enumerate(args) if isinstance(a, Tensor)]

        def run(*tensors: Tensor) -> Any:
            filled = list(args)
            for place, tensor in zip(places, tensors):
                filled[place] = tensor
            return reference(*filled)

        tensors = [args[i] for i in places]
        mode = detect_fake_mode(tensors) or contextlib.nullcontext()
        with torch.no_grad(), mode, enable_python_dispatcher():
            module = make_fx(run, select_decomp_table(), tracing_mode="real")(*tensors)
        self.graph = module.graph
        self.graph.eliminate_dead_code()
        found = next(n for n in self.graph.nodes if n.op == "output").args[0]
        self.outputs = list(found) if isinstance(found, (tuple, list)) else [found]
        self.nodes = [n for n in self.graph.nodes if n.op not in ("placeholder", "output")]
        self.placeholders = [n for n in self.graph.nodes if n.op == "placeholder"]
        if any(n.op != "call_function" for n in self.nodes):
            raise NotImplementedError("the formula holds a constant tensor")

    @functools.cached_property
    def products(self) -> list[fx.Node]:
        """The products of matrices."""
        return [node for node in self.nodes if is_product(node)]

    @functools.cached_property
    def rounds_early(self) -> bool:
        """Whether a product is rounded to 16 bits before the formula is at its end, or would be taken in fp32 of 16-bit tensors.

        Then it is less exact than our operator, or slower than what anybody writes.
        """
        half = any(n.meta["val"].dtype in HALF_DTYPES for n in self.placeholders)
        results = [base_of(n) for n in self.outputs if isinstance(n, fx.Node)]
        for product in self.products if half else ():
            value = product.meta["val"]
            if value.dtype not in HALF_DTYPES or (value.is_cpu and name_of(product) in ("addmm", "baddbmm")):
                return True
            if product not in results or any(reader.op != "output" for reader in readers(product)):
                return True
        return False


def put(graph: fx.Graph, node: fx.Node, formula: Formula) -> None:
    """Put a formula in a node's place."""
    tensors = [a for a in node.args if isinstance(a, fx.Node)]
    env: dict[fx.Node, Any] = dict(zip(formula.placeholders, tensors))
    kept = {key: value for key, value in node.meta.items() if key not in ("val", "tensor_meta", "eager_input_vals")}
    with graph.inserting_before(node):
        for step in formula.nodes:
            env[step] = graph.node_copy(step, env.__getitem__)
            env[step].meta = {**kept, **{key: step.meta[key] for key in ("val", "tensor_meta") if key in step.meta}}
    if isinstance(node.meta["val"], (tuple, list)):
        for user in list(node.users):
            result = formula.outputs[user.args[1]]  # type: ignore[index]
            user.replace_all_uses_with(env[result])
            graph.erase_node(user)
    else:
        node.replace_all_uses_with(env[formula.outputs[0]])
    graph.erase_node(node)
    for step in formula.nodes:
        _without_detour(env[step])
    for step in reversed(formula.nodes):
        if not env[step].users:
            graph.erase_node(env[step])


def _without_detour(node: fx.Node) -> None:
    """Read what was reshaped, or converted to a wider dtype, and then back, from where it had the same shape and dtype.

    The partitioner then knows them for one tensor, and nothing is copied.
    """
    seen = node
    while seen.op == "call_function" and name_of(seen) in _DETOURS:
        seen = seen.all_input_nodes[0]
        dtype = seen.meta["val"].dtype
        if dtype.itemsize < node.meta["val"].dtype.itemsize or not dtype.is_floating_point:
            return  # a narrower dtype on the way: rounded
        if dtype is node.meta["val"].dtype and seen.meta["val"].shape == node.meta["val"].shape:
            node.replace_all_uses_with(seen)
            return


def fake_args(node: fx.Node) -> tuple[Any, ...] | None:
    """A node's arguments with tensors in place of nodes; None where one is neither a tensor nor a constant."""
    if node.kwargs:
        return None
    args = tuple(a.meta.get("val") if isinstance(a, fx.Node) else a for a in node.args)
    fine = all(
        isinstance(value, FakeTensor) if isinstance(arg, fx.Node) else not isinstance(arg, (list, tuple))
        for arg, value in zip(node.args, args)
    )
    return args if fine else None
