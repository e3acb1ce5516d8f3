"""A function's source with fused calls in it, and the class whose methods are such functions.

One class is made for one structure, whatever the number of modules that have it: a compiler that takes a model layer by
layer makes one graph for all of them. It is a subclass of the module's own class and has its name.
"""

from __future__ import annotations

import abc
import ast
import functools
import inspect
import operator
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType
from typing import Any, Optional, Union

from torch import nn

from . import calls, chains
from .flow import Flow
from .methods import reached
from .norm_formula import NormFormula
from .norm_forward import norm_forward
from .sites import Applied, Site, applied_at, is_linear_call, sites
from .source import SourceError, build, parse, redecorated, undecorated

Edit = tuple[str, Union["Rewrite", tuple[str, ...]]]
"""(a site's key, the ops that parts of it may become), or (REFERENCE + the name of a function, its edits)."""
Rewrite = tuple[Edit, ...]
REFERENCE = "function "
_PREFIX = "_fuse_"


@dataclass(frozen=True)
class Made:
    """A class that fuse makes: base with the methods rewritten, and with mixin before the torch.nn class that it fuses.

    Hashable and picklable: it stands for the class in pickles and in what unfuse remembers.
    """

    base: type[nn.Module]
    methods: tuple[tuple[str, Rewrite], ...] = ()
    mixin: Optional[type[nn.Module]] = None
    formula: Optional[NormFormula] = None

    def cls(self) -> type[nn.Module]:
        """The class, made once. SourceError when the base's source no longer has these sites."""
        originals = tuple(getattr(self.base, name, None) for name, _ in self.methods)
        found = _CLASSES.get((self, originals))
        if found is None:
            found = _CLASSES[self, originals] = _class(self)
        return found


_CLASSES: weakref.WeakValueDictionary[Any, type[nn.Module]] = weakref.WeakValueDictionary()


class FusedModule:
    """Mixin of the classes that fuse makes."""

    _fuse_made: Made

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Keep the base's own from being told of a class that it need not know."""

    def _get_name(self) -> str:
        return f"Fused{self._fuse_made.base.__name__}"  # in repr(model)

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(protocol)
        function, args, *rest = reduced
        base = self._fuse_made.base
        return _remade, (self._fuse_made, function, tuple(base if arg is type(self) else arg for arg in args)), *rest

    def __prepare_scriptable__(self) -> nn.Module:
        """What torch.jit.script compiles in this module's place: the same children under the original forward."""
        base: Any = self._fuse_made.base
        unfused = base.__new__(base)
        unfused.__dict__.update({name: value for name, value in self.__dict__.items() if not name.startswith(_PREFIX)})
        return unfused


