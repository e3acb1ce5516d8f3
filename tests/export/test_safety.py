"""Hostile files: one clear error each, nothing written, and the process lives."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from onnx import TensorProto

from fused_ops.export import ExportError, build_engine
from fused_ops.export.files.atomic import check_onnx
from fused_ops.export.files.manifest import check_hash, manifest_path, write_manifest
from fused_ops.export.inspect import inspect_file
from tests.export.onnx_files import PROFILE, linear_model, save

WORKER = Path(__file__).with_name("fuzz_worker.py")
MUTANTS = 100
SECONDS = 300
READERS = {"build": "tensorrt_rtx", "inspect": "onnx", "infer": "onnxruntime"}  # and the package that each needs
BYTES = 16 * 8 * 4  # of the weight w


def mutated(data: bytes, rng: random.Random) -> bytes:
    """One change of a kind that files suffer in transit or at an attacker's hand."""
    out = bytearray(data)
    at = rng.randrange(len(out))
    kind = rng.choice(("cut", "flip", "overwrite", "insert", "repeat"))
    if kind == "cut":
        del out[at:]
    elif kind == "flip":
        out[at] ^= 1 << rng.randrange(8)
    elif kind == "overwrite":
        for _ in range(rng.randint(1, 8)):
            out[rng.randrange(len(out))] = rng.randrange(256)
    elif kind == "insert":
        out[at:at] = rng.randbytes(rng.randint(1, 16))
    else:
        out[at:at] = out[at : at + rng.randrange(200)]
    return bytes(out)


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A folder of mutants for each reader, and the one process that fed them to the readers."""
    root, files = tmp_path_factory.mktemp("fuzzed"), []
    for reader, package in READERS.items():
        if importlib.util.find_spec(package) is None:
            continue
        data, rng = linear_model().SerializeToString(), random.Random(f"fused-ops {reader}")
        (root / reader).mkdir()
        for index in range(MUTANTS):
            files.append(root / reader / f"{index}.onnx")
            files[-1].write_bytes(mutated(data, rng))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(WORKER.parents[2])}
    done = subprocess.run(
        [sys.executable, str(WORKER), *map(str, files)],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        env=environment,
        check=False,
    )
    return root, done


@pytest.mark.xdist_group("export-fuzzed")
@pytest.mark.parametrize("reader", READERS)
def test_mutated_onnx_never_ends_the_process(fuzzed: tuple[Path, subprocess.CompletedProcess[str]], reader: str) -> None:
    pytest.importorskip(READERS[reader])
    root, done = fuzzed
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    outcomes = {name: outcome for used, name, outcome in lines if used == reader}
    assert done.returncode == 0, f"died after {len(lines)} files: {done.stderr[-2000:]}"
    assert len(outcomes) == MUTANTS
    strange = {
        name: outcome for name, outcome in outcomes.items() if outcome != "ok" and not outcome.startswith("ExportError: ")
    }
    assert strange == {}
    assert sum(outcome.startswith("ExportError") for outcome in outcomes.values()) > MUTANTS // 3  # they were mutated
    engines = {path.stem for path in (root / reader).glob("*.engine")}
    assert engines == {
        name.removesuffix(".onnx") for name, outcome in outcomes.items() if outcome == "ok" and reader == "build"
    }


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    """At each length, not at a drawn one. A cut that leaves a valid file would have to leave a graph with its outputs."""
    data = linear_model().SerializeToString()
    path = tmp_path / "cut.onnx"
    for length in range(0, len(data), 7):
        path.write_bytes(data[:length])
        with pytest.raises(ExportError, match=r"cut\.onnx"):
            check_onnx(path)


def link(target: str) -> Callable[[Path], None]:
    return lambda folder: (folder / "w").symlink_to(target)


def data_of(size: int) -> Callable[[Path], None]:
    return lambda folder: (folder / "w").write_bytes(bytes(size)) and None


EXTERNAL: dict[str, tuple[dict[str, str], Callable[[Path], Any], str]] = {
    "parent": ({"location": "../secret"}, data_of(BYTES), "allowed: a relative path inside"),
    "inner parent": ({"location": "sub/../../secret"}, data_of(BYTES), "allowed: a relative path inside"),
    "absolute": ({"location": "/etc/passwd"}, data_of(BYTES), "allowed: a relative path inside"),
    "link": ({"location": "w"}, link("../secret"), "symbolic link"),
    "linked folder": ({"location": "w/secret"}, link(".."), "symbolic link"),
    "hard link": ({"location": "w"}, lambda folder: os.link(folder.parent / "secret", folder / "w"), "hard link"),
    "folder": ({"location": "w"}, lambda folder: (folder / "w").mkdir(), "no such regular file"),
    "fifo": ({"location": "w"}, lambda folder: os.mkfifo(folder / "w"), "no such regular file"),
    "missing": ({"location": "w"}, lambda folder: None, "no such regular file"),
    "no location": ({}, data_of(BYTES), "allowed: a relative path inside"),
    "null byte": ({"location": "w\0x"}, data_of(BYTES), "allowed: a relative path inside"),
    "negative offset": ({"location": "w", "offset": "-4"}, data_of(BYTES), "lie outside the file"),
    "negative length": ({"location": "w", "length": "-1"}, data_of(BYTES), "lie outside the file"),
    "length beyond": ({"location": "w", "length": str(1 << 60)}, data_of(BYTES), "lie outside the file"),
    "offset beyond": ({"location": "w", "offset": "9" * 30}, data_of(BYTES), "lie outside the file"),
    "no number": ({"location": "w", "offset": "0x10"}, data_of(BYTES), "offset or length is no number"),
    "many digits": ({"location": "w", "offset": "9" * 9000}, data_of(BYTES), "offset or length is no number"),
    "too short": ({"location": "w"}, data_of(BYTES - 4), "w|initializer"),
    "too long": ({"location": "w"}, data_of(BYTES + 4), "w|initializer"),
    "the model itself": ({"location": "m.onnx"}, data_of(BYTES), "w|initializer"),
}


@pytest.mark.parametrize("case", EXTERNAL)
def test_hostile_external_data_is_refused(tmp_path: Path, case: str) -> None:
    """By a check or by a parser's error, before an engine exists."""
    pytest.importorskip("tensorrt_rtx")
    entries, prepare, message = EXTERNAL[case]
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    (tmp_path / "secret").write_bytes(bytes(BYTES))
    prepare(folder)
    save_with_external_data(folder / "m.onnx", entries)
    with pytest.raises(ExportError, match=message) as caught:
        build_engine(folder / "m.onnx", tmp_path / "m.engine", backend="tensorrt_rtx", profiles=PROFILE)
    assert str(caught.value).startswith("build_engine: ")
    assert not list(tmp_path.glob("*.engine*"))


