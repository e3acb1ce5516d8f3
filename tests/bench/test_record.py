"""The results file: quantiles, rates, ratios and goals, a row flushed at once, a run cut short, a run resumed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bench.goals import goals_for, judge
from bench.inputs import argument_sets, is_parameter
from bench.providers import PROVIDERS
from bench.record import Recorder, annotate, quantile, rates, read, spread
from bench.roofline import Roofline, drift
from bench.tasks import matrix
from fused_ops import REGISTRY
from tests.bench.small import task

KEY = {"op": "softmax", "case": "4k", "dtype": "bf16", "pass": "fwd", "kind": "kernel", "shape": "4096x4096"}


def row(provider: str, p50: float, **more: object) -> dict[str, object]:
    role = "ours" if provider == "ours" else "peer"
    return {**KEY, "provider": provider, "role": role, "status": "ok", "p50_us": p50, **more}


def test_quantiles() -> None:
    assert [quantile([4.0, 1.0, 3.0, 2.0], q) for q in (0, 0.5, 1)] == [1.0, 2.5, 4.0]
    assert quantile([7.0], 0.2) == 7.0
    assert spread([1e-6 * i for i in range(11)]) == {"samples": 11, "p20_us": "2", "p50_us": "5", "p80_us": "8"}


def test_rates_and_limit() -> None:
    got = rates(2e-3, moved=3 * 10**9, flops=10**12, limit_s=1e-3)
    assert (got["gbps"], got["tflops"], got["percent_of_limit"]) == ("1500", "500", "50")
    roof = Roofline(3e12, {"fp32": 1e12})
    assert roof.limit(3 * 10**9, 10**10, task("softmax")) == pytest.approx(1e-3)  # no matrix product: bytes only
    assert roof.limit(3 * 10**9, 10**10, task("linear")) == pytest.approx(1e-2)


def test_ratio_is_to_the_fastest_right_peer() -> None:
    rows = [
        row("eager", 20.0),
        row("quack", 9.0),
        row("liger", 1.0) | {"status": "wrong"},
        row("ours", 10.0, percent_of_limit=95),
    ]
    ours = annotate(rows)[-1]
    assert (ours["best_peer"], ours["ratio_to_best_peer"]) == ("quack", "0.9")
    assert annotate([rows[0] | {"dtype": "fp16"}, rows[-1]])[-1].get("best_peer") is None  # another measurement's peer


def test_a_peer_timed_by_another_method_gives_no_ratio_and_leaves_the_goal_open() -> None:
    """By events the host's launches count too: no ratio pairs them with a graph's replay, whoever has which."""
    graph, events = {"method": "graph"}, {"method": "events"}
    for mine, theirs in ((graph, events), (events, graph)):
        ours = annotate([row("quack", 8.0, **theirs), row("ours", 10.0, percent_of_limit="91", **mine)])[-1]
        assert "best_peer" not in ours
        assert "ratio_to_best_peer" not in ours
        assert ours["reason"] == f"timed by {mine['method']}, so no ratio to quack ({theirs['method']})"
        assert (ours["goal"], ours["met"]) == (">= 0.98x quack; >= 90% of the limit", "open; yes")
    wall = [row("eager", 8.0, method="loop"), row("ours", 10.0, method="loop")]
    assert annotate([r | {"kind": "wall"} for r in wall])[-1]["ratio_to_best_peer"] == "0.8"


def test_peers_timed_alike_are_compared_and_the_others_named() -> None:
    shape = {"shape": "4096x50257", "case": "gpt2"}  # its goal names no peer, so that any may decide it
    rows = [row("eager", 20.0, method="graph", **shape), row("helion", 5.0, method="events", **shape)]
    for p50, met in ((10.0, "open"), (19.0, "no")):  # missed against those timed alike is missed
        ours = annotate([*rows, row("ours", p50, method="graph", **shape)])[-1]
        assert (ours["best_peer"], ours["met"]) == ("eager", met)
        assert ours["reason"] == "timed by graph, so no ratio to helion (events)"
    again = annotate([rows[0], rows[1] | {"method": "graph"}, ours])[-1]  # measured again, by graph
    assert (again["best_peer"], again["reason"], again["met"]) == ("helion", "", "no")


def test_measurements_of_two_gpus_are_not_compared() -> None:
    rows = [row("eager", 20.0, gpu="H100"), row("eager", 5.0, gpu="H200"), row("ours", 10.0, gpu="H100")]
    assert annotate(rows)[-1]["ratio_to_best_peer"] == "2"


def limit_row(case: str, rate: float, time: str, gpu: str = "H100", **more: object) -> dict[str, object]:
    rates = {"gbps": rate} if case == "copy" else {"tflops": rate}
    return {"kind": "roofline", "op": "roofline", "role": "peer", "provider": "torch", "case": case, "dtype": case, "gpu": gpu,
            "time": f"2026-01-01T{time}+00:00", "status": "ok", "p50_us": 1.0, **rates, **more}  # fmt: skip


LIMITS = [
    limit_row("copy", 3000, "10:00:00"),
    limit_row("bf16", 700, "10:00:01"),
    limit_row("copy", 2000, "10:08:00"),
    limit_row("bf16", 1, "10:07:00", status="error"),
    limit_row("copy", 4000, "10:04:00", gpu="H200"),
]


def test_the_nearest_roofline_of_the_same_gpu_counts() -> None:
    def bandwidth(gpu: str, time: str | None = None) -> float:
        found = Roofline.from_rows(LIMITS, gpu, time)
        assert found is not None
        return found.bandwidth

    assert bandwidth("H100", "2026-01-01T10:03:59+00:00") == 3e12
    assert bandwidth("H100", "2026-01-01T10:04:01+00:00") == 2e12
    assert bandwidth("H100") == 2e12  # the last
    assert bandwidth("H200", "2026-01-01T10:00:00+00:00") == 4e12
    assert Roofline.from_rows(LIMITS, "B200") is None
    assert Roofline.from_rows(LIMITS, "H100") == Roofline(2e12, {"bf16": 7e14})


def test_percentages_are_to_the_nearest_roofline() -> None:
    """Also for rows measured before it: the last one comes at the end of a run."""
    both = [row("ours", 1000.0, gpu="H100", bytes=10**9, flops=1, time=f"2026-01-01T10:0{m}:00+00:00") for m in (1, 7)]
    first, last = annotate([*LIMITS, *both])[-2:]
    assert (first["limit_us"], first["percent_of_limit"]) == ("333.3", "33.33")
    assert (last["limit_us"], last["percent_of_limit"]) == ("500", "50")
    assert "best_peer" not in annotate(LIMITS)[0]
    product = both[0] | {"op": "linear", "shape": "4096x4096x4096", "flops": 7 * 10**11}
    assert annotate([*LIMITS, product])[-1]["limit_us"] == "1000"


def test_drift_of_the_roofline_is_said() -> None:
    assert drift(LIMITS[:2]) == []
    assert drift([limit_row("copy", 3000, "10:00:00"), limit_row("copy", 2920, "10:09:00")]) == []
    (said,) = drift(LIMITS[::-1])  # in order of time, not of rows
    for text in ("H100: copy", "-33.3%", "3000 GB/s at 2026-01-01T10:00:00", "2000 GB/s at 2026-01-01T10:08:00"):
        assert text in said
    (said,) = drift([limit_row("bf16", 700, "10:00:00"), limit_row("bf16", 735, "10:09:00")])
    assert "bf16 drifted by +5.0%, from 700 TFLOP/s" in said


def test_goals_met_missed_and_open() -> None:
    ours = row("ours", 10.0, percent_of_limit="91")
    assert judge(ours, {"quack": 9.0}) == (">= 0.98x quack; >= 90% of the limit", "no; yes")
    assert judge(ours, {"eager": 9.0})[1] == "open; yes"
    assert judge(ours | {"percent_of_limit": ""}, {})[1] == "open; open"
    assert judge(ours | {"kind": "wall"}, {"quack": 25.0, "eager": 7.0})[1] == "yes; no"
    assert goals_for(ours | {"op": "model"}) == []


def test_the_matrix_is_held_to_goals() -> None:
    """The goals of softmax, the norms and linear each apply somewhere in the registry's cases."""
    with_goals = {
        t.spec.name for t, _ in matrix("", ["ours"]) if goals_for({**t.key, "shape": "x".join(map(str, t.case.shape))})
    }
    assert {"softmax", "layer_norm", "linear"} <= with_goals


