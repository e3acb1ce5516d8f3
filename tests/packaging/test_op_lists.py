"""No list of ops is kept by hand outside the registry: what several ops have is a field of each op's declaration."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

from fused_ops import REGISTRY
from tests.packaging.conftest import ROOT
from tests.packaging.sources import files

NAMES = frozenset(REGISTRY) | {raw.name for op in REGISTRY.values() for raw in op.raw}
# file -> why it may name ops side by side
ALLOWED = {
    "fused_ops/_fuse/sites.py": "each form is written for the op that it becomes",
    "fused_ops/_tools/forecast/counts.py": "what was counted in each kernel's SASS",
    "fused_ops/_tools/forecast/model.py": "a model of each op, reckoned by hand",
    "bench/providers/peers.py": "a library's own entry points",
    "bench/providers/quack_kernels.py": "a library's own entry points",
    "bench/test_2_host.py": "calls that are written out for each mechanism",
    "bench/wheels.py": "folders of a library's own",
}


def lists(source: str) -> Iterator[list[str]]:
    """The names of ops in each tuple, list and set, and in each dict's keys, that holds two or more."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Dict):
            parts = [key.elts if isinstance(key, ast.Tuple) else [key] for key in node.keys]
            elements = [element for part in parts for element in part]
        elif isinstance(node, (ast.Tuple, ast.List, ast.Set)):
            elements = [part for e in node.elts for part in (e.elts if isinstance(e, ast.Tuple) else [e])]
        else:
            continue
        found = {str(e.value) for e in elements if isinstance(e, ast.Constant) and e.value in NAMES}
        if len(found) > 1:
            yield sorted(found)


def _found() -> dict[str, list[list[str]]]:
    paths = [path for part in ("fused_ops", "export", "bench") for path in files(part)]
    found = {path.as_posix(): list(lists((ROOT / path).read_text())) for path in paths}
    return {path: names for path, names in found.items() if names}


def test_no_list_of_ops_is_kept_by_hand() -> None:
    assert {path: names for path, names in _found().items() if path not in ALLOWED} == {}


def test_what_is_allowed_is_there() -> None:
    assert set(ALLOWED) <= set(_found())


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ('OPS = ("softmax", "linear")', ["linear", "softmax"]),
        ('if op in ["softmax", "linear"]: pass', ["linear", "softmax"]),
        ('x = {"softmax", "linear", 3}', ["linear", "softmax"]),
        ('TABLE = {"softmax_fwd": 1, "layer_norm_bwd": 2}', ["layer_norm_bwd", "softmax_fwd"]),
        ('ROWS = (("softmax", 4096), ("layer_norm", 768))', ["layer_norm", "softmax"]),
        ('COUNTS = {("softmax_fwd", "packed"): 1, ("softmax_bwd", "packed"): 2}', ["softmax_bwd", "softmax_fwd"]),
    ],
)
def test_a_list_is_found(source: str, names: list[str]) -> None:
    assert names in list(lists(source))


def test_one_op_alone_is_no_list() -> None:
    assert not list(lists('if op == "softmax": x = ("softmax", "fwd", None, {**other, "linear": 1})'))
