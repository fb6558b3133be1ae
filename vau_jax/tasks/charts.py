"""Charts of a report as Plotly figures, plain dicts which the page renders, and confusion matrices.

Plotly interprets HTML in any text, links included: all text from files goes through `label`.
"""

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Chart = dict[str, Any]  # title, data, layout


def label(text: Any) -> str:
    """Text from a file such that Plotly shows it literally: no tags, entities, links or formulas."""
    return html.escape(str(text), quote=False).replace("$", "&#36;")


def chart(title: str, data: list[dict[str, Any]], **layout: Any) -> Chart:
    """A figure under a title."""
    return {"title": title, "data": data, "layout": layout}


@dataclass(frozen=True)
class Matrix:
    """How often each true class was answered as each class; a column more stands for unreadable answers."""

    title: str
    labels: Sequence[str]
    counts: Sequence[Sequence[int]]  # [true, predicted]

    def cells(self) -> list[list[tuple[int, float]]]:
        """(count, share of its row, in [0, 1]) of each cell."""
        return [[(int(count), count / (sum(row) or 1)) for count in row] for row in self.counts]
