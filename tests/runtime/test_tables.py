"""What an entry of a table of configurations can be, drawn from its fields: what is taken can be launched, all else is refused."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import math
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fused_ops._runtime import plans, tables
from fused_ops._runtime.tables import Key, Machine
from fused_ops._runtime.tuned_kernels import KERNELS, source_hash
from fused_ops._tools import tune
from fused_ops.kernels.config import RowConfig, next_power_of_2
from tests.special_files import KINDS, not_waiting

OWNER = Machine("NVIDIA Test 80GB", "3.9.0", clusters=True)
BASES = [
    (Key("softmax_fwd", 4096, 1000, 2), RowConfig(1, 1024, 4)),
    (Key("layer_norm_bwd", 512, 256, 4), RowConfig(4, 256, 4)),
    (Key("softmax_bwd", 4096, 4096, 2), RowConfig(1, 4096, 8, "packed")),
    (Key("rms_norm_bwd", 64, 50257, 4), RowConfig(4, 2048, 16, "chunked", 2)),
    (Key("softmax_fwd", 64, 128256, 2), RowConfig(1, 131072, 16, "packed", num_ctas=8)),
]
NO_NUMBERS = [None, True, False, "1", "", [], {}, [1], 1.0, 1.5, math.nan, math.inf, -math.inf]
NUMBERS = sorted(
    {base + more for k in (*range(20), 30, 31, 32, 63) for base in (2**k, -(2**k)) for more in (-1, 0, 1)} | {10**30}
)
SIZES = ("M", "N", "itemsize")
NUMERIC = [field.name for field in dataclasses.fields(RowConfig) if field.name != "variant"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("FUSED_OPS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir(mode=0o700)
    yield tmp_path / "cache"
    tables.forget_tables()


def _entry(key: Key, config: RowConfig) -> dict[str, Any]:
    entry = {**dataclasses.asdict(key), "source": source_hash(key.kernel), "microseconds": 5.0}
    return entry | {"config": dataclasses.asdict(config)}


def _taken(*entries: Any) -> dict[Key, RowConfig] | None:
    """The table that load gives of these entries, None where it refuses them."""
    try:
        return tables.parse(json.dumps({**OWNER.table_keys, "entries": entries}), OWNER)
    except (ValueError, TypeError, KeyError):
        return None


def _changed(entry: dict[str, Any], field: str, value: Any) -> dict[str, Any]:
    entry = copy.deepcopy(entry)
    (entry["config"] if field in entry["config"] else entry)[field] = value
    return entry


def _can_launch(key: Key, config: RowConfig) -> bool:
    """What a kernel's block must be, said again and otherwise than in check_config: nothing of it is about one field."""
    if (
        config.variant == "shared"
    ):  # two bytes a column, in one row forward, two backward, or two of each of two in layer norm's
        columns = {"softmax_fwd": 131072, "softmax_bwd": 65536, "layer_norm_bwd": 16384}[key.kernel]
        only = (1, 2 * columns if columns < key.N else columns, 16, "shared", 1, 1)
        return key.itemsize == 2 and columns // 2 < key.N <= columns and dataclasses.astuple(config) == only
    columns, threads = config.block_n // config.num_ctas, 32 * config.num_warps
    held = config.block_m * columns * (2 if config.variant == "packed" else 4)  # bytes of values in registers
    pipelined = (config.num_stages - 1) * config.block_m * columns * key.itemsize
    return (
        key.itemsize in (2, 4)
        and math.log2(key.M).is_integer()
        and threads in (32, 64, 128, 256, 512, 1024)
        and config.num_ctas in (1, 2, 4, 8)
        and (config.num_ctas == 1 or (KERNELS[key.kernel].clustered and config.block_m == 1 and not config.chunked))
        and config.variant in KERNELS[key.kernel].variants
        and (config.block_n < key.N if config.chunked else key.N <= config.block_n < 2 * key.N)
        and (not config.chunked or config.block_m * columns >= threads)  # else two threads read and write one partial sum
        and held <= 4 * 65536
        and held <= 4 * 128 * threads
        and pipelined <= 48 * 1024
    )


