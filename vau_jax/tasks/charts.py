"""Charts of a report as Plotly figures: plain dicts, which the page draws.

Plotly reads HTML in any text, links among it: so all text that comes from files goes through `label`.
"""

import html
from typing import Any

Chart = dict[str, Any]  # title, data, layout


def label(text: Any) -> str:
    """Text from a file as Plotly shows it letter for letter: no tags, entities, links or formulas."""
    return html.escape(str(text), quote=False).replace("$", "&#36;")


def chart(title: str, data: list[dict[str, Any]], **layout: Any) -> Chart:
    """A figure under a title."""
    return {"title": title, "data": data, "layout": layout}
