"""Each gradient of a raw backward alone, all but one, and none: within the contract, and nothing that was not asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fused_ops import REGISTRY
from fused_ops.testing import ContractMode
from tests.torch.calls import Call, each_call

BACKWARDS = {raw.overload for op in REGISTRY.values() for raw in op.raw if not raw.forward}


class Seen(TorchDispatchMode):
    """While active, notes the calls of raw backwards."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in BACKWARDS:
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


@each_call
@pytest.mark.usefixtures("poisoned_memory")
def test_subsets(call: Call) -> None:
    leaves = call.tensors(requires_grad=True, batch=2, middle=2)
    with Seen() as seen:
        call.ours(*leaves).sin().sum().backward()
    assert seen.calls
    for operator, args in seen.calls:
        needs = [i for i, argument in enumerate(operator._schema.arguments) if argument.name.startswith("need_")]
        able = [i for i in needs if args[i]]  # a step of a backward is not given what others of its gradients need
        for wanted in {frozenset(), *(frozenset(s) for i in able for s in ([i], set(able) - {i}))}:
            given = [i in wanted if i in able else argument for i, argument in enumerate(args)]
            with ContractMode() as mode:
                operator(*given)
            assert mode.checked == [str(operator)]


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_a_linears_backward_in_one_step(activation: str) -> None:
    """With the activation and the products together, as no public function asks for it."""
    operator = REGISTRY["linear"].bwd
    dy, x, weight, saved = torch.randn(9, 5), torch.randn(9, 7), torch.randn(5, 7), torch.randn(9, 5)
    for needs in ((True, False, False), (False, True, False), (False, False, True), (True, True, True)):
        with ContractMode() as mode:
            operator(dy, x, weight, saved, activation, *needs)
        assert mode.checked
