"""`vau data annotate`: clips become a table of VAU-Bench's format, whatever a model answers."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ml_collections import ConfigDict

from tests import tables, video_files
from tests.chat_server import Answer, Server, pictures, serve
from vau_jax.common.files import InputError
from vau_jax.configs import annotate as annotate_config
from vau_jax.data_prep import annotate, check
from vau_jax.datasets import vau_bench
from vau_jax.tasks.description import SECTIONS

SEEN = "A man with a hood climbs over the fence of a yard and takes a box away."
GOOD = {
    "class": "Stealing",
    "start": 1.0,
    "end": 2.5,
    "key_object": "a man with a hood",
    "reasoning": {title: f"{title} is seen." for title in SECTIONS},
    "question": "What does the man take?",
    "options": ["a box from the yard", "a bag from the car", "a bike from the wall", "a tool from the shed"],
    "answer": "a box from the yard",
}
NORMAL = GOOD | {"class": "Normal", "start": 0, "end": 0}


def text_of(request: dict[str, Any]) -> str:
    return "\n".join(
        m["content"] if isinstance(m["content"], str) else m["content"][-1]["text"] for m in request["messages"]
    )


def replies(annotation: Callable[[str], Any] = lambda asked: GOOD) -> Callable[[dict[str, Any], int], Answer]:
    """A description first, then what `annotation` makes of the prompt."""

    def script(request: dict[str, Any], number: int) -> Answer:
        asked = text_of(request)
        answer = annotation(asked) if "Classes:" in asked else {"description": SEEN}
        return Answer(answer if isinstance(answer, str) else json.dumps(answer))

    return script


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    """Five clips of 3 s, in a folder below too."""
    for number, name in enumerate(("a.mp4", "b.mp4", "c.mp4", "deep/d.mp4", "deep/e.mp4")):
        (tmp_path / "clips" / name).parent.mkdir(parents=True, exist_ok=True)
        video_files.write(tmp_path / "clips" / name, 60, size=(160 + 16 * number, 120))
    return tmp_path / "clips"


@pytest.fixture
def config(clips: Path) -> ConfigDict:
    c = annotate_config.get_config()
    c.videos, c.annotator.model, c.annotator.frames, c.annotator.retries = str(clips), "m", 3, 0
    return c


@pytest.fixture
def answered(config: ConfigDict) -> Iterator[Callable[..., Server]]:
    """Starts a server of the given script, which the config names."""
    started = []

    def start(script: Callable[[dict[str, Any], int], Answer]) -> Server:
        opened = serve(script)
        started.append(opened)
        server = opened.__enter__()
        config.annotator.url = server.url
        return server

    yield start
    for one in started:
        one.__exit__(None, None, None)


def test_a_folder_becomes_a_table_that_check_passes(
    config: ConfigDict, answered: Callable[..., Server], tmp_path: Path, clips: Path
) -> None:
    server = answered(replies())
    card = annotate.run(config, tmp_path / "out")
    rows, audit = vau_bench.load(tmp_path / "out" / "annotations.csv", "msad")
    assert check.problems(rows, audit, clips, probe=True) == []
    assert [row.video for row in rows] == ["a.mp4", "b.mp4", "c.mp4", "deep/d.mp4", "deep/e.mp4"]
    assert all(row.interval == (1.0, 2.5) and row.anomaly_class == "Stealing" for row in rows)
    assert all(
        row.options["ABCD".index(row.answer)] == GOOD["answer"] and list(row.reasoning) == list(SECTIONS)
        for row in rows
    )
    assert len({row.answer for row in rows}) > 1, "the options stand in different orders"
    assert card["tasks"] == dict.fromkeys(("qa", "grounding", "classification", "description"), 5)
    assert all(len(pictures({"messages": request["messages"][:2]})) == 3 for request in server.requests)
    assert "video of 3.0 s, taken at 0.0, 1.0, 2.0 s" in text_of(server.requests[0])


def test_the_second_question_has_the_description(
    config: ConfigDict, answered: Callable[..., Server], tmp_path: Path
) -> None:
    server = answered(replies())
    annotate.run(config, tmp_path / "out")
    assert sum(f"Description: {SEEN}" in text_of(request) for request in server.requests) == 5


BAD = {
    "unknown class": GOOD | {"class": "Theft"},
    "start and end are no numbers": GOOD | {"start": "1:00"},
    "the interval is not inside of the video": GOOD | {"end": 90.0},
    "a normal video has an interval": GOOD | {"class": "Normal"},
    "no key_object": GOOD | {"key_object": " "},
    "no question": GOOD | {"question": 7},
    "sections of the reasoning are lacking": GOOD | {"reasoning": {"Location": "yard"}},
    "not four options": GOOD | {"options": ["a", "b"]},
    "two options are the same": GOOD | {"options": ["a", "A", "b", GOOD["answer"]]},
    "the answer is no option": GOOD | {"answer": "A"},
}


@pytest.mark.parametrize("reason", [*BAD, "not JSON"])
def test_what_breaks_a_rule_is_asked_again_with_the_reason(
    reason: str, config: ConfigDict, answered: Callable[..., Server], tmp_path: Path
) -> None:
    bad = BAD.get(reason, "<html>")
    server = answered(replies(lambda asked: GOOD if "This breaks a rule" in asked else bad))
    card = annotate.run(config, tmp_path / "out")
    told = "unknown class" if reason == "not JSON" else reason
    assert card["annotated"] == 5 and sum(f"This breaks a rule: {told}" in text_of(r) for r in server.requests) == 5


def test_what_stays_wrong_is_rejected_and_counted(
    config: ConfigDict, answered: Callable[..., Server], tmp_path: Path
) -> None:
    config.rounds = 2
    number = iter(range(100))
    server = answered(
        replies(lambda asked: BAD["two options are the same"] if next(number) % 5 == 0 or "breaks" in asked else GOOD)
    )
    card = annotate.run(config, tmp_path / "out")
    assert (card["annotated"], card["rejected"]) == (4, {"two options are the same": 1})
    assert len((tmp_path / "out" / "rejected.jsonl").read_text().splitlines()) == 1
    assert len(server.requests) == 5 + 5 + 1


def test_a_damaged_video_is_listed_and_stops_nothing(
    config: ConfigDict, answered: Callable[..., Server], tmp_path: Path, clips: Path
) -> None:
    (clips / "b.mp4").write_bytes(b"broken")
    answered(replies())
    card = annotate.run(config, tmp_path / "out")
    assert (card["videos"], card["annotated"], card["rejected"]) == (5, 4, {"the video cannot be read": 1})


def test_a_repeated_call_asks_for_new_videos_alone(
    config: ConfigDict, answered: Callable[..., Server], tmp_path: Path, clips: Path
) -> None:
    server = answered(replies())
    annotate.run(config, tmp_path / "out")
    first = (tmp_path / "out" / "annotations.csv").read_text()
    annotate.run(config, tmp_path / "out")
    assert len(server.requests) == 10 and (tmp_path / "out" / "annotations.csv").read_text() == first
    video_files.write(clips / "f.mp4", 40, size=(120, 160))
    card = annotate.run(config, tmp_path / "out")
    assert (len(server.requests), card["annotated"]) == (12, 6)


def test_the_card_has_tokens_and_cost(config: ConfigDict, answered: Callable[..., Server], tmp_path: Path) -> None:
    """The server reports 100 and 10 tokens an answer."""
    config.annotator.price_prompt, config.annotator.price_completion = 1e6, 2e6
    answered(replies())
    card = annotate.run(config, tmp_path / "out")
    assert card["tokens_this_call"] == {"prompt": 1000, "completion": 100} and card["cost_this_call"] == 1200.0
    assert (card["model"], card["classes"]) == ("m", {"Stealing": 5})


def test_a_known_class_is_kept(config: ConfigDict, answered: Callable[..., Server], tmp_path: Path) -> None:
    config.classes = tables.write(tmp_path / "known" / "classes.csv", [{"video": "a.mp4", "class": "Normal"}])
    answered(replies(lambda asked: NORMAL if "another class than the known one" in asked else GOOD))
    card = annotate.run(config, tmp_path / "out")
    rows, _ = vau_bench.load(tmp_path / "out" / "annotations.csv", "msad")
    assert (rows[0].anomaly_class, rows[0].interval, card["annotated"]) == ("Normal", "normal", 5)


def test_what_a_model_writes_stays_text(config: ConfigDict, answered: Callable[..., Server], tmp_path: Path) -> None:
    """Quotes, rows, sections and code in its answers change nothing about the table."""
    hostile = 'x",y\n"z.mp4",a\r\n### Conclusion: <script>__import__("os")</script>'
    options = [f"{hostile} {n}" for n in range(4)]
    answered(replies(lambda asked: GOOD | {"question": hostile, "options": options, "answer": options[2]}))
    annotate.run(config, tmp_path / "out")
    rows, audit = vau_bench.load(tmp_path / "out" / "annotations.csv", "msad")
    assert len(rows) == 5 == audit.rows and not audit.entries
    assert rows[0].question == 'x",y "z.mp4",a Conclusion: <script>__import__("os")</script>'


def test_a_users_mistakes_are_one_line(config: ConfigDict, answered: Callable[..., Server], tmp_path: Path) -> None:
    answered(replies())
    with pytest.raises(InputError, match=r"has the class 'Theft': expected one of"):
        config.classes = tables.write(tmp_path / "known" / "classes.csv", [{"video": "a.mp4", "class": "Theft"}])
        annotate.run(config, tmp_path / "out")
    config.classes, config.videos = "", str(tmp_path / "nowhere")
    with pytest.raises(InputError, match="does not exist"):
        annotate.run(config, tmp_path / "out")
    config.videos = ""
    with pytest.raises(InputError, match="expected a folder of videos"):
        annotate.run(config, tmp_path / "out")


def test_no_annotation_at_all_is_an_error_with_the_reasons(
    config: ConfigDict, answered: Callable[..., Server], tmp_path: Path
) -> None:
    answered(lambda request, number: Answer(status=401))
    with pytest.raises(InputError, match=r"none of 5 videos was annotated: \{'no answer': 5\}"):
        annotate.run(config, tmp_path / "out")