def test_honest_external_data_is_accepted(tmp_path: Path) -> None:
    """That the cases above fail for their own reason."""
    pytest.importorskip("tensorrt_rtx")
    (tmp_path / "w").write_bytes(bytes(BYTES))
    save_with_external_data(tmp_path / "m.onnx", {"location": "w", "offset": "0", "length": str(BYTES)})
    assert build_engine(tmp_path / "m.onnx", tmp_path / "m.engine", backend="tensorrt_rtx", profiles=PROFILE).bytes > 10_000


def save_with_external_data(path: Path, entries: dict[str, str]) -> None:
    proto = linear_model()
    weight = proto.graph.initializer[0]
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    for key, value in entries.items():
        weight.external_data.add(key=key, value=value)
    path.write_bytes(proto.SerializeToString())


def test_names_that_are_no_utf8_are_refused(tmp_path: Path) -> None:
    """Protobuf hands them out as bytes; TensorRT's log, which cannot be decoded with them, would be lost."""
    (tmp_path / "m.onnx").write_bytes(
        linear_model(sequence="sequence").SerializeToString().replace(b"sequence", b"sequenc\xff")
    )
    for read in (inspect_file, lambda path: build_engine(path, tmp_path / "m.engine", profiles=PROFILE)):
        with pytest.raises(ExportError, match=r"got b'sequenc\\xff', allowed: UTF-8"):
            read(tmp_path / "m.onnx")


def test_inspect_reads_onnx(tmp_path: Path) -> None:
    path = save(linear_model(), tmp_path / "m.onnx")
    details = inspect_file(path)
    assert details["operators"] == {"MatMul": 1, "Add": 1, "Relu": 1}
    assert details["inputs"] == ["x(batch, sequence, 16) FLOAT"]
    assert details["weights"] == {"FLOAT": 16 * 8 + 8}
    assert (details["kind"], details["manifest"], details["bytes"]) == ("onnx", "none", path.stat().st_size)
    write_manifest(path, "onnx")
    assert inspect_file(path)["manifest"] == "agrees"
    with path.open("ab") as file:
        file.write(b"\x32\x00")  # an empty doc_string: still a valid model
    assert inspect_file(path)["manifest"] == "differs"


def test_inspect_tells_archives_apart_and_unpickles_nothing(tmp_path: Path) -> None:
    torch.jit.trace(torch.nn.Linear(4, 2), torch.ones(1, 4)).save(str(tmp_path / "m.pt"))
    torch.export.save(torch.export.export(torch.nn.Linear(4, 2), (torch.ones(1, 4),)), tmp_path / "m.pt2")
    assert inspect_file(tmp_path / "m.pt")["kind"] == "torchscript"
    assert inspect_file(tmp_path / "m.pt2")["kind"] == "exported program"
    marker = tmp_path / "ran"
    torch.save(Trap(str(marker)), tmp_path / "trap.pt")
    with pytest.raises(ExportError, match="got an archive of another kind"):
        inspect_file(tmp_path / "trap.pt")
    assert not marker.exists()
    torch.load(tmp_path / "trap.pt", weights_only=False)
    assert marker.exists()  # the trap works


