"""Names agree: the arguments of all public functions, and the ops that any list outside the registry names."""

from __future__ import annotations

import inspect
import re

import pytest
import torch

from bench import goals
from bench.providers import peers
from fused_ops import REGISTRY
from fused_ops._fuse import engine, sites
from fused_ops.testing import KERNELS, Op

OPERATORS = {raw.name for op in REGISTRY.values() for raw in op.raw}
# A tensor argument is the input, a weight or a bias of some role, or a scale of one of them.
TENSOR = re.compile(r"input|(\w+_)?(weight|bias)\d?|(input|weight)_scale")
OPTIONS = {"dim", "dtype", "normalized_shape", "eps", "activation", "recompute", "out_dtype"}


@pytest.mark.parametrize("spec", REGISTRY.values(), ids=REGISTRY)
def test_arguments_are_named_alike_in_all_ops(spec: Op) -> None:
    parameters = inspect.signature(spec.public).parameters
    assert next(iter(parameters)) == "input"
    assert not [name for name in parameters if not TENSOR.fullmatch(name) and name not in OPTIONS]
    if spec.torch_fn.__module__.startswith("fused_ops"):  # the eager baseline where torch has no such function
        assert list(inspect.signature(spec.torch_fn).parameters) == list(parameters)


@pytest.mark.parametrize("spec", REGISTRY.values(), ids=REGISTRY)
def test_a_refusal_names_an_argument_of_the_function(spec: Op) -> None:
    """The first word of each message is the function, the second one of its arguments."""
    checked = 0
    for error in spec.errors("cpu"):
        with pytest.raises(error.raises) as raised:
            spec.public(*error.args, **error.kwargs)
        found = re.match(rf"{spec.public.__name__}: (\w+): got ", str(raised.value))
        if found:
            assert found[1] in inspect.signature(spec.public).parameters, str(raised.value)
            checked += 1
    assert checked >= 5


def _table(provider: type[peers._Library], monkeypatch: pytest.MonkeyPatch) -> set[str]:
    monkeypatch.setattr(peers.importlib, "import_module", lambda name: None)
    return set(provider().table())


def test_no_list_names_an_op_that_does_not_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    lists = {
        "bench.goals": {op for goal in goals.GOALS for op in goal.ops},
        "fuse(ops=)": {*engine.OPS, *(op.removeprefix("bare_") for op in engine.OPTIONAL_OPS)},
        "fuse, forms": set(sites.FORMS),
    } | {provider.__name__: _table(provider, monkeypatch) for provider in (peers.Liger, peers.Quack, peers.FlagGems)}
    assert all(lists.values())
    assert not {where: names - REGISTRY.keys() for where, names in lists.items() if names - REGISTRY.keys()}


def test_no_table_names_an_operator_that_does_not_exist() -> None:
    lists = {
        "tuned": set(KERNELS),
    }
    assert all(lists.values())
    assert not {where: names - OPERATORS for where, names in lists.items() if names - OPERATORS}


def test_every_operator_is_registered_with_torch() -> None:
    for name in OPERATORS:
        assert hasattr(torch.ops.fused_ops, name)