def _remade(made: Made, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    module = function(*args)
    try:
        calls.learn()
        module.__class__ = made.cls()
    except SourceError as error:
        warnings.warn(f"fuse: {made.base.__name__} is loaded unfused: {error}", stacklevel=2)
    return module


def _class(made: Made) -> type[nn.Module]:
    base: Any = made.base
    members: dict[str, Any] = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    members["_fuse_made"] = made
    for name, rewrite in made.methods:
        original = getattr(base, name)
        members[name] = _while_it_stands(base, name, original, redecorated(original, rewritten(undecorated(original), rewrite)))
    mixin: Any = made.mixin
    if mixin is not None and base.forward is mixin.__mro__[1].forward:
        members["forward"] = _while_it_stands(base, "forward", base.forward, mixin.forward)
    if made.formula is not None:
        helpers = {name: method for name, method in reached(base).items() if name != "forward"}
        forward = norm_forward(base.forward, made.formula, helpers)
        members["forward"] = _while_it_stands(base, "forward", base.forward, forward)
    mixins = () if made.mixin is None else (made.mixin,)
    bases = (FusedModule, *mixins) if any(issubclass(mixin, base) for mixin in mixins) else (FusedModule, base, *mixins)
    meta = type(base)
    maker: Any = abc.ABCMeta if issubclass(meta, abc.ABCMeta) else type  # not meta itself: it may keep a list of its classes
    made_class: type[nn.Module] = maker.__new__(meta, base.__name__, bases, members)
    return made_class


def _while_it_stands(base: type[nn.Module], name: str, original: Any, fused: Any) -> Any:
    """The method fused; or base's own, once another library has put one there that is not original."""

    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        if getattr(base, name) is not original:
            return getattr(base, name)(self, *args, **kwargs)
        return fused(self, *args, **kwargs)

    method.__signature__ = inspect.signature(original)  # type: ignore[attr-defined]
    return method


def rewritten(function: FunctionType, rewrite: Rewrite) -> FunctionType:
    """function with the sites of rewrite as fused calls; SourceError where its source does not have them."""
    tree = parse(function)
    flow = Flow(tree)
    by_key = {site.key: site for site in sites(flow)}
    names: dict[str, Any] = {}
    replaced: dict[int, ast.AST] = {}
    for key, extra in rewrite:
        if key.startswith(REFERENCE):
            _refer(flow, function, key.removeprefix(REFERENCE), extra, names, replaced)  # type: ignore[arg-type]
        elif key in by_key:
            _replace(by_key[key], extra, names, replaced)  # type: ignore[arg-type]
        else:
            raise SourceError("has another source than the one that was fused")
    return build(function, _Replace(replaced).visit(tree), names)


def _refer(
    flow: Flow, function: FunctionType, name: str, rewrite: Rewrite, names: dict[str, Any], replaced: dict[int, ast.AST]
) -> None:
    """Have the function read its file's function `name` in its rewritten form, wherever it reads it."""
    original = function.__globals__.get(name)
    fused = redecorated(original, rewritten(undecorated(original), rewrite))
    for node in ast.walk(flow.tree):
        if isinstance(node, ast.Name) and node.id == name and isinstance(node.ctx, ast.Load):
            if isinstance(flow.parent[id(node)], ast.Compare):  # `attention is name`
                continue
            values = [_helper(f"original_{name}", original, names), _helper(f"fused_{name}", fused, names)]
            inner = ast.copy_location(ast.Name(name, ast.Load()), node)
            replaced[id(node)] = _call("instead", [inner, *values], names, node)


def _replace(site: Site, ops: tuple[str, ...], names: dict[str, Any], replaced: dict[int, ast.AST]) -> None:
    for definition in site.captured:
        replaced[id(definition.value)] = _way_in(site, definition.value)
    replaced[id(site.root)] = _fused_call(site, ops, names)


def _fused_call(site: Site, ops: tuple[str, ...], names: dict[str, Any]) -> ast.AST:
    root: Any = site.root
    if site.op == "function":
        return _call("function", [site.called, *root.args], names, root, root.keywords)
    if site.op == "softmax_method":
        return _call("softmax_method", [root.func.value, *root.args], names, root, root.keywords)
    if site.op == "chain":
        x = root.body[0].targets[0]
        values = [root.iter, ast.Name(x.id, ast.Load()), ast.Constant(frozenset(ops))]  # type: ignore[arg-type]
        return ast.copy_location(ast.Assign([x], _call("chain", values, names, root)), root)
    assert site.activation is not None
    called, args, options = _step(site.activation)
    if site.op == "linear":
        further = [args, options] if site.activation.args or site.activation.keywords else []
        return _call("linear_act", [called, site.linears[0], _way_in(site, root), *further], names, root)
    if site.op == "mlp":
        steps = ast.Tuple([ast.Tuple(list(_step(step)), ast.Load()) for step in site.steps], ast.Load())
        activation = ast.Tuple([called, args, options], ast.Load())
        x = _way_in(site, root.args[0])
        further = [steps, activation, site.linears[0], x, ast.Constant("linear" in ops)]
        return _call("mlp", [site.linears[1], *further], names, root)
    gate, up = (_way_in(site, factor) for factor in site.factors)
    orders = [ast.Constant(site.up_after), ast.Constant(site.key.startswith("gated_linear_reversed"))]
    values = [called, site.linears[0], gate, site.linears[1], up, args, options, *orders, _product(root, names)]
    call = _call("gated", values, names, root)
    if isinstance(root, ast.AugAssign):
        return ast.copy_location(ast.Assign([root.target], call), root)
    return call


def _product(root: Any, names: dict[str, Any]) -> ast.expr:
    """The function that multiplies as root, a product, does."""
    if isinstance(root, ast.Call):
        method: Any = root.func
        return method if len(root.args) == 2 else _helper(method.attr, getattr(calls, method.attr), names)
    product = operator.imul if isinstance(root, ast.AugAssign) else operator.mul
    return _helper(product.__name__, product, names)


def _step(step: Applied) -> tuple[ast.expr, ast.expr, ast.expr]:
    called = ast.Constant(step.called) if isinstance(step.called, str) else step.called
    options = ast.Dict([ast.Constant(k.arg) for k in step.keywords], [k.value for k in step.keywords])
    return called, ast.Tuple(list(step.args), ast.Load()), options


def _way_in(site: Site, node: ast.expr) -> ast.expr:
    """What stands in node's place once the site's last statement computes it all: what its first Linear is called with."""
    if any(node is definition.use for definition in site.captured):
        return ast.copy_location(ast.Name(node.id, ast.Load()), node)  # type: ignore[attr-defined]
    if is_linear_call(node) and any(node.func is linear for linear in site.linears):  # type: ignore[attr-defined]
        return node.args[0] if site.op != "mlp" or node.func is site.linears[0] else _way_in(site, node.args[0])  # type: ignore[attr-defined]
    applied = applied_at(node)
    assert applied is not None
    assert id(node) in site.nodes
    return _way_in(site, applied.inner)


def _helper(name: str, value: Any, names: dict[str, Any]) -> ast.Name:
    names[_PREFIX + name] = value
    return ast.Name(_PREFIX + name, ast.Load())


def _call(
    helper: str, args: list[Any], names: dict[str, Any], where: ast.AST, keywords: list[ast.keyword] | None = None
) -> ast.Call:  # fmt: skip
    function = _helper(helper, getattr(calls, helper, None) or getattr(chains, helper), names)
    return ast.copy_location(ast.Call(function, args, keywords or []), where)


class _Replace(ast.NodeTransformer):
    def __init__(self, replaced: dict[int, ast.AST]) -> None:
        self.replaced = replaced

    def visit(self, node: ast.AST) -> Any:
        while id(node) in self.replaced:
            node = self.replaced.pop(id(node))
        return self.generic_visit(node)
