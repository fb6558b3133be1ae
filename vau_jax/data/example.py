"""What is asked about a video, as the pipeline and users' rewards have it."""

from dataclasses import dataclass
from pathlib import Path

from vau_jax.data.annotations import Row
from vau_jax.data.prompts import Reflection


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
        return f"{self.row.video}/{self.task}" + (f"/{self.rotation}" if self.rotation else "")

    @property
    def kind(self) -> str:
        """What it has in common with others."""
        return f"{self.task}/{self.row.anomaly_class}"
