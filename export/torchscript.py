"""TorchScript export, by trace or by script. The file holds ATen operators only: it loads without fused_ops."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from .files.atomic import ExportError, PathLike, check_writable, output
from .files.manifest import write_manifest
from .program import Args, evaluating, quiet, split_args


def export_torchscript(
    model: nn.Module, args: Args, path: PathLike, *, mode: str = "trace", freeze: bool = False, check_trace: bool = True
) -> Path:
    """Write a model as TorchScript. torch.jit.load reads it in any process, without fused_ops, and so does C++.

    Args:
        model: a module, fused or not. It is exported in eval mode, and its own mode is restored.
        args: example inputs: a tuple, a dict of keyword inputs, or one tensor. With mode "script" the exported module is
            run on them too, and its result compared with the model's.
        path: the file to write. It appears whole, or not at all; an existing file survives a failure.
        mode: "trace" records one run: control flow is fixed as it ran, and dimensions stay dynamic unless the code turns
            sizes into numbers. "script" compiles the module's Python source and keeps its control flow.
        freeze: make the weights constants and fold them; the module can then no longer be moved to another device.
        check_trace: trace a second time and compare.

    Returns:
        The absolute path. If the model returns a dict or dataclass, the traced module returns a tuple of tensors in the
        order of the keys. The keys are listed in the archive's file fused_ops.json.

    Raises:
        ExportError: a bad argument, or a model that torch.jit cannot trace or script; nothing is written.
    """
    op = "export_torchscript"
    if not isinstance(model, nn.Module):
        raise TypeError(f"{op}: model: got {type(model).__name__}, allowed: a torch.nn.Module")
    if mode not in ("trace", "script"):
        raise ExportError(f"{op}: mode: got {mode!r}, allowed: 'trace', 'script'")
    target = check_writable(op, path)
    positional, keywords = split_args(model, args)
    keys: list[str] = []
    try:
        with evaluating(model), quiet(), torch.no_grad():
            if mode == "script":
                module = torch.jit.script(model)
                if positional or keywords:
                    expected = model(*positional, **keywords)
                    torch.testing.assert_close(module(*positional, **keywords), expected, equal_nan=True)
            else:
                keywords = {name: value for name, value in keywords.items() if value is not None}  # a trace has no None
                flat = _Flat(model, positional, keywords)
                result = model(*positional, **keywords)
                parts = result if isinstance(result, tuple) else (result,)
                all_tensors = all(isinstance(part, torch.Tensor) for part in parts)
                keys = [] if all_tensors else [str(key) for key in _keys(result)]
                source = flat if keywords or not all_tensors else model
                examples = (*positional, *keywords.values())
                module = torch.jit.trace(source, examples, check_trace=check_trace)
            module = torch.jit.freeze(module) if freeze else module
    except Exception as error:
        raise ExportError(f"{op}: torch.jit.{mode} cannot take the model: {error}") from error
    _refuse_custom_ops(op, module)
    with output(op, target) as staged:
        metadata = {"outputs": keys, "mode": mode, "torch": torch.__version__}
        torch.jit.save(module, str(staged), _extra_files={"fused_ops.json": json.dumps(metadata)})
        write_manifest(staged, "torchscript", mode=mode, outputs=keys)
    return target


class _Flat(nn.Module):
    """Wraps a module for torch.jit.trace: all inputs are positional, the result is one tensor or a flat tuple of tensors."""

    def __init__(self, model: nn.Module, positional: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        super().__init__()
        self.model = model
        self._names = tuple(keywords)
        names = [*list(inspect.signature(model.forward).parameters)[: len(positional)], *keywords]
        parameters = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in names]

        def forward(*args: Any) -> Any:
            count = len(args) - len(self._names)
            result = model(*args[:count], **dict(zip(self._names, args[count:])))
            tensors = tuple(t for t in pytree.tree_leaves(result) if isinstance(t, torch.Tensor))
            return tensors if len(tensors) != 1 else tensors[0]

        forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        self.forward = forward


def _keys(result: Any) -> list[str]:
    pairs = pytree.tree_flatten_with_path(result)[0]
    return [pytree.keystr(path).strip("[]'.") for path, leaf in pairs if isinstance(leaf, torch.Tensor)]


def _refuse_custom_ops(op: str, module: Any) -> None:
    """Raise ExportError if the graph calls an operator of fused_ops: it would load only where fused_ops is imported."""
    found = sorted(_custom(module.inlined_graph))
    if found:
        raise ExportError(f"{op}: the graph calls {', '.join(found)}, which exist only where fused_ops is imported")


def _custom(graph: Any) -> set[str]:
    """The kinds of the nodes in a graph and its nested blocks that are not torch's own operators."""
    found, blocks = set(), [graph]
    while blocks:
        for node in blocks.pop().nodes():
            if not node.kind().startswith(("aten::", "prim::", "prims::", "quantized::", "onednn::")):
                found.add(node.kind())
            blocks.extend(node.blocks())
    return found
