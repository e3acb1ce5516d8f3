"""Every environment variable that fused_ops and bench read, each through one parser that refuses by name what it does not know.

Switches and choices are read once, at the first import; folders at each call. A value that means nothing fails the import with a
SettingError. The command `fused-ops` is let in all the same: `doctor` shows REFUSED, every other command ends with it.
"""

from __future__ import annotations

import math
import os
import re
import sys
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

TRUE_WORDS = ("1", "true", "yes", "on", "y")  # as Triton has them
FALSE_WORDS = ("0", "false", "no", "off", "n")
_OURS = re.compile(r"FUSED_?OPS?_", re.IGNORECASE)  # how a variable of ours begins, or one that was meant to be
_T = TypeVar("_T")


class SettingError(ValueError):
    """A variable of the environment has a value that means nothing. The message names variable, value and what is allowed."""


@dataclass(frozen=True)
class Refusal:
    """A variable of the environment whose value was refused: what came, and what is allowed."""

    variable: str
    got: str
    allowed: str

    def __str__(self) -> str:
        return f"{self.variable}: got {self.got[:100]!r}, allowed: {self.allowed}"


KNOWN = [
    "FUSED_OPS_CACHE",
    "FUSED_OPS_COMMIT",
]  # the variables that are ours: these, read at each call, and each that _text reads
REFUSED: list[Refusal] = []


def _text(name: str) -> str:
    """The value of a variable that is ours, "" where it is not set."""
    if name not in KNOWN:
        KNOWN.append(name)
    return os.environ.get(name, "")


def _one_of(name: str, default: _T, values: Mapping[str, _T]) -> _T:
    """The value that the variable's word stands for, in any case; the default where it is empty or refused."""
    text = _text(name)
    if text and text.lower() not in values:
        REFUSED.append(Refusal(name, text, ", ".join(map(repr, values))))
    return values.get(text.lower(), default)


def _switch(name: str, default: bool = False) -> bool:
    return _one_of(name, default, dict.fromkeys(TRUE_WORDS, True) | dict.fromkeys(FALSE_WORDS, False))


def _choice(name: str, *allowed: str) -> str:
    """One of these words, by default the first."""
    return _one_of(name, allowed[0], {word: word for word in allowed})


def _seconds(name: str, default: float) -> float:
    text = _text(name)
    try:
        seconds = float(text or default)
    except ValueError:
        seconds = math.nan
    if 0 <= seconds < math.inf:
        return seconds
    REFUSED.append(Refusal(name, text, "seconds, a number of at least 0"))
    return default


BACKEND = _choice("FUSED_OPS_BACKEND", "auto", "triton", "aten")
LAUNCH = _choice("FUSED_OPS_LAUNCH", "auto", "triton")  # "triton": every launch through kernel[grid]
INTERPRET = _switch("TRITON_INTERPRET")  # CPU tensors run the kernels in Triton's interpreter
NVTX = _switch("FUSED_OPS_NVTX")  # an NVTX range around every raw operator
INLINE = _switch("FUSED_OPS_INLINE")  # AOTAutograd traces into the launches
CLUSTER = _switch("FUSED_OPS_CLUSTER", True)  # long rows may run as clusters
GLUON = _switch("FUSED_OPS_GLUON", True)  # long rows may wait in shared memory, in kernels written in Gluon
COMPILE_WITH_ATEN = frozenset(filter(None, _text("FUSED_OPS_COMPILE_WITH_ATEN").lower().replace(" ", "").split(",")))
BENCH_PREPARE_S = _seconds("FUSED_OPS_BENCH_PREPARE_S", 5.0)  # what a provider of bench may take to prepare


def _home() -> Path:
    try:
        return Path.home()
    except RuntimeError:  # a user without one, as in some containers: a folder that is never there
        return Path(os.devnull)


def user_folder() -> Path:
    """Where the user's tables of configurations are: $FUSED_OPS_CACHE, else fused_ops in $XDG_CACHE_HOME or ~/.cache."""
    if folder := _text("FUSED_OPS_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or _home() / ".cache") / "fused_ops"


def commit() -> str:
    """What FUSED_OPS_COMMIT says of the code that bench measures, any text, or ""."""
    return _text("FUSED_OPS_COMMIT")


def triton_cache() -> Path:
    """Where Triton keeps compiled kernels."""
    return Path(os.environ.get("TRITON_CACHE_DIR") or _home() / ".triton" / "cache")


def inductor_cache() -> Path:
    """Where Inductor keeps compiled graphs."""
    if folder := os.environ.get("TORCHINDUCTOR_CACHE_DIR"):
        return Path(folder)
    import getpass
    import tempfile

    return Path(tempfile.gettempdir()) / f"torchinductor_{getpass.getuser()}"


def cxx() -> str:
    """The C++ compiler's command, by $CXX or the usual name."""
    return (os.environ.get("CXX", "").split() or ["c++"])[0]


def compiling_environment() -> dict[str, str]:
    """The environment for a process that compiles kernels: this one's, without the interpreter."""
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


def unknown() -> dict[str, str]:
    """{variable: the nearest that is known, or ""} of the environment's variables that look like ours and are none."""
    found = [name for name in os.environ if _OURS.match(name) and name not in KNOWN]
    found = [name for name in found if not name.startswith("FUSED_OPS_TEST_")]  # what the tests read
    if not found:
        return {}
    import difflib

    ends = {_OURS.sub("", name): name for name in KNOWN}
    nearest = {name: difflib.get_close_matches(_OURS.sub("", name).upper(), ends, 1, 0.7) for name in sorted(found)}
    return {name: ends[near[0]] if near else "" for name, near in nearest.items()}


def _is_command() -> bool:
    """Whether this process is the command `fused-ops`, or `python -m fused_ops`, which itself says what was refused."""
    arguments = getattr(sys, "argv", None) or [""]
    if arguments[0] == "-m":  # python -m NAME: Python is looking for the module
        return sys.orig_argv[-len(arguments)].endswith(("fused_ops", "fused_ops.__main__"))
    return Path(arguments[0]).stem == "fused-ops"


def _require() -> None:
    if REFUSED and not _is_command():
        raise SettingError("; ".join(map(str, REFUSED)))


def check_ops(ops: Iterable[str]) -> None:
    """Refuse what FUSED_OPS_COMPILE_WITH_ATEN names and is none of ops: those that are registered, known only after their import.

    Raises:
        SettingError: it names something else.
    """
    allowed = ("all", *ops)
    wrong = ",".join(sorted(COMPILE_WITH_ATEN.difference(allowed)))
    if wrong and not any(refusal.variable == "FUSED_OPS_COMPILE_WITH_ATEN" for refusal in REFUSED):
        REFUSED.append(Refusal("FUSED_OPS_COMPILE_WITH_ATEN", wrong, ", ".join(map(repr, allowed))))
    _require()


_require()
for _name, _nearest in unknown().items():
    _hint = f"did you mean {_nearest}?" if _nearest else f"there are {', '.join(KNOWN)}"
    warnings.warn(f"fused_ops: this version reads no variable {_name}; {_hint}", stacklevel=2)
