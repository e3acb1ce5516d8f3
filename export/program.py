"""Turn a module and example inputs into an ExportedProgram of ATen operators, and keep the names that users know."""

from __future__ import annotations

import contextlib
import inspect
import logging
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind, TensorArgument
from torch.utils import _pytree as pytree
from torch.utils._pytree import tree_map

from .._torch.library import decompositions
from .files.atomic import ExportError

Args = tuple[Any, ...] | Mapping[str, Any] | torch.Tensor


def split_args(model: nn.Module, args: Args) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Split args into (positional, keyword) arguments; keywords are sorted in the order of model.forward's parameters."""
    if isinstance(args, torch.Tensor):
        return (args,), {}
    if isinstance(args, Mapping):
        try:
            order = {name: i for i, name in enumerate(inspect.signature(model.forward).parameters)}
        except (TypeError, ValueError):
            order = {}
        return (), dict(sorted(args.items(), key=lambda item: order.get(item[0], len(order))))
    if isinstance(args, (tuple, list)):
        return tuple(args), {}
    raise TypeError(f"args: got {type(args).__name__}, allowed: a tuple, a dict of keyword inputs, or one tensor")


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put model in eval mode inside the block; each submodule gets its own mode back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the exporter's warnings that say nothing about the user's model."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")  # "torchvision is not installed"
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning, message=".*LeafSpec.*")
            warnings.filterwarnings("ignore", category=DeprecationWarning)
            # fused_ops' argument checks compare sizes, and leave nothing in a traced graph
            warnings.filterwarnings("ignore", category=torch.jit.TracerWarning, module=r"fused_ops\.")  # type: ignore[attr-defined]
            yield
    finally:
        logger.setLevel(level)


def exported_program(op: str, model: nn.Module | ExportedProgram, args: Args, dynamic_shapes: Any) -> ExportedProgram:
    """Export model in eval mode, and replace each fused_ops operator by its ATen reference.

    dynamic_shapes is as for torch.export; a string is allowed too, and names a dimension of any size.

    Raises:
        ExportError: torch.export cannot trace the model, or dynamic_shapes names an unknown input.
    """
    try:
        with quiet(), torch.no_grad():
            if not isinstance(model, ExportedProgram):
                positional, keywords = tree_map(_detached, split_args(model, args))
                shapes = _as_hints(_complete(op, keywords, dynamic_shapes))
                with evaluating(model), _explicit(model, keywords):
                    model = torch.export.export(model, positional, keywords, dynamic_shapes=shapes)
            return model.run_decompositions(decompositions())
    except (ExportError, TypeError):
        raise
    except Exception as error:
        raise ExportError(f"{op}: torch.export cannot trace the model: {error}") from error


def _detached(leaf: Any) -> Any:
    """An example input detached, because torch.export cannot trace the shapes of a tensor's .grad."""
    return leaf.detach() if isinstance(leaf, torch.Tensor) else leaf


def _complete(op: str, keywords: dict[str, Any], spec: Any) -> Any:
    """dynamic_shapes with an entry for every keyword input; an input without one is static (None)."""
    if not keywords or not isinstance(spec, Mapping):
        return spec
    unknown = [name for name in spec if name not in keywords]
    if unknown:
        raise ExportError(f"{op}: dynamic_shapes: got {unknown[0]!r}, allowed: the inputs {', '.join(keywords)}")
    return {name: spec.get(name) for name in keywords}


@contextlib.contextmanager
def _explicit(model: nn.Module, keywords: dict[str, Any]) -> Iterator[None]:
    """Inside the block, model.forward names a parameter for each input that it takes by **kwargs, which torch.export mishandles."""
    signature = inspect.signature(model.forward)
    extra = [name for name in keywords if name not in signature.parameters]
    if not extra:
        yield
        return
    original, own = model.forward, model.__dict__.get("forward")
    kept = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    added = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in extra]

    def forward(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **kwargs)

    forward.__signature__ = inspect.Signature(kept + added)  # type: ignore[attr-defined]
    model.__dict__["forward"] = forward
    try:
        yield
    finally:
        if own is None:
            del model.__dict__["forward"]
        else:
            model.__dict__["forward"] = own


