"""Read the source of a method as a tree, and make a method from a changed tree."""

from __future__ import annotations
import __future__

import ast
import copy
import functools
import inspect
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

FUTURE = functools.reduce(lambda flags, name: flags | getattr(__future__, name).compiler_flag,
                          __future__.all_feature_names, 0)  # fmt: skip
DYNAMIC = {"locals", "vars", "eval", "exec", "dir"}


class NotReadable(Exception):
    """A method's source cannot be read, or cannot be rewritten; the message says why."""


@dataclass(frozen=True)
class Source:
    """A method's function without its decorators, and the tree of its source."""

    function: types.FunctionType
    node: ast.FunctionDef


@functools.lru_cache(maxsize=1024)
def read(function: Callable[..., Any]) -> Source:
    """Return the source of a method.

    Raises:
        NotReadable: there is none, or the method was compiled from another one.
    """
    inner = inspect.unwrap(function)
    if not isinstance(inner, types.FunctionType):
        raise NotReadable("it is not a Python function")
    code = inner.__code__
    if code.co_flags & (inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR):
        raise NotReadable("it is a generator or a coroutine")
    try:
        source = inspect.getsource(inner)
        indented = source[:1].isspace()
        tree = ast.parse("if True:\n" + source if indented else source)
    except (OSError, TypeError, SyntaxError) as error:
        raise NotReadable("its source cannot be read") from error
    node: Any = tree.body[0]
    node = node.body[0] if indented else node
    if not isinstance(node, ast.FunctionDef) or node.name != inner.__name__ or not node.args.args:
        raise NotReadable("its source is not that of a method")
    ast.increment_lineno(node, code.co_firstlineno - 1 - indented)
    names = {child.id for child in ast.walk(node) if isinstance(child, ast.Name)}
    attributes = {child.attr for child in ast.walk(node) if isinstance(child, ast.Attribute)}
    if any(name.startswith("__") and not name.endswith("__") for name in names | attributes):
        raise NotReadable("it uses names that are private to its class")
    if names & DYNAMIC:
        raise NotReadable(f"it calls {', '.join(sorted(names & DYNAMIC))}")
    layers, wrapper = 0, function
    while wrapper is not inner:
        layers, wrapper = layers + 1, wrapper.__wrapped__  # type: ignore[attr-defined]
    if layers not in (0, len(node.decorator_list)):
        raise NotReadable("it is wrapped by more or fewer decorators than its source shows")
    if not any(_same(found, code) for found in _codes("".join(inspect.findsource(inner)[0]), code.co_name)):
        raise NotReadable("its source has changed since it was compiled")
    return Source(inner, node)


def write(function: Callable[..., Any], node: ast.FunctionDef) -> Callable[..., Any]:
    """Make a method from a changed tree of its source, with the decorators, defaults and globals that it had.

    Raises:
        NotReadable: a decorator cannot be found.
    """
    source = read(function)
    inner = source.function
    result: Any = _compile(source, node)
    result.__defaults__, result.__kwdefaults__ = inner.__defaults__, inner.__kwdefaults__
    result.__annotations__, result.__dict__ = dict(inner.__annotations__), dict(inner.__dict__)
    result.__qualname__, result.__module__, result.__doc__ = inner.__qualname__, inner.__module__, inner.__doc__
    if function is not inner:
        for decorator in reversed(source.node.decorator_list):
            try:
                expression = ast.Expression(copy.deepcopy(decorator))
                result = eval(compile(expression, inner.__code__.co_filename, "eval"), inner.__globals__)(result)
            except Exception as error:
                raise NotReadable(f"its decorator {ast.unparse(decorator)} cannot be applied again") from error
    return result


def _compile(source: Source, node: ast.FunctionDef) -> types.FunctionType:
    """Compile a tree to a function without defaults and decorators, on the cells and globals of the original."""
    inner, code = source.function, source.function.__code__
    node = copy.deepcopy(node)
    node.decorator_list, node.returns = [], None
    node.args.defaults = [ast.Constant(None) for _ in node.args.defaults]
    node.args.kw_defaults = [value and ast.Constant(None) for value in node.args.kw_defaults]
    extra = [argument for argument in (node.args.vararg, node.args.kwarg) if argument is not None]
    for argument in [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, *extra]:
        argument.annotation = None
    template: Any = ast.parse(f"def outer({', '.join(code.co_freevars)}):\n    return 0").body[0]
    template.body = [node, template.body[0]]
    tree = ast.fix_missing_locations(ast.Module([template], []))
    made = compile(tree, code.co_filename, "exec", flags=code.co_flags & FUTURE, dont_inherit=True)
    outer = next(value for value in made.co_consts if isinstance(value, types.CodeType))
    body = next(v for v in outer.co_consts if isinstance(v, types.CodeType) and v.co_name == node.name)
    cells = dict(zip(code.co_freevars, inner.__closure__ or (), strict=True))
    closure = tuple(cells[name] for name in body.co_freevars)
    return types.FunctionType(body, inner.__globals__, inner.__name__, None, closure)


@functools.lru_cache(maxsize=64)
def _codes(source: str, name: str) -> tuple[types.CodeType, ...]:
    """Return all compiled functions of this name in a whole file."""
    found, rest = [], [compile(source, "source", "exec", dont_inherit=True)]
    while rest:
        parts = [value for value in rest.pop().co_consts if isinstance(value, types.CodeType)]
        found += [part for part in parts if part.co_name == name]
        rest += parts
    return tuple(found)


def _same(a: types.CodeType, b: types.CodeType) -> bool:
    keys = ("co_firstlineno", "co_code", "co_names", "co_varnames", "co_freevars", "co_cellvars")
    if any(getattr(a, key) != getattr(b, key) for key in keys) or len(a.co_consts) != len(b.co_consts):
        return False
    return all(
        _same(x, y) if isinstance(x, types.CodeType) and isinstance(y, types.CodeType) else x == y
        for x, y in zip(a.co_consts, b.co_consts, strict=True)
    )
