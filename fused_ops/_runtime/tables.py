"""Tuned configurations of the row kernels, which replace the chosen ones: shipped for a GPU, or the user's own.

A table is a JSON file for one GPU and one Triton version. The shipped tables are fused_ops/configs/*.json. `fused-ops tune`
writes the user's, in a folder of the user cache that only the user can write. A table that is corrupt, of another GPU or Triton,
or no regular file is ignored; an entry that was measured on another source of its kernel is passed over. Nothing is ever tuned
inside a call.
"""

from __future__ import annotations

import functools
import json
import os
import re
import stat
import tempfile
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..kernels.config import CLUSTER_CTAS, SHARED_COLUMNS, RowConfig, next_power_of_2
from . import clusters as clusters_module
from .device import KERNEL_DTYPES
from .files import open_regular, read_open, read_regular
from .plans import forget_plans
from .settings import user_folder
from .tuned_kernels import KERNELS, source_hash

_PACKAGE = Path(__file__).parents[1]
MAX_FILE = 1 << 24  # bytes of a table
MAX_MICROSECONDS = 1e9
MAX_ELEMENTS = 1 << 42  # of the rows of one key: more than any GPU holds
MAX_COLUMNS = 65536  # of a block, of each program of a cluster
LIMITS = {
    "block_m": 4096, "block_n": MAX_COLUMNS * CLUSTER_CTAS, "num_warps": 32, "num_stages": 8, "num_ctas": CLUSTER_CTAS,
}  # fmt: skip
ANY_NUMBER = ("num_stages",)  # the others are powers of two
MAX_REGISTERS = 65536  # of 32 bits: of an SM, all of whose programs share them
MAX_VALUES = 128  # registers of values in a thread, which has 255: twice what tuning tries and what is chosen without a table
MAX_PREFETCHED = 48 * 1024  # bytes of one operand on their way; with the other, the shared memory of the smallest SM
ITEMSIZES = tuple(sorted({dtype.itemsize for dtype in KERNEL_DTYPES}))


@dataclass(frozen=True)
class Key:
    """What one configuration of a table is for: rows of N elements of itemsize bytes in kernel.

    M is a power of two; the entry serves every number of rows above M / 2 and up to M.
    """

    kernel: str
    M: int
    N: int
    itemsize: int


@dataclass(frozen=True)
class Machine:
    """What a table is for: a GPU's name and Triton's version.

    clusters: whether this GPU and Triton run clusters. It follows from the others and is not written to the table.
    """

    gpu: str
    triton: str
    clusters: bool = False

    @property
    def table_keys(self) -> dict[str, str]:
        """The fields that a table must repeat to be used on this machine."""
        return {"gpu": self.gpu, "triton": self.triton}

    @property
    def file_name(self) -> str:
        """The table's file name, different for every GPU and Triton version."""
        gpu = re.sub(r"[^a-z0-9]+", "_", self.gpu.lower()).strip("_")
        return f"{gpu}-triton_{self.triton}.json"


@functools.cache
def machine(device: int) -> Machine:
    """The Machine of a CUDA device."""
    import torch
    import triton

    clusters = clusters_module.can_cluster(device)
    return Machine(torch.cuda.get_device_name(device), triton.__version__, clusters)


