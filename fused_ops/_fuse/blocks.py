"""Modules whose forward holds what can be fused: their sites found, chosen, and made the methods of one class."""

from __future__ import annotations

import ast
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from . import conditions, hf
from .activations import ACTIVATION_FUNCTIONS, looks_like_activation
from .branches import is_taken, named_in_taken_branches
from .calls import FUNCTION_NAMES, is_linear
from .edit import REFERENCE, Edit, Rewrite
from .methods import Parsed, asking_own_class, functions_named, names_in, parsed, reached
from .resolve import Scope
from .run import Run
from .sites import FORMS, PARTS, Applied, is_path
from .source import SourceError, undecorated
from .verdicts import Verdict, follower, verdict


@dataclass
class Method:
    """A method of the module: its parsed source, and what each of its sites came to."""

    name: str
    parsed: Parsed
    scope: Scope
    verdicts: list[Verdict] = field(default_factory=list)
    chosen: list[Verdict] = field(default_factory=list)


@dataclass
class Block:
    """A module with what its methods hold.

    earlier: the keys of the sites that a fuse before this one has fused. functions: those of its file that its methods name, as
    (method, name, edits, verdicts). reasons: id of a Linear -> what is said of it where nothing fuses it. named: what each
    method names, in the branches that are taken now.
    """

    name: str
    module: nn.Module
    earlier: frozenset[str] = frozenset()
    methods: list[Method] = field(default_factory=list)
    functions: list[tuple[str, str, Rewrite, list[Verdict]]] = field(default_factory=list)
    reasons: dict[int, str] = field(default_factory=dict)
    named: dict[str, frozenset[str]] = field(default_factory=dict)

    def counts(self, method: Method, site: ast.AST | None = None) -> int:
        """1 where a site of a method runs as the module is configured now, else 0."""
        runs = method.name in self.live() and (site is None or is_taken(method.parsed.flow, method.scope, site))
        return int(runs)

    def calls(self, method: str, function: str) -> bool:
        """Whether a method calls a function of its file, as the module is configured now."""
        return method in self.live() and function in self.named[method] and hf.attention_calls(self.module, function)

    def live(self) -> frozenset[str]:
        """The methods that forward reaches as the module is configured now."""
        found, pending = set(), ["forward"]
        while pending:
            name = pending.pop()
            found.add(name)
            pending += [other for other in self.named.get(name, ()) if other in self.named and other not in found]
        return frozenset(found)

    def rewrites(self, ops: frozenset[str]) -> dict[str, Rewrite]:
        """{method's name: its edits}. ops: what the parts of an MLP or of a loop over modules may become."""
        edits: dict[str, list[Edit]] = {}
        parts = tuple(sorted(ops & PARTS))
        for method in self.methods:
            for found in method.chosen:
                edits.setdefault(method.name, []).append((found.site.key, parts if found.op in ("mlp", "chain") else ()))
        for name, function, rewrite, _ in self.functions:
            edits.setdefault(name, []).append((REFERENCE + function, rewrite))
        return {name: tuple(found) for name, found in edits.items()}


def block(run: Run, name: str, module: nn.Module, cls: type[nn.Module], earlier: frozenset[str]) -> Block:
    """What the methods of the module's class hold. Nothing is changed and nothing of the user's is run.

    earlier: the keys of the sites that an earlier fuse has fused.
    """
    found = Block(name, module, earlier)
    if conditions.replaced_forward(module) is not None:
        found.reasons = {id(m): f"{cls.__name__}: {conditions.replaced_forward(module)}" for m in _linears_below(module)}
        return found
    functions = reached(cls)
    if (asking := asking_own_class(functions)) is not None:
        _unread(found, cls, *asking)
        return found
    wanted_names = FUNCTION_NAMES | {nn.Softmax.__name__} | ACTIVATION_FUNCTIONS | _children_of_interest(module)
    for method, function in functions.items():
        try:
            inner = undecorated(function)
        except SourceError as error:
            _unread(found, cls, method, error)
            continue
        found.named[method] = names_in(inner.__code__)
        _functions(run, found, method, inner)
        if wanted_names.isdisjoint(names_in(inner.__code__)):
            continue
        read = parsed(inner)
        if isinstance(read, SourceError):
            _unread(found, cls, method, read)
            continue
        entry = Method(method, read, Scope(read.source, module))
        found.named[method] = named_in_taken_branches(read.flow, entry.scope)
        entry.verdicts = [v for site in read.sites if (v := verdict(site, entry.scope, read.flow, run.refuses)) is not None]
        _choose(run, entry, earlier)
        found.reasons.update(_followers(entry))
        found.methods.append(entry)
    return found


