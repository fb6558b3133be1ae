"""Annotation files for tests."""

import csv
from pathlib import Path

BASE = {
    "Video Name": "Assault_2.mp4",
    "Question": "What is seen?",
    "Option 1": "a fight",
    "Option 2": "a fire",
    "Option 3": "a crash",
    "Option 4": "nothing",
    "Correct Option": "A",
    "Key Object": "two men",
    "Description": "Two men fight.",
    "Reasoning": (
        "### Specific Anomaly Type: fight ### Location: street ### Key Evidence: fists ### Detailed Explanation: a row "
        "### Cause and Effect: a quarrel ### Conclusion: a fight"
    ),
    "Anomaly Class": "Assault",
    "Start Time": "4.0",
    "End Time": "35.0",
}


def read(path: str | Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def write(path: str | Path, rows: list[dict[str, str]]) -> str:
    """Returns the path."""
    Path(path).parent.mkdir(exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    return str(path)
