"""Filling a template: each page is a block of `base.html.j2`."""

from __future__ import annotations

from typing import Any

from deqcore.pages.assets import assets


def render(package: str, template: str, *, title: str, language: str = "en", **values: Any) -> str:
    """Fill a template that extends `base.html.j2`; a value that it lacks is an error.

    Args:
        package: the package that holds the template, such as "deqcore.monitor".
        template: its file.
        title: of the page.
        language: of its text, "en" or "ja".
        **values: what the template names.
    """
    from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

    loader = ChoiceLoader([PackageLoader(name, "") for name in (package, "deqcore.pages")])
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template(template).render(title=title, language=language, **values, **assets())
