"""fused_ops._fuse.source: what is read of a function is what it runs, and what is built of it is the function."""

import ast
import contextlib
import functools
import importlib.util
import inspect
import itertools
import linecache
import os
import sys

import pytest
import torch

from fused_ops._fuse.source import SourceError, build, parse, read, redecorated, undecorated

CHANGED = "does not run what its source says"
FORMS = {
    "function": ("def f(x):\n    '''Says something.'''\n    assert x\n    return x + 1", "f"),
    "method": ("class A:\n    def f(self, x):\n        return x + 1", "A().f"),
    "private names": (
        "class A:\n    __y = 1\n    def f(self, x):\n        self.__x = x\n        return self.__x + self.__y",
        "A().f",
    ),
    "private name in a nested function": (
        "class A:\n  def __init__(self):\n    self.__y = 1\n  def make(self):\n    def f(x):\n      return x + self.__y\n    return f",
        "A().make()",
    ),
    "super": (
        "class B:\n    def f(self, x):\n        return x\nclass A(B):\n    def f(self, x):\n        return super().f(x) + 1",
        "A().f",
    ),
    "super in a nested function": (
        "class B:\n    def f(self, x):\n        return x\n"
        "class A(B):\n    def make(self):\n        def f(x):\n            return super(__class__, self).f(x) + 1\n        return f",
        "A().make()",
    ),
    "super of the file": (
        "B = super\nclass C:\n    def f(self, x):\n        return x\nclass A(C):\n    def f(self, x):\n        return super().f(x) + 1",
        "A().f",
    ),
    "class in a class": ("class A:\n    class B:\n        def f(self, x):\n            return x + 1", "A.B().f"),
    "class in a function": (
        "def make(y):\n    class A:\n        def f(self, x):\n            return x + y if A else 0\n    return A",
        "make(1)().f",
    ),
    "closure": ("def make(y):\n    def f(x):\n        return x + y\n    return f", "[make(y) for y in (1, 2)][0]"),
    "recursion": ("def make():\n    def f(x):\n        return x if x == 3 else f(x + 1)\n    return f", "make()"),
    "global recursion": ("def f(x):\n    return x if x == 3 else f(x + 1)", "f"),
    "names bound in the signature": ("y = 1\ndef f(x, a=(y := 1), *, z: (w := int) = 0):\n    return x + y + z", "f"),
    "function in the function": (
        "def make():\n    def f(x):\n        def g(y):\n            class K: pass\n            return K, y\n"
        "        return x + 1 if g.__qualname__.startswith('make.') and 'g.<locals>.K' in g(1)[0].__qualname__ else 0\n"
        "    return f",
        "make()",
    ),
    "import": ("import operator\nfrom operator import add as plus\ndef f(x):\n    return operator.add(x, plus(1, 0))", "f"),
    "imports in blocks": (
        "try:\n    import operator\nexcept ImportError:\n    pass\nif True:\n    import math\n"
        "def f(x):\n    return operator.add(x, math.floor(1.5))",
        "f",
    ),
    "import of its own": ("import operator\ndef f(x):\n    operator = x\n    return operator.__add__(1)", "f"),
    "future": ("from __future__ import annotations\ndef f(x: Missing) -> Missing:\n    y: Missing = 1\n    return x + y", "f"),
    "defined in blocks": (
        "try:\n    raise ValueError\nexcept ValueError:\n    for _ in range(2):\n        def f(x):\n            return x + 1\n"
        "finally:\n    def g(x):\n        return x",
        "f",
    ),
    "decorated over lines": (
        "import functools\ndef d(a):\n    return lambda f: f\n@d(\n  1,\n)\n@d(2)\ndef f(\n    x,\n):\n    return x + 1",
        "f",
    ),
    "strings over lines": ("class A:\n    def f(self, x):\n        y = '''a\nb'''\n        return x + len(y) - 2", "A().f"),
    "one line": ("class A:\n    def f(self, x): y = 1; return x + y  # :", "A().f"),
    "comprehensions": ("def f(x):\n    return sum([x for x in [y for y in (x, 1)]]) if (lambda: x)() else 0", "f"),
    "exceptions": ("def f(x):\n    try:\n        return x + 1\n    except TypeError as error:\n        return error", "f"),
    "match": (
        "def f(x):\n    match x:\n        case {'a': y}:\n            return y\n        case y:\n            return y + 1",
        "f",
    ),
    "tabs": ("class A:\n\tdef f(self, x):\n\t\tif x:\n\t\t\treturn x + 1", "A().f"),
    "invalid escape": ("def f(x):\n    return x + len('\\d') - 1", "f"),
    "name of an outer variable": (
        "def make(f):\n    class A:\n        def f(self, x):\n            return f(x)\n    return A().f",
        "make(int(1).__add__)",
    ),
}
if sys.version_info >= (3, 12):
    FORMS["type parameters"] = (
        "class A[S]:\n    def f[T](self, x: T) -> S:\n        y: T = 1\n        return x + y if (T, S) else 0",
        "A().f",
    )