class Trap:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (Path(self.path),)


def test_inspect_reads_an_engines_manifest_and_does_not_load_it(tmp_path: Path) -> None:
    (tmp_path / "m.engine").write_bytes(b"no engine at all")
    assert "no manifest" in inspect_file(tmp_path / "m.engine")["note"]
    tensor = {"name": "x", "dtype": "FLOAT", "dims": ["batch", 4]}
    write_manifest(tmp_path / "m.engine", "tensorrt_rtx", inputs=[tensor], outputs=[tensor])
    details = inspect_file(tmp_path / "m.engine")
    assert (details["kind"], details["inputs"]) == ("tensorrt_rtx", ["x(batch, 4) FLOAT"])
    manifest_path(tmp_path / "m.engine").write_text("{}")
    with pytest.raises(ExportError, match="is no manifest"):
        inspect_file(tmp_path / "m.engine")


NEARLY = {
    **{f"digit {i}": lambda digest, i=i: digest[:i] + format(int(digest[i], 16) ^ 1, "x") + digest[i + 1 :] for i in range(64)},
    **{f"prefix of {n}": lambda digest, n=n: digest[:n] for n in (0, 1, 8, 32, 63)},
    "longer": lambda digest: digest + "0",
    "twice": lambda digest: digest * 2,
    "padded": lambda digest: digest[:63] + " ",
}


@pytest.mark.parametrize("nearly", NEARLY)
def test_a_hash_that_is_nearly_right_is_refused(nearly: str, tmp_path: Path) -> None:
    """The caller's, the manifest's, and those of external data: each digit counts, and all 64."""
    save_with_external_data(tmp_path / "m.onnx", {"location": "w"})
    (tmp_path / "w").write_bytes(bytes(BYTES))
    path, data = tmp_path / "m.onnx", (tmp_path / "m.onnx").read_bytes()
    manifest = write_manifest(path, "onnx")
    wrong = NEARLY[nearly](manifest["sha256"])
    assert (
        check_hash("op", path, data, manifest["sha256"]) == check_hash("op", path, data, manifest["sha256"].upper()) == manifest
    )
    with pytest.raises(ExportError, match=r"^op: (sha256: got|.*: got SHA-256)"):
        check_hash("op", path, data, wrong)
    assert inspect_file(path)["manifest"] == "agrees"
    for changed in (
        {"sha256": wrong},
        {"external_data": {"w": NEARLY[nearly](manifest["external_data"]["w"])}},
    ):
        manifest_path(path).write_text(json.dumps(manifest | changed))
        assert inspect_file(path)["manifest"] == "differs"
    manifest_path(path).write_text(json.dumps(manifest | {"sha256": wrong}))
    with pytest.raises(ExportError, match="its manifest says"):
        check_hash("op", path, data, None)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no zip", b"\x00" * 64], ids=["empty", "zip", "zeros"])
def test_inspect_refuses_what_it_does_not_know(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m.bin").write_bytes(content)
    with pytest.raises(ExportError, match=r"inspect: .*m\.bin"):
        inspect_file(tmp_path / "m.bin")


def test_every_artefact_has_a_manifest_that_agrees(tmp_path: Path) -> None:
    from fused_ops.export import export_onnx, export_torchscript, quantize_onnx

    layer, x = torch.nn.Linear(64, 64), torch.ones(2, 64)
    export_onnx(layer, (x,), tmp_path / "m.onnx", external_data_bytes=0)
    export_torchscript(layer, (x,), tmp_path / "m.pt")
    quantize_onnx(tmp_path / "m.onnx", tmp_path / "q.onnx", [{"input": x}], progress=False)
    assert {name: inspect_file(tmp_path / name)["manifest"] for name in ("m.onnx", "m.pt", "q.onnx")} == {
        "m.onnx": "agrees", "m.pt": "agrees", "q.onnx": "agrees",
    }  # fmt: skip
    data = bytearray((tmp_path / "m.onnx.data").read_bytes())
    data[0] ^= 1
    (tmp_path / "m.onnx.data").write_bytes(data)
    assert inspect_file(tmp_path / "m.onnx")["manifest"] == "differs"
    manifest = manifest_path(tmp_path / "m.onnx")
    manifest.write_text(manifest.read_text().replace("m.onnx.data", "../../etc/passwd"))
    assert inspect_file(tmp_path / "m.onnx")["manifest"] == "differs"
