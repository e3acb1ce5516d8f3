"""What the audit lists: calls on fake tensors as the compilations that their launches ask for."""

from __future__ import annotations

import pytest
import torch

from fused_ops import fused_layernorm, fused_softmax
from fused_ops._runtime import clusters, settings
from fused_ops._tools import audit_cases
from fused_ops._tools.audit_cases import case_of
from fused_ops._tools.launches import DEVICE, Gpu, listed, unique
from fused_ops.ops.linear import matmul_plan

H200 = Gpu("Test", (9, 0), 132)


def _cases(run: object, gpu: Gpu = H200) -> list[dict]:
    with listed(gpu) as launches:
        run()  # type: ignore[operator]
    assert launches
    arch = gpu.capability[0] * 10 + gpu.capability[1]
    return [case_of(launch, arch) for launch in unique(launches)]


def _empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=DEVICE)


def test_a_launch_is_the_compilation_that_it_asks_for() -> None:
    with torch.no_grad():
        (case,) = _cases(lambda: fused_softmax(_empty(33, 1000)))
    assert (case["module"], case["kernel"]) == ("softmax.softmax", "softmax_fwd_kernel")
    assert (case["arch"], case["dtype"], case["config"]) == (90, "bf16", "N=1000")
    assert case["signature"] == {
        "x_ptr": "*bf16:16", "y_ptr": "*bf16:16", "M": "i32", "N": "i32", "stride_xm": "i32", "stride_ym": "i32",
    }  # fmt: skip
    assert case["constexprs"] == {
        "stride_xn": 1, "VEC": 8, "EDGES": False, "SAME": True, "BLOCK_M": 1, "BLOCK_N": 1024,
    }  # fmt: skip
    assert (case["num_stages"], case["num_ctas"], case["min_triton"], case["aligned"]) == (1, 1, None, True)


def test_alignment_and_mixed_dtypes_are_seen() -> None:
    with torch.no_grad():
        (case,) = _cases(
            lambda: fused_layernorm(_empty(32 * 4096 + 1)[1:].view(32, 4096), (4096,), _empty(4096, dtype=torch.float32))
        )
    assert (case["signature"]["x_ptr"], case["signature"]["w_ptr"]) == ("*bf16", "*fp32:16")
    assert (case["signature"]["N"], case["signature"]["eps"]) == ("i32:16", "fp32")
    assert not case["aligned"]


@pytest.mark.parametrize(
    ("N", "affine", "aligned"), [(4096, True, True), (1001, True, False), (1001, False, True), (20, False, False)]
)
def test_wide_loads_are_due_where_a_thread_reads_whole_vectors(N: int, affine: bool, aligned: bool) -> None:
    with torch.no_grad():
        (case,) = _cases(lambda: fused_layernorm(_empty(64, N), (N,), _empty(N) if affine else None))
    assert case["aligned"] is aligned


def test_labels_of_different_compilations_differ() -> None:
    cases = [
        {"kernel": "k", "dtype": "bf16", "config": "N=8", "signature": {"x_ptr": x, "M": "i32"}, "constexprs": {},
         "num_warps": 4, "num_stages": stages, "num_ctas": 1}
        for x, stages in (("*bf16:16", 1), ("*bf16", 1), ("*bf16", 3))
    ]  # fmt: skip
    other = {**cases[0], "kernel": "other"}
    audit_cases._tell_apart([*cases, other])
    assert [case["config"] for case in (*cases, other)] == [
        "N=8 x_ptr=*bf16:16 num_stages=1", "N=8 x_ptr=*bf16 num_stages=1", "N=8 x_ptr=*bf16 num_stages=3", "N=8",
    ]  # fmt: skip


@pytest.mark.xdist_group("audit")
def test_eager_and_compiled_calls_are_listed() -> None:
    """A compiler traces products without TMA, and clusters need a later Triton than may be installed: both are listed."""
    before = clusters._triton, matmul_plan.at_vectors, clusters._given_up
    eager, compiled = ({launch.kernel for _, launch in audit_cases.launches_on(H200, way)} for way in (False, True))
    assert (clusters._triton, matmul_plan.at_vectors, clusters._given_up) == before
    assert compiled - eager == {name for name in compiled if "_cluster_" in name} != set()
    assert eager - compiled == {name for name in eager if "_tma_" in name} != set()
    wide = [case for case in audit_cases.audit_cases((90,)) if case["kernel"] == "linear_fwd_kernel" and case["aligned"]]
    assert any(case["constexprs"]["BLOCK_M"] == 128 for case in wide)


@pytest.mark.xdist_group("audit")
def test_each_case_has_a_label_of_its_own() -> None:
    cases = audit_cases.audit_cases((90,))
    assert len({(case["kernel"], case["config"], case["dtype"]) for case in cases}) == len(cases)
    assert {case["arch"] for case in cases} == {90}
    assert all(set(case["signature"]).isdisjoint(case["constexprs"]) for case in cases)


@pytest.mark.parametrize(("name", "value"), [("INTERPRET", True), ("BACKEND", "aten")])
def test_a_process_without_compiled_kernels_is_refused(name: str, value: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, name, value)
    with pytest.raises(RuntimeError, match="unset TRITON_INTERPRET and FUSED_OPS_BACKEND"):
        audit_cases.audit_cases((90,))


def test_the_sm_counts_are_of_gpus_of_the_architecture() -> None:
    for arch in audit_cases.KNOWN_ARCHITECTURES:
        gpus = audit_cases.gpus_of(arch)
        assert {gpu.capability for gpu in gpus} == {divmod(arch, 10)}
        assert 132 in {gpu.sms for gpu in gpus}
        assert len({gpu.sms for gpu in gpus}) == len(gpus) > 1
