"""A reward that takes its time, as a judge does: for benchmarks/grpo_step.py --reward-seconds."""

import os
import time
from typing import Any


def wait(completion: str, example: Any) -> float:
    """The number of characters of the completion, after REWARD_SECONDS seconds (an environment variable)."""
    time.sleep(float(os.environ["REWARD_SECONDS"]))
    return float(len(completion))
