"""Find GroupNorms that only a SiLU reads in the source of a module's methods, and rewrite these methods.

    h = self.norm(h)                                    h = self.fastddpm_pair(self.norm, self.act, h)
    h = self.act(h)

The source must prove that a rewrite is safe: no name may keep the norm's result, and nothing with an effect may run
between the two calls. The objects that the names stand for are looked up in the module, and again in every call
(`pair.takes`): so the new method means the same even if the module changes. The pair also takes in
`h = h * (1 + scale) + shift` and `h = h + embedding` where the source has them between the calls or before. If an
`if` stands between norm and SiLU, the pair is completed in each of its branches.
"""

from __future__ import annotations

import ast
import copy
import types
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from fastddpm.interop.fusing.pair import is_silu, what
from fastddpm.interop.fusing.source import Source

PURE = (ast.Name, ast.Attribute, ast.Constant, ast.Subscript, ast.Slice, ast.Tuple, ast.List, ast.BinOp, ast.UnaryOp,
        ast.Compare, ast.BoolOp, ast.operator, ast.unaryop, ast.cmpop, ast.boolop, ast.expr_context)  # fmt: skip
NAMES = (ast.Name, ast.Constant, ast.operator, ast.unaryop, ast.expr_context)
PATH = (ast.Call, ast.BinOp, ast.UnaryOp, ast.Attribute, ast.Subscript, ast.Tuple, ast.List, ast.keyword)
SIMPLE = (ast.Assign, ast.AnnAssign, ast.Return, ast.Expr)
ENDS = (ast.Return, ast.Raise, ast.Break, ast.Continue)


@dataclass(frozen=True)
class Site:
    """A pair in the source: the objects it stands for, and the operations taken in with it."""

    norm: nn.GroupNorm
    silu: Any
    adds: bool
    film: bool

    @property
    def what(self) -> str:
        return what(self.adds, self.film)

    @property
    def score(self) -> int:
        return 1 + self.adds + self.film


