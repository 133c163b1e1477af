"""Check the prose of the code and the pages: phrases to avoid, openings of docstrings, the form of error messages.

    python docs/tools/prose.py             # packages, pages, examples, tests and settings
    python docs/tools/prose.py PATH ...    # these files and folders

Comments, docstrings and strings of Python files are read, Markdown without its code, and the texts of TOML files and
Jinja templates. `prose_allowed.txt` beside this file lists the right uses of a phrase. Needs the standard library only.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, TypeAlias

ROOT = Path(__file__).resolve().parents[2]
ALLOWED = Path(__file__).with_name("prose_allowed.txt")
SUFFIXES: Final = (".py", ".md", ".toml", ".j2")
SKIPPED: Final = re.compile(
    r"/(\.\w[^/]*|build|dist|site|__pycache__|node_modules)/|docs/tools/prose|docs/test_prose|\.ja\.md$|/ja/"
)
FOLDERS: Final = (
    "deqcore",
    "backends",
    "docs",
    "examples",
    "benchmarks",
    "release",
    "tests",
    *(path.name for pattern in ("*.md", "*.toml") for path in sorted(ROOT.glob(pattern))),
)

Where: TypeAlias = Literal["text", "docstring", "comment", "string"]


@dataclass(frozen=True)
class Piece:
    """Prose from one place of a file.

    Attributes:
        line: where it begins, from 1.
        text: line breaks kept.
        where: what kind of place it is.
    """

    line: int
    text: str
    where: Where


@dataclass(frozen=True)
class Finding:
    """A sentence to rewrite: the file, its line, what is wrong, and the words."""

    path: Path
    line: int
    fault: str
    words: str

    def __str__(self) -> str:
        return f"{self.path.relative_to(ROOT)}:{self.line}: {self.fault}: {' '.join(self.words.split())}"


ANYWHERE: Final[tuple[Where, ...]] = ("text", "docstring", "comment", "string")
CODE: Final[tuple[Where, ...]] = ("docstring", "comment")
# pattern, where it is wrong, what to write
PHRASES: Final[tuple[tuple[str, tuple[Where, ...], str], ...]] = (
    (r"\btold\b", ANYWHERE, "say who reports what"),
    (r"\bin words\b", ANYWHERE, "'as text'"),
    (r"\bwithout a word\b", ANYWHERE, "'silently'"),
    (r"(?<!there )\b(?:is|are|was|were) no\b(?! (?:longer|more|less|larger|smaller|fewer|better|worse|one)\b)",
     ANYWHERE, "'is not a …'"),
    (r"\blikewise\b", ANYWHERE, "'also', or repeat the noun"),
    (r"\banew\b", ANYWHERE, "'again'"),
    (r"\bof one's own\b", ANYWHERE, "'your own', 'custom'"),
    (r"\bin place of\b", ANYWHERE, "'instead of'"),
    (r"\bnobody\b", ANYWHERE, "name who does not"),
    (r"\bconfess(?:es|ed)?\b", ANYWHERE, "'reports'"),
    (r"\b(?:is|are|was|were|not) (?:not )?to be had\b|\bcannot be had\b", ANYWHERE, "'is not available'"),
    (r"\b(?:came|comes|come) of it\b", ANYWHERE, "'the result'"),
    (r"\b(?:is|are) expected(?! to\b)", ("string",), "'must be … (got …)'"),
    (r"\bthere (?:is|are|was|were) [^.;:?]{1,60}, but\b", ANYWHERE, "subject first"),
    (r"\bas ever\b", ANYWHERE, "'as usual'"),
    (r"\b(?:go|goes|went) on\b(?! top\b)", ANYWHERE, "'continue'"),
    (r"\bbut for\b", ANYWHERE, "'except for'"),
    (r"\bstands? (?:in|at|on|above|beside)\b", ANYWHERE, "'is in', 'has'"),
    (r"\bbeside (?:f|z)\b", ANYWHERE, "'without', 'in addition to'"),
    (r"\b(?:is|are|was|were) to be\b", ANYWHERE, "'must be', or the verb alone"),
    (r"\b(?:say|says|know|knows) nothing\b", ANYWHERE, "what it does not show"),
    (r"\bknows? no\b", ANYWHERE, "'does not have'"),
    (r"\bin company\b", ANYWHERE, "'in a batch'"),
    (r"\bby heart\b", ANYWHERE, "'memorise'"),
    (r"\bhears? (?:from|of)\b", ANYWHERE, "'reads'"),
    (r"\bwhoever\b", ANYWHERE, "name the person or the caller"),
    (r"\bwho (?:uses|wants|has|asks|needs|reads|gives|calls)\b", ("comment",), "name the caller"),
    (r"\b(?:previously|formerly|refactored|TODO|FIXME|XXX|WIP)\b", CODE, "history belongs to the commit"),
    (r"\bissue #?\d+", (*CODE, "string"), "history belongs to the commit"),
)  # fmt: skip
COMPILED: Final = tuple((re.compile(p, re.IGNORECASE), where, advice) for p, where, advice in PHRASES)

# First words that no imperative sentence has; and nouns that opened docstrings here.
OPENINGS: Final = frozenset(
    """
    a an the this that these those it its each every all any some no none one two both other another what whatever
    whether how where wherever which who whose why when if as for of from in into by with without on at to like
    is are was were has have does true false yes not only never always so such same between after before until
    inner outer largest smallest least most first last next new old
    array arrays function value values result index indices product gradient jacobian norm evaluation evaluations
    state status row sample memory error message text settings options config a dict none
    """.split()  # noqa: SIM905 - a list of words
)
S_VERBS: Final = frozenset(("address", "compress", "cross", "discuss", "express", "focus", "pass", "press", "process"))
ING_VERBS: Final = frozenset(("bring", "string", "ring"))
ATTRIBUTES: Final = frozenset(("property", "cached_property", "fixture", "overload"))

MESSAGES: Final = re.compile(r"(Error|Warning)$")
REMEDY: Final = re.compile(
    r"\b(must|cannot|can not|use|pass|give|set|install|choose|call|write|move|make|leave|lower|raise|start|register|"
    r"rename|remove|update|upgrade|add|put|return|keep|name|did you mean|available|registered|its options are|see|"
    r"cast|convert|compute|try|reduce|check|run|read|open|close|take|turn|run|unset|delete|loosen|load|save|increase|"
    r"decrease|wrap|replace|look|import|implement|define|differentiate|let|enable|disable|fit)\b",
    re.IGNORECASE,
)  # fmt: skip


def pieces(path: Path) -> Iterator[Piece]:
    """Yield the prose of one file, in the order of its kinds."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        yield from _of_python(text)
    elif path.suffix == ".md":
        yield from _of_lines(_without_code(text))
    elif path.suffix == ".toml":
        yield from _of_lines(re.sub(r"^[ \t]*#+ ?", "", text, flags=re.M))
    else:
        yield from _of_lines(
            re.sub(r"{%.*?%}|{{.*?}}|{#.*?#}|<(style|script)\b.*?</\1>|<[^>]*>", _blank, text, flags=re.S)
        )


