"""Reading a run's results, from its folder or its archive, with every file and field checked."""

from __future__ import annotations

import gzip
import io
import tarfile
from pathlib import Path

from fused_ops._runtime.files import NotRegularError, open_regular, read_open

from .results_check import check
from .results_format import ARCHIVE, FILES, MAX_ARCHIVE, MAX_BYTES, FormatError, Results


def load(path: Path) -> Results:
    """The results in a folder or an archive, every file and field checked.

    Raises:
        FormatError: anything is not as results_format and results_check say. The message names file and field.
    """
    path = Path(path)
    if path.is_dir() and not (path / "machine.json").is_file() and (path / ARCHIVE).is_file():
        path = path / ARCHIVE
    files = _folder(path) if path.is_dir() else _archive(path)
    if "machine.json" not in files:
        raise FormatError(f"{path}: machine.json is missing")
    if not {"results.csv", "correctness.csv"} & set(files):
        raise FormatError(f"{path}: neither results.csv nor correctness.csv is there")
    return check(str(path), files)


def _folder(path: Path) -> dict[str, bytes]:
    files = {}
    for name in FILES:
        file = path / name
        try:
            with open_regular(file, links=False, max_bytes=None if name == "log.txt" else MAX_BYTES) as stream:
                files[name] = b"" if name == "log.txt" else read_open(stream)
        except FileNotFoundError:
            continue
        except NotRegularError as error:
            raise FormatError(f"{file}: no regular file: it is {error.strerror}") from None
        except OSError as error:
            raise FormatError(f"{file}: {error.strerror}") from None
    return files


def _archive(path: Path) -> dict[str, bytes]:
    """The members of a packed run, by name. Nothing is written anywhere, whatever the members are called."""
    try:
        with open_regular(path) as packed, gzip.open(packed) as stream:
            content = stream.read(MAX_ARCHIVE + 1)
    except FileNotFoundError:
        raise FormatError(f"{path}: no such file or folder") from None
    except NotRegularError as error:
        raise FormatError(f"{path}: no regular file: it is {error.strerror}") from None
    except (OSError, EOFError, ValueError) as error:
        raise FormatError(f"{path}: no whole gzip file: {error}") from None
    if len(content) > MAX_ARCHIVE:
        raise FormatError(f"{path}: more than {MAX_ARCHIVE} bytes unpacked")
    files: dict[str, bytes] = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as archive:
            for member in archive:
                if member.name not in FILES:
                    raise FormatError(f"{path}: member {member.name!r}, allowed: {', '.join(FILES)}")
                if not member.isreg() or member.issparse():
                    raise FormatError(f"{path}: member {member.name}: no regular file")
                if member.name in files:
                    raise FormatError(f"{path}: member {member.name} is there twice")
                if member.size > MAX_BYTES:
                    raise FormatError(f"{path}: member {member.name}: {member.size} bytes, allowed: {MAX_BYTES}")
                reader = archive.extractfile(member)
                files[member.name] = reader.read() if reader is not None else b""
    except tarfile.TarError as error:
        raise FormatError(f"{path}: no tar archive: {error}") from None
    return files
