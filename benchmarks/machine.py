"""What the benchmarks say about the machine, and about how much their times vary."""

import platform
from pathlib import Path

import numpy as np


def processor() -> str:
    """The name of the processor as Linux gives it, elsewhere that of its architecture."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def spread(seconds: list[float]) -> dict[str, float]:
    """The extremes and quartiles of times."""
    low, first, third, high = np.percentile(seconds, (0, 25, 75, 100))
    return {"min": float(low), "quartile_1": float(first), "quartile_3": float(third), "max": float(high)}