def _unread(found: Block, cls: type[nn.Module], method: str, error: SourceError) -> None:
    found.reasons.update({id(m): f"{cls.__name__}.{method} {error}" for m in _linears_below(found.module)})


def _linears_below(module: nn.Module) -> list[nn.Module]:
    """The Linears that module itself is likely to call: its children, and those in its lists."""
    found: list[nn.Module] = []
    for child in module._modules.values():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            found += _linears_below(child)
        elif child is not None and (isinstance(child, nn.Linear) or is_linear(child)):
            found.append(child)
    return found


def _children_of_interest(module: nn.Module) -> frozenset[str]:
    """The attributes by which the module's code may reach a Linear, an activation or a norm: a child's, or a grandchild's."""
    names: set[str] = set()
    for name, child in module._modules.items():
        if child is None:
            continue
        if is_linear(child) or isinstance(child, nn.Linear) or looks_like_activation(child) or "Norm" in type(child).__name__:
            names.add(name)
        elif isinstance(child, (nn.ModuleList, nn.ModuleDict, nn.Sequential)):
            if any(is_linear(m) for m in child.modules()):
                names.add(name)
        else:
            names.update(key for key, m in child._modules.items() if m is not None and is_linear(m))
    names.update(name for name, value in vars(module).items() if name[0] != "_" and looks_like_activation(value))
    return frozenset(names)


def _choose(run: Run, method: Method, earlier: frozenset[str]) -> None:
    """Choose among the sites, larger ones first; no part of the source is in two."""
    able = [v for v in method.verdicts if v.reason is None and (_wanted(run, v.op) or v.site.key in earlier)]
    able = [v for v in able if not _left_out(run, method, v)]
    activated = [v.site for v in able if v.op == "linear"]
    taken: set[int] = set()
    for found in sorted(able, key=lambda v: FORMS.index(v.op) if v.op in FORMS else len(FORMS)):
        if found.op == "mlp" and (_never_idle(found, method.scope) or any(id(found.site.root) in s.nodes for s in activated)):
            continue
        parts = found.site.nodes | {id(d.statement) for d in found.site.captured}
        if taken.isdisjoint(parts):
            taken |= parts
            method.chosen.append(found)


def _wanted(run: Run, op: str) -> bool:
    return op in run.wanted or (op == "chain" and not PARTS.isdisjoint(run.wanted))


def _left_out(run: Run, method: Method, found: Verdict) -> bool:
    assert method.scope.module is not None
    return not found.linears and run.refuses(method.scope.module) is not None


def _never_idle(found: Verdict, scope: Scope) -> bool:
    """Whether a dropout stands between an MLP's halves that does something in training."""
    for step in found.site.steps:
        assert isinstance(step.called, ast.expr)
        for called in scope.objects(step.called):
            p = called.p if isinstance(called, nn.Dropout) else _probability(step, scope) if callable(called) else 0
            if not isinstance(called, nn.Identity) and p != 0:
                return True
    return False


def _probability(step: Applied, scope: Scope) -> Any:
    given = step.args[0] if step.args else next((k.value for k in step.keywords if k.arg == "p"), None)
    values = () if given is None else scope.objects(given)
    return values[0] if len(values) == 1 else 0.5


def _functions(run: Run, found: Block, method: str, function: Any) -> None:
    """Enter the functions of its file that a method names and that call an op's function, such as softmax."""
    for name, other in functions_named(function):
        try:
            inner = undecorated(other)
        except SourceError:
            continue
        if FUNCTION_NAMES.isdisjoint(names_in(inner.__code__)):
            continue
        read = parsed(inner)
        if isinstance(read, SourceError):
            continue
        scope = Scope(read.source, None)
        sites = [site for site in read.sites if site.called is not None]
        verdicts = [v for site in sites if (v := verdict(site, scope, read.flow, run.refuses)) is not None]
        wanted = [v for v in verdicts if v.op in run.wanted or REFERENCE + name + v.site.key in found.earlier]
        wanted = [v for v in wanted if run.refuses(found.module) is None]
        if wanted:
            found.functions.append((method, name, tuple((v.site.key, ()) for v in wanted), wanted))


def _followers(method: Method) -> dict[int, str]:
    """id of each Linear that the method calls -> what follows, where that is no activation."""
    found: dict[int, str] = {}
    for node in ast.walk(method.parsed.flow.tree):
        if isinstance(node, ast.Call) and len(node.args) == 1 and is_path(node.func):
            for called in method.scope.objects(node.func):
                if isinstance(called, nn.Module) and (is_linear(called) or isinstance(called, nn.Linear)):
                    found.setdefault(id(called), follower(method.parsed.flow, node, method.scope))
    return found
