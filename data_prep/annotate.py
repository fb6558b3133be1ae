"""Annotates new videos by a model behind an endpoint: VAU-Bench's construction, and its format.

    vau data annotate --workdir=DIR --config.videos=FOLDER --config.annotator.url=URL --config.annotator.model=NAME

Each video is asked for twice, as VAU-R1 (arXiv 2505.23504) made its annotations: what is seen, and with that the
class, the interval, the reasoning in six sections and a question with four options. What breaks a rule is asked again
with the complaint, up to config.rounds times, and then rejected. DIR holds annotations.csv (for `vau data check`),
rejected.jsonl, card.json (model, counts, cost) and answers.jsonl, so that no answer is paid for twice: the same call
goes on after a kill, and with more videos.
"""

import csv
import hashlib
import io
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from vau_jax import cli
from vau_jax.common import files, progress
from vau_jax.common.about import about
from vau_jax.common.chat import Chat, Message, frames_content, json_object
from vau_jax.common.files import InputError, check_range, dump_json
from vau_jax.common.progress import Progress
from vau_jax.data.video import clips
from vau_jax.data.video.decode_worker import DecoderPool
from vau_jax.data.video.decoders import VideoError
from vau_jax.data.video.listing import videos_below
from vau_jax.datasets import tables, vau_bench
from vau_jax.tasks.classification import LABELS, NORMAL
from vau_jax.tasks.description import SECTIONS

Record = dict[str, Any]  # what a model answered, by field
LETTERS = "ABCD"
DESCRIBE = (
    "You annotate surveillance videos. You see frames of one video with their times. Answer with a JSON object of one "
    'text: {"description": ...}, three to six plain sentences about the place, the people and things, what they do in '
    "which order, and at what time anything unusual happens. Say only what can be seen."
)
ANNOTATE = (
    "You annotate surveillance videos. You see frames of one video with their times, and its description. Answer with "
    "a JSON object of: class, one of the given classes; start and end, the seconds between which the anomaly is seen, "
    f"both 0 where the class is {NORMAL}; key_object, the people and things that matter, in a few words; reasoning, an "
    f"object with a text for each of {', '.join(SECTIONS)}; question, about what happens, that cannot be answered "
    "without the video; options, a list of four different answers of about the same length, of which one is right; "
    "answer, the right option's text."
)


@dataclass
class Item:
    """A video on its way."""

    path: Path
    name: str  # relative to the folder
    label: str = ""  # given by the user
    seconds: float = 0.0
    description: str = ""
    record: Record = field(default_factory=dict)
    said: list[Message] = field(default_factory=list)  # answers that broke a rule, and what was wrong
    reason: str = ""  # why it is rejected


def run(config: ConfigDict, workdir: str | Path) -> dict[str, Any]:
    """Writes the annotations, and returns the card. Raises InputError for invalid settings."""
    workdir = Path(workdir)
    check_range("rounds", config.rounds, 1)
    check_range("annotator.frames", config.annotator.frames, 1)
    if not config.videos:
        raise InputError("videos is not set: expected a folder of videos, --config.videos=FOLDER")
    folder = Path(config.videos).resolve()
    labels = known_classes(config.classes)
    items = [Item(path, str(path.relative_to(folder))) for path in videos_below(folder)]
    if not items:
        raise InputError(f"{config.videos} has no videos")
    for item in items:
        item.label = labels.get(item.name, labels.get(item.path.name, ""))
    workdir.mkdir(parents=True, exist_ok=True)
    chat, pool = Chat(config.annotator, workdir / "answers.jsonl"), DecoderPool(1, config.video_seconds)
    ask(items, chat, pool, config, "descriptions", describing, read_description)
    ask([item for item in items if not item.reason], chat, pool, config, "annotations", annotating, read_annotation)
    pool.close()
    return write(items, chat, config, workdir)


def known_classes(path: str) -> dict[str, str]:
    """Classes by video of a CSV with the columns video and class. Raises InputError for an unknown one."""
    if not path:
        return {}
    rows, faults = tables.csv_rows(Path(path), tables.read(Path(path), "table of classes"), ("video", "class"), "video")
    if faults:
        raise InputError(f"{path} row {faults[0].number}: {faults[0].reason}")
    if unknown := [row["class"] for _, row in rows if row["class"] not in LABELS]:
        raise InputError(f"{path} has the class {unknown[0]!r}: expected one of {', '.join(LABELS)}")
    return {row["video"]: row["class"] for _, row in rows}


