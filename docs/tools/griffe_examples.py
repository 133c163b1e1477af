"""For mkdocstrings: the section "Example:" of our docstrings is the one that it calls "Examples:"."""

from __future__ import annotations

import re
from typing import Any

import griffe

SECTION = re.compile(r"^( *)Example:$", re.MULTILINE)


class Examples(griffe.Extension):
    """Without it a doctest is taken for running text, and its prompts for quotations."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rename the section in each docstring, once it has been read."""
        if obj.docstring is not None:
            obj.docstring.value = SECTION.sub(r"\1Examples:", obj.docstring.value)
