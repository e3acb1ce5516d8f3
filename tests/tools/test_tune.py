"""Tables of measured configurations: what is believed, what is ignored, and how tuning fills them. No GPU in it."""

from __future__ import annotations

import ast
import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import fused_ops
from fused_ops._runtime import tables, tuned_kernels
from fused_ops._runtime.tables import Key, Machine
from fused_ops._runtime.tuned_kernels import source_hash
from fused_ops._tools import tune, tune_measure
from fused_ops.kernels.config import RowConfig
from fused_ops.testing import KERNELS
from tests import process

OWNER = Machine("NVIDIA Test 80GB", "3.9.0")
CLUSTERS = dataclasses.replace(OWNER, clusters=True)
KEY = Key("softmax_fwd", 4096, 1000, 2)
CONFIG = RowConfig(1, 1024, 4)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("FUSED_OPS_CACHE", str(tmp_path / "cache"))
    yield tmp_path / "cache"
    tables._tables.clear()


def _table(**changes: Any) -> dict[str, Any]:
    entry = {
        **dataclasses.asdict(KEY),
        "source": source_hash(KEY.kernel),
        "microseconds": 5.0,
        "config": dataclasses.asdict(CONFIG),
    }
    return {**OWNER.table_keys, "entries": [entry], **changes}


def test_a_saved_table_is_loaded(folder: Path) -> None:
    path = tables.save(OWNER, {KEY: (CONFIG, 5.0)})
    assert tables.load(OWNER) == {KEY: CONFIG}
    assert path.parent == folder
    assert os.stat(folder).st_mode & 0o777 == 0o700
    assert sorted(os.listdir(folder)) == [OWNER.file_name]


def _entry(**changes: Any) -> dict[str, Any]:
    return _table(entries=[{**_table()["entries"][0], **changes}])


def _config(**changes: Any) -> dict[str, Any]:
    return _entry(config={**dataclasses.asdict(CONFIG), **changes})


@pytest.mark.parametrize(
    "table",
    [
        [], {}, "x", None, _table(extra=1), _table(entries={}), _table(gpu="another"), _table(triton="3.6.0"), _table(source="1" * 64),
        _entry(kernel=1), _entry(source="1"), _entry(source=1), _entry(microseconds="fast"), _entry(M=4095), _entry(N=-1), _entry(N=True), _entry(itemsize="2"), _entry(config=[]), _entry(more=1),
        _config(block_n=512), _config(block_n=1000), _config(num_warps=3), _config(num_warps=64), _config(num_warps=True),
        _config(num_stages=0), _config(variant="fast"), _config(block_m=0), _config(block_m=8192), _config(num_ctas=2), _config(extra=1),
        _entry(kernel="layer_norm_fwd", source=source_hash("layer_norm_fwd"), config=dataclasses.asdict(RowConfig(1, 1024, 4, "packed"))),
        _entry(itemsize=4, config=dataclasses.asdict(RowConfig(1, 1024, 4, "packed"))),
        _entry(N=65536, config=dataclasses.asdict(RowConfig(64, 65536, 4))),
    ],
    ids=str,
)  # fmt: skip
def test_a_corrupt_or_foreign_table_is_ignored_with_a_warning(folder: Path, table: Any) -> None:
    folder.mkdir(mode=0o700)
    (folder / OWNER.file_name).write_text(json.dumps(table))
    with pytest.warns(UserWarning, match="is ignored"):
        assert tables.load(OWNER) == {}


@pytest.mark.parametrize("text", ["", "{", "\x00", "[" * 100000, '{"gpu": 1e999}'], ids=range(5))
def test_what_is_no_json_is_ignored_with_a_warning(folder: Path, text: str) -> None:
    folder.mkdir(mode=0o700)
    (folder / OWNER.file_name).write_text(text)
    with pytest.warns(UserWarning, match="is ignored"):
        assert tables.load(OWNER) == {}


def test_a_table_that_others_can_write_is_ignored(folder: Path) -> None:
    path = tables.save(OWNER, {KEY: (CONFIG, 5.0)})
    for target, mode in ((folder, 0o777), (path, 0o666)):
        before = target.stat().st_mode
        target.chmod(mode)
        with pytest.warns(UserWarning, match="others may write"):
            assert tables.load(OWNER) == {}
        target.chmod(before)
    elsewhere = folder / "elsewhere.json"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)
    with pytest.warns(UserWarning, match="is ignored"):
        assert tables.load(OWNER) == {}


def test_tuning_keeps_the_fastest_and_goes_on_where_it_stopped(folder: Path) -> None:
    keys = [KEY, Key("layer_norm_bwd", 64, 512, 4)]
    tried: list[tuple[Key, RowConfig]] = []

    def measure(key: Key, config: RowConfig) -> float:
        tried.append((key, config))
        if config.num_warps == 1:
            raise RuntimeError("out of resources")
        if key == keys[1]:
            raise KeyboardInterrupt
        return 100.0 / config.num_warps + config.block_m

    with pytest.raises(KeyboardInterrupt):
        tune.tune(keys, OWNER, measure)
    best = min((c for k, c in tried if k == KEY and c.num_warps > 1), key=lambda c: 100.0 / c.num_warps + c.block_m)
    assert tables.load(OWNER) == {KEY: best}
    tried.clear()
    entries = tune.tune(keys, OWNER, lambda k, c: tried.append((k, c)) or float(c.num_warps)).entries
    assert {k for k, _ in tried} == {keys[1]}
    assert set(entries) == set(tables.load(OWNER)) == set(keys)