# --- Questions and answers ----------------------------------------------------------------------------------------


def ask(
    items: Sequence[Item],
    chat: Chat,
    pool: DecoderPool,
    config: ConfigDict,
    title: str,
    question: Callable[[Item], tuple[str, str]],
    read: Callable[[Item, Record], str],
) -> None:
    """Asks for all items, in rounds for those whose answer breaks a rule; `read` takes an answer over, or says what is
    wrong. Items without a good answer keep the last `reason`."""
    shown, done = Progress(title, len(items), "video"), 0
    for item in items:
        item.said = []
    left = list(items)
    for number in range(config.rounds):
        asked: list[Item] = []
        for index, reply in chat.ask_all(_questions(left, asked, pool, config, question)):
            item = asked[index]
            item.reason = f"no answer: {reply.error}" if reply.error else read(item, json_object(reply.text) or {})
            if item.reason and not reply.error:
                item.said += [{"role": "assistant", "content": reply.text}, {"role": "user", "content": _told(item)}]
            if not item.reason or number == config.rounds - 1 or reply.error:
                done += 1
                shown.show(done, f"{chat.tokens.total()} tokens, cost {chat.cost:.2f}")
        left = [item for item in asked if item.said and item.reason and not item.reason.startswith("no answer")]


def _told(item: Item) -> str:
    return f"This breaks a rule: {item.reason}. Answer again with the whole JSON object."


def _questions(
    items: Sequence[Item],
    asked: list[Item],
    pool: DecoderPool,
    config: ConfigDict,
    question: Callable[[Item], tuple[str, str]],
) -> Iterator[list[Message]]:
    """The messages for each item whose video can be read; the others have their reason."""
    options = clips.VideoOptions(nframes=config.annotator.frames, min_pixels=64 * 64, max_pixels=512 * 512)
    for item in items:
        try:
            clip = pool.read(item.path, options, factor=2, multiple=1)
        except VideoError as error:
            item.reason = f"the video cannot be read: {error}"
            continue
        item.seconds = clip.duration
        times = ", ".join(f"{time:.1f}" for time in clip.times)
        system, text = question(item)
        lines = [f"The pictures are frames of a video of {clip.duration:.1f} s, taken at {times} s.", text]
        content = [*frames_content(clip.frames), {"type": "text", "text": "\n".join(filter(None, lines))}]
        asked.append(item)
        yield [{"role": "system", "content": system}, {"role": "user", "content": content}, *item.said]


def describing(item: Item) -> tuple[str, str]:
    """The system's and the user's text of the first question."""
    return DESCRIBE, _class_of(item)


def annotating(item: Item) -> tuple[str, str]:
    """Of the second."""
    known = f"Classes: {', '.join(LABELS)}."
    return ANNOTATE, "\n".join(filter(None, [f"Description: {item.description}", known, _class_of(item)]))


def _class_of(item: Item) -> str:
    return f"The class is known: {item.label}." if item.label else ""


def read_description(item: Item, answer: Mapping[str, Any]) -> str:
    """Takes a description over; returns what is wrong with it."""
    text = answer.get("description")
    if not isinstance(text, str) or len(text.split()) < 5:
        return "no description: expected a text of some sentences"
    item.description = _plain(text)
    return ""


def read_annotation(item: Item, answer: Mapping[str, Any]) -> str:
    """Takes an annotation over; returns the first rule that it breaks. The text up to the colon is the same for all of
    a kind."""
    label = answer.get("class")
    if label not in LABELS:
        return f"unknown class: {str(label)[:60]!r} is none of {', '.join(LABELS)}"
    if item.label and label != item.label:
        return f"another class than the known one: {label}, not {item.label}"
    if wrong := _wrong_interval(answer, label, item.seconds) or _wrong_texts(answer) or _wrong_options(answer):
        return wrong
    item.record = dict(answer)
    return ""


def _wrong_interval(answer: Mapping[str, Any], label: str, seconds: float) -> str:
    times = [answer.get("start"), answer.get("end")]
    if not all(isinstance(time, int | float) and not isinstance(time, bool) for time in times):
        return f"start and end are no numbers: {str(times)[:60]}"
    if label == NORMAL:
        return "" if times == [0, 0] else f"a normal video has an interval: {times}, not 0 and 0"
    if not 0 <= times[0] < times[1] <= seconds + 1.0:
        return f"the interval is not inside of the video: {times} of {seconds:.1f} s"
    return ""


