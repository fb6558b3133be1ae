"""The record of a dataset's irregularities: nothing is changed or left out silently."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

from vau_jax.tasks.example import Example

Action = Literal["changed", "excluded", "flagged"]


@dataclass(frozen=True)
class AuditEntry:
    """Something that was changed, excluded or flagged."""

    line: int  # number of the row in the file, 1 for the first after the header
    video: str
    action: Action
    what: str  # the tasks or field concerned
    reason: str


@dataclass
class Audit:
    """What a reader changed, excluded or flagged, row by row."""

    path: str
    protocol: str
    rows: int = 0
    entries: list[AuditEntry] = field(default_factory=list)

    def note(self, line: int, video: str, action: Action, what: str, reason: str) -> None:
        """Adds an entry."""
        self.entries.append(AuditEntry(line, video, action, what, reason))

    def exclude(self, example: Example, reason: str) -> None:
        """Adds an entry about an example that is left out."""
        self.note(example.meta.get("line", 0), example.video, "excluded", example.task, reason)

    def counts(self) -> Counter[tuple[str, str]]:
        """(action, reason) -> number of rows; reasons are cut at the first colon, where the value begins."""
        return Counter((entry.action, entry.reason.split(":")[0]) for entry in self.entries)

    def table(self) -> str:
        """The counts as lines of text, the most frequent first."""
        lines = [f"{self.path}: {self.rows} rows, protocol {self.protocol}"]
        lines += [f"  {n:5d}  {action:9s} {reason}" for (action, reason), n in self.counts().most_common()]
        return "\n".join(lines)