_number = itertools.count()


@pytest.fixture
def loaded(tmp_path):
    """A function text -> the module that a file of that text is, and the file's path."""

    def load(text):
        path = tmp_path / f"loaded_{next(_number)}.py"
        path.write_text(text + "\n")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module, path

    return load


def doubled(function):
    """function with every return value of its own handed to a helper that doubles it."""
    tree = parse(function)
    for node in ast.walk(tree):
        if isinstance(node, ast.Return):
            node.value = ast.Call(ast.Name("_fuse_twice", ast.Load()), [node.value], [])
    return build(function, tree, {"_fuse_twice": lambda value: value * 2 if isinstance(value, int) else value})


def unchanged(function):
    return build(function, parse(function), {})


@pytest.mark.filterwarnings("error", "ignore:.*invalid escape sequence")
@pytest.mark.parametrize("form", FORMS)
def test_what_is_built_is_the_function(form, loaded):
    text, expression = FORMS[form]
    function = eval(expression, vars(loaded(text)[0]))
    inner = getattr(function, "__func__", function)
    args = (function.__self__,) if inspect.ismethod(function) else ()
    before, code = function(2), inner.__code__
    same = unchanged(inner)
    if form != "super of the file":  # Python 3.12 calls it by another instruction, to the same effect
        assert same.__code__.replace(co_filename="") == code.replace(co_filename="")
    assert getattr(same.__code__, "co_qualname", "") == getattr(code, "co_qualname", "")
    assert same(*args, 2) == before == 3
    if "recursion" not in form:
        assert build(inner, read(inner).tree, {"_fuse_unused": 1})(*args, 2) == 3
        assert doubled(inner)(*args, 2) == 6


def test_a_notebooks_cell_is_read(loaded):
    """A notebook compiles a cell by its statements: a function does not know of the cell's imports."""
    text = "import operator\nclass A:\n    def f(self, x):\n        return operator.add(x, 1)\n"
    names = {"__name__": "notebook"}
    linecache.cache["<cell 1>"] = (len(text), None, text.splitlines(keepends=True), "<cell 1>")
    for statement in ast.parse(text).body:
        exec(compile(ast.Module([statement], []), "<cell 1>", "exec"), names)
    assert doubled(names["A"].f)(None, 2) == 6


def test_variables_and_globals_stay_live(loaded):
    module, _ = loaded(
        "G = 1\ndef make():\n    y = 1\n    def f(x):\n        return x + y + G\n    def set(z):\n        nonlocal y\n        y = z\n    return f, set"
    )
    f, set_y = module.make()
    made = doubled(f)
    assert made(1) == 6
    set_y(10)
    module.G = 100
    assert made(1) == 222


def test_an_empty_variable_stays_empty_until_it_is_set(loaded):
    module, _ = loaded(
        "def make():\n    def f(x):\n        return x + y\n    def set(z):\n        nonlocal y\n        y = z\n    if False:\n        y = 0\n    return f, set"
    )
    f, set_y = module.make()
    made = doubled(f)
    with pytest.raises(NameError):
        made(1)
    set_y(1)
    assert made(1) == 4