def _as_hints(spec: Any) -> Any:
    """dynamic_shapes with every string replaced by Dim.DYNAMIC."""
    if isinstance(spec, str):
        return Dim.DYNAMIC
    if isinstance(spec, Mapping):
        return {key: _as_hints(value) for key, value in spec.items()}
    if isinstance(spec, (tuple, list)):
        return type(spec)(_as_hints(value) for value in spec)
    return spec


def tensor_inputs(program: ExportedProgram) -> list[str]:
    """The names of the program's tensor inputs, in order."""
    specs = program.graph_signature.input_specs
    return [s.arg.name for s in specs if s.kind is InputKind.USER_INPUT and isinstance(s.arg, TensorArgument)]


def tensor_outputs(program: ExportedProgram) -> list[str]:
    """Names for the program's tensor outputs: a dict's or dataclass's keys, "output" for one tensor, else "output_0", ..."""
    specs = [s for s in program.graph_signature.output_specs if s.kind is OutputKind.USER_OUTPUT]
    tree = program.call_spec.out_spec
    if tree is None or tree.num_leaves != len(specs):
        return [f"output_{i}" for i, s in enumerate(specs) if isinstance(s.arg, TensorArgument)]
    paths = [path for path, _ in pytree.tree_flatten_with_path(pytree.tree_unflatten(list(range(len(specs))), tree))[0]]
    names = []
    for spec, path in zip(specs, paths):
        keys = [str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", "")))) for key in path]
        name = "_".join(keys) or "output"
        names.append(f"output_{name}" if name[:1].isdigit() else name)
        if not isinstance(spec.arg, TensorArgument):
            names.pop()
    return names


def dim_names(program: ExportedProgram, args: Args, dynamic_shapes: Any) -> dict[str, str]:
    """Map each symbol of the program, such as s31, to a name: the user's Dim or string, else <input>_dim_<axis>."""
    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    specs = [s for s in program.graph_signature.input_specs if s.kind is InputKind.USER_INPUT]
    leaves = _leaf_specs(args, dynamic_shapes, program, len(specs))
    given: dict[str, str] = {}
    fallback: dict[str, str] = {}
    for spec, leaf in zip(specs, leaves):
        value = nodes[spec.arg.name].meta.get("val") if spec.arg.name in nodes else None
        if not isinstance(value, torch.Tensor):
            continue
        for axis, size in enumerate(value.shape):
            if isinstance(size, int):
                continue
            expression = size.node.expr
            dim = _axis(leaf, axis)
            if expression.is_Symbol:
                if isinstance(dim, str) or getattr(dim, "__name__", None):
                    given.setdefault(str(expression), dim if isinstance(dim, str) else dim.__name__)
                fallback.setdefault(str(expression), f"{spec.arg.name}_dim_{axis}")
            elif getattr(dim, "root", None) is not None and len(expression.free_symbols) == 1:
                given.setdefault(str(next(iter(expression.free_symbols))), dim.root.__name__)
    return fallback | given


def _axis(leaf: Any, axis: int) -> Any:
    if isinstance(leaf, Mapping):
        return leaf.get(axis)
    return leaf[axis] if isinstance(leaf, (tuple, list)) and axis < len(leaf) else None


def _leaf_specs(args: Args, spec: Any, program: ExportedProgram, count: int) -> list[Any]:
    """The entry of dynamic_shapes for each flattened input; all None if the two structures do not match."""
    if isinstance(args, torch.Tensor):
        args = (args,)
    if not args and program.example_inputs is not None:
        args = tuple(program.example_inputs[0]) or program.example_inputs[1]
    leaves: list[Any] = []
    if isinstance(args, Mapping):
        order = list(program.call_spec.in_spec.children()[1].context) if program.call_spec.in_spec else list(args)
        args = {name: args[name] for name in order if name in args}
    elif isinstance(spec, Mapping):
        spec = list(spec.values())

    def walk(value: Any, spec: Any) -> None:
        if isinstance(value, Mapping):
            for key, item in value.items():
                walk(item, spec.get(key) if isinstance(spec, Mapping) else None)
        elif isinstance(value, (tuple, list)):
            for i, item in enumerate(value):
                walk(item, spec[i] if isinstance(spec, (tuple, list)) and i < len(spec) else None)
        else:
            leaves.extend([spec] * pytree.tree_structure(value).num_leaves)

    walk(args, spec)
    return leaves if len(leaves) == count else [None] * count