@pytest.mark.parametrize(("key", "config"), BASES, ids=str)
@pytest.mark.parametrize("field", [*SIZES, *NUMERIC])
def test_only_numbers_that_can_be_launched_are_taken(key: Key, config: RowConfig, field: str) -> None:
    entry = _entry(key, config)
    assert _taken(entry) == {key: config}
    assert not [value for value in NO_NUMBERS if _taken(_changed(entry, field, value)) is not None]
    taken = {value for value in NUMBERS if _taken(_changed(entry, field, value)) is not None}
    for value in taken:
        changed = _changed(entry, field, value)
        assert _can_launch(Key(*(changed[name] for name in ("kernel", *SIZES))), RowConfig(**changed["config"])), value
    assert taken < set(NUMBERS)
    assert not [value for value in taken if value < 1]


def test_no_pair_of_numbers_is_taken_that_cannot_be_launched() -> None:
    """Blocks, warps and stages together: 65536 columns a warp is each of them in range."""
    values = [1, 2, 4, 8, 16, 32, 1024, 4096, 65536]
    seen = taken = 0
    for key, config in BASES:
        for key_n in (key, dataclasses.replace(key, N=65536)):
            for i, first in enumerate(NUMERIC):
                for second in NUMERIC[i + 1 :]:
                    for pair in ((a, b) for a in values for b in values):
                        changed = dataclasses.replace(config, **dict(zip((first, second), pair)))
                        seen += 1
                        with contextlib.suppress(ValueError):
                            tables.check_config(key_n, changed, clusters=True)
                            taken += 1
                            assert _can_launch(key_n, changed), (key_n, changed)
    assert 0 < taken < seen // 10


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_row_of_65536_columns_in_one_warp_is_refused_and_says_why(kernel: str) -> None:
    key = Key(kernel, 64, 65536, 2)
    with pytest.raises(ValueError, match="got 65536 registers of values a program, allowed: up to 4096 in 1 warps"):
        tables.check_config(key, RowConfig(1, 65536, 1))


@pytest.mark.parametrize("field", ["kernel", "source", "microseconds", "config", "variant"])
def test_the_other_fields_take_their_own_type_only(field: str) -> None:
    entry = _entry(*BASES[0])
    bad = [*NO_NUMBERS, *NUMBERS, "softmax", "0" * 63, "f" * 65, "F" * 64, "\0"]
    good = {"microseconds": [value for value in (*NO_NUMBERS, *NUMBERS) if type(value) in (int, float) and 0 < value < 1e9]}
    passed_over = {"kernel": [value for value in bad if type(value) is str]}  # it may be another version's
    for value in bad:
        found = _taken(_changed(entry, field, value))
        wanted = {BASES[0][0]: BASES[0][1]} if any(value is v for v in good.get(field, [])) else None
        assert found == ({} if any(value is v for v in passed_over.get(field, [])) else wanted), repr(value)


@pytest.mark.parametrize("where", ["entry", "config", "table"])
def test_a_missing_a_further_and_a_doubled_name_are_refused(where: str, folder: Path) -> None:
    table = {**OWNER.table_keys, "entries": [_entry(*BASES[0])]}
    objects = {"entry": table["entries"][0], "config": table["entries"][0]["config"], "table": table}
    text = json.dumps(table)
    assert tables.parse(text, OWNER)
    for name in [*objects[where]]:
        value = json.dumps(objects[where][name])
        doubled = text.replace(f'"{name}": {value}', f'"{name}": {value}, "{name}": {value}', 1)
        assert doubled != text
        with pytest.raises(ValueError, match=f"a name twice: .*{name}"):
            tables.parse(doubled, OWNER)
        kept = objects[where].pop(name)
        with pytest.raises(ValueError, match=r"entry|config|table"):
            tables.parse(json.dumps(table), OWNER)
        objects[where][name] = kept
    objects[where]["more"] = 1
    with pytest.raises(ValueError, match=r"entry|config|table"):
        tables.parse(json.dumps(table), OWNER)


