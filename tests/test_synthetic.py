"""The rendered data set: real H.264 files, facts that hold, and nothing to learn from the text alone."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import av
import numpy as np

from vau_jax.datasets import reflections, synthetic, vau_bench
from vau_jax.datasets.vau_bench import LABELS
from vau_jax.tasks import parsing, prompts, rewards
from vau_jax.tasks.example import Reflection


def test_files_are_h264_of_the_promised_kind(dataset: Path) -> None:
    sizes = set()
    for path in sorted((dataset / "videos").glob("*.mp4")):
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            assert stream.codec_context.name == "h264"
            assert 10 <= float(stream.average_rate) <= 30
            assert 4 <= stream.frames / float(stream.average_rate) <= 12
            sizes.add(stream.width > stream.height)
    assert sizes == {True, False}


def test_there_are_eight_kinds_of_anomaly_of_vau_bench() -> None:
    assert len(synthetic.ANOMALIES) >= 8
    assert set(synthetic.KINDS) <= set(LABELS)


def test_every_reflection_record_makes_a_completion_that_is_paid_for(dataset: Path) -> None:
    """A wrong draft that is corrected earns 0.5, a right one that is kept 0.75, and half a right interval between."""
    rows, _ = vau_bench.load(dataset / "train.csv")
    records = [json.loads(line) for line in (dataset / "train_reflection.jsonl").read_text().splitlines()]
    by_name = {row.video: row for row in rows}
    for record in records:
        row, task = by_name[record.pop("video")], record.pop("task")
        example = replace(vau_bench.example_of(row, task), reflection=Reflection(**record))
        text = "".join(span.text for span in prompts.completion(example, "reflection"))
        parsed = parsing.parse([text], task, "strict", reflection=True)
        target = parsing.targets_of([example])
        assert 0.5 <= float(rewards.reflection_reward(parsed, target)[0]) <= 0.75


def test_annotations_are_clean(dataset: Path) -> None:
    rows, audit = vau_bench.load(dataset / "train.csv")
    assert audit.entries == []
    assert {row.anomaly_class for row in rows} == set(synthetic.KINDS)
    assert all(len(row.tasks) == 4 and len(row.reasoning) == 6 for row in rows)


def test_an_anomaly_is_visible_inside_its_interval_and_not_outside() -> None:
    """Against the same scene without its event, pixels differ inside the interval only."""
    for label in synthetic.ANOMALIES:
        scene = synthetic.draw_scene("x", 11, synthetic.LAYOUTS["train"], label)
        with_event, without = list(synthetic.frames(scene)), list(synthetic.frames(replace(scene, interval=None)))
        still = replace(scene, interval=None)
        assert len(with_event) == len(without) == round(scene.duration * scene.fps)
        start, end = (round(t * scene.fps) for t in scene.interval)
        first, quiet = synthetic.Painter(scene), synthetic.Painter(still)
        before = [np.array_equal(first.frame(i / scene.fps), quiet.frame(i / scene.fps)) for i in range(start)]
        assert all(before), label
        changed = np.abs(with_event[(start + end) // 2].astype(int) - without[(start + end) // 2]).max(-1) > 60
        assert changed.mean() > 0.01, label


def test_scenes_are_the_same_for_the_same_seed() -> None:
    a, b, other = (synthetic.split_scenes("train", 20, seed) for seed in (1, 1, 2))
    assert a == b != other
    first, again = (next(synthetic.frames(x[0])) for x in (a, b))
    np.testing.assert_array_equal(first, again)


def test_test_layouts_are_never_trained_on() -> None:
    layouts = {split: {s.layout for s in synthetic.split_scenes(split, 300, 0)} for split in ("train", "test")}
    assert not layouts["train"] & layouts["test"]


def test_letters_are_balanced() -> None:
    letters = Counter(synthetic.annotation(s)["Correct Option"] for s in synthetic.split_scenes("train", 2000, 0))
    assert min(letters.values()) > 0.2 * 2000


def test_options_alone_do_not_tell_the_answer() -> None:
    """A rule learnt from option texts alone (how often each is right when it stands there) stays at chance."""
    rows = [synthetic.annotation(s) for s in synthetic.split_scenes("train", 6000, 0)]
    options = [[row[column] for column in vau_bench.OPTION_COLUMNS] for row in rows]
    right = [o["ABCD".index(row["Correct Option"])] for o, row in zip(options, rows, strict=True)]
    shown = Counter(o for four in options[:3000] for o in four)
    wins = Counter(right[:3000])
    guesses = [max(four, key=lambda o: wins[o] / shown[o]) for four in options[3000:]]
    assert np.mean([g == r for g, r in zip(guesses, right[3000:], strict=True)]) < 0.25 + 3 * np.sqrt(0.19 / 3000)


def test_intervals_begin_at_random_times() -> None:
    starts = [s.interval[0] / s.duration for s in synthetic.split_scenes("train", 2000, 0) if s.interval]
    assert np.std(starts) > 0.15


def test_some_drafts_are_wrong(dataset: Path) -> None:

    drafts = [r.draft_is_right for r in reflections.load(dataset / "train_reflection.jsonl").values()]
    assert 0.2 < 1 - np.mean(drafts) < 0.6


def test_a_second_call_renders_nothing(dataset: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in dataset.rglob("*")}
    synthetic.make_dataset(dataset, {"train": 24, "val": 0, "test": 12}, seed=7)
    assert {p: p.stat().st_mtime_ns for p in dataset.rglob("*")} == before