EDITS = {
    "another number": ("return x + 1", "return x + 2"),
    "another sign of zero": ("return x + 0.0", "return x + -0.0"),
    "another type": ("return x, 1", "return x, True"),
    "another type in a tuple": ("return x, (1, 2.0)", "return x, (1, 2)"),
    "another set": ("return x in {0.0, 1}", "return x in {0.0, 1.0}"),
    "another operator": ("return x + 1", "return x - 1"),
    "another method": ("return x.one()", "return x.two()"),
    "another global": ("return one(x)", "return two(x)"),
    "another variable": ("y = x; z = x; return y", "y = x; z = x; return z"),
    "another keyword": ("return g(x, a=1)", "return g(x, b=1)"),
    "another text": ("return f'{x}a'", "return f'{x}b'"),
    "another range of try": (
        "y = 0\n    try:\n        y = x\n        y = g(y)\n    except E:\n        pass\n    return y",
        "y = 0\n    y = x\n    try:\n        y = g(y)\n    except E:\n        pass\n    return y",
    ),
    "another lambda": ("return lambda: x", "return lambda: 0"),
    "another inner function": ("def g(): return 1\n    return g", "def g(): return 2\n    return g"),
    "another inner name": ("def g(): return 1\n    return g", "def h(): return 1\n    return h"),
    "another inner default": ("return (lambda a=1: a)(), x", "return (lambda a=2: a)(), x"),
    "a generator": ("return x", "yield x"),
    "a coroutine": ("return x", None),
    "a line before it": ("return x", ""),
    "nothing": ("return x", "return x )"),
}  # fmt: skip


@pytest.mark.parametrize("edit", EDITS)
def test_a_file_edited_since_its_import_is_refused(edit, loaded):
    before, after = EDITS[edit]
    text = "{}def f(x):\n    {}"
    module, path = loaded(text.format("", before))
    if after is None:
        path.write_text(text.format("async ", before))
    else:
        path.write_text(text.format("" if after else "\n", after or before))
    linecache.checkcache(str(path))
    with pytest.raises(SourceError, match=CHANGED):
        read(module.f)


def test_a_file_edited_after_it_was_read_is_refused(loaded):
    module, path = loaded("def f(x):\n    return x + 1")
    assert isinstance(read(module.f).tree, ast.FunctionDef)
    path.write_text("def f(x):\n    return x + 2\n")  # of the same length
    os.utime(path, (1, 1))
    with pytest.raises(SourceError, match=CHANGED):
        read(module.f)
    path.write_text("def f(x):\n    return x + 1\n")
    os.utime(path, (2, 2))
    assert doubled(module.f)(1) == 4


def test_a_function_made_under_a_files_name_is_refused(loaded):
    _, path = loaded("def f(x):\n    return x + 1")
    names = {}
    exec(compile("def f(x):\n    return x + 2", str(path), "exec"), names)
    with pytest.raises(SourceError, match=CHANGED):
        read(names["f"])


def test_the_code_that_runs_is_the_code_that_is_read(loaded):
    module, _ = loaded("def f(x):\n    return x + 1\ndef g(x):\n    return x + 2")
    module.f.__code__ = module.g.__code__
    assert doubled(module.f)(1) == module.f(1) * 2 == 6


def test_the_code_of_a_function_rewritten_by_a_tool_is_refused(loaded):
    module, _ = loaded("def f(x):\n    return x + 1")
    consts = tuple(2 if const == 1 else const for const in module.f.__code__.co_consts)
    code = module.f.__code__.replace(co_consts=consts)
    module.f.__code__ = code if code != module.f.__code__ else code.replace(co_code=code.co_code[:-2] + code.co_code[:2])
    with pytest.raises(SourceError, match=CHANGED):
        read(module.f)


def test_names_changed_by_hand_do_not_matter(loaded):
    module, _ = loaded("class A:\n    def f(self, x):\n        return x + 1\ndef g(self, x):\n    return x + 2")
    f = functools.update_wrapper(module.A.f, module.g)
    del f.__wrapped__
    f.__qualname__ = "B.h"
    made = doubled(f)
    assert (made(None, 1), made.__name__, made.__qualname__) == (4, "g", "B.h")


def test_defaults_are_the_functions_own(loaded):
    module, _ = loaded("def f(x=1, *, y=1):\n    return x + y")
    module.f.__defaults__, module.f.__kwdefaults__ = (2,), {"y": 3}
    assert doubled(module.f)() == 10


