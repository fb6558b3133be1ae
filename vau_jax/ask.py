"""Asks a model about one video.

    python -m vau_jax.ask --model=DIR --video=FILE --task=qa --option "a fire" --option "a fall" ... "What happens?"
    python -m vau_jax.ask --model=DIR --video=FILE --task=ground|classify
    python -m vau_jax.ask --model=DIR --video=FILE --task=describe "What does the man in red do?"

DIR is a Hugging Face folder or the workdir of a run; a run is asked in the words, and sees the frames, of its training.
Prints the answer, and the interval where the task has one.
"""

import argparse
from dataclasses import asdict
from pathlib import Path

from absl import logging
from ml_collections import ConfigDict

from vau_jax import parsing
from vau_jax.data import prompts
from vau_jax.data.annotations import LABELS, Row
from vau_jax.data.pipeline import video_options
from vau_jax.files import InputError, exit_on_input_error, read_json
from vau_jax.vlm import DTYPES, VideoLM

TASKS = {"qa": "qa", "ground": "grounding", "classify": "classification", "describe": "description"}


def answer(
    model: str,
    video: str,
    task: str,
    question: str = "",
    options: tuple[str, ...] = (),
    dtype: str = "bfloat16",
    max_new_tokens: int = 0,
) -> tuple[str, str]:
    """(what to print, the whole completion) for a question about one video file. Raises InputError.

    `max_new_tokens` 0 is the run's own, or 1024.
    """
    if task == "qa" and (not question or len(options) != 4):
        raise InputError(f'--task=qa wants a question and four --option, found "{question}" and {len(options)}')
    if not Path(video).is_file():
        raise InputError(f"video {video} does not exist: give a video file")
    data = _run_settings(Path(model))
    text = _words(task, question, options, data)
    vlm = VideoLM.load(model, dtype)
    sampled = asdict(video_options(data, vlm.processor.video_options)) if data else {}
    item = {"type": "video", "video": video, **sampled}
    batch = vlm.encode([[{"role": "user", "content": [item, {"type": "text", "text": text}]}]])
    length = max_new_tokens or data.get("max_completion_tokens", 1024)
    completion = vlm.generate(batch, max_new_tokens=length, temperature=0.0).text[0][0]
    reflection = data.get("style") in prompts.WITH_DRAFT
    return read(completion, task, options, reflection), completion


def _run_settings(model: Path) -> ConfigDict:
    """config.data of the run whose workdir or checkpoint `model` is; empty for a model folder."""
    for folder in (model, model.parent.parent):
        if (folder / "config.json").is_file() and (folder / "model").is_dir():
            return ConfigDict(read_json(folder / "config.json")["data"])
    return ConfigDict()


def _words(task: str, question: str, options: tuple[str, ...], data: ConfigDict) -> str:
    """The user's text."""
    if task == "describe" and "description" not in data.get("tasks", ()):
        return question or "Describe what happens in the video."
    row = Row("", "msad", question, options, None, None, None, "", "", {})
    words = prompts.load_words(data.get("templates", ""))
    asked = prompts.question(row, TASKS[task], data.get("style", "think"), data.get("wording", "full"), words)
    return f"{question}\n{asked}" if question and task != "qa" else asked


def read(completion: str, task: str, options: tuple[str, ...], reflection: bool) -> str:
    """What to print: the answer that the completion holds, or the completion where there is none."""
    if task == "describe":
        return parsing.TAG.sub("\n", completion).strip()
    final = parsing.parse([completion], TASKS[task], "lenient", reflection).final
    found = ""
    if task == "qa" and final.choice[0] >= 0:
        found = f"{'ABCD'[final.choice[0]]}. {options[final.choice[0]]}"
    if task == "classify" and final.label[0] >= 0:
        found = LABELS[final.label[0]]
    if task == "ground" and final.kind[0] == parsing.INTERVAL:
        found = "Anomaly\n{:.1f} s to {:.1f} s".format(*final.interval[0])
    if task == "ground" and final.kind[0] == parsing.NORMAL:
        found = "Normal"
    return found or f"no answer in the expected form; the model wrote:\n{completion.strip()}"


def main() -> None:
    parser = argparse.ArgumentParser(description="ask a model about one video")
    parser.add_argument("--model", required=True, help="Hugging Face folder or workdir of a run")
    parser.add_argument("--video", required=True, help="video file")
    parser.add_argument("--task", required=True, choices=TASKS)
    parser.add_argument("--option", action="append", default=[], help="an answer to choose from; qa wants four")
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES)
    parser.add_argument("--max_new_tokens", type=int, default=0, help="0: the run's own, or 1024")
    parser.add_argument("--verbose", action="store_true", help="print the reasoning too")
    parser.add_argument("question", nargs="?", default="")
    a = parser.parse_args()

    logging.set_verbosity(logging.ERROR)  # orbax warns of a file that parameters alone do not need

    def run() -> None:
        found, whole = answer(a.model, a.video, a.task, a.question, tuple(a.option), a.dtype, a.max_new_tokens)
        print(f"{whole.strip()}\n\n{found}" if a.verbose else found)

    exit_on_input_error(run)


if __name__ == "__main__":
    main()
