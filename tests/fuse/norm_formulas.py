"""The verdict of norm_formula on every class of transformers that has no children and looks like a norm.

    python -m tests.fuse.norm_formulas [WORD ...]   all model folders of transformers, or those whose names contain a word

prints one line a class, grouped by verdict, and at the end how many there are of each. Importing all of transformers' modeling
files takes minutes, so no test does it.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import sys
import warnings
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from fused_ops._fuse.norm_formula import NormFormula, norm_formula

N = 16


class AnyConfig:
    """A configuration with a value for every name."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return 1e-6 if "eps" in name else "silu" if "act" in name else N


def classes(words: list[str], exact: bool = False) -> Iterator[type[nn.Module]]:
    """The modules that transformers' modeling files define themselves, by folder."""
    import transformers.models

    for folder in sorted(p.name for p in pkgutil.iter_modules(transformers.models.__path__) if p.ispkg):
        if words and not (folder in words if exact else any(word in folder for word in words)):
            continue
        package = Path(transformers.models.__path__[0]) / folder
        for file in sorted(package.glob("modeling_*.py")):
            try:
                module = importlib.import_module(f"transformers.models.{folder}.{file.stem}")
            except ImportError as error:
                print(f"{folder}/{file.stem}: not imported: {str(error).splitlines()[0]}", file=sys.stderr)
                continue
            found = [c for c in vars(module).values() if inspect.isclass(c) and c.__module__ == module.__name__]
            yield from [c for c in found if issubclass(c, nn.Module)]


def make(cls: type[nn.Module], **given: Any) -> nn.Module | None:
    """cls with N features, or None where its arguments cannot be guessed."""
    arguments = dict(given)
    for p in inspect.signature(cls.__init__).parameters.values():
        if p.name in ("self", *given) or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
            continue
        if p.name == "config":
            arguments[p.name] = AnyConfig()
        elif p.default is p.empty or p.name in ("dim", "hidden_size"):
            arguments[p.name] = 1e-6 if "eps" in p.name else N
    try:
        return cls(**arguments)
    except Exception:
        return None


def verdicts(words: list[str], exact: bool = False) -> dict[str, list[str]]:
    """verdict -> the classes that have it; where a class has with_scale or group_size, once with each."""
    table: dict[str, list[str]] = defaultdict(list)
    for cls in classes(words, exact):
        flags = inspect.signature(cls.__init__).parameters
        variants: list[dict[str, Any]] = [{}]
        variants += [{"with_scale": False}] if "with_scale" in flags else []
        variants += [{"group_size": N // 2}] if "group_size" in flags else []
        for given in variants:
            module = make(cls, **given)
            if module is None:
                if cls.__name__.endswith("Norm"):
                    table["(not made)"].append(cls.__name__)
                continue
            verdict = norm_formula(module)
            if verdict is None:
                if "Norm" in cls.__name__ and not module._modules and not isinstance(module, nn.LayerNorm):
                    table["None"].append(cls.__name__)
                continue
            name = cls.__name__ + "".join(f"({k}={v})" for k, v in given.items())
            table[_words(verdict)].append(name)
    return table


def _words(verdict: NormFormula | str) -> str:
    if isinstance(verdict, str):
        return verdict
    weight = "no weight" if verdict.weight is None else f"weight {verdict.weight}"
    return f"{verdict.op}, {weight}, {len(verdict.pairs)} pairs of dtypes"


def main() -> None:
    warnings.simplefilter("ignore")
    table = verdicts(sys.argv[1:])
    for verdict, names in sorted(table.items()):
        print(f"{len(names):4d} {verdict}\n     {' '.join(names)}")


if __name__ == "__main__":
    main()
