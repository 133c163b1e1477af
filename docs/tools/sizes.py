"""Compare the size of the packages of two checkouts, and the processor time that their imports take.

python docs/tools/sizes.py EARLIER [--imports RUNS]
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("deqcore", "backends/deqcore_numpy", "backends/deqcore_torch", "backends/deqcore_jax", "tests")
IMPORTS = {  # what is timed: what is imported before the clock starts
    "import deqcore": "",
    "import deqcore.plugins": "",
    "import deqcore; deqcore.fixed_point": "import numpy",
    "import deqcore_torch.nn": "import torch",
    "import deqcore_jax.nnx": "import jax, flax.nnx",
}
LONG = 50  # lines of a function
WORDS = {"Any": r"\bAny\b", "cast": r"(?<![\w.])cast\(", "getattr": r"(?<![\w.])getattr\("}


@dataclass(frozen=True)
class Size:
    """The size of a package.

    Attributes:
        files: Python files.
        lines: lines in them.
        functions: lengths in lines of functions outside classes.
        methods: lengths in lines of methods.
        words: lines with a word of `WORDS`, without imports and definitions of it.
    """

    files: int
    lines: int
    functions: list[int]
    methods: list[int]
    words: dict[str, int]


def size(folder: Path) -> Size:
    """Return the size of the Python files below a folder."""
    texts = [path.read_text(encoding="utf-8") for path in sorted(folder.rglob("*.py"))]
    lengths = [length for text in texts for length in _lengths(ast.parse(text), inside=False)]
    lines = [line for text in texts for line in text.splitlines()]
    code = [line for line in lines if not re.match(r"\s*(from|import) |\s*def (cast|getattr)", line)]
    return Size(
        len(texts),
        len(lines),
        [length for length, method in lengths if not method],
        [length for length, method in lengths if method],
        {word: sum(bool(re.search(pattern, line)) for line in code) for word, pattern in WORDS.items()},
    )


def _lengths(node: ast.AST, inside: bool) -> Iterator[tuple[int, bool]]:
    """Yield the length of each function below a node, and whether it is a method."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield (child.end_lineno or child.lineno) - child.lineno + 1, inside
        yield from _lengths(child, isinstance(child, ast.ClassDef))


def table(before: Path, after: Path) -> str:
    """Return the table of sizes, each as before → after."""
    head = ["package", "files", "lines", "functions", "methods", "median length", f"> {LONG} lines", *WORDS]
    rows = [head, ["---"] * len(head)]
    for package in PACKAGES:
        pair = [size(root / package) for root in (before, after)]
        cells = [[one.files, one.lines, len(one.functions), len(one.methods), *_spread(one)] for one in pair]
        counts = [[*cell, *one.words.values()] for cell, one in zip(cells, pair, strict=True)]
        rows.append([f"`{package.rpartition('/')[2]}`", *(f"{a} → {b}" for a, b in zip(*counts, strict=True))])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _spread(one: Size) -> tuple[str, str]:
    lengths = [*one.functions, *one.methods]
    return f"{statistics.median(lengths):g}", f"{sum(length > LONG for length in lengths)}"


def seconds(root: Path, statement: str) -> float:
    """Return the processor time of an import in a fresh process."""
    first = f"import time\n{IMPORTS[statement]}\nstart = time.process_time()"
    script = f"{first}\n{statement}\nprint(time.process_time() - start)"
    environment = os.environ | {"PYTHONPATH": f"{root}{os.pathsep}{root / 'backends'}"}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment, cwd=root, check=True
    )
    return float(done.stdout)


def imports(before: Path, after: Path, runs: int) -> str:
    """Return the table of imports: the smallest time of several processes, in alternation."""
    rows = ["| import | ms before | ms after |", "|---|---|---|"]
    for statement in IMPORTS:
        times = [(seconds(before, statement), seconds(after, statement)) for _ in range(runs)]
        a, b = (1e3 * min(one) for one in zip(*times, strict=True))
        rows.append(f"| `{statement}` | {a:.1f} | {b:.1f} |")
    return "\n".join(rows)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("earlier", type=Path, help="folder of the earlier checkout")
    parser.add_argument("--imports", type=int, default=0, metavar="RUNS", help="time imports, too")
    given = parser.parse_args()
    earlier = given.earlier.resolve()
    print(table(earlier, ROOT))
    if given.imports:
        print(f"\n{imports(earlier, ROOT, given.imports)}")


if __name__ == "__main__":
    main()