def test_rows_are_on_disk_at_once_and_a_cut_line_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "results.csv"
    recorder = Recorder(path)
    recorder.add(**row("eager", 20.0))
    assert [r["provider"] for r in read(path)] == ["eager"]
    recorder.add(**row("ours", 10.0))
    path.write_bytes(path.read_bytes() + b"2026-01-01,half a li")
    assert [r["provider"] for r in read(path)] == ["eager", "ours"]
    recorder.finish()
    assert [r["ratio_to_best_peer"] for r in read(path)] == ["1", "2"]
    assert all(r["torch"] == torch.__version__ and r["cpu"] for r in read(path))
    with pytest.raises(KeyError, match="speed"):
        recorder.add(speed=1)


def test_resume_tries_errors_and_skips_again(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "r.csv")
    for provider, status in (("eager", "ok"), ("liger", "error"), ("quack", "skipped"), ("helion", "unsupported")):
        recorder.add(**(row(provider, 1.0) | {"status": status}))
    again = Recorder(tmp_path / "r.csv")
    done = {
        p: again.done({"op": "softmax", "case": "4k", "provider": p}) for p in ("eager", "liger", "quack", "helion", "ours")
    }
    assert done == {"eager": True, "liger": False, "quack": False, "helion": True, "ours": False}
    assert again.done({"op": "softmax", "provider": "liger"}, errors_too=True)
    for measured in again.rows:
        measured["gpu"] = "another GPU"
    assert not again.done({"op": "softmax", "case": "4k", "provider": "eager"})


