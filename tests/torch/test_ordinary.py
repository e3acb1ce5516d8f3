"""Which tensors the raw operators take, in eager mode and in a compiled function."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor

from fused_ops._torch.arguments import ordinary


class Overriding(Tensor):
    """A subclass with __torch_function__, which may know torch's functions and not ours."""


def ones() -> Tensor:
    return torch.ones(4, 4)


ORDINARY: dict[str, Callable[[], Tensor]] = {
    "tensor": ones,
    "view": lambda: ones().t()[1:],
    "parameter": lambda: nn.Parameter(ones()),
    "buffer": lambda: nn.Buffer(ones()),
    "meta": lambda: ones().to("meta"),
    "fake": lambda: FakeTensorMode().from_tensor(ones()),
}
OTHERS: dict[str, Callable[[], Any]] = {
    "subclass": lambda: ones().as_subclass(Overriding),
    "wrapper": lambda: TwoTensor(ones(), ones()),
    "parameter of a wrapper": lambda: nn.Parameter(TwoTensor(ones(), ones())),
    "uninitialised": nn.UninitializedParameter,
    "masked": lambda: torch.masked.masked_tensor(ones(), ones() > 0),
    "jagged": lambda: torch.nested.nested_tensor([ones(), ones()[1:]], layout=torch.jagged),
    "nested": lambda: torch.nested.nested_tensor([ones(), ones()[1:]], layout=torch.strided),
    "sparse": lambda: ones().to_sparse(),
    "compressed rows": lambda: ones().to_sparse_csr(),
    "MKL-DNN": lambda: ones().to_mkldnn(),
    "quantised": lambda: torch.quantize_per_tensor(ones(), 0.1, 0, torch.qint8),
    "a number": lambda: 3.0,
}


def made(name: str) -> Any:
    with warnings.catch_warnings():  # prototypes say that they are
        warnings.simplefilter("ignore")
        return (ORDINARY | OTHERS)[name]()


def compiled(tensor: Tensor) -> bool:
    """ordinary(tensor) where it is traced."""
    function = torch.compile(lambda t: (torch.zeros(1), ordinary(t)), backend="eager", fullgraph=True)
    with torch.no_grad():
        return function(tensor)[1]


@pytest.mark.parametrize("name", [*ORDINARY, *OTHERS])
def test_eager(name: str) -> None:
    assert ordinary(made(name)) is (name in ORDINARY)


@pytest.mark.parametrize("name", [*ORDINARY, "subclass", "wrapper", "parameter of a wrapper", "jagged"])
def test_compiled(name: str) -> None:
    """torch.compile takes no other tensors."""
    torch._dynamo.reset()
    assert compiled(made(name)) is (name in ORDINARY)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_module_asks_about_its_parameters(backend: str) -> None:
    class Doubling(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return input * (2 if ordinary(self.weight) and ordinary(input) else 3)

    layer = Doubling(4, 4)
    assert torch.equal(torch.compile(layer, backend=backend, fullgraph=True)(ones()), ones() * 2)
    layer.weight = nn.Parameter(TwoTensor(ones(), ones()))
    assert torch.equal(torch.compile(layer, backend=backend, fullgraph=True)(ones()), ones() * 3)


@pytest.fixture
def mesh() -> Iterator[Any]:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield init_device_mesh("cpu", (2,))
    dist.destroy_process_group()


def test_a_distributed_tensor_is_what_its_part_is(mesh: Any) -> None:
    from torch.distributed._functional_collectives import AsyncCollectiveTensor
    from torch.distributed.tensor import DTensor, Shard

    for local, expected in ((ones(), True), (TwoTensor(ones(), ones()), False)):
        tensor = DTensor.from_local(local, mesh, [Shard(0)])
        assert ordinary(tensor) is ordinary(nn.Parameter(tensor)) is expected
        torch._dynamo.reset()
        assert compiled(tensor) is expected
    assert ordinary(AsyncCollectiveTensor(ones())) is True
