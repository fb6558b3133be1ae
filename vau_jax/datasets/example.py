"""What is asked about a video, as the pipeline and users' rewards have it."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from vau_jax.common.files import dump_json
from vau_jax.datasets.vau_bench import Row
from vau_jax.tasks.prompts import Reflection


@dataclass(frozen=True)
class Example:
    """One question about one video."""

    row: Row
    task: str
    path: Path
    reflection: Reflection | None = None
    rotation: int = 0  # places that the options are moved by, after they are shuffled

    @property
    def name(self) -> str:
        """`video/task/digest`: what every file calls this example.

        The digest is of what is asked and of the truth, in whatever order the options are. So questions about the same
        video have different names, and a row keeps its name wherever it stands, and in other files.
        """
        row = self.row
        asked = {
            "qa": lambda: (row.question, sorted(row.options), row.options["ABCD".index(row.answer)]),
            "grounding": lambda: row.interval,
            "classification": lambda: row.anomaly_class,
            "description": lambda: (row.description, row.reasoning),
        }[self.task]()
        return f"{row.video}/{self.task}/{hashlib.sha256(dump_json(asked).encode()).hexdigest()[:10]}"

    @property
    def kind(self) -> str:
        """What it has in common with others."""
        return f"{self.task}/{self.row.anomaly_class}"
