"""Evaluations as tests of reports have them, with texts that would like to be code."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests import records
from vau_jax.eval import scores
from vau_jax.eval.records import to_line
from vau_jax.tasks.record import Record

HOSTILE = "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'>"
SECTIONS = "<think>{think}</think><draft>{draft}</draft><reflect>It burns, I see.</reflect><revise>r</revise>"


def record(number: int, task: str, answer: str, drafted: str, failure: str | None = None, **changed: Any) -> Record:
    """A record of a video with a fire from 2 to 6 s."""
    text = SECTIONS.format(think=f"Smoke {HOSTILE}", draft=drafted) + f"<answer>{answer}</answer>"
    if task == "grounding":
        text = text.replace(f"<answer>{answer}", "<answer>Anomaly") + f"<glue>{answer}</glue>"
    made = records.record(task, text, "reflection", failure, video=f"v{number}.mp4", **changed)
    return replace(made, example=f"v{number}.mp4/{task}", question=f"What happens? {HOSTILE}")


def evaluation(folder: Path, evaluated: list[Record], name: str, videos: Path, csv: str = "test.csv") -> Path:
    folder.mkdir(parents=True)
    (folder / "predictions.jsonl").write_text("".join(to_line(r, "f") for r in evaluated))
    result = {
        "name": name,
        "checkpoint": f"runs/{HOSTILE}",
        "blind": False,
        "protocol": "clean",
        "about": {"time": "now", "commit": "abc", "devices": "1 x cpu"},
        "settings": {
            "data": {"csv": csv, "videos": str(videos)},
            "rewards": {"accuracy": 1.0, "format": 0.5, "tiou": 0.0},
        },
        "excluded": [{"video": HOSTILE, "what": "qa", "reason": "no question text"}],
        "failed": 0,
        **scores.score(evaluated, weights={"accuracy": 1.0, "format": 0.5}),
    }
    (folder / "metrics.json").write_text(json.dumps(result))
    return folder


ASKED = [
    ((0, "qa", "B", "A"), {}),  # corrected
    ((0, "grounding", "[2.0, 6.0]", "Anomaly [2.0, 6.0]"), {}),
    ((0, "classification", "Fire", "Fire"), {}),
    ((1, "qa", "C", "B"), {}),  # broken
    ((1, "grounding", "[5.0, 9.0]", "Anomaly [1.0, 5.0]"), {}),  # broken
    ((1, "classification", "???", "Fire"), {"source": "ucf"}),  # broken and unreadable
]
RECORDS = [record(*asked, **changed) for asked, changed in ASKED]