def test_two_entries_of_one_key_are_refused() -> None:
    entry = _entry(*BASES[0])
    other = _changed(entry, "num_warps", 8)
    assert _taken(entry, entry) is _taken(entry, other) is None
    assert _taken(entry, _changed(other, "M", 2048)) is not None


def test_every_candidate_of_any_shape_is_taken() -> None:
    for kernel in KERNELS:
        for N in (1, 31, 32, 33, 1000, 4096, 8193, 50257, 65536, 128256, 2**19, 2**22):
            for itemsize in tables.ITEMSIZES:
                key = Key(kernel, 1024, N, itemsize)
                for config in tune.candidates(key, clusters=True):
                    assert _can_launch(key, config), (key, config)
                    assert config.chunked or config.block_n == next_power_of_2(N)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_regular_file_is_ignored_at_once_with_a_warning(kind: str, folder: Path) -> None:
    KINDS[kind](folder / OWNER.file_name)
    with not_waiting():
        with pytest.warns(UserWarning, match=r"is ignored: .*allowed: a regular file"):
            assert tables.load(OWNER) == {}
        assert tables.saved(OWNER) == {}


def test_a_table_that_is_too_large_is_ignored(folder: Path) -> None:
    with open(folder / OWNER.file_name, "wb") as file:
        file.truncate(tables.MAX_FILE + 1)
    with pytest.warns(UserWarning, match=f"is ignored: .*bytes, allowed: {tables.MAX_FILE}"):
        assert tables.load(OWNER) == {}


@pytest.mark.parametrize("missing", ["file", "folder", "a file for a folder"])
def test_no_table_is_no_warning(missing: str, folder: Path) -> None:
    if missing != "file":
        folder.rmdir()
    if missing == "a file for a folder":
        folder.touch()
        with pytest.raises(OSError, match="exists"):
            tables.own_folder()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tables.load(OWNER) == tables.saved(OWNER) == {}


@pytest.fixture
def launched_with(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A launcher's plan on device 0: what configuration a table has for the first key of BASES."""
    monkeypatch.setattr(tables, "machine", lambda _: OWNER)
    key = BASES[0][0]

    @plans.plan
    def planned(M: int) -> Any:
        return tables.measured(key.kernel, M, key.N, key.itemsize, 0)

    yield lambda: planned(key.M)
    plans._plans.pop()


@pytest.mark.parametrize("stopped", [False, True], ids=["to the end", "stopped in the middle"])
def test_what_tuning_saves_is_launched_from_then_on(stopped: bool, launched_with: Any) -> None:
    """In the same process: neither a table that was read before nor a plan made by it stays."""
    keys = [BASES[0][0], BASES[1][0]]
    assert launched_with() is None

    def measure(key: Key, config: RowConfig) -> float:
        if stopped and key == keys[1]:
            raise KeyboardInterrupt
        return 1.0 + config.num_warps

    try:
        tune.tune(keys, OWNER, measure)
    except KeyboardInterrupt:
        assert stopped
    assert launched_with() == tables.load(OWNER)[keys[0]]
    assert tables.measured(keys[0].kernel, keys[0].M, keys[0].N, keys[0].itemsize, 0) == launched_with()
    tables.save(OWNER, {keys[0]: (BASES[0][1], 0.5)})
    assert launched_with() == BASES[0][1]


def test_a_time_that_is_none_is_no_measurement(launched_with: Any) -> None:
    times = iter([math.nan, -1.0, 0.0, math.inf])
    tuned = tune.tune([BASES[0][0]], OWNER, lambda _, config: next(times, 8.0 - config.num_warps / 8))
    ((config, time),) = tuned.entries.values()
    assert 0 < time < 8
    assert launched_with() == config


def test_tuning_says_where_its_table_cannot_be_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from typer.testing import CliRunner

    from fused_ops.export.cli import app

    os.chmod(folder, 0o777)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    done = CliRunner().invoke(app, ["tune"])
    assert done.exit_code == 2
    assert "others may write it; FUSED_OPS_CACHE names another folder" in done.output
