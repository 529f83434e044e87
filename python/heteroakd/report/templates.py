"""Pages and texts made from the templates beside this file; what stands in a page is escaped."""

from collections.abc import Callable
from typing import Any

import jinja2


def render(template: str, filters: dict[str, Callable[..., Any]], **values: Any) -> str:
    """A template of this folder filled in, no empty lines at its end; a name that was not given is an error."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("heteroakd.report", "."), undefined=jinja2.StrictUndefined,
        autoescape=template.endswith(".html.j2"), trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= filters
    return environment.get_template(template).render(values).rstrip()
