"""Which way a launch goes, what it holds and what its errors say: with stand-ins for Triton's kernels and launchers."""

from __future__ import annotations

import gc
import logging
import os
import sys
import weakref
from typing import Any

import pytest
import torch

from fused_ops._runtime import compiled as compiled_module
from fused_ops._runtime import faults, launch_path, notices, scratch, settings
from fused_ops._runtime.compiled import Planned
from tests import process

VERSIONS = [(3, 6), (3, 7), (3, 8), (3, 9)]


class CudaLauncher:
    """Triton's, by name and attributes: how often it was called, past the front end (fast) or by it."""

    profile_scratch_size = 0
    launch_cooperative_grid = launch_pdl = False
    arg_annotations, kernel_signature = (), b""

    def __init__(self, global_scratch_size: int = 0) -> None:
        self.global_scratch_size = global_scratch_size
        self.fast = 0
        self.error: Exception | None = None

    def launch(self, *_: Any) -> None:
        self.fast += 1
        if self.error is not None:
            raise self.error

    __call__ = launch


class Compiled:
    function, packed_metadata = 1, (4, 1, 0)

    def __init__(self, launcher: Any) -> None:
        self._run = launcher


class Kernel:
    """A JITFunction, by name and attributes: kernel[grid] counts, raises error, or returns what was compiled."""

    __name__ = "stand_in_kernel"
    arg_names = ("x_ptr", "M", "BLOCK_M")
    pre_run_hooks: tuple[Any, ...] = ()

    def __init__(self, launcher: Any = None) -> None:
        self.compiled: Compiled | None = Compiled(launcher or CudaLauncher())
        self.through = 0
        self.error: Exception | None = None

    def __getitem__(self, grid: Any) -> Any:
        return self._launch

    def _launch(self, *_: Any, **__: Any) -> Any:
        self.through += 1
        if self.error is not None:
            raise self.error
        return self.compiled


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton 3.9, nothing forced and nothing refused, whatever is here."""
    use_version(monkeypatch, (3, 9))
    monkeypatch.setattr(settings, "LAUNCH", "auto")
    monkeypatch.setattr(settings, "INTERPRET", False)
    monkeypatch.setattr(launch_path, "TRITON_INSTALLED", True)
    monkeypatch.setattr(launch_path, "_refused", {})
    notices.warn_once.cache_clear()


def use_version(monkeypatch: pytest.MonkeyPatch, version: tuple[int, int]) -> None:
    for module in (launch_path, compiled_module):
        monkeypatch.setattr(module, "triton_version", lambda: (f"{version[0]}.{version[1]}.0", version))


def planned(kernel: Kernel) -> Planned:
    return Planned(0, kernel, {"BLOCK_M": 32})


def run(plan: Planned, times: int = 1) -> None:
    for _ in range(times):
        plan.run(0, 7, (4,), (torch.empty(4, 8),))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, ("fast path", "known for Triton 3.9.0; FUSED_OPS_LAUNCH=triton turns it off")),
        ({"LAUNCH": "triton"}, ("kernel[grid]", "FUSED_OPS_LAUNCH=triton")),
        ({"INTERPRET": True}, ("interpreter", "TRITON_INTERPRET is set")),
        ({"TRITON_INSTALLED": False}, ("none", "Triton is not installed")),
        (
            {"version": (3, 10)},
            ("kernel[grid]", "the fast path knows the launchers of Triton 3.6 to 3.9, not that of 3.10.0"),
        ),
        ({"version": (3, 5)}, ("kernel[grid]", "the fast path knows the launchers of Triton 3.6 to 3.9, not that of 3.5.0")),
    ],
    ids=["auto", "forced", "interpreted", "missing", "too_new", "too_old"],
)
def test_launch_path_says_which_way_and_why(
    monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], expected: tuple[str, str]
) -> None:
    for name, value in change.items():
        if name == "version":
            use_version(monkeypatch, value)
        else:
            monkeypatch.setattr(launch_path if name == "TRITON_INSTALLED" else settings, name, value)
    assert launch_path.launch_path() == expected
    kernel = Kernel()
    run(planned(kernel), 3)
    launcher = kernel.compiled._run
    if expected[0] == "fast path":
        assert (kernel.through, launcher.fast) == (1, 2)
    elif "INTERPRET" not in change and "TRITON_INSTALLED" not in change:
        assert (kernel.through, launcher.fast) == (3, 0)


def test_a_broken_triton_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Any:
        raise ImportError("libtriton.so: no such file")

    monkeypatch.setattr(launch_path, "triton_version", broken)
    assert launch_path.launch_path() == ("none", "Triton cannot be imported: ImportError: libtriton.so: no such file")


@pytest.mark.parametrize(("value", "said"), [(None, "auto"), ("Triton", "triton"), ("fast", "")])
def test_the_setting_is_checked(value: str | None, said: str) -> None:
    env = {k: v for k, v in os.environ.items() if k != "FUSED_OPS_LAUNCH"}
    env |= {} if value is None else {"FUSED_OPS_LAUNCH": value}
    code = "from fused_ops._runtime import settings; print(settings.LAUNCH)"
    done = process.run(code, env=env)
    assert done.stdout.strip() == said
    if not said:
        assert "SettingError: FUSED_OPS_LAUNCH: got 'fast', allowed: 'auto', 'triton'" in done.stderr


def test_a_launcher_with_other_arguments_is_left_to_triton_for_good(caplog: pytest.LogCaptureFixture) -> None:
    kernel = Kernel()
    kernel.compiled._run.error = TypeError("function takes exactly 20 arguments (19 given)")
    with caplog.at_level(logging.WARNING, "fused_ops"):
        run(planned(kernel), 5)
    assert (kernel.through, kernel.compiled._run.fast) == (5, 1)
    (record,) = caplog.records
    assert "stand_in_kernel: launched through kernel[grid]" in record.getMessage()
    way, reason = launch_path.launch_path()
    assert way == "fast path"
    assert "not for stand_in_kernel: TypeError: function takes exactly 20 arguments" in reason


def test_a_launcher_that_lacks_what_is_known_is_left_to_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(CudaLauncher, "launch_pdl")
    kernel = Kernel()
    run(planned(kernel), 3)
    assert (kernel.through, kernel.compiled._run.fast) == (3, 0)
    assert "launch_pdl" in launch_path.launch_path()[1]


@pytest.mark.parametrize("size", [0, 640], ids=["", "scratch"])
@pytest.mark.parametrize("version", VERSIONS, ids=lambda v: f"triton{v[0]}.{v[1]}")
def test_a_plan_keeps_its_compiled_kernel_alive(monkeypatch: pytest.MonkeyPatch, version: tuple[int, int], size: int) -> None:
    use_version(monkeypatch, version)
    monkeypatch.setattr(compiled_module, "scratch", lambda *_: torch.empty(0))
    launcher = CudaLauncher(size)
    kernel = Kernel(launcher)
    plan = planned(kernel)
    run(plan)
    alive = weakref.ref(kernel.compiled)
    kernel.compiled = None  # as after device_caches.clear()
    gc.collect(1)  # the young: what the test made
    assert alive() is not None
    run(plan, 2)
    assert (kernel.through, launcher.fast) == (1, 2)
    plan._ready.clear()
    gc.collect(1)  # the young: what the test made
    assert alive() is None


class ResourcesError(Exception):
    """As Triton's OutOfResources: its message is not its argument."""

    def __init__(self, required: int, limit: int) -> None:
        self.required, self.limit = required, limit

    def __str__(self) -> str:
        return f"out of resource: {self.required} of {self.limit}"