def _blank(match: re.Match[str]) -> str:
    return "\n" * match[0].count("\n") or "·"


def _without_code(text: str) -> str:
    text = re.sub(r"^( *)(```+|~~~+).*?^\1\2 *$", _blank, text, flags=re.S | re.M)
    return re.sub(r"`[^`\n]*`|\]\([^)]*\)", _blank, text)


def _of_lines(text: str) -> Iterator[Piece]:
    """Split a text into paragraphs."""
    for match in re.finditer(r"(?:.+\n?)+", text):
        yield Piece(text.count("\n", 0, match.start()) + 1, match[0], "text")


def _of_python(text: str) -> Iterator[Piece]:
    tree = ast.parse(text)
    docstrings = {id(node) for node in _docstring_nodes(tree)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            inside = id(node) in docstrings
            yield Piece(node.lineno, _prose(node.value) if inside else node.value, "docstring" if inside else "string")
    yield from _comments(text)


def _prose(docstring: str) -> str:
    """Blank out the examples and the code of a docstring."""
    text = re.sub(r"^ *(?:>>>|\.\.\. ).*$", "", docstring, flags=re.M)
    return re.sub(r"``?[^`\n]*``?", "·", text)


def _docstring_nodes(tree: ast.Module) -> Iterator[ast.Constant]:
    for node in ast.walk(tree):
        for statement in getattr(node, "body", ()) if not isinstance(node, ast.Lambda | ast.IfExp) else ():
            value = statement.value if isinstance(statement, ast.Expr) else None
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                yield value


def _comments(text: str) -> Iterator[Piece]:
    """Yield the comments, those of successive lines as one."""
    block: list[str] = []
    start = last = 0
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type != tokenize.COMMENT:
            continue
        line, words = token.start[0], token.string.lstrip("#: ")
        if block and line != last + 1:
            yield Piece(start, "\n".join(block), "comment")
            block = []
        start = start if block else line
        block.append(re.sub(r"`[^`]*`", "·", words))
        last = line
    if block:
        yield Piece(start, "\n".join(block), "comment")


def faults(path: Path) -> Iterator[Finding]:
    """Yield what is wrong in one file."""
    for piece in pieces(path):
        joined = re.sub(r"\s", " ", piece.text)
        for pattern, where, advice in COMPILED:
            for match in pattern.finditer(joined) if piece.where in where else ():
                line = piece.line + piece.text.count("\n", 0, match.start())
                words = joined[max(0, match.start() - 40) : match.end() + 40]
                yield Finding(path, line, f"{match[0]!r}, write {advice}", words)
    if path.suffix == ".py" and not path.is_relative_to(ROOT / "tests"):  # a test's docstring states a fact
        tree = ast.parse(path.read_text(encoding="utf-8"))
        yield from _openings(path, tree)
        yield from _messages(path, tree)


def _openings(path: Path, tree: ast.Module) -> Iterator[Finding]:
    """Find docstrings of functions that do not open with an imperative verb."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or _is_attribute(node):
            continue
        docstring = ast.get_docstring(node)
        if docstring and not is_imperative(docstring):
            yield Finding(path, node.lineno + 1, "open with an imperative verb", docstring.split("\n")[0][:60])


def _is_attribute(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    names = {
        part.id if isinstance(part, ast.Name) else part.attr
        for each in node.decorator_list
        for part in ast.walk(each)
        if isinstance(part, ast.Name | ast.Attribute)
    }
    return bool(names & ATTRIBUTES)  # fmt: skip


def is_imperative(docstring: str) -> bool:
    """Decide by the first word whether a docstring may open with a verb; one that opens with a symbol passes."""
    match = re.match(r"[A-Za-z][\w'’-]*", docstring)
    if match is None:
        return True
    word = match[0].lower()
    if word in OPENINGS:
        return False
    if word.endswith("s") and word not in S_VERBS:
        return False
    return not word.endswith("ing") or word in ING_VERBS


def _messages(path: Path, tree: ast.Module) -> Iterator[Finding]:
    """Find messages of errors and warnings without an end or without a remedy."""
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        if not call.args or not _makes_error(call.func):
            continue
        text = _template(call.args[0])
        if text is None or " " not in text:
            continue
        if not re.search(r"([.?!][\"')]?|[{}…])$", text.rstrip()):
            yield Finding(path, call.args[0].lineno, "end the message with a period", text[-60:])
        if not REMEDY.search(text) and "{…}" not in text[-6:]:
            yield Finding(path, call.args[0].lineno, "say how to fix it", text[-80:])


def _makes_error(function: ast.expr) -> bool:
    if isinstance(function, ast.Attribute):
        return function.attr == "warn" and isinstance(function.value, ast.Name) and function.value.id == "warnings"
    names = ("ValueError", "TypeError", "KeyError", "AttributeError", "NotImplementedError", "IndexError", "cls")
    return isinstance(function, ast.Name) and (
        function.id not in names and bool(MESSAGES.search(function.id)) and function.id != "AssertionError"
    )


def _template(node: ast.expr) -> str | None:
    """Return the text of a string or an f-string, `{…}` for what it inserts; None for anything else."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "{…}" for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = _template(node.left), _template(node.right)
        return None if left is None and right is None else f"{left or '{…}'}{right or '{…}'}"
    return None


def files(places: Iterable[str]) -> Iterator[Path]:
    """Yield the files to read below these files and folders."""
    for place in places:
        path = (ROOT / place).resolve()
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.suffix in SUFFIXES and file.is_file() and not SKIPPED.search(f"/{file.relative_to(ROOT)}"):
                yield file


def allowed() -> list[tuple[str, str]]:
    """Read the pairs of path and words that are right as they are."""
    lines = [line for line in ALLOWED.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    return [(path.strip(), words.strip()) for path, _, words in (line.partition("|") for line in lines)]


def check(places: Iterable[str]) -> list[Finding]:
    """Return all findings below these places that are not allowed."""
    exceptions = allowed()
    return [
        finding
        for path in files(places)
        for finding in faults(path)
        if not any(str(path.relative_to(ROOT)) == at and words in str(finding) for at, words in exceptions)
    ]


def main(arguments: list[str]) -> int:
    """Print the findings and return the exit status: 1 if there are any."""
    findings = check(arguments or FOLDERS)
    for finding in findings:
        print(finding)
    print(f"{len(findings)} sentences to rewrite." if findings else "The prose check found nothing.")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