@dataclass
class Rewriter:
    """Rewrites one method of one module: `Rewriter(module, source).run()`, then `sites`.

    It builds lists of statements, appending one after another. Appending a statement that completes a pair removes
    the statements that made up the pair.
    """

    module: nn.Module
    source: Source
    accepts: Callable[[nn.GroupNorm], bool]
    sites: list[Site] = field(default_factory=list)

    def __post_init__(self) -> None:
        node, code = self.source.node, self.source.function.__code__
        self.self_name = node.args.args[0].arg if not node.args.posonlyargs else node.args.posonlyargs[0].arg
        names = [child for child in ast.walk(node) if isinstance(child, ast.Name)]
        self.stores = Counter(name.id for name in names if isinstance(name.ctx, ast.Store))
        self.loads = Counter(name.id for name in names if not isinstance(name.ctx, ast.Store))
        self.locals = {*code.co_varnames, *code.co_cellvars}
        self.simple = set(code.co_varnames) - set(code.co_cellvars)  # names that no inner function can see
        self.cells = dict(zip(code.co_freevars, self.source.function.__closure__ or (), strict=True))

    def run(self) -> ast.FunctionDef:
        """Return the new tree; that of the source if there is no pair."""
        node = copy.deepcopy(self.source.node)
        if self.stores[self.self_name]:
            return node
        node.body = self._block(node.body)
        return node

    # Lists of statements.

    def _block(self, body: list[ast.stmt]) -> list[ast.stmt]:
        out: list[ast.stmt] = []
        for statement in body:
            if isinstance(statement, (ast.If, ast.For, ast.While, ast.With)):
                statement.body = self._block(statement.body)
            if isinstance(statement, (ast.If, ast.For, ast.While)):
                statement.orelse = self._block(statement.orelse)
            out, sites = self._append(out, statement)
            self.sites += [site for site in dict.fromkeys(sites) if site not in self.sites]
        return out

    def _append(self, out: list[ast.stmt], statement: ast.stmt) -> tuple[list[ast.stmt], list[Site]]:
        """Append a statement to `out`, with the pairs that it completes."""
        if not isinstance(statement, SIMPLE) or statement.value is None:
            return [*out, statement], []
        original = copy.deepcopy(statement)
        taken, sites = 0, []
        loose = False  # whether a SiLU reads a name not yet traced to a norm
        for call in [node for node in ast.walk(statement.value) if isinstance(node, ast.Call)]:
            root: Any = statement.value
            if not self._is_silu_call(call) or not self._in_plain_sight(root, call):
                continue
            first = _comes_first(root, call)
            match = self._match(call, out if first and not taken else [], statement)
            if match is None:
                loose = loose or (first and isinstance(call.args[0], ast.Name))
                continue
            new, count, site = match
            taken = taken or count
            sites.append(site)
            statement = _replace(statement, call, new)  # type: ignore[assignment]
        kept, chain = out[: len(out) - taken], [*out[len(out) - taken :], original]
        if (sites or loose) and kept and isinstance(kept[-1], ast.If):
            sunk = self._sink(kept[-1], chain)
            if sunk is not None and max(s.score for s in sunk[1]) > max((s.score for s in sites), default=0):
                return [*kept[:-1], sunk[0]], sunk[1]
        return [*kept, statement], sites

    def _sink(self, branch: ast.If, chain: list[ast.stmt]) -> tuple[ast.If, list[Site]] | None:
        """Return an `if` with the statements after it moved into both of its branches."""
        branch, found = copy.deepcopy(branch), []
        for name in ("body", "orelse"):
            body = getattr(branch, name)
            if body and isinstance(body[-1], ENDS):
                continue
            for statement in copy.deepcopy(chain):
                body, sites = self._append(body, statement)
                found += sites
            setattr(branch, name, body)
        return (branch, found) if found else None

    # Expressions.

    def _match(self, call: ast.Call, out: list[ast.stmt], user: ast.stmt) -> tuple[ast.Call, int, Site] | None:
        """Return the new call for a SiLU's, how many of the last statements it replaces, and the pair."""
        taken = 0

        def follow(value: ast.expr) -> ast.expr:
            """Return a value; for a name that dies here, the value that the statement before gave it."""
            nonlocal taken, user
            if taken < len(out) and isinstance(value, ast.Name):
                before = out[-1 - taken]
                if self._gives(before, value.id) and self._dies(value.id, user):
                    taken, user = taken + 1, before
                    return before.value  # type: ignore[attr-defined, no-any-return]
            return value

        value, film = follow(call.args[0]), ()
        parts = _scale_and_shift(value)
        if parts is not None:
            value, *film = parts  # type: ignore[assignment]
            value = follow(value)
        if not isinstance(value, ast.Call) or len(value.args) != 1 or value.keywords:
            return None
        norm, silu = self._resolve(value.func), self._resolve(call.func)
        if not isinstance(norm, nn.GroupNorm) or not self.accepts(norm) or isinstance(value.args[0], ast.Starred):
            return None
        mark = taken, user
        x, add = value.args[0], None
        if isinstance(total := follow(x), ast.BinOp) and isinstance(total.op, ast.Add):
            x, add = total.left, total.right
        else:
            taken, user = mark
        arguments = [value.func, call.func, x]
        keywords = [ast.keyword("add", _tuple([add]))] if add is not None else []
        keywords += [ast.keyword("film", _tuple(list(film)))] if film else []
        own = ast.Name(self.self_name, ast.Load())
        new = ast.Call(ast.Attribute(own, "fastddpm_pair", ast.Load()), arguments, keywords)
        key = type(silu) if isinstance(silu, nn.Module) else silu
        return ast.copy_location(new, call), taken, Site(norm, key, add is not None, bool(film))

    def _is_silu_call(self, call: ast.Call) -> bool:
        if len(call.args) != 1 or isinstance(call.args[0], ast.Starred):
            return False
        return all(keyword.arg == "inplace" for keyword in call.keywords) and is_silu(self._resolve(call.func))

    def _in_plain_sight(self, root: ast.expr, call: ast.Call) -> bool:
        """Return whether the names around a call are the method's: it is in no lambda or comprehension."""
        hidden = (ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
        return not any(
            isinstance(node, hidden) and any(child is call for child in ast.walk(node)) for node in ast.walk(root)
        )

    def _gives(self, statement: ast.stmt, name: str) -> bool:
        return isinstance(statement, ast.Assign) and _is_name(statement.targets, name) and name in self.simple

    def _dies(self, name: str, user: ast.stmt) -> bool:
        """Return whether a statement is the only one to read the value that a name has before it."""
        reads = [n for n in ast.walk(user) if isinstance(n, ast.Name) and n.id == name and isinstance(n.ctx, ast.Load)]
        if len(reads) != 1:
            return False
        if isinstance(user, ast.Return) or (isinstance(user, ast.Assign) and _is_name(user.targets, name)):
            return True
        return self.loads[name] == 1 and self.stores[name] == 1

    def _resolve(self, node: ast.expr) -> Any:
        """Return the object that a dotted name stands for in this module, or None. Runs no code of the module."""
        if isinstance(node, ast.Name):
            if node.id == self.self_name:
                return self.module
            if node.id in self.locals:
                return None
            cell = self.cells.get(node.id)
            return cell.cell_contents if cell is not None else self.source.function.__globals__.get(node.id)
        if isinstance(node, ast.Attribute):
            owner = self._resolve(node.value)
            if isinstance(owner, nn.Module):
                return owner.__dict__.get(node.attr, owner._modules.get(node.attr))
            return getattr(owner, node.attr, None) if isinstance(owner, types.ModuleType) else None
        if isinstance(node, ast.Subscript):
            owner = self._resolve(node.value)
            try:
                key = ast.literal_eval(node.slice)
            except ValueError:
                return None
            if isinstance(owner, (nn.ModuleList, nn.Sequential)) and isinstance(key, int):
                return owner[key] if -len(owner) <= key < len(owner) else None
            return owner._modules.get(key) if isinstance(owner, nn.ModuleDict) and isinstance(key, str) else None
        return None


def _scale_and_shift(value: ast.expr) -> tuple[ast.expr, ast.expr, ast.expr] | None:
    """Split `x * (1 + scale) + shift` into x, scale and shift if the last two call nothing.

    Also take `(1 + scale) * x + shift` if x is a name.
    """
    if not (isinstance(value, ast.BinOp) and isinstance(value.op, ast.Add) and isinstance(value.left, ast.BinOp)):
        return None
    product, shift = value.left, value.right
    if not isinstance(product.op, ast.Mult):
        return None
    for x, factor in ((product.left, product.right), (product.right, product.left)):
        if x is product.right and not isinstance(x, ast.Name):
            continue  # the scale is read before x is computed
        if isinstance(factor, ast.BinOp) and isinstance(factor.op, ast.Add):
            for one, scale in ((factor.left, factor.right), (factor.right, factor.left)):
                if isinstance(one, ast.Constant) and one.value == 1 and _is_pure(scale) and _is_pure(shift):
                    return x, scale, shift
    return None


def _is_pure(node: ast.AST) -> bool:
    return all(isinstance(child, PURE) for child in ast.walk(node))


def _comes_first(root: ast.AST, call: ast.AST) -> bool:
    """Return whether `root` evaluates only names and the function to call before the arguments of `call`."""
    if root is call:
        return True
    if not isinstance(root, PATH):
        return False
    for child in ast.iter_child_nodes(root):
        if any(node is call for node in ast.walk(child)):
            return _comes_first(child, call)
        called = isinstance(root, ast.Call) and child is root.func
        if not all(isinstance(node, (*NAMES, ast.Attribute) if called else NAMES) for node in ast.walk(child)):
            return False
    return False


def _is_name(targets: list[ast.expr], name: str) -> bool:
    return len(targets) == 1 and isinstance(targets[0], ast.Name) and targets[0].id == name


def _tuple(values: list[ast.expr]) -> ast.Tuple:
    return ast.Tuple(values, ast.Load())


def _replace(root: ast.AST, old: ast.AST, new: ast.AST) -> ast.AST:
    class Replace(ast.NodeTransformer):
        def visit(self, node: ast.AST) -> Any:
            return new if node is old else self.generic_visit(node)

    return Replace().visit(root)
