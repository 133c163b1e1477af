"""Write docs/errors.md: every error and warning of deqcore with the texts that users may read.

    python docs/tools/errors.py

The texts are found in the source, not listed by hand: calls of an error class or of one of its class methods, and
`warnings.warn`. Braces mark what a message inserts, as in the source.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from deqcore.types import Status

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "errors.md"
PACKAGES = ("deqcore", "backends/deqcore_numpy", "backends/deqcore_torch", "backends/deqcore_jax")
OPTION = "ValueError"  # what an option's own check raises; the registry makes a ConfigError of it
INTRO = """# Errors and warnings

Every error that deqcore raises for a user to read is a `deqcore.errors.DeqcoreError`, of a type that says what went
wrong; most are the matching built-in error as well, so that `except ValueError` catches a wrong setting. A message says
what was given, what was expected and what to do. In the templates below, braces stand for what is inserted.

This page is written by `python docs/tools/errors.py`, and a test keeps it true to the code.
"""


@dataclass
class Kind:
    """One class: what it means, what it is a kind of, and its messages with the modules that they come from."""

    name: str
    bases: list[str]
    meaning: str
    messages: dict[str, set[str]] = field(default_factory=dict)


def sources() -> Iterator[tuple[str, ast.Module]]:
    """Dotted name and syntax tree of every module."""
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            name = ".".join(path.relative_to((ROOT / package).parent).with_suffix("").parts)
            yield name.removesuffix(".__init__"), ast.parse(path.read_text(encoding="utf-8"))


def template(node: ast.expr | None) -> str | None:
    """Return the text of a string or an f-string with its insertions in braces; None for anything else."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = template(node.left), template(node.right)
        return None if left is None and right is None else f"{left or '{…}'}{right or '{…}'}"
    if not isinstance(node, ast.JoinedStr):
        return None
    parts = []
    for part in node.values:
        if isinstance(part, ast.FormattedValue):
            conversion = "!r" if part.conversion == ord("r") else ""
            parts.append("{" + ast.unparse(part.value) + conversion + "}")
        elif isinstance(part, ast.Constant):
            parts.append(str(part.value))
    return "".join(parts)


def assigned(tree: ast.Module) -> dict[str, ast.expr]:
    """Collect texts that are put together under a name before they are raised."""
    return {
        node.targets[0].id: node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and template(node.value)
    }


def is_kind(node: ast.ClassDef) -> bool:
    """Say whether a class is an error or a warning of ours."""
    return any(ast.unparse(base).endswith(("Error", "Warning", "Exception")) for base in node.bases)


def collect() -> dict[str, Kind]:
    """Return all classes by name, in the order of `errors.py`, then of the modules."""
    modules = sorted(sources(), key=lambda each: each[0] != "deqcore.errors")
    kinds: dict[str, Kind] = {}
    for _, tree in modules:
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef) and is_kind(node):
                meaning = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
                kinds[node.name] = Kind(node.name, [ast.unparse(base) for base in node.bases], meaning)
    for module, tree in modules:
        for name, text in messages(tree, kinds):
            kinds[name].messages.setdefault(" ".join(text.split()), set()).add(module)
    return kinds


def messages(tree: ast.Module, kinds: dict[str, Kind]) -> Iterator[tuple[str, str]]:
    """Yield class and template of each message in a module."""
    for owner in ast.walk(tree):
        if isinstance(owner, ast.ClassDef) and owner.name in kinds:
            yield from (
                (owner.name, text)
                for node in ast.walk(owner)
                if isinstance(node, ast.Call) and ast.unparse(node.func) == "cls"
                if (text := template(node.args[0]))
            )
    texts = assigned(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name == "__post_init__":
            yield from option_checks(node)
        if not isinstance(node, ast.Call) or not node.args:
            continue
        name = ast.unparse(node.func)
        if name == "warnings.warn":
            category = [ast.unparse(a) for a in (*node.args[1:], *(k.value for k in node.keywords))]
            found = [each for each in category if each in kinds]
            name = found[0] if found else ""
        first = node.args[0]
        found_text = texts.get(first.id) if isinstance(first, ast.Name) else first
        if name in kinds and (text := template(found_text)):
            yield name, text
        if name.endswith(".bad_value") and name.split(".")[0] in kinds and len(node.args) > 3:
            owner, option, _, expected = (template(each) or "{" + ast.unparse(each) + "}" for each in node.args[:4])
            yield name.split(".")[0], f"{owner}: {option} must be {expected} (got {{given!r}})."


def option_checks(function: ast.FunctionDef) -> Iterator[tuple[str, str]]:
    """Collect what the options of a solver, a strategy or a sink refuse."""
    for node in ast.walk(function):
        raised = node.exc if isinstance(node, ast.Raise) else None
        if not isinstance(raised, ast.Call) or ast.unparse(raised.func) != OPTION:
            continue
        if text := template(raised.args[0]):
            yield "ConfigError", f"The {{kind}} {{name!r}} refuses its options: {text.removesuffix('.')}."


def code(text: str) -> str:
    """Make a code span, whatever backticks the text has."""
    fence = "``" if "`" in text else "`"
    pad = " " if "`" in text else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def render(kinds: dict[str, Kind]) -> str:
    """Write the page."""
    lines = [INTRO]
    for kind in kinds.values():
        lines += [f"## {kind.name}", "", f"{kind.meaning}", "", f"A kind of {', '.join(map(code, kind.bases))}.", ""]
        for text, modules in sorted(kind.messages.items()):
            lines.append(f"- {code(text)}  \n  from {', '.join(code(each) for each in sorted(modules))}")
        if kind.messages:
            lines.append("")
    lines += [
        "## How a solve ends",
        "",
        "`Status` of each sample, and the sentence that `Solution.summary()` prints.",
        "",
    ]
    lines += [f"- `{status.name}` ({int(status)}): {status.sentence}" for status in Status]
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(render(collect()), encoding="utf-8")
    print(f"{PAGE.relative_to(ROOT)} is written.")