def check_config(key: Key, config: RowConfig, clusters: bool = False) -> None:
    """Raise ValueError unless config can launch the kernel of key: ranges, powers of two, room for a row, registers for it.

    A program keeps its block in registers, in 32 bits a value or, where packed, a pair of values. A block beyond them would
    spill to memory, however long the compiler works on it. clusters: whether the GPU and Triton that config is for run clusters.
    """
    if key.itemsize not in ITEMSIZES:
        raise ValueError(f"itemsize: got {key.itemsize!r}, allowed: {', '.join(map(str, ITEMSIZES))}")
    for name, value in asdict(config).items():
        if name == "variant":
            if value not in KERNELS[key.kernel].variants:
                raise ValueError(f"variant: got {value!r} for {key.kernel}")
        elif type(value) is not int or not 1 <= value <= LIMITS[name] or (value & (value - 1) and name not in ANY_NUMBER):
            kind = "a number" if name in ANY_NUMBER else "a power of two"
            raise ValueError(f"{name}: got {value!r}, allowed: {kind} from 1 to {LIMITS[name]}")
    if config.variant == "packed" and (key.itemsize != 2 or config.block_m != 1):
        raise ValueError(f"variant: packed rows are of 16-bit floats, one a program; got {key} and {config}")
    whole, rows = next_power_of_2(key.N), KERNELS[key.kernel].chunk_rows
    if config.chunked and (config.block_n >= whole or config.block_m not in rows):
        raise ValueError(f"chunked: got {config.block_m} rows of {config.block_n}, allowed: {rows} of less than N = {key.N}")
    if not config.chunked and config.block_n != whole:
        raise ValueError(f"block_n: got {config.block_n}, allowed: {whole} for N = {key.N} unless chunked")
    if config.variant == "shared":
        _check_shared(key, config)
        return
    if config.num_ctas > 1:
        clusters_module.check_cluster(key.kernel, config, clusters)
    if config.block_n > MAX_COLUMNS * config.num_ctas:
        raise ValueError(f"block_n: got {config.block_n}, allowed: up to {MAX_COLUMNS} for each of num_ctas")
    tile = config.block_m * config.block_n // config.num_ctas
    threads = 32 * config.num_warps
    if (
        config.chunked and tile < threads
    ):  # two would hold an element of a partial sum, which one reads while the other writes it
        raise ValueError(f"chunked: got a tile of {tile} elements, allowed: at least one for each of {threads} threads")
    registers = tile // 2 if config.variant == "packed" else tile
    most = min(MAX_REGISTERS, MAX_VALUES * 32 * config.num_warps)
    if registers > most:
        raise ValueError(
            f"block_m * block_n: got {registers} registers of values a program, allowed: up to {most} in {config.num_warps} warps"
        )
    prefetched = (config.num_stages - 1) * tile * key.itemsize
    if prefetched > MAX_PREFETCHED:
        raise ValueError(f"num_stages: got {prefetched} bytes of blocks on their way, allowed: up to {MAX_PREFETCHED}")


def _check_shared(key: Key, config: RowConfig) -> None:
    """Raise ValueError unless the rows of key can wait in shared memory as config says."""
    least, most = SHARED_COLUMNS[key.kernel]
    if key.itemsize != 2 or not least < key.N <= most:
        raise ValueError(f"variant: shared rows are of {least + 1} to {most} 16-bit floats in {key.kernel}; got {key}")
    if config != (only := RowConfig(1, config.block_n, 16, "shared")):
        raise ValueError(f"variant: got {config}, allowed for shared rows: {only}")


def parse(text: str, owner: Machine) -> dict[Key, RowConfig]:
    """The configurations of a table, those measured on another source of their kernel left out.

    Raises ValueError on anything but a table of owner with exactly the known keys.
    """
    return {key: config for key, (config, _) in _entries(text, owner).items()}


def _entries(text: str, owner: Machine) -> dict[Key, tuple[RowConfig, float]]:
    """{key: (config, microseconds)} of a table, as `parse`."""
    table = json.loads(text, object_pairs_hook=_object, parse_constant=_constant)
    if type(table) is not dict or set(table) != {"gpu", "triton", "entries"} or type(table["entries"]) is not list:
        raise ValueError("not a table of configurations")
    if {name: table[name] for name in owner.table_keys} != owner.table_keys:
        raise ValueError("of another GPU or Triton version")
    found: dict[Key, tuple[RowConfig, float]] = {}
    for entry in table["entries"]:
        if type(entry) is not dict or set(entry) != {"kernel", "M", "N", "itemsize", "source", "microseconds", "config"}:
            raise ValueError(f"entry {entry!r}")
        key = Key(*(entry[name] for name in ("kernel", "M", "N", "itemsize")))
        sizes, time = (key.M, key.N, key.itemsize), entry["microseconds"]
        if not all(type(n) is int and 0 < n < 2**31 for n in sizes) or key.M & (key.M - 1) or key.M * key.N > MAX_ELEMENTS:
            raise ValueError(f"entry {entry!r}")
        if type(key.kernel) is not str or not re.fullmatch(r"[0-9a-f]{64}", entry["source"]):
            raise ValueError(f"entry {entry!r}")
        if type(time) not in (int, float) or not 0 < time < MAX_MICROSECONDS:
            raise ValueError(f"microseconds: got {time!r}, allowed: a number above 0, below {MAX_MICROSECONDS:g}")
        if type(entry["config"]) is not dict or set(entry["config"]) != set(RowConfig.__dataclass_fields__):
            raise ValueError(f"config {entry['config']!r}")
        if key.kernel not in KERNELS or entry["source"] != source_hash(key.kernel):
            continue
        if key in found:
            raise ValueError(f"entries: two of {key}, allowed: one")
        config = RowConfig(**entry["config"])
        check_config(key, config, owner.clusters)
        found[key] = config, float(time)
    return found


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object as a dict. Raises ValueError where a name is there twice."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError(f"an object has a name twice: {', '.join(sorted(name for name, _ in pairs))}")
    return found