def _wrong_texts(answer: Mapping[str, Any]) -> str:
    for name in ("key_object", "question"):
        if not isinstance(answer.get(name), str) or not answer[name].strip():
            return f"no {name}: expected a text"
    reasoning = answer.get("reasoning")
    given = reasoning if isinstance(reasoning, dict) else {}
    lacking = [title for title in SECTIONS if not isinstance(given.get(title), str) or not given[title].strip()]
    return f"sections of the reasoning are lacking: {', '.join(lacking)}" if lacking else ""


def _wrong_options(answer: Mapping[str, Any]) -> str:
    options = answer.get("options")
    if not isinstance(options, list) or len(options) != 4 or not all(isinstance(o, str) and o.strip() for o in options):
        return "not four options: expected a list of four texts"
    if len({_plain(option).casefold() for option in options}) < 4:
        return "two options are the same: expected four different ones"
    if answer.get("answer") not in options:
        return f"the answer is no option: {str(answer.get('answer'))[:60]!r}"
    return ""


def _plain(text: str) -> str:
    """One line, whose words cannot be read as another section or a row."""
    return " ".join(text.replace("#", " ").split())


# --- What is written ----------------------------------------------------------------------------------------------


def row_of(item: Item, seed: int) -> dict[str, str]:
    """An item as a row of VAU-Bench, its options in an order of the seed and its name alone."""
    record = item.record
    rng = np.random.default_rng([seed, *hashlib.sha256(item.name.encode()).digest()])
    options = [_plain(record["options"][i]) for i in rng.permutation(4)]
    reasoning = " ".join(f"### {title}: {_plain(record['reasoning'][title])}" for title in SECTIONS)
    values = (item.name, _plain(record["question"]), *options, LETTERS[options.index(_plain(record["answer"]))])
    values += (_plain(record["key_object"]), item.description, reasoning, record["class"])
    return dict(zip(vau_bench.COLUMNS, (*values, f"{record['start']:g}", f"{record['end']:g}"), strict=True))


def write(items: Sequence[Item], chat: Chat, config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """Writes the table, what was rejected, and the card, which is returned. Raises InputError without any row."""
    kept = [item for item in items if not item.reason]
    rejected = [{"video": item.name, "reason": item.reason} for item in items if item.reason]
    files.write_text(workdir / "rejected.jsonl", "".join(dump_json(one) + "\n" for one in rejected))
    reasons = Counter(one["reason"].partition(":")[0] for one in rejected)
    if not kept:
        raise InputError(
            f"none of {len(items)} videos was annotated: {dict(reasons)}; see {workdir / 'rejected.jsonl'}"
        )
    rows = [row_of(item, config.seed) for item in kept]
    text = io.StringIO()
    writer = csv.DictWriter(text, vau_bench.COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    files.write_text(workdir / "annotations.csv", text.getvalue())
    read, _ = vau_bench.load(workdir / "annotations.csv", "msad")
    longest = [max(row.options, key=len) == row.options[LETTERS.index(row.answer)] for row in read]
    card = {
        "url": config.annotator.url,
        "model": config.annotator.model,
        "temperature": config.annotator.temperature,
        "prompt_hash": hashlib.sha256(f"{DESCRIBE}{ANNOTATE}".encode()).hexdigest()[:16],
        "videos": len(items),
        "annotated": len(kept),
        "classes": dict(Counter(row.anomaly_class for row in read)),
        "tasks": dict(Counter(task for row in read for task in row.tasks)),
        "letters": dict(sorted(Counter(row.answer for row in read).items())),
        "right_option_is_longest": float(np.mean(longest)),
        "rejected": dict(reasons),
        "tokens_this_call": dict(chat.tokens),
        "cost_this_call": chat.cost,
        "about": about(),
        "settings": json.loads(config.to_json_best_effort()),
    }
    files.write_text(workdir / "card.json", dump_json(card, indent=1))
    return card


def summary(config: ConfigDict, workdir: Path) -> str:
    """The last lines of the program."""
    table = workdir / "annotations.csv"
    card = files.read_json(workdir / "card.json")
    title = f"annotated {card['annotated']} of {card['videos']} videos, cost of this call {card['cost_this_call']:.2f}"
    places = {"annotations": table, "rejected": workdir / "rejected.jsonl", "card": workdir / "card.json"}
    return progress.summary(title, places, [("vau", "data", "check", table, config.videos, "--source=msad")])


if __name__ == "__main__":
    cli.main("data annotate")
