"""What a GPU can do and what the model believes, as the few numbers that a forecast needs: all from coefficients.json."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

FILE = Path(__file__).with_name("coefficients.json")
FITTED = ("latency", "issue_share", "l2_share", "norm", "launch", "host")
"""The coefficients that measurements of our kernels may change; the others are measured apart, or on data sheets."""
SHARES = ("issue_share", "l2_share")


@dataclass(frozen=True)
class Gpu:
    """The coefficients of one GPU.

    copy: bytes/s of a large device copy, read and written. rates: FLOP/s of a large cuBLAS product, by bytes an element.
    sms, capability, l2_bytes: from its data sheet. clock: Hz under load. launch: seconds that a kernel takes at the least in a
    replayed CUDA graph. latency: seconds from a load to its data while the memory is busy; l2_latency: where L2 has it.
    issue_share: the part of the issue slots (4 an SM a clock) that a kernel can fill; warp_issue: instructions a clock of a warp
    alone. sm_bytes: bytes/s between one SM and L2;
    l2_rate: between all of them and L2. l2_share: the part of L2 that a second read finds. norm: p of the p-norm that joins limits
    which overlap; infinity is the longest alone. host: a factor of the host's time.
    """

    name: str
    copy: float
    rates: Mapping[int, float]
    sms: int
    capability: tuple[int, int]
    clock: float
    l2_bytes: float
    launch: float
    latency: float
    l2_latency: float
    issue_share: float
    warp_issue: float
    mufu: float
    sm_bytes: float
    l2_rate: float
    l2_share: float
    norm: float
    host: float
    names: tuple[str, ...] = ()

    def issue(self, programs: float, instructions: float, warps: int) -> float:
        """Seconds to issue so many instructions a warp, in programs of so many warps, on all SMs."""
        return programs * instructions * warps / (self.sms * self.slots)

    @property
    def slots(self) -> float:
        """Warp instructions that an SM issues a second."""
        return 4 * self.issue_share * self.clock

    def special(self, elements: float) -> float:
        """Seconds of one special function (exp2, reciprocal) an element, on all SMs."""
        return elements / 32 / (self.sms * self.mufu * self.clock)

    def __hash__(self) -> int:
        return hash(self.name)


@dataclass(frozen=True)
class Coefficients:
    """Everything in coefficients.json. sources: of a GPU's coefficients, (where it is from, what would fit it); model: of all
    GPUs; host: seconds of host time an eager call, by "op pass" or by pass."""

    gpus: Mapping[str, Gpu]
    sources: Mapping[str, tuple[str, str]]
    model: Mapping[str, float]
    host: Mapping[str, float]


def read(text: str) -> Coefficients:
    """Read coefficients.json. Raises ValueError, which names the field, on anything that is none."""
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"coefficients: no JSON: {error}") from None
    top = {"gpus", "gpu_coefficients", "model", "host"}
    if not isinstance(content, dict) or set(content) != top:
        raise ValueError(f"coefficients: got {_names(content)}, allowed: {', '.join(sorted(top))}")
    fields = {f.name for f in dataclasses.fields(Gpu)} - {"name"}
    sources = {
        name: (_text(entry, f"gpu_coefficients.{name}", "source"), _text(entry, f"gpu_coefficients.{name}", "fits"))
        for name, entry in content["gpu_coefficients"].items()
    }
    if set(sources) != fields:
        raise ValueError(f"coefficients: gpu_coefficients: got {_names(sources)}, allowed: {', '.join(sorted(fields))}")
    model = {}
    for name, entry in content["model"].items():
        _text(entry, f"model.{name}", "source")
        model[name] = _number(entry["value"], f"model.{name}", 1.0)
    _text(content["host"], "host", "source")
    host = {name: _number(value, f"host.{name}") for name, value in content["host"]["seconds"].items()}
    gpus = {name: _gpu(name, entry, fields) for name, entry in content["gpus"].items()}
    return Coefficients(MappingProxyType(gpus), sources, model, host)


def _gpu(name: str, entry: Any, fields: set[str]) -> Gpu:
    if not isinstance(entry, dict) or set(entry) != fields:
        raise ValueError(f"coefficients: gpus.{name}: got {_names(entry)}, allowed: {', '.join(sorted(fields))}")
    values: dict[str, Any] = {}
    for field, value in entry.items():
        where = f"gpus.{name}.{field}"
        if field == "names":
            values[field] = tuple(map(str, value))
        elif field == "capability":
            values[field] = (int(value[0]), int(value[1]))
        elif field == "rates":
            values[field] = MappingProxyType({int(size): _number(rate, f"{where}.{size}") for size, rate in value.items()})
        else:
            values[field] = _number(value, where, 1.0 if field in SHARES else float("inf"))
    return Gpu(name, **{**values, "sms": int(values["sms"])})


def _names(value: Any) -> str:
    return ", ".join(sorted(value)) if isinstance(value, Mapping) else repr(value)


def _text(entry: Any, where: str, name: str) -> str:
    if not isinstance(entry, dict) or not isinstance(entry.get(name), str) or not entry[name]:
        raise ValueError(f"coefficients: {where}: {name}: a text is missing")
    return str(entry[name])


def _number(value: Any, where: str, most: float = float("inf")) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= most:
        limit = "" if most == float("inf") else f", at most {most:g}"
        raise ValueError(f"coefficients: {where}: got {value!r}, allowed: a number above 0{limit}")
    return float(value)


@functools.cache
def coefficients() -> Coefficients:
    """The committed ones."""
    return read(FILE.read_text())


GPUS: Mapping[str, Gpu] = coefficients().gpus
"""Short name -> coefficients."""
SOURCES: Mapping[str, tuple[str, str]] = coefficients().sources
"""Field -> (where its value is from, what would fit it)."""
MODEL: Mapping[str, float] = coefficients().model


def gpu_named(name: str) -> Gpu | None:
    """The coefficients for a short name, or for a name as torch.cuda.get_device_name gives it; None where there are none."""
    found = GPUS.get(name.lower())
    return found or next((gpu for gpu in GPUS.values() if name in gpu.names), None)


def host_seconds(op: str, pass_: str, gpu: Gpu) -> float:
    """Host time of an eager call."""
    host = coefficients().host
    return gpu.host * host.get(f"{op} {pass_}", host[pass_])