def test_a_file_that_is_no_results_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="no benchmark results"):
        read(path)


def test_every_op_is_in_the_matrix_and_bf16_forward_comes_first() -> None:
    tasks = matrix("", [p.name for p in PROVIDERS])
    assert {t.spec.name for t, _ in tasks} == set(REGISTRY)
    assert {t.id for t, _ in tasks[:40]} <= {t.id for t, _ in matrix("-bf16-fwd-", ["ours"])}
    assert len({t.spec.name for t, _ in tasks[:150]}) >= 3  # ops take turns
    ours = [t.id for t, p in tasks if p == "ours"]
    assert len(ours) == len(set(ours))
    assert all("4k" in t.id for t, _ in matrix("softmax-4k", ["ours"]))


def test_an_op_without_gradients_is_measured_forward_only() -> None:
    tasks = [t for t, _ in matrix("", ["ours"])]
    assert {(t.pass_, t.kind) for t in tasks if t.spec.name == "linear_fp8"} == {("fwd", "kernel"), ("fwd", "wall")}
    assert {"fwd", "train_fwd", "bwd", "fwd+bwd"} == {t.pass_ for t in tasks if t.spec.name == "linear"}
    fp8 = next(t for t in tasks if t.id == "linear_fp8-square_4096_gelu-float8_e4m3fn-fwd-kernel")
    assert fp8.work() == (2 * 4096**2 + 2 * 4096**2 + 4 * 2 * 4096 + 2 * 4096, 2 * 4096**3)
    roof = Roofline(1e15, {"float8_e4m3fn": 1e15})  # as the rate of fp8 products is recorded
    assert roof.limit(*fp8.work(), fp8) == pytest.approx(2 * 4096**3 / 1e15)


def test_every_tensor_but_the_first_is_told_from_an_input() -> None:
    parameters = ["weight", "bias", "weight1", "bias2", "gate_weight", "up_bias", "qkv_weight", "weight_scale"]
    assert [n for n in (*parameters, "input", "input_scale", "residual", "target", "width") if is_parameter(n)] == parameters


def test_sets_differ_in_inputs_and_agree_in_parameters() -> None:
    first, second = argument_sets(task("layer_norm", "bwd"), 2, "cpu")
    assert not torch.equal(first.args[0], second.args[0])
    assert torch.equal(first.args[2], second.args[2])
    assert first.args[2].data_ptr() != second.args[2].data_ptr()
    assert [t.shape for t in first.leaves()] == [(24, 40), (40,), (40,)]
    assert first.dy[0].shape == (24, 40)
