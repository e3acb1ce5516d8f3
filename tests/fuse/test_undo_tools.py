"""Undoing a fuse of a model that fully_shard or accelerate's hooks changed before or since. accelerate itself is taken where it is installed."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest
import torch.distributed as dist
from torch import nn

from fused_ops import fuse, unfuse
from tests.fuse.doors import assert_outcomes, assert_same, call, everything, fused_copy, outcome, quiet_fuse, state

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def one_process() -> Iterator[Any]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("parts", [[""], ["mlp", "gated", ""], ["seq"], ["head"], ["mlp.norm"]], ids=str)
def test_fully_shard_is_not_lost(parts: list[str], one_process: Any):
    from torch.distributed.fsdp import FSDPModule, fully_shard

    reference = everything()
    expected = outcome(reference, call, backward=False)
    fused = fused_copy(reference)
    for part in parts:
        fully_shard(fused.get_submodule(part), mesh=one_process)
    assert_outcomes(outcome(fused, call, backward=False), expected)
    between = state(fused)
    try:
        unfuse(fused)
    except RuntimeError:
        assert [(name, cls) for name, cls, _ in state(fused)] == [(name, cls) for name, cls, _ in between]
    for part in parts:
        assert isinstance(fused.get_submodule(part), FSDPModule)
    assert_outcomes(outcome(fused, call, backward=False), expected)


class Hook:
    """What a hook of accelerate sees; it doubles what the module returns, so that a lost hook shows."""

    no_grad = False

    def __init__(self) -> None:
        self.calls = 0

    def init_hook(self, module: nn.Module) -> nn.Module:
        return module

    def detach_hook(self, module: nn.Module) -> nn.Module:
        return module

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple, dict]:
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        self.calls += 1
        return output * 2


class StandIn:
    """What accelerate's hooks do to a module: its forward is set on the instance, and comes back as a bound method."""

    @staticmethod
    def add_hook_to_module(module: nn.Module, hook: Hook) -> None:
        def hooked(module: Any, *args: Any, **kwargs: Any) -> Any:
            args, kwargs = module._hf_hook.pre_forward(module, *args, **kwargs)
            return module._hf_hook.post_forward(module, module._old_forward(*args, **kwargs))

        module._old_forward, module._hf_hook = module.forward, hook
        module.forward = functools.update_wrapper(functools.partial(hooked, module), module._old_forward)

    @staticmethod
    def remove_hook_from_module(module: nn.Module) -> None:
        module.forward = module._old_forward
        del module._hf_hook, module._old_forward


def _hooks() -> list[Any]:
    if importlib.util.find_spec("accelerate") is None:
        return [StandIn]
    import accelerate.hooks

    return [StandIn, accelerate.hooks]


hooked_parts = pytest.mark.parametrize("part", ["mlp", "mlp.fc1", "mlp.act", "mlp.norm", "seq", "gated.up", "function", ""])
by_library = pytest.mark.parametrize("library", _hooks(), ids=lambda library: library.__name__)


@by_library
@hooked_parts
def test_accelerates_hooks_before_and_after(library: Any, part: str):
    reference, fused, other = everything(), everything(), everything()
    for m in (reference, fused):
        library.add_hook_to_module(m.get_submodule(part), Hook())
    quiet_fuse(fused)
    assert_same(reference, fused, call)
    assert fused.get_submodule(part)._hf_hook.calls == reference.get_submodule(part)._hf_hook.calls == 2
    unfuse(fused)
    assert_same(reference, fused, call)
    library.remove_hook_from_module(fused.get_submodule(part))
    report = fuse(fused)
    assert [(c.name, c.op) for c in report.fused] == [(c.name, c.op) for c in fuse(other).fused]
    assert_same(everything(), fused, call)
    unfuse(fused)
    assert [type(m) for m in fused.modules()] == [type(m) for m in reference.modules()]
    assert_same(everything(), fused, call)


@by_library
@hooked_parts
def test_accelerates_hooks_on_a_fused_model(library: Any, part: str):
    reference = everything()
    fused = fused_copy(reference)
    for m in (reference, fused):
        library.add_hook_to_module(m.get_submodule(part), Hook())
    assert_same(reference, fused, call)
    between = state(fused)
    try:
        unfuse(fused)
    except RuntimeError:
        assert state(fused) == between
    assert_same(reference, fused, call)
    for m in (reference, fused):
        library.remove_hook_from_module(m.get_submodule(part))
    assert_same(reference, fused, call)
    unfuse(fused)
    assert [type(m) for m in fused.modules()] == [type(m) for m in reference.modules()]
    assert_same(reference, fused, call)
    fuse(fused)
    assert_same(reference, fused, call)
