"""Fixtures that the export tests share."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._export import utils
from torch.onnx._internal.exporter import _registration

from tests.export.exports import Exports


@pytest.fixture(scope="session", autouse=True)
def _registry_made_once() -> Iterator[None]:
    """torch's exporter reads the source of its 500 translations at each export, which takes a small one half its time."""
    make = functools.cache(_registration.ONNXRegistry.from_torchlib)

    def from_torchlib(*args: Any, **options: Any) -> Any:
        registry = copy.copy(make(*args, **options))
        registry.functions = {name: list(found) for name, found in registry.functions.items()}
        return registry

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_registration.ONNXRegistry, "from_torchlib", staticmethod(from_torchlib))
        yield


@pytest.fixture(scope="session", autouse=True)
def _operators_found_once() -> Iterator[None]:
    """At each export torch looks for every composite operator of C++ some ninety times, once for each namespace there is. Here
    it does so again only where there are other operators than the last time."""
    find = utils._materialize_cpp_cia_ops
    found: list[list[str]] = []

    def materialize() -> None:
        there = torch._C._dispatch_get_registrations_for_dispatch_key("CompositeImplicitAutograd")
        if [there] != found:
            find()
            found[:] = [there]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utils, "_materialize_cpp_cia_ops", materialize)
        yield


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where a test's ONNX file goes, in a folder of its own."""
    return tmp_path / "model.onnx"


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exports:
    """Exports of the shared models, each made once."""
    return Exports(tmp_path_factory.mktemp("exported"))
