"""The peers' wheels: a pinned list, parts that fit a transfer, and an installation that one bad wheel does not stop."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from bench import wheels

ROOT = Path(__file__).resolve().parents[2]
PYTHON = f"cp{sys.version_info.major}{sys.version_info.minor}"
LINUX = "manylinux_2_28_x86_64"


def a_wheel(folder: Path, name: str = "peer-1.0-py3-none-any.whl", **files: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / name, "w") as wheel:
        for path, text in (files or {"peer.py": "answer = 42"}).items():
            wheel.writestr(path, text)
    return folder / name


def test_the_list_is_pinned_and_shadows_nothing() -> None:
    found = wheels.read_list(wheels.LIST.read_text())
    assert {"liger-kernel", "flag-gems", "helion", "quack-kernels", "tensorrt-rtx-cu13"} <= {w.name for w in found}
    assert len({w.name for w in found}) == len(found), "one version of each"
    for wheel in found:
        assert wheel.version[0].isdigit()
        assert wheel.reason
        assert wheels.canonical(wheel.name) not in wheels.REFUSED
        assert wheel.in_pieces <= (len(wheel.parts) > 1)


@pytest.mark.parametrize(
    "line",
    ["1 wheel liger-kernel # why", "1 wheel liger-kernel>=0.8 # why", "wheel a==1 # why", "1 wheel a==1", "1 zip a==1 # why",
     "1+2,3 wheel a==1 # why", "1 wheel torch==2.11.0 # why", "1 wheel NumPy==2.0 # why"],
)  # fmt: skip
def test_a_line_that_is_not_pinned_or_not_allowed_is_refused(line: str) -> None:
    with pytest.raises(ValueError, match="line 1"):
        wheels.read_list(line)


def test_parts() -> None:
    whole, halves = wheels.read_list("1,2 wheel a-b==1.0 # why\n# comment\n\n1+2 xz c==2.0 # why\n")
    assert (whole.parts, whole.in_pieces, whole.pin, whole.stem) == ((1, 2), False, "a-b==1.0", "a_b-1.0-")
    assert (halves.parts, halves.in_pieces) == ((1, 2), True)


def test_gathering_goes_on_after_a_failure_and_keeps_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fetched = []

    def fetch(wheel: wheels.Wheel, into: Path) -> Path:
        fetched.append(wheel.name)
        if wheel.name == "bad":
            raise subprocess.CalledProcessError(1, "pip", stderr="looking\nERROR: no such version\n")
        return a_wheel(into, f"{wheel.stem}py3-none-any.whl", **{"a.txt": "x" * 100})

    monkeypatch.setattr(wheels, "fetch", fetch)
    chosen = wheels.read_list("1 wheel bad==1 # why\n1,2 wheel both==1 # why\n1+2 xz halves==1 # why\n")
    assert wheels.gather(tmp_path, (), chosen) == 1
    said = capsys.readouterr().out
    assert "bad==1: FAILED: ERROR: no such version" in said
    assert "part 2:" in said
    assert sorted(f.name for f in (tmp_path / "1").iterdir()) == [
        "both-1-py3-none-any.whl", "halves-1-py3-none-any.whl.tar.1of2",
    ]  # fmt: skip
    fetched.clear()
    assert wheels.gather(tmp_path, (2,), chosen[1:]) == 0
    assert fetched == []


def test_a_part_that_does_not_fit_a_transfer_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    a_wheel(tmp_path / "1", **{"a.py": "x" * 1000})
    monkeypatch.setattr(wheels, "repository_bytes", lambda: 0)
    assert wheels.check_sizes(tmp_path, (1,)) == 0
    monkeypatch.setattr(wheels, "TRANSFER", 500)
    assert wheels.check_sizes(tmp_path, (1,)) == 1
    assert "TOO LARGE" in capsys.readouterr().out


def test_the_repository_leaves_room() -> None:
    assert 0 <= wheels.repository_bytes() < 10 << 20  # the largest part that is carried leaves 11.9 MB


def test_a_repacked_wheel_unpacks_to_the_same_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wheels, "LARGE", 1000)
    monkeypatch.setattr(wheels, "XZ", [{"id": wheels.lzma.FILTER_X86}, {"id": wheels.lzma.FILTER_LZMA2, "preset": 0}])
    big = "".join(chr(32 + i * i % 90) for i in range(5000))
    wheel = a_wheel(tmp_path, **{"pkg/big.so": big, "pkg/__init__.py": "", "pkg-1.dist-info/METADATA": "Name: pkg"})
    packed = wheels.repack(wheel, tmp_path)
    with tarfile.open(packed) as tar:
        assert tar.getnames()[0] == "pkg/big.so.xz"
    target = tmp_path / "site"
    assert wheels.unpack(packed, target) == ("installed", "installed")
    assert (target / "pkg/big.so").read_text() == big
    assert (target / "pkg-1.dist-info/METADATA").read_text() == "Name: pkg"


def test_one_bad_wheel_does_not_stop_the_rest(tmp_path: Path) -> None:
    """By the command that a GPU run uses: a line for each, the last one for all, a status, and nothing shadowed."""
    folder = tmp_path / "wheels"
    a_wheel(folder / "1")
    a_wheel(
        folder / "2", f"other-1.0-{PYTHON}-{PYTHON}-{LINUX}.whl", **{"shared/other.py": "", "other-1.0.data/purelib/o.py": ""}
    )
    a_wheel(folder / "2", "third-1.0-py3-none-any.whl", **{"shared/third.py": "", "third-1.0.data/scripts/run": ""})
    a_wheel(folder / "2", "triton-9.9-py3-none-any.whl", **{"triton/__init__.py": ""})
    a_wheel(folder / "2", f"old-1.0-cp27-cp27-{LINUX}.whl", **{"old.py": ""})
    a_wheel(folder / "2", "outside-1.0-py3-none-any.whl", **{"../outside.py": ""})
    (folder / "2" / "broken-1.0-py3-none-any.whl").write_bytes(b"no zip")
    target = tmp_path / "site"
    done = subprocess.run(
        ["bash", str(ROOT / "bench/wheels_install.sh"), str(folder), str(target)],
        capture_output=True, text=True, check=False, env={"PATH": "/usr/bin:/bin", "PYTHON": sys.executable},
    )  # fmt: skip
    lines = done.stdout.splitlines()
    assert done.returncode == 1
    assert lines[-1] == "wheels: 3 installed, 4 not, 0 waiting for a piece"
    assert "broken-1.0-py3-none-any.whl: FAILED: BadZipFile: File is not a zip file" in lines
    assert "triton-9.9-py3-none-any.whl: not installed: triton would shadow the machine's own" in lines
    assert f"old-1.0-cp27-cp27-{LINUX}.whl: not installed: it is for cp27, this is {PYTHON}" in lines
    site = target / "site-packages"
    assert (site / "shared/other.py").exists()
    assert (site / "shared/third.py").exists(), "two wheels share a folder"
    assert (site / "o.py").exists()
    assert not (site / "triton").exists()
    assert not (tmp_path / "outside.py").exists()
    assert not (target / "outside.py").exists()


def python(code: str, path: Path) -> str:
    """What code prints in a process whose PYTHONPATH is path."""
    environment = {"PYTHONPATH": str(path), "PATH": "/usr/bin:/bin"}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment).stdout


def test_the_target_on_the_path_is_a_site_directory_read_last(tmp_path: Path) -> None:
    """.pth files count; what the machine has wins; a sitecustomize of the machine still runs."""
    a_wheel(tmp_path / "wheels", **{
        "peer.py": "answer = 42", "peer.pth": "below\n", "below/deep.py": "answer = 43", "pytest/__init__.py": "", "pytest.py": "",
    })  # fmt: skip
    target = tmp_path / "target"
    assert wheels.install(tmp_path / "wheels", target, tmp_path / "store") == 0
    assert python("import peer, deep; print(peer.answer, deep.answer)", target) == "42 43\n"
    assert str(target) not in python("import pytest; print(pytest.__file__)", target)
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "sitecustomize.py").write_text("print('own')")
    assert python("import peer", Path(f"{target}:{tmp_path / 'own'}")) == "own\n"
    assert "/site-packages/" in python("import peer; print(peer.__file__)", target)


def test_pieces_are_joined_when_the_last_one_comes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two calls with a target each: what came first is kept between them."""
    store = tmp_path / "store"
    wheel = a_wheel(tmp_path, **{"peer.py": "answer = 42"})
    for number, piece in enumerate(wheels.split(wheel, 3), 1):
        home = tmp_path / "wheels" / str(number)
        home.mkdir(parents=True)
        (home / f"{wheel.name}.{number}of3").write_bytes(piece)
    for number in (1, 2):
        assert wheels.install(tmp_path / "wheels" / str(number), tmp_path / f"site{number}", store) == 0
        assert capsys.readouterr().out.endswith("wheels: 0 installed, 0 not, 1 waiting for a piece\n")
    assert wheels.install(tmp_path / "wheels" / "3", tmp_path / "site3", store) == 0
    assert capsys.readouterr().out.endswith("wheels: 1 installed, 0 not, 0 waiting for a piece\n")
    assert (tmp_path / "site3/site-packages/peer.py").read_text() == "answer = 42"
    assert wheels.install(tmp_path / "wheels", tmp_path / "site4", tmp_path / "other") == 0
    assert (tmp_path / "site4/site-packages/peer.py").exists(), "all pieces in one call"


def test_helions_pretuned_kernels_travel(tmp_path: Path) -> None:
    for op in ("softmax", "layer_norm", "other"):
        (tmp_path / "checkout" / op).mkdir(parents=True)
        (tmp_path / "checkout" / op / f"{op}.py").write_text(op)
    assert wheels.pack_pretuned(tmp_path / "checkout", tmp_path / "1") == "2 files"
    assert wheels.install(tmp_path / "1", tmp_path / "site", tmp_path / "store") == 0
    assert (tmp_path / "site/site-packages/pretuned_kernels/softmax/softmax.py").read_text() == "softmax"
    assert not (tmp_path / "site/site-packages/pretuned_kernels/other").exists()
    assert wheels.pack_pretuned(tmp_path / "nowhere", tmp_path / "1").startswith("none in")


def test_wrong_arguments_say_the_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert wheels.main(["gather", "x", "first"]) == 2
    assert wheels.main(["install", "x"]) == 2
    assert "usage" in capsys.readouterr().err
