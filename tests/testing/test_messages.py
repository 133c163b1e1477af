"""Each check of the conformance suite says what must hold."""

import ast
from pathlib import Path

import deqcore.testing

FOLDER = Path(deqcore.testing.__file__).parent


def test_no_check_is_a_bare_assertion():
    bare = [
        f"{path.relative_to(FOLDER)}:{node.lineno}"
        for path in sorted(FOLDER.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Assert) and node.msg is None
    ]
    assert not bare, f"say what must hold and what to do: {bare}"
