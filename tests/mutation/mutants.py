"""Mutants of the rules: one small change each, in a function of spepolicy/machine, mmu or judge.

The sample is fixed before anything is tried: every possible mutant has a key (package, function, statement, change),
and those whose hash with `SEED` is smallest are in the sample. A change of the source elsewhere leaves them in it, and
so does moving a function to another file of its package.
"""

from __future__ import annotations

import ast
import copy
import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("spepolicy/machine", "spepolicy/mmu", "spepolicy/judge")
SAMPLE = 300
SEED = "spepolicy, issue 9"

_COMPARE = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
}  # fmt: skip
_BINARY = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.FloorDiv, ast.FloorDiv: ast.Mult, ast.Div: ast.Mult,
    ast.Mod: ast.FloorDiv, ast.LShift: ast.RShift, ast.RShift: ast.LShift, ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd, ast.BitXor: ast.BitAnd, ast.Pow: ast.Mult,
}  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """One change of one file."""

    path: str  # below the root
    function: str
    line: int  # of the statement's first line, today
    last: int  # of its last line; of what has a body, of its head
    was: str  # the expression or statement
    now: str
    key: str  # package, function, statement, was, now, and which of its kind in the package it is
    index: int  # the how-manieth possible mutant of its file it is


def _skipped(node: ast.AST) -> bool:
    """Whether *node* is none that a lane or a judgement runs through: messages, types, what only compiled code has."""
    if isinstance(node, ast.Raise | ast.Assert | ast.JoinedStr):
        return True
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "COMPILED", "not COMPILED")


def _removable(node: ast.AST) -> bool:
    """Whether *node* is a statement that can be left out and leaves a program: names stay bound."""
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Call)
    if isinstance(node, ast.Assign):
        return isinstance(node.targets[0], ast.Attribute | ast.Subscript)
    return isinstance(node, ast.Continue | ast.Break)


def _changes(node: ast.AST) -> Iterator[ast.AST | None]:
    """Yield what may stand in the place of *node*; None: nothing (a statement)."""
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in _COMPARE:
        changed = copy.deepcopy(node)
        changed.ops = [_COMPARE[type(node.ops[0])]()]
        yield changed
        if isinstance(node.ops[0], ast.Lt | ast.LtE | ast.Gt | ast.GtE):
            yield ast.UnaryOp(ast.Not(), copy.deepcopy(node))
    elif isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        yield ast.BinOp(copy.deepcopy(node.left), _BINARY[type(node.op)](), copy.deepcopy(node.right))
    elif isinstance(node, ast.BoolOp):
        other = ast.Or() if isinstance(node.op, ast.And) else ast.And()
        yield ast.BoolOp(other, copy.deepcopy(node.values))
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.Invert | ast.USub):
        yield copy.deepcopy(node.operand)
    elif isinstance(node, ast.Constant) and type(node.value) in (int, bool):
        yield ast.Constant(not node.value if isinstance(node.value, bool) else node.value + 1)
    elif isinstance(node, ast.IfExp):
        yield ast.IfExp(copy.deepcopy(node.test), copy.deepcopy(node.orelse), copy.deepcopy(node.body))
    elif isinstance(node, ast.AugAssign) and type(node.op) in _BINARY:
        yield ast.AugAssign(copy.deepcopy(node.target), _BINARY[type(node.op)](), copy.deepcopy(node.value))
        yield None
    elif _removable(node):
        yield None


@dataclass
class _Place:
    """Where one node hangs in its tree."""

    parent: ast.AST
    field: str
    position: int | None
    node: ast.AST
    statement: ast.stmt
    function: str


def _places(parent: ast.AST, statement: ast.stmt | None, function: str) -> Iterator[_Place]:
    for name, value in ast.iter_fields(parent):
        if name in ("decorator_list", "annotation", "returns", "type_comment", "args") and isinstance(
            parent, ast.FunctionDef | ast.AnnAssign
        ):
            continue
        for position, node in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if not isinstance(node, ast.AST) or _skipped(node):
                continue
            inside = function
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                inside = f"{function}.{node.name}".strip(".")
            own = node if isinstance(node, ast.stmt) else statement
            in_function = function and isinstance(own, ast.stmt)
            if in_function and not isinstance(node, ast.FunctionDef | ast.ClassDef):
                assert own is not None
                yield _Place(parent, name, position, node, own, function)
            if isinstance(node, ast.ClassDef):
                for method in node.body:
                    if isinstance(method, ast.FunctionDef):
                        yield from _places(method, None, f"{inside}.{method.name}")
            else:
                yield from _places(node, own if function or isinstance(node, ast.FunctionDef) else None, inside)


def _head_end(statement: ast.stmt) -> int:
    body = getattr(statement, "body", None)
    return body[0].lineno - 1 if body else statement.end_lineno or statement.lineno


def _possible(
    path: str, tree: ast.Module, seen: Counter[str] | None = None
) -> Iterator[tuple[Mutant, _Place, ast.AST | None]]:
    seen = Counter() if seen is None else seen
    package = path.rpartition("/")[0]
    index = 0
    for place in _places(tree, None, ""):
        for change in _changes(place.node):
            was = ast.unparse(place.node)
            now = ast.unparse(ast.fix_missing_locations(change)) if change is not None else "pass"
            text = ast.unparse(place.statement).partition("\n")[0]
            key = "\t".join((package, place.function, text, was, now))
            seen[key] += 1
            line = place.statement.lineno
            last = max(line, _head_end(place.statement))
            yield Mutant(path, place.function, line, last, was, now, f"{key}\t{seen[key]}", index), place, change
            index += 1


def mutants_of(path: str, seen: Counter[str] | None = None) -> list[Mutant]:
    """Return every possible mutant of the file *path*, below the root. *seen* counts those of equal text that other
    files of its package have: no two keys are the same.
    """
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    return [mutant for mutant, _, _ in _possible(path, tree, seen)]


def every_mutant() -> list[Mutant]:
    """Return every possible mutant."""
    files = [file for package in PACKAGES for file in sorted((ROOT / package).rglob("*.py"))]
    seen: Counter[str] = Counter()
    return [mutant for file in files for mutant in mutants_of(file.relative_to(ROOT).as_posix(), seen)]


def sample(count: int = SAMPLE) -> list[Mutant]:
    """Return the fixed sample, in the order of its hashes."""
    return sorted(every_mutant(), key=lambda it: hashlib.sha256(f"{SEED}\t{it.key}".encode()).digest())[:count]


def source_of(mutant: Mutant) -> str:
    """Return the source of the mutant's file with its change."""
    tree = ast.parse((ROOT / mutant.path).read_text(encoding="utf-8"))
    for one, place, change in _possible(mutant.path, tree):
        if one.index == mutant.index:
            put: ast.AST = ast.Pass() if change is None else change
            if place.position is None:
                setattr(place.parent, place.field, put)
            else:
                getattr(place.parent, place.field)[place.position] = put
            return ast.unparse(ast.fix_missing_locations(tree)) + "\n"
    raise LookupError(f"{mutant.path} has no such mutant")