def test_a_measured_configuration_replaces_the_chosen_one(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = Key("softmax_fwd", 4096, 4096, 2)
    tables.save(OWNER, {KEY: (CONFIG, 5.0), packed: (RowConfig(1, 4096, 4, "packed"), 1.0)})
    monkeypatch.setattr(tables, "machine", lambda _: OWNER)
    assert tables.measured("softmax_fwd", 4000, 1000, 2, 0) == CONFIG
    assert tables.measured("softmax_fwd", 4097, 1000, 2, 0) is None
    assert tables.measured("softmax_fwd", 4000, 1000, 4, 0) is None
    assert tables.measured("softmax_fwd", 4000, 1000, 2, -1) is None, "the interpreter takes what is chosen"
    assert tables.measured("softmax_fwd", 4096, 4096, 2, 0, packable=False) is None
    assert tables.measured("softmax_fwd", 4096, 4096, 2, 0, packable=True) == RowConfig(1, 4096, 4, "packed")


def test_a_cluster_is_believed_only_where_it_can_run(folder: Path) -> None:
    long = Key("softmax_fwd", 64, 128256, 2)
    cluster = RowConfig(1, 131072, 16, "packed", num_ctas=8)
    path = tables.save(CLUSTERS, {long: (cluster, 5.0)})
    assert tables.load(CLUSTERS) == {long: cluster}
    assert set(json.loads(path.read_text())) == {"gpu", "triton", "entries"}
    with pytest.warns(UserWarning, match=r"num_ctas: got 8, allowed: 1.*compute capability 9 or 10.*Triton 3\.8"):
        assert tables.load(OWNER) == {}


@pytest.mark.parametrize(
    ("key", "config"),
    [
        (KEY, RowConfig(1, 1024, 4, num_ctas=16)),
        (KEY, RowConfig(1, 1024, 4, num_ctas=3)),
        (KEY, RowConfig(2, 1024, 4, num_ctas=2)),
        (KEY, RowConfig(1, 1024, 4, "chunked", num_ctas=2)),
        (Key("layer_norm_bwd", 64, 1000, 2), RowConfig(1, 1024, 4, num_ctas=2)),
        (KEY, RowConfig(1, 131072, 4)),
        (KEY, RowConfig(1, 262144, 4, num_ctas=2)),
    ],
)
def test_a_cluster_that_cannot_launch_is_refused(key: Key, config: RowConfig) -> None:
    with pytest.raises(ValueError, match="got"):
        tables.check_config(key, config, clusters=True)


def test_tuning_tries_clusters_where_they_are() -> None:
    long = Key("softmax_fwd", 4096, 128256, 2)
    assert all(config.num_ctas == 1 for config in tune.candidates(long))
    found = [config for config in tune.candidates(long, clusters=True) if config.num_ctas > 1]
    assert {config.num_ctas for config in found} == {2, 4, 8}
    assert {config.variant for config in found} == {"packed", "one_pass"}
    assert all(config.num_ctas == 1 for config in tune.candidates(KEY, clusters=True)), "a short row needs none"
    tried: list[RowConfig] = []
    tune.tune([long], CLUSTERS, lambda _, config: tried.append(config) or 1.0)
    assert set(found) <= set(tried)


def test_every_candidate_is_valid_and_there_are_some() -> None:
    keys = tune_measure.all_keys()
    assert {key.kernel for key in keys} == set(KERNELS)
    for key in keys:
        for clusters in (False, True):
            found = tune.candidates(key, clusters)
            assert len(found) == len(set(found)) > 0, key
            for config in found:
                tables.check_config(key, config, clusters)


@pytest.mark.parametrize("changed", ["1" * 64, None], ids=["of another source", "of a kernel that is no more"])
def test_an_entry_of_another_source_is_passed_over_and_the_others_count(folder: Path, changed: str | None) -> None:
    other = _table()["entries"][0] | ({"kernel": "softmax_fwd_of_old"} if changed is None else {"source": changed, "N": 900})
    folder.mkdir(mode=0o700)
    (folder / OWNER.file_name).write_text(json.dumps(_table(entries=[other, *_table()["entries"]])))
    assert tables.load(OWNER) == {KEY: CONFIG}
    assert tables.saved(OWNER) == {KEY: (CONFIG, 5.0)}


def test_a_change_to_one_kernel_keeps_the_measurements_of_the_others(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = {name: source_hash(name) for name in KERNELS}
    changed = tmp_path / "kernels"
    shutil.copytree(Path(fused_ops.__file__).parent / "kernels", changed)
    (changed / "norm" / "layer_norm_bwd.py").write_text("# another\n")
    monkeypatch.setattr(tuned_kernels, "_FOLDER", changed)
    source_hash.cache_clear()
    try:
        assert {name for name in KERNELS if source_hash(name) != before[name]} == {"layer_norm_bwd"}
    finally:
        source_hash.cache_clear()


@pytest.mark.parametrize("kernel", list(KERNELS))
def test_the_source_hash_covers_every_module_the_row_kernels_use(kernel: str) -> None:
    folder = Path(fused_ops.__file__).parent / "kernels"
    used = set()
    sources = {*tuned_kernels.SHARED, *KERNELS[kernel].sources}
    for name in sources:
        here = Path(name).parent
        for node in ast.walk(ast.parse((folder / f"{name}.py").read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                home = here if node.level == 1 else here.parent
                modules = [node.module.replace(".", "/")] if node.module else [alias.name for alias in node.names]
                used |= {(home / module).as_posix() for module in modules}
    assert {"config", "rows"} <= used <= sources


def test_without_a_gpu_tune_says_so_and_fails() -> None:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = process.run(process.command("tune"), env=environment)
    assert done.returncode == 2
    assert "measures on a GPU, and torch sees none" in done.stderr
