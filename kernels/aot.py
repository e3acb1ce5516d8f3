"""Ahead-of-time compilation of the kernels, with no GPU and without torch: what each one costs on each architecture.

    python kernels/aot.py [--jobs N] < cases.json > rows.jsonl

Reads a list of cases (fused_ops/_tools/audit.py writes it), compiles each with the Triton of this interpreter, and prints one
JSON object a case as it is done. It runs as a script in any environment that has Triton, so that one torch installation
can audit every Triton version.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import importlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

# Limits from the CUDA C++ Programming Guide, "Compute Capabilities", by compute capability: shared bytes a block can
# have, shared bytes and warps and blocks an SM holds. An SM has 65536 registers, given out by 256 a warp.
LIMITS = {
    80: (166912, 167936, 64, 32),
    86: (101376, 102400, 48, 16),
    89: (101376, 102400, 48, 24),
    90: (232448, 233472, 64, 32),
    100: (232448, 233472, 64, 32),
    103: (232448, 233472, 64, 32),
    120: (101376, 102400, 48, 24),
}
REGISTERS_SM = 65536
RESERVED_SHARED = 1024  # bytes of shared memory that CUDA itself takes of each block


def occupancy(arch: int, registers: int, shared_bytes: int, num_warps: int) -> int:
    """How many programs of a kernel an SM of compute capability arch holds at once."""
    _, shared_sm, warps, blocks = LIMITS[arch]
    per_warp = -(-max(registers, 1) * 32 // 256) * 256
    return min(
        blocks, warps // num_warps, REGISTERS_SM // (per_warp * num_warps), shared_sm // (shared_bytes + RESERVED_SHARED)
    )


def widths(ptx: str, instruction: str) -> dict[int, int]:
    """How many bits each width of global access moves, over one text of the kernel: {128: 1024, 32: 64}."""
    moved: dict[int, int] = {}
    for vector, bits in re.findall(rf"\b{instruction}\.global(?:\.[a-zA-Z]\w*(?:::\w+)*)*?(?:\.v(\d))?\.[busf](\d+)\b", ptx):
        width = int(vector or 1) * int(bits)
        moved[width] = moved.get(width, 0) + width
    if instruction == "ld":
        for size in re.findall(r"\bcp\.async\.c[ag]\.shared\.global[\w.:]* \[[^\]]*\], \[[^\]]*\], (0x[0-9a-f]+|\d+)", ptx):
            moved[int(size, 0) * 8] = moved.get(int(size, 0) * 8, 0) + int(size, 0) * 8
    return moved


def matrix_instruction(ptx: str) -> str:
    """The tensor core instruction of a kernel, or "" where it has none."""
    for name in ("tcgen05.mma", "wgmma.mma_async", "mma.sync"):
        if name in ptx:
            return name
    return ""


def _main_width(moved: dict[int, int]) -> int:
    return max(moved, key=lambda width: (moved[width], width), default=0)


def _kernel(case: dict[str, Any]) -> Any:
    """The JITFunction of a case: of this folder, or of the module that its "peer" names."""
    if case.get("peer"):
        return getattr(importlib.import_module(case["peer"]), case["kernel"])
    return getattr(_package(case["module"]), case["kernel"])


def _resources(cubin: bytes) -> tuple[int, int]:
    """(registers a thread, stack bytes a thread) of a cubin. Triton's kernels use the stack for spills alone."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no resource usage: {text[:200]}")
    return int(found[1]), int(found[2])


def _constant(value: Any) -> Any:
    """A constant as the kernel takes it: of Triton's dtypes, which JSON does not know, there is the name, as "tl:bf16"."""
    import triton.language as tl

    return tl.dtype(value[3:]) if isinstance(value, str) and value.startswith("tl:") else value


