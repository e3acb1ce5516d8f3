"""The forecast: it gives the figures that its coefficients were read from, and behaves as time must."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from typing import Any

import pytest
import torch

from fused_ops import REGISTRY
from fused_ops._tools.forecast import GPUS, Forecast, Gpu, forecast, gpu_named, kernels_hash, variant_of
from fused_ops._tools.forecast.gpus import FILE, SOURCES, coefficients, read
from fused_ops._tools.forecast.limits import Launch, last_wave
from fused_ops.testing import Case

H100 = GPUS["h100"]
BF16 = 2
CASES = [(s.name, case) for s in REGISTRY.values() for case in s.bench.cases()]


def _of_pass(forward_and_backward: tuple[int, int], pass_: str) -> int:
    """What a pass has of a forward's and a backward's bytes or FLOPs."""
    fwd, bwd = forward_and_backward
    return {"bwd": bwd, "fwd+bwd": fwd + bwd}.get(pass_, fwd)


def of(op: str, case: Case, pass_: str, gpu: Gpu = H100, kind: str = "kernel") -> Forecast:
    spec = REGISTRY[op]
    work = (_of_pass(spec.bench.bytes(case), pass_), _of_pass(spec.bench.flops(case), pass_))
    return forecast(op, case.shape, case.dtype.itemsize, pass_, gpu, kind=kind, activation=variant_of(case.name), work=work)


@pytest.mark.parametrize(
    ("op", "shape", "pass_", "microseconds", "binding"),
    [
        ("softmax", (201728, 197), "fwd", 93, "issue"),
        ("softmax", (201728, 197), "bwd", 90, "memory"),
        ("softmax", (8192, 50257), "fwd", 806, "chain"),
        ("softmax", (8192, 65536), "fwd", 876, None),
        ("softmax", (4096, 128256), "fwd", 1029, "memory"),
        ("softmax", (8192, 50257), "bwd", 1168, "memory"),
        ("layer_norm", (16384, 768), "bwd", 46, "in flight"),
        ("layer_norm", (4096, 16384), "bwd", 253, "memory"),
    ],
)
def test_the_model_gives_what_it_was_read_from(
    op: str, shape: tuple[int, int], pass_: str, microseconds: float, binding: str | None
) -> None:
    """The forecasts of one case each, reckoned by hand from the SASS of its kernel."""
    found = forecast(op, shape, BF16, pass_, H100)
    assert found.seconds * 1e6 == pytest.approx(microseconds, rel=0.12)
    assert binding in (None, found.binding)


def test_the_activations_backward_is_what_it_was_read_from() -> None:
    first = forecast("linear", (16384, 3072, 768), BF16, "bwd", H100, activation="gelu").launches[0]
    assert first.name == "act_bwd"
    assert first.seconds * 1e6 == pytest.approx(125, rel=0.12)


@pytest.mark.parametrize(("op", "case"), CASES, ids=lambda v: v if isinstance(v, str) else v.name)
def test_every_case_has_a_time_no_shorter_than_its_bytes(op: str, case: Case) -> None:
    spec = REGISTRY[op]
    for pass_ in ("fwd", "train_fwd", "bwd", "fwd+bwd") if spec.trains else ("fwd",):
        found = of(op, case, pass_)
        assert math.isfinite(found.seconds)
        assert found.binding in {"launch", *(name for launch in found.launches for name in launch.limits)}
        assert found.seconds >= 0.99 * _of_pass(spec.bench.bytes(case), pass_) / H100.copy


def test_a_faster_memory_shortens_what_memory_limits() -> None:
    row = next(c for name, c in CASES if name == "softmax" and c.name == "bert_base_attention" and c.dtype is torch.bfloat16)
    h100, h200 = (of("softmax", row, "fwd", GPUS[name]) for name in ("h100", "h200"))
    assert h100.binding == "memory"
    assert 0.69 < h200.seconds / h100.seconds < 0.9


def test_host_time_limits_small_calls_only() -> None:
    small = forecast("softmax", (140, 4096), BF16, "fwd", H100, kind="wall")
    large = forecast("softmax", (8192, 65536), BF16, "fwd", H100, kind="wall")
    assert small.binding == "host"
    assert small.seconds > forecast("softmax", (140, 4096), BF16, "fwd", H100).seconds
    assert large == forecast("softmax", (8192, 65536), BF16, "fwd", H100)


def test_both_passes_are_the_sum_of_the_two() -> None:
    """A product's forward stores its pre-activation where gradients are recorded; softmax's does not."""
    for op, shape, act, first in (("softmax", (4096, 4096), "none", "fwd"), ("linear", (8192, 3072, 768), "gelu", "train_fwd")):
        one, two, both = (forecast(op, shape, BF16, p, H100, activation=act).seconds for p in (first, "bwd", "fwd+bwd"))
        assert both == pytest.approx(one + two)


def test_an_op_without_a_model_takes_its_bytes() -> None:
    found = forecast("new_op", (4096, 4096), BF16, "fwd", H100, work=(300_000_000, 10**9))
    assert found.binding == "memory"
    assert found.seconds == pytest.approx(300e6 / H100.copy / 0.9 + H100.launch)


@pytest.mark.parametrize(("pass_", "kind"), [("forward", "kernel"), ("fwd", "host")])
def test_unknown_questions_are_refused(pass_: str, kind: str) -> None:
    with pytest.raises(ValueError, match="allowed: fwd, train_fwd, bwd"):
        forecast("softmax", (1, 1), BF16, pass_, H100, kind=kind)


def test_limits_join_between_the_longest_and_the_sum() -> None:
    launch = Launch("k", {"memory": 3e-6, "issue": 2e-6}, floor=1e-6, norm=4)
    assert 3e-6 < launch.seconds - launch.floor < 5e-6
    assert launch.binding == "memory"
    assert dataclasses.replace(launch, norm=200).seconds == pytest.approx(4e-6)
    assert Launch("k", {"memory": 1e-9}, floor=1e-6).binding == "launch"
    assert Launch("k", {}, floor=1e-6).seconds == 1e-6


@pytest.mark.parametrize(
    ("programs", "places", "factor"), [(10, 100, 1.0), (100, 100, 1.0), (150, 100, 2 / 1.5), (200, 100, 1.0)]
)
def test_a_last_wave_costs_what_it_leaves_empty(programs: int, places: int, factor: float) -> None:
    assert last_wave(programs, places) == pytest.approx(factor)
    assert last_wave(programs, places, 0.0) == 1.0


def test_gpus_go_by_either_name() -> None:
    assert gpu_named("NVIDIA H100 80GB HBM3") is gpu_named("h100") is H100
    assert gpu_named("NVIDIA H200") is GPUS["h200"]
    assert gpu_named("NVIDIA GeForce RTX 4090") is None


def test_every_coefficient_says_where_it_is_from() -> None:
    assert set(SOURCES) == {f.name for f in dataclasses.fields(Gpu)} - {"name"}
    assert all(source and fits for source, fits in SOURCES.values())


def _changed(change: Any) -> str:
    content = json.loads(FILE.read_text())
    change(content)
    return json.dumps(content)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["gpus"]["h100"].pop("latency"), "gpus.h100: got .*allowed: .*latency"),
        (lambda c: c["gpus"]["h100"].update(latency=-1), "gpus.h100.latency: got -1, allowed: a number above 0"),
        (lambda c: c["gpus"]["h100"].update(issue_share=1.5), "gpus.h100.issue_share: got 1.5, .*at most 1"),
        (lambda c: c["gpus"]["h100"].update(norm=True), "gpus.h100.norm: got True"),
        (lambda c: c["gpus"]["h100"]["rates"].update({"2": "fast"}), "gpus.h100.rates.2: got 'fast'"),
        (lambda c: c["gpu_coefficients"]["norm"].pop("source"), "gpu_coefficients.norm: source: a text is missing"),
        (lambda c: c["gpu_coefficients"].pop("norm"), "gpu_coefficients: got"),
        (lambda c: c["model"]["duty"].update(value=2), "model.duty: got 2, .*at most 1"),
        (lambda c: c["host"]["seconds"].update(fwd=None), "host.fwd: got None"),
        (lambda c: c.pop("host"), "got gpu_coefficients, gpus, model, allowed: "),
    ],
)
def test_coefficients_that_mean_nothing_are_refused(change: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(_changed(change))


def test_coefficients_are_what_the_file_says() -> None:
    assert read(FILE.read_text()) == coefficients()
    assert read(_changed(lambda c: c["gpus"]["h100"].update(latency=1e-6))).gpus["h100"].latency == 1e-6
    with pytest.raises(ValueError, match="no JSON"):
        read("{")


def test_activations_are_read_from_names() -> None:
    assert [variant_of(n) for n in ("a_gelu", "a_gelu_tanh", "a_None", "4k", "x_quick_gelu")] == [
        "gelu", "gelu_tanh", "none", "none", "quick_gelu",
    ]  # fmt: skip


def test_the_kernels_hash_is_of_their_source() -> None:
    assert kernels_hash() == kernels_hash()
    assert len(kernels_hash()) == 12


def test_a_forward_only_op_has_no_backward() -> None:
    with pytest.raises(ValueError, match="linear_fp8 has no bwd"):
        forecast("linear_fp8", (4096, 4096, 4096), 1, "bwd", H100)


def command(*args: str) -> Any:
    testing = pytest.importorskip("typer.testing")
    from fused_ops.export.cli import app

    return testing.CliRunner().invoke(app, ["forecast", *args], env={"COLUMNS": "200", "NO_COLOR": "1"})


def test_the_command_says_the_time_and_what_limits_it() -> None:
    """By formula, where nothing is compiled and no table has the shape; else from the committed counts."""
    found = forecast("layer_norm", (16000, 768), BF16, "bwd", H100)
    said = command("layer_norm", "16000", "768", "--pass", "bwd", "--quick")
    assert said.exit_code == 0, said.output
    assert f"{found.seconds * 1e6:.1f} us on h100, limited by in flight, " in said.stdout
    assert "a forecast, not a measurement (formulas)" in said.stdout
    answer = json.loads(command("layer_norm", "16384", "768", "--pass", "bwd", "--quick", "--json").stdout)
    assert [part["name"] for part in answer["launches"]] == ["layer_norm_bwd_kernel", "column_sum_kernel"]
    assert answer["counts"].startswith("headline-")
    assert answer["seconds"] == pytest.approx(sum(part["seconds"] for part in answer["launches"]))
    assert answer["launches"][0]["instructions_per_element"] > 1
    wall = json.loads(command("softmax", "1", "4096", "--wall", "--quick", "--json", "--gpu", "NVIDIA H200").stdout)
    assert (wall["gpu"], wall["binding"]) == ("h200", "host")


@pytest.mark.skipif(sys.platform != "linux", reason="Triton compiles on Linux only")
@pytest.mark.xdist_group("audit")
def test_the_command_compiles_what_no_table_has() -> None:
    answer = json.loads(command("rms_norm", "4096", "1536", "--json", "--jobs", "1").stdout)
    (launch,) = answer["launches"]
    assert answer["counts"].startswith("compiled by Triton ")
    assert launch["name"] == "rms_norm_fwd_kernel"
    assert launch["spill_bytes"] == 0
    assert launch["programs_per_sm"] > 1
    assert 2 * 4096 * 1536 * 2 / H100.copy < answer["seconds"] < 1e-4


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("pooling", "1", "1"), "got 'pooling', allowed: "),
        (("softmax", "1"), "softmax: got 1 sizes, allowed: 2"),
        (("softmax", "0", "1"), "Invalid value"),
        (("softmax", "1", "1", "--gpu", "a100"), "got 'a100', allowed: h100, h200"),
        (("softmax", "1", "1", "--dtype", "int8"), "got 'int8', allowed: bf16"),
        (("softmax", "1", "1", "--dtype", "fp8"), "softmax: got fp8, allowed: bf16, fp16, fp32"),
        (("softmax", "1", "1", "--pass", "up"), "got 'up', allowed: fwd"),
        (("softmax", "1", "1", "--activation", "gelu"), "softmax has none: got gelu"),
        (("linear", "1", "1", "1", "--activation", "swish"), "got 'swish', allowed: none"),
        (("mlp", "1", "1", "1"), "mlp needs one: gelu, gelu_tanh"),
        (("linear_fp8", "1", "1", "1", "--dtype", "fp8", "--pass", "bwd"), "linear_fp8 has no bwd"),
        (("layer_norm_fp8", "8", "768", "--quick"), "no formula is of it"),
    ],
)
def test_the_command_refuses_what_it_has_no_model_of(args: tuple[str, ...], message: str) -> None:
    """Before anything is compiled."""
    said = command(*args)
    assert said.exit_code == 2
    assert message in said.stderr
