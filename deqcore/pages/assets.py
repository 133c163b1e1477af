"""Style, script and content security policy of a page."""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from importlib.resources import files


@cache
def style() -> str:
    """Return the style sheet: light and dark, wide and narrow."""
    return (files("deqcore.pages") / "page.css").read_text(encoding="utf-8")


@cache
def script() -> str:
    """Return the script: it sorts tables and shows the values of charts. A page is complete without it."""
    return (files("deqcore.pages") / "page.js").read_text(encoding="utf-8")


def policy() -> str:
    """Return the content security policy: no network, and no script but `script()`, which its hash names."""
    digest = base64.b64encode(hashlib.sha256(script().encode()).digest()).decode()
    return f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'"


def assets() -> dict[str, object]:
    """Return `style`, `script` and `policy` for a template, not to be escaped."""
    from markupsafe import Markup

    return {"style": Markup(style()), "script": Markup(script()), "policy": Markup(policy())}
