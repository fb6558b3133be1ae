"""A reward that takes its time, as a judge does: for benchmarks/grpo_step.py --reward-seconds."""

import os
import time
from typing import Any


def wait(completion: str, example: Any) -> float:
    """Takes REWARD_SECONDS seconds, and then says how long the completion is."""
    time.sleep(float(os.environ["REWARD_SECONDS"]))
    return float(len(completion))