REFUSED = {
    "two lambdas": ("f, g = (lambda x: x), (lambda x: x + 1)", "ordinary function"),
    "coroutine": ("async def f(x):\n    return x", "ordinary function"),
    "coroutine of a generator": ("import types\n@types.coroutine\ndef f(x):\n    yield x", CHANGED),
    "cached": ("import functools\n@functools.cache\ndef f(x):\n    return x", "cannot look through"),
    "partial": ("import functools\nf = functools.partial(print, 1)", "no Python function but a partial"),
    "builtin": ("f = print", "no Python function but a builtin"),
    "callable": ("class F:\n    def __call__(self, x):\n        return x\nf = F()", "no Python function but a F"),
    "made by exec": ("exec('def f(x): return x')", "no source to read"),
    "locals": ("def f(x):\n    return locals()", "its own variables"),
    "vars in a list": ("def f(x):\n    return [vars() for _ in x]", "its own variables"),
    "eval": ("def f(x):\n    return eval('x')", "its own variables"),
    "not in the closure": (
        "import functools\ndef d(g):\n    @functools.wraps(g)\n    def f(x, g=g):\n        return g(x)\n    return f\n"
        "@d\ndef f(x):\n    return x",
        "cannot look through",
    ),
    "around itself": ("def d():\n    def f(x):\n        return f\n    f.__wrapped__ = f\n    return f\nf = d()", "cannot look through"),
}  # fmt: skip


@pytest.mark.parametrize("form", REFUSED)
def test_what_is_refused_has_a_reason(form, loaded):
    text, reason = REFUSED[form]
    with pytest.raises(SourceError, match=reason):
        read(loaded(text)[0].f)


def test_eval_with_names_of_its_own_is_read(loaded):
    module, _ = loaded("def f(x):\n    return eval('y + 1', {'y': x}) if vars(f) == {} else dir(x)")
    assert doubled(module.f)(1) == 4


def _counted(function):
    @functools.wraps(function)
    def counted(*args, **kwargs):
        nonlocal calls
        calls += 1
        return function(*args, **kwargs), calls

    calls = 0
    counted.label = "counted"
    return counted


def _twice_held(function):
    also = function

    @functools.wraps(function)
    def held(*args, **kwargs):
        return function(*args, **kwargs) if args else also(*args, **kwargs)

    return held


DECORATORS = {
    "contextmanager": (contextlib.contextmanager, lambda made: made.__enter__()),
    "no_grad": (torch.no_grad(), lambda made: made),
    "autocast": (torch.autocast("cpu"), lambda made: made),
    "user's": (_counted, lambda made: made[0]),
    "holds it twice": (_twice_held, lambda made: made),
    "two": (lambda function: torch.no_grad()(_counted(function)), lambda made: made[0]),
}


@pytest.mark.parametrize("name", DECORATORS)
def test_decorators_are_looked_through_and_put_back(name, loaded):
    decorate, result = DECORATORS[name]
    text = "def f(x: int, y=1):\n    '''Adds.'''\n    {} x + y"
    module, _ = loaded(text.format("yield" if name == "contextmanager" else "return"))
    decorated = decorate(module.f)
    inner = undecorated(decorated)
    assert inner is module.f
    tree = parse(inner)
    tree.body[-1].value = (
        ast.BinOp(tree.body[-1].value, ast.Add(), ast.Constant(5)) if name != "contextmanager" else tree.body[-1].value
    )
    again = redecorated(decorated, build(inner, tree, {}))
    more = 0 if name == "contextmanager" else 5
    assert result(again(1, y=2)) == result(decorated(1, y=2)) + more == 3 + more
    assert undecorated(again) is not inner
    assert undecorated(decorated) is inner
    assert inspect.signature(again) == inspect.signature(decorated)
    for attribute in ("__name__", "__qualname__", "__module__", "__doc__", "__annotations__"):
        assert getattr(again, attribute) == getattr(decorated, attribute)
    assert again.__dict__.keys() == decorated.__dict__.keys()


def test_a_decorators_variables_are_shared_with_the_decorated_function(loaded):
    decorated = _counted(loaded("def f(x):\n    return x")[0].f)
    again = redecorated(decorated, unchanged(undecorated(decorated)))
    assert [decorated(0)[1], again(0)[1], decorated(0)[1]] == [1, 2, 3]
    assert again.label == "counted"


def test_a_decorator_without_wraps_is_the_function(loaded):
    text = "def d(g):\n    def h(x):\n        return g(x) + 1\n    return h\n@d\ndef f(x):\n    return x + 1"
    f = loaded(text)[0].f
    assert read(f).tree.name == "h"
    assert doubled(f)(1) == 6