WHERE = "while launching stand_in_kernel[(7,)] on cpu: x_ptr=float32[4, 8] M=4 BLOCK_M=32"


@pytest.mark.parametrize("first", [True, False], ids=["first", "warm"])
@pytest.mark.parametrize(
    ("type_of", "arguments"),
    [
        (RuntimeError, ("Triton Error [CUDA]: invalid argument",)),
        (torch.cuda.OutOfMemoryError, ("CUDA out of memory. Tried to allocate 2 GiB",)),
        (ValueError, ("Pointer argument (at 0) cannot be accessed from Triton (cpu tensor?)",)),
        (ResourcesError, (300000, 232448)),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_an_error_names_the_launch_and_keeps_its_type(
    type_of: type[Exception], arguments: tuple[Any, ...], first: bool
) -> None:
    kernel, error = Kernel(), type_of(*arguments)
    plan, said = planned(kernel), str(error)
    if first:
        kernel.error = error
    else:
        run(plan)
        kernel.compiled._run.error = error
    for _ in range(2):  # of an error that is raised again nothing is told twice
        with pytest.raises(type_of) as raised:
            run(plan)
        assert raised.value is error
    if type_of is ResourcesError:
        assert str(error) == said
        assert getattr(error, "__notes__", []) == ([WHERE] if sys.version_info >= (3, 11) else [])
    else:
        assert str(error) == f"{said}\n{WHERE}"


def test_the_fault_of_an_earlier_kernel_and_a_capture_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments: Any = (Kernel(), 1, (torch.empty(2), 3), {})
    late, captured = RuntimeError("CUDA error: misaligned address"), RuntimeError("operation not permitted")
    faults.name_launch(late, *arguments)
    assert "an earlier kernel" in str(late)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    faults.name_launch(captured, *arguments)
    assert "once before the capture" in str(captured)

    def lost() -> bool:
        raise RuntimeError("the context is lost")

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lost)
    other = RuntimeError("something")
    faults.name_launch(other, *arguments)
    assert str(other) == "something"  # and nothing else is raised in its place


def test_scratch_keeps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pool of which nothing may be left after a launch, as CUDA graphs in torch.compile have one; no capture is seen."""
    empty, pool = torch.empty, []

    def allocate(*size: Any, device: Any = None, **options: Any) -> torch.Tensor:
        assert device == 3
        buffer = empty(*size, **options)
        pool.append(weakref.ref(buffer))
        return buffer

    monkeypatch.setattr(torch, "empty", allocate)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    for size in (640, 1 << 18, 1 << 20):
        for stream in (0, 7, None):
            buffer = scratch.allocator(size, 128, stream)
            assert buffer.numel() * buffer.element_size() == size
            del buffer
    assert len(pool) == 9
    assert not [buffer for buffer in pool if buffer() is not None]