def _constant(text: str) -> Any:
    raise ValueError(f"got {text}, allowed: numbers that JSON has")


def _require_own(info: os.stat_result) -> None:
    """Raise ValueError unless the user owns what info is of and nobody else can write it."""
    others = stat.S_IWGRP | stat.S_IWOTH
    if os.name == "posix" and (stat.S_ISLNK(info.st_mode) or info.st_uid != os.getuid() or info.st_mode & others):
        raise ValueError("not the user's own, or others may write it")


def load(owner: Machine) -> dict[Key, RowConfig]:
    """The configurations measured on owner: the shipped ones, overridden by the user's."""
    shipped = _load(_PACKAGE / "configs" / owner.file_name, owner, own=False)
    return shipped | _load(user_folder() / owner.file_name, owner, own=True)


def _load(path: Path, owner: Machine, own: bool) -> dict[Key, RowConfig]:
    try:
        text = _read_own(path) if own else read_regular(path, max_bytes=MAX_FILE)
        return parse(text.decode(), owner)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        warnings.warn(f"fused_ops: {path} is ignored: {error}", stacklevel=3)
        return {}


def _read_own(path: Path) -> bytes:
    """A table in the user's folder. Raises ValueError or OSError unless folder and file are the user's own, and no link."""
    _require_own(path.parent.lstat())
    with open_regular(path, max_bytes=MAX_FILE, links=False) as file:
        _require_own(os.fstat(file.fileno()))
        return read_open(file)


def own_folder() -> Path:
    """The folder of the user's tables, made where it is missing. Raises OSError or ValueError where only the user cannot write it."""
    folder = user_folder()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _require_own(folder.lstat())
    return folder


def save(owner: Machine, entries: dict[Key, tuple[RowConfig, float]]) -> Path:
    """Write the user's table, whole or not at all, in a folder that only the user can enter. Returns its path.

    From then on this process, too, launches with it.
    """
    folder = own_folder()
    rows = [
        {**asdict(k), "source": source_hash(k.kernel), "microseconds": time, "config": asdict(config)}
        for k, (config, time) in entries.items()
    ]
    path = folder / owner.file_name
    with tempfile.NamedTemporaryFile("w", dir=folder, suffix=".tmp", delete=False) as file:
        json.dump({**owner.table_keys, "entries": rows}, file, indent=1)
    os.replace(file.name, path)
    forget_tables()
    return path


def saved(owner: Machine) -> dict[Key, tuple[RowConfig, float]]:
    """The user's own table with microseconds: {key: (config, microseconds)}. Empty where there is none to be trusted."""
    try:
        return _entries(_read_own(user_folder() / owner.file_name).decode(), owner)
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return {}


_tables: dict[int, dict[Key, RowConfig]] = {}
_forced: dict[str, RowConfig] = {}


def force(kernel: str, config: RowConfig | None) -> None:
    """Make a kernel run with config wherever it can; None ends that. For tuning and tests."""
    _forced.pop(kernel, None)
    if config is not None:
        _forced[kernel] = config
    forget_plans()


def forget_tables() -> None:
    """Drop the tables read so far, and every launch planned by them: each is read again when a configuration is next asked for."""
    _tables.clear()
    forget_plans()


def measured(
    kernel: str, M: int, N: int, itemsize: int, device: int, packable: bool = False, shareable: bool = False
) -> RowConfig | None:
    """The tuned configuration for a launch, or None where there is none, or none that can run.

    packable, shareable: whether the rows can be held in pairs, or in shared memory.
    """
    config = _forced.get(kernel)
    if config is None:
        if device < 0:
            return None
        table = _tables.get(device)
        if table is None:
            table = _tables[device] = load(machine(device))
        if not table:
            return None
        config = table.get(Key(kernel, next_power_of_2(M), N, itemsize))
    if config is not None and config.num_ctas > 1 and device >= 0 and not clusters_module.can_cluster(device):
        return None  # it had been measured, and was refused since
    able = config is not None and {"packed": packable, "shared": shareable}.get(config.variant, True)
    return config if able else None
