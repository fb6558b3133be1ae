"""Charts of a report as Plotly figures: plain dicts, which the page renders.

Plotly interprets HTML in any text, links included: all text from files goes through `label`.
"""

import html
from typing import Any

Chart = dict[str, Any]  # title, data, layout


def label(text: Any) -> str:
    """Text from a file such that Plotly shows it literally: no tags, entities, links or formulas."""
    return html.escape(str(text), quote=False).replace("$", "&#36;")


def chart(title: str, data: list[dict[str, Any]], **layout: Any) -> Chart:
    """A figure under a title."""
    return {"title": title, "data": data, "layout": layout}
