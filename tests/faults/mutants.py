"""Random mutants of the solvers, strategies and linear algebra, and what the conformance suite says of them.

A small mutator of our own: mutmut copies the whole tree and generates every mutant before it runs one, cosmic-ray
edits the files of the working tree in place, and neither draws a sample by a seed. Here a mutant is a syntax tree with
one node changed, planted like a fault (`planting.py`), so that nothing is written beside the source.

What is not mutated, as no check of behaviour could see it or as unit tests own it: messages and `raise`, docstrings,
annotations, the validation of options (`__post_init__`), defaults of options and class attributes.
"""

from __future__ import annotations

import ast
import copy
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

COMPARE = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
}
BINARY = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.Pow: ast.Mult,
}
PACKAGES = ("solvers", "backward", "linear")


@dataclass(frozen=True)
class Mutant:
    """One changed place.

    Attributes:
        module: import name.
        line: of the place.
        column: of the place.
        before: the changed expression as it was.
        after: and as it is.
        source: of the whole module, changed.
    """

    module: str
    line: int
    column: int
    before: str
    after: str
    source: str

    def __str__(self) -> str:
        return f"{self.module}:{self.line}:{self.column}  {self.before}  →  {self.after}"


def modules(root: Path) -> dict[str, str]:
    """Import names and sources of everything that is mutated."""
    found = {}
    for package in PACKAGES:
        paths = sorted((root / package).glob("*.py"))
        if not paths:
            raise FileNotFoundError(f"{root / package} has no modules: PACKAGES must name folders that exist.")
        for path in paths:
            if path.stem != "__init__":
                found[f"deqcore.{package}.{path.stem}"] = path.read_text(encoding="utf-8")
    return found


def places(tree: ast.AST) -> Iterator[ast.AST]:
    """Nodes inside functions that may be changed."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name != "__post_init__":
            for statement in node.body:
                yield from _inside(statement)


def _inside(node: ast.AST) -> Iterator[ast.AST]:
    if isinstance(node, ast.Raise | ast.FunctionDef):
        return  # functions within functions are found on their own
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return  # docstrings
    if isinstance(node, ast.AnnAssign):
        if node.value is not None:
            yield from _inside(node.value)
        return
    yield node
    for child in ast.iter_child_nodes(node):
        yield from _inside(child)


def changes(node: ast.AST) -> Iterator[ast.AST]:
    """What a node may become."""
    if isinstance(node, ast.Compare) and type(node.ops[0]) in COMPARE and len(node.ops) == 1:
        yield ast.Compare(node.left, [COMPARE[type(node.ops[0])]()], node.comparators)
    elif isinstance(node, ast.BinOp) and type(node.op) in BINARY:
        yield ast.BinOp(node.left, BINARY[type(node.op)](), node.right)
    elif isinstance(node, ast.BoolOp):
        yield ast.BoolOp(ast.Or() if isinstance(node.op, ast.And) else ast.And(), node.values)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.Invert | ast.Not):
        yield node.operand
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield ast.Constant(not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        yield ast.Constant(node.value + 1 if isinstance(node.value, int) else 2 * node.value + 1.0)
    elif isinstance(node, ast.IfExp):
        yield ast.IfExp(ast.UnaryOp(ast.Not(), node.test), node.body, node.orelse)
    elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("where", "select") and len(node.args) == 3:
        yield ast.Call(node.func, [node.args[0], node.args[2], node.args[1]], node.keywords)


def sample(sources: dict[str, str], count: int, seed: int) -> tuple[list[Mutant], int]:
    """Return some of all mutants, the same ones for the same seed, and how many there are."""
    trees = {module: ast.parse(text) for module, text in sources.items()}
    every = [
        (module, index, number)
        for module, tree in trees.items()
        for index, node in enumerate(places(tree))
        for number, _ in enumerate(changes(node))
    ]
    drawn = random.Random(seed).sample(every, min(count, len(every)))
    return [_made(module, trees[module], index, number) for module, index, number in drawn], len(every)


def _made(module: str, tree: ast.Module, index: int, number: int) -> Mutant:
    changed = copy.deepcopy(tree)
    node = list(places(changed))[index]
    new = list(changes(node))[number]
    before, after = ast.unparse(node), ast.unparse(new)

    class Swap(ast.NodeTransformer):
        def visit(self, each: ast.AST) -> ast.AST:
            return ast.copy_location(new, node) if each is node else self.generic_visit(each)

    source = ast.unparse(ast.fix_missing_locations(Swap().visit(changed)))
    return Mutant(module, getattr(node, "lineno", 0), getattr(node, "col_offset", 0), before, after, source)
