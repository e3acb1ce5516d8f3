"""Measured configurations of the row kernels, over the chosen ones: shipped for a GPU, and a user's own from `fused-ops tune`.

A table is a JSON file keyed on the GPU, Triton's version and a hash of the kernels' source. The shipped tables are
fused_ops/configs/*.json, the user's is in a folder of the user cache that only the user can write. A table that is corrupt,
foreign, or of another GPU, Triton or source is ignored; nothing is ever tuned inside a call.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import stat
import tempfile
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from . import _cluster
from .kernels.config import CLUSTER_CTAS, RowConfig, next_power_of_2

KERNELS = ("softmax_fwd", "softmax_bwd", "layer_norm_fwd", "layer_norm_bwd")
SOURCES = (
    "config", "layer_norm", "layer_norm_bwd", "layer_norm_cluster", "reduce", "rows", "softmax", "softmax_cluster", "softmax_packed",
)  # fmt: skip
VARIANTS = {"one_pass": KERNELS, "chunked": KERNELS, "packed": ("softmax_fwd", "softmax_bwd")}
MAX_COLUMNS = 65536  # of a block, of each program of a cluster
LIMITS = {
    "block_m": 4096, "block_n": MAX_COLUMNS * CLUSTER_CTAS, "num_warps": 32, "num_stages": 8, "num_ctas": CLUSTER_CTAS,
}  # fmt: skip
MAX_TILE = 1 << 20  # elements of one Triton tensor


@dataclass(frozen=True)
class Key:
    """What a configuration is for. M stands for every M up to it and above half of it."""

    kernel: str
    M: int
    N: int
    itemsize: int


@dataclass(frozen=True)
class Machine:
    """What a table is for: the GPU's name, Triton's version, and the hash of the kernels' source.

    clusters: whether this GPU and Triton run clusters. It follows from the others and is not in the table.
    """

    gpu: str
    triton: str
    source: str
    clusters: bool = False

    @property
    def table_keys(self) -> dict[str, str]:
        """What the table says of itself."""
        return {"gpu": self.gpu, "triton": self.triton, "source": self.source}

    @property
    def file_name(self) -> str:
        """A file name of its own."""
        gpu = re.sub(r"[^a-z0-9]+", "_", self.gpu.lower()).strip("_")
        return f"{gpu}-triton_{self.triton}-{self.source[:12]}.json"


@functools.cache
def source_hash() -> str:
    """The hash of every kernel a configuration is for: after a change to one, its measurements say nothing."""
    folder = Path(__file__).parent / "kernels"
    return hashlib.sha256(b"\0".join((folder / f"{name}.py").read_bytes() for name in SOURCES)).hexdigest()


@functools.cache
def machine(device: int) -> Machine:
    """The Machine of a CUDA device."""
    import torch
    import triton

    clusters = _cluster.can_cluster(device)
    return Machine(torch.cuda.get_device_name(device), triton.__version__, source_hash(), clusters)


def check_config(key: Key, config: RowConfig, clusters: bool = False) -> None:
    """Raise ValueError unless config can launch the kernel of key: ranges, powers of two, and room for a row.

    clusters: whether the GPU and Triton that config is for run clusters.
    """
    for name, value in asdict(config).items():
        if name == "variant":
            if value not in VARIANTS or key.kernel not in VARIANTS[value]:
                raise ValueError(f"variant: got {value!r} for {key.kernel}")
        elif type(value) is not int or not 1 <= value <= LIMITS[name] or value & (value - 1):
            raise ValueError(f"{name}: got {value!r}, allowed: a power of two up to {LIMITS[name]}")
    if config.variant == "packed" and (key.itemsize != 2 or config.block_m != 1):
        raise ValueError(f"variant: packed rows are of 16-bit floats, one a program; got {key} and {config}")
    if config.variant != "chunked" and config.block_n < key.N:
        raise ValueError(f"block_n: got {config.block_n}, allowed: at least N = {key.N} unless chunked")
    if config.num_ctas > 1:
        _cluster.check_cluster(key.kernel, config, clusters)
    if config.block_n > MAX_COLUMNS * config.num_ctas:
        raise ValueError(f"block_n: got {config.block_n}, allowed: up to {MAX_COLUMNS} for each of num_ctas")
    if config.block_m * config.block_n > MAX_TILE:
        raise ValueError(f"block_m * block_n: got {config.block_m * config.block_n}, allowed: up to {MAX_TILE}")


def parse(text: str, owner: Machine) -> dict[Key, RowConfig]:
    """The configurations of a table. Raises ValueError on anything but a table of owner with exactly the known keys."""
    table = json.loads(text)
    if type(table) is not dict or set(table) != {"gpu", "triton", "source", "entries"} or type(table["entries"]) is not list:
        raise ValueError("not a table of configurations")
    if {name: table[name] for name in owner.table_keys} != owner.table_keys:
        raise ValueError("of another GPU, Triton version or kernel source")
    configs: dict[Key, RowConfig] = {}
    for entry in table["entries"]:
        if type(entry) is not dict or set(entry) != {"kernel", "M", "N", "itemsize", "microseconds", "config"}:
            raise ValueError(f"entry {entry!r}")
        key = Key(*(entry[name] for name in ("kernel", "M", "N", "itemsize")))
        sizes = (key.M, key.N, key.itemsize)
        if key.kernel not in KERNELS or not all(type(n) is int and 0 < n < 2**31 for n in sizes) or key.M & (key.M - 1):
            raise ValueError(f"entry {entry!r}")
        if type(entry["config"]) is not dict or set(entry["config"]) != set(RowConfig.__dataclass_fields__):
            raise ValueError(f"config {entry['config']!r}")
        config = RowConfig(**entry["config"])
        check_config(key, config, owner.clusters)
        configs[key] = config
    return configs


def user_folder() -> Path:
    """Where the user's tables are: $FUSED_OPS_CACHE, else fused_ops in $XDG_CACHE_HOME or ~/.cache."""
    if folder := os.environ.get("FUSED_OPS_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fused_ops"


def _require_own(path: Path) -> None:
    """Raise ValueError unless the user owns path and nobody else can write it."""
    if os.name == "posix":
        info = path.lstat()
        if stat.S_ISLNK(info.st_mode) or info.st_uid != os.getuid() or info.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise ValueError("not the user's own, or others may write it")


def load(owner: Machine) -> dict[Key, RowConfig]:
    """The configurations measured on owner: the shipped ones, and the user's over them."""
    shipped = _load(Path(__file__).parent / "configs" / owner.file_name, owner, own=False)
    return shipped | _load(user_folder() / owner.file_name, owner, own=True)


def _load(path: Path, owner: Machine, own: bool) -> dict[Key, RowConfig]:
    if not path.exists():
        return {}
    try:
        if own:
            _require_own(path.parent)
            _require_own(path)
        return parse(path.read_text(), owner)
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        warnings.warn(f"fused_ops: {path} is ignored: {error}", stacklevel=3)
        return {}


def save(owner: Machine, entries: dict[Key, tuple[RowConfig, float]]) -> Path:
    """Write the user's table, whole or not at all, in a folder that only the user can enter. Returns its path."""
    folder = user_folder()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _require_own(folder)
    rows = [{**asdict(k), "microseconds": time, "config": asdict(config)} for k, (config, time) in entries.items()]
    path = folder / owner.file_name
    with tempfile.NamedTemporaryFile("w", dir=folder, suffix=".tmp", delete=False) as file:
        json.dump({**owner.table_keys, "entries": rows}, file, indent=1)
    os.replace(file.name, path)
    return path


_tables: dict[int, dict[Key, RowConfig]] = {}
_forced: dict[str, RowConfig] = {}


def force(kernel: str, config: RowConfig | None) -> None:
    """Let a kernel run with config wherever it can, or, with None, as it would again. For tuning and tests."""
    from ._launch import forget_plans

    _forced.pop(kernel, None)
    if config is not None:
        _forced[kernel] = config
    forget_plans()


def measured(kernel: str, M: int, N: int, itemsize: int, device: int, packable: bool = False) -> RowConfig | None:
    """The measured configuration of a kernel, or None where none was measured or it cannot run."""
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
    if config is not None and config.num_ctas > 1:
        from ._cluster import can_cluster

        if device >= 0 and not can_cluster(device):  # it had been measured, and was refused since
            return None
    return None if config is None or (config.variant == "packed" and not packable) else config


def candidates(key: Key, clusters: bool = False) -> list[RowConfig]:
    """The configurations that tuning tries for key. clusters: whether the GPU and Triton run clusters."""
    block_n = next_power_of_2(key.N)
    values = 2 if key.kernel.endswith("bwd") else 1  # rows of values that a program holds
    found = []
    for warps in (1, 2, 4, 8, 16, 32):
        for block_m in (1, 2, 4, 8, 16, 32):
            per_thread = values * block_m * block_n // (32 * warps)
            if block_n <= 65536 and 4 <= per_thread <= 64:
                found.append(RowConfig(block_m, block_n, warps))
        if key.itemsize == 2 and key.N >= 2048 and 8 <= values * block_n // (32 * warps) <= 128:
            found.append(RowConfig(1, block_n, warps, "packed"))
        if key.N > 8192 and warps >= 4:
            rows = (1, 2, 4, 8) if key.kernel == "layer_norm_bwd" else (1,)
            found += [
                RowConfig(m, n, warps, "chunked") for m in rows for n in (2048, 4096, 8192) if m * n // (32 * warps) <= 64
            ]
        if clusters:
            found += _cluster.cluster_candidates(block_n, warps, values)
    return [config for config in found if _fits(key, config, clusters)]


def _fits(key: Key, config: RowConfig, clusters: bool) -> bool:
    try:
        check_config(key, config, clusters)
    except ValueError:
        return False
    return True


def tune(
    keys: Iterable[Key], owner: Machine, measure: Callable[[Key, RowConfig], float], again: bool = False,
    done: Callable[[], None] = lambda: None,
) -> dict[Key, tuple[RowConfig, float]]:  # fmt: skip
    """Measure the candidates of each key and save the fastest after each, so that a run that was stopped goes on.

    measure(key, config) gives microseconds, or raises where the configuration does not compile or is wrong. Keys in
    the user's table already are passed over, unless again. Returns the table's entries.
    """
    entries = _saved(owner)
    for key in keys:
        if again or key not in entries:
            best: tuple[RowConfig, float] | None = None
            for config in candidates(key, owner.clusters):
                try:
                    time = measure(key, config)
                except Exception:  # the compiler's failures have many types; a configuration that fails is no candidate
                    continue
                if best is None or time < best[1]:
                    best = config, time
            if best is not None:
                entries[key] = best
                save(owner, entries)
        done()
    _tables.clear()
    return entries


def _saved(owner: Machine) -> dict[Key, tuple[RowConfig, float]]:
    path = user_folder() / owner.file_name
    if not path.exists():
        return {}
    try:
        _require_own(path)
        text = path.read_text()
        configs = parse(text, owner)
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return {}
    times = [float(entry["microseconds"]) for entry in json.loads(text)["entries"]]
    return {key: (config, time) for (key, config), time in zip(configs.items(), times)}