def compiled_case(case: dict[str, Any]) -> Any:
    """What Triton compiles a case to."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = _kernel(case)
    signature, attrs = {}, {}
    for i, name in enumerate(kernel.arg_names):
        text = "constexpr" if name in case["constexprs"] else case["signature"][name]
        signature[name], _, divisible = text.partition(":")
        if divisible:
            attrs[(i,)] = [["tt.divisibility", int(divisible)]]
    if getattr(kernel, "is_gluon", lambda: False)():
        from triton.experimental.gluon._runtime import GluonASTSource as ASTSource
    source = ASTSource(kernel, signature, {name: _constant(value) for name, value in case["constexprs"].items()}, attrs)
    options = {"num_warps": case["num_warps"], "num_stages": case["num_stages"], "num_ctas": case.get("num_ctas", 1)}
    options |= {"maxnreg": case["maxnreg"]} if case.get("maxnreg") else {}
    options["enable_fp_fusion"] = True
    return triton.compile(source, target=GPUTarget("cuda", case["arch"], 32), options=options)


def _package(module: str) -> Any:
    """A module of this folder, which is no package: it gets a name of its own."""
    package = "_fused_ops_kernels"
    if package not in sys.modules:
        made = types.ModuleType(package)
        made.__path__ = [str(Path(__file__).resolve().parent)]
        sys.modules[package] = made
    return importlib.import_module(f"{package}.{module}")


def _counted(compiled: Any, case: dict[str, Any]) -> dict[str, Any]:
    """What the machine code holds and a launch of it executes: the fields of sass.counted."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-sass", file.name]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    result: dict[str, Any] = _package("sass.counted").counted(listing, compiled.asm["ptx"], case)
    return result


def compile_case(case: dict[str, Any]) -> dict[str, Any]:
    """Compile one case and return its row, or a row whose "error" says why it does not compile.

    A case with a "launch" (its grid, its sizes, the bytes of its tensors) also has its machine code counted.

    A case with a "min_triton" later than this one is not compiled, and its row's "skipped" says so.
    """
    import triton

    row = {key: case[key] for key in ("kernel", "config", "arch", "dtype", "num_warps", "aligned")}
    row |= {"triton": triton.__version__, "num_ctas": case.get("num_ctas", 1)}
    least = case.get("min_triton")
    if least and [int(part) for part in triton.__version__.split(".")[:2]] < least:
        return row | {"skipped": f"needs Triton {'.'.join(map(str, least))} or later"}
    try:
        compiled = compiled_case(case)
        registers, spill = _resources(compiled.asm["cubin"])
        ptx = compiled.asm["ptx"]
        loads, stores = widths(ptx, "ld"), widths(ptx, "st")
        row |= {
            "registers": registers,
            "spill_bytes": spill,
            "shared_bytes": compiled.metadata.shared,
            "load_bits": _main_width(loads),
            "store_bits": _main_width(stores),
            "mma": matrix_instruction(ptx),
            "cluster_accesses": ptx.count("ld.shared::cluster"),
            "loads": loads,
            "stores": stores,
            "occupancy": occupancy(case["arch"], registers, compiled.metadata.shared, case["num_warps"]),
            "shared_limit": LIMITS[case["arch"]][0],
        }
        if "launch" in case:
            row["counted"] = _counted(compiled, case)
    except Exception as error:  # a compiler's failure is the row's result, whatever its type
        row["error"] = f"{type(error).__name__}: {str(error).strip()[:500]}"
    return row


def main() -> None:
    """Compile the cases on standard input."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=min(4, os.cpu_count() or 1))
    jobs = parser.parse_args().jobs
    os.environ.pop("TRITON_INTERPRET", None)
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]
    cases = json.load(sys.stdin)
    if jobs <= 1 or len(cases) <= 1:
        for i, case in enumerate(cases):
            print(json.dumps({"index": i, **compile_case(case)}), flush=True)
        return
    with concurrent.futures.ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        pending = {pool.submit(compile_case, case): i for i, case in enumerate(cases)}
        for done in concurrent.futures.as_completed(pending):
            print(json.dumps({"index": pending[done], **done.result()}), flush=True)


if __name__ == "__main__":
    main()
