"""Annotated videos to batches: targets, shuffled options, order, resuming, broken videos."""

import json
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from tests import tables
from tests.records import example
from tests.runs import prompts_of
from vau_jax.common.files import InputError
from vau_jax.configs import demo
from vau_jax.data import loading, pipeline
from vau_jax.data.loading import Loader
from vau_jax.data.pipeline import HostBatch
from vau_jax.data.processor import Processor
from vau_jax.data.video import clips, frame_cache
from vau_jax.data.video.clips import Clip
from vau_jax.data.video.frame_cache import FrameCache
from vau_jax.datasets import reflections
from vau_jax.tasks import parsing, prompts


@pytest.fixture(scope="module")
def processor(model_folder: Path) -> Processor:
    return Processor(model_folder)


@pytest.fixture
def config(dataset: Path) -> ConfigDict:
    c = demo.stage("sft").data
    c.csv, c.videos = str(dataset / "train.csv"), str(dataset / "videos")
    c.reflection, c.style = str(dataset / "train_reflection.jsonl"), "reflection"
    c.max_completion_tokens = 400
    return c


def batches(
    config: ConfigDict, processor: Processor, count: int, state: dict | None = None, rows: range | None = None
) -> tuple[list, dict]:
    examples, _ = pipeline.load_examples(config)
    iterator = pipeline.train_iterator(prompts_of(examples, processor, config), 4, seed=3, rows=rows)
    if state:
        iterator.set_state(state)
    return [next(iterator) for _ in range(count)], iterator.get_state()


def same(a: pipeline.HostBatch, b: pipeline.HostBatch) -> bool:
    pairs = [(a.batch.tokens, b.batch.tokens), (a.batch.vision.patches, b.batch.vision.patches), (a.weights, b.weights)]
    return all(np.array_equal(x, y) for x, y in pairs)


def test_right_completions_earn_every_reward(config: ConfigDict, processor: Processor) -> None:
    """What SFT teaches parses strictly, and its final answer is the truth."""
    found, _ = batches(config, processor, 6)
    for host in found:
        texts = [
            processor.tokenizer.decode(t[m][:-1])
            for t, m in zip(host.completions.tokens[:, 0], host.completions.mask[:, 0], strict=True)
        ]
        parsed = parsing.parse(texts, [item.example.task for item in host.examples], "strict", reflection=True)
        from vau_jax.tasks import rewards

        assert parsed.format_ok.all(), texts
        assert rewards.task_score(parsed.final, host.target).tolist() == pytest.approx([1.0] * len(texts))


def test_wrong_drafts_carry_no_loss_and_all_else_does(config: ConfigDict, processor: Processor) -> None:
    seen = set()
    for host in batches(config, processor, 6)[0]:
        for item in host.examples:
            right = item.example.reflection.draft_is_right
            seen.add(right)
            text = processor.tokenizer.decode(item.target_tokens[item.target_weights > 0])
            assert ("<draft></draft>" in text) == (not right)
            assert text.startswith("<think>") and text.endswith("<|im_end|>")
    assert seen == {True, False}


def test_options_move_with_their_letters(config: ConfigDict, processor: Processor) -> None:
    config.tasks = ("qa",)
    originals = {e.id: e for e in pipeline.load_examples(config)[0]}
    orders = set()
    for host in batches(config, processor, 8)[0]:
        for item in host.examples:
            choices, original = item.example.choices, originals[item.example.id]
            assert choices[item.example.truth["choice"]] == original.choices[original.truth["choice"]]
            assert all(f"{letter}. {text}" in item.prompt for letter, text in zip("ABCD", choices, strict=True))
            orders.add(tuple(original.choices.index(text) for text in choices))
    assert len(orders) > 4


def test_the_order_does_not_depend_on_threads(config: ConfigDict, processor: Processor) -> None:
    one, _ = batches(config, processor, 5)
    config.workers = 4
    four, _ = batches(config, processor, 5)
    assert all(same(a, b) for a, b in zip(one, four, strict=True))


def test_resuming_gives_the_batches_that_were_left(config: ConfigDict, processor: Processor) -> None:
    straight, _ = batches(config, processor, 6)
    _, state = batches(config, processor, 3)
    rest, _ = batches(config, processor, 3, state)
    assert all(same(a, b) for a, b in zip(straight[3:], rest, strict=True))


def items(host: HostBatch) -> list[tuple]:
    """What makes an example what it is: name, prompt (options' order), pixels, target."""
    return [
        (i.example.id, i.prompt, i.encoded.visuals[0].patches.tobytes(), i.target_tokens.tobytes())
        for i in host.examples
    ]


def counts(host: HostBatch, config: ConfigDict) -> dict[str, int]:
    return pipeline.summed(pipeline.problem_counts(item, config) for item in host.examples)


@pytest.mark.parametrize(
    ("processes", "window"),
    [(2, 1), *(pytest.param(*more, marks=pytest.mark.long) for more in ((2, 3), (4, 1), (4, 3)))],
)
def test_processes_share_the_batches_of_one(
    config: ConfigDict, processor: Processor, processes: int, window: int
) -> None:
    config.length_window = window
    alone, _ = batches(config, processor, 5)
    each = 4 // processes
    shares = [batches(config, processor, 5, rows=range(i * each, i * each + each))[0] for i in range(processes)]
    for number, host in enumerate(alone):
        assert [i for share in shares for i in items(share[number])] == items(host)


def test_resuming_with_another_number_of_processes(config: ConfigDict, processor: Processor) -> None:
    config.length_window = 3
    straight, _ = batches(config, processor, 6)
    _, state = batches(config, processor, 3, rows=range(1, 2))
    rest = [batches(config, processor, 3, state, range(2 * i, 2 * i + 2))[0] for i in range(2)]
    for number, host in enumerate(straight[3:]):
        assert items(rest[0][number]) + items(rest[1][number]) == items(host)


def test_batches_hold_examples_of_similar_length(config: ConfigDict, processor: Processor) -> None:
    """Rows that know their videos' durations, as imported ones do; nothing is lost and nothing doubled."""
    examples = [
        replace(e, meta={**e.meta, "duration": 4.0 + 4 * (i % 3), "fps": 10.0, "width": 96, "height": 64})
        for i, e in enumerate(pipeline.load_examples(config)[0])
    ]

    def spread(window: int) -> tuple[float, list[str]]:
        config.length_window = window
        iterator = pipeline.train_iterator(prompts_of(examples, processor, config), 4, seed=3)
        hosts = [next(iterator) for _ in range(18)]
        durations = [[item.example.meta["duration"] for item in host.examples] for host in hosts]
        return np.mean([max(d) - min(d) for d in durations]), [i.example.id for host in hosts for i in host.examples]

    (plain, names), (sorted_, same_names) = spread(1), spread(18)
    assert sorted_ < 1.5 < plain
    assert sorted(names) == sorted(same_names) and len(set(names)) == 72


def test_epochs_differ(config: ConfigDict, processor: Processor) -> None:
    config.max_examples = 4
    found, _ = batches(config, processor, 6)
    assert not any(same(a, b) for i, a in enumerate(found) for b in found[:i])


def test_task_weights_set_the_mix(config: ConfigDict, processor: Processor) -> None:
    config.task_weights.qa = 2.0
    tasks = [item.example.task for host in batches(config, processor, 10)[0] for item in host.examples]
    assert tasks.count("qa") == 20


def test_batches_of_one_example(config: ConfigDict, processor: Processor) -> None:
    """VAU-R1's own batch size; also from a dataset of one example."""
    config.max_examples = 1
    prompts = prompts_of(pipeline.load_examples(config)[0], processor, config)
    iterator = pipeline.train_iterator(prompts, 1, seed=0)
    found = [next(iterator).examples[0].example for _ in range(3)]
    assert {(e.video, e.task) for e in found} == {("train_00000.mp4", "qa")}


def test_the_next_batches_are_loaded_during_a_step(
    config: ConfigDict, processor: Processor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without being asked for: after the first batch is taken, further videos are decoded while the caller is busy."""
    loaded, original = [], loading.Loader.__call__

    def counting(self: Loader, *args: Any) -> Any:
        loaded.append(1)
        return original(self, *args)

    monkeypatch.setattr(loading.Loader, "__call__", counting)
    prompts = prompts_of(pipeline.load_examples(config)[0], processor, config)
    iterator = pipeline.train_iterator(prompts, 2, seed=0)
    next(iterator)
    for _ in range(100):  # the step
        time.sleep(0.1)
        if len(loaded) >= 6:
            break
    assert len(loaded) >= 6, "two batches beyond the one that was taken"


def test_a_broken_video_costs_its_example_and_is_counted(
    config: ConfigDict, processor: Processor, tmp_path: Path, dataset: Path
) -> None:
    import shutil

    shutil.copytree(dataset / "videos", tmp_path / "videos")
    for path in sorted((tmp_path / "videos").glob("train_*"))[:12]:
        path.write_bytes(b"broken")
    config.videos = str(tmp_path / "videos")
    found, _ = batches(config, processor, 8)
    failed = [item for host in found for item in host.examples if item.failure]
    assert failed and not any(item.target_weights.any() for item in failed)
    counted = sum((Counter(counts(host, config)) for host in found), Counter())
    assert counted["data/failed_videos"] == counted["data/failed_videos/unreadable"] == len(failed)


def test_a_video_that_takes_too_long_costs_its_example_and_is_counted(config: ConfigDict, processor: Processor) -> None:
    config.video_seconds = 0.0001
    found, _ = batches(config, processor, 2)
    assert all(item.failure for host in found for item in host.examples)
    assert counts(found[0], config)["data/failed_videos/timeout"] == 4


def test_a_damaged_video_is_used_and_counted(
    config: ConfigDict, processor: Processor, tmp_path: Path, dataset: Path
) -> None:
    import shutil

    from tests import video_files

    folder = tmp_path / "videos"
    shutil.copytree(dataset / "videos", folder)
    bad = video_files.damage(video_files.fast_start(tmp_path / "bad.mp4", count=200), 0.5, 600)
    for path in folder.glob("train_*"):
        shutil.copy(bad, path)
    config.videos = str(folder)
    host = batches(config, processor, 1)[0][0]
    counted = counts(host, config)
    assert (counted["data/damaged_videos"], counted["data/failed_videos"]) == (4, 0)
    assert all(item.damage and item.target_weights.any() for item in host.examples)


def test_frames_come_from_the_cache_and_others_are_counted(
    config: ConfigDict, processor: Processor, tmp_path: Path
) -> None:
    straight, _ = batches(config, processor, 2)
    sampling = processor.sampling(loading.video_options(config, processor.video_options))
    videos = sorted({item.example.media[0] for item in straight[0].examples})
    frame_cache.build(tmp_path, videos, sampling, clips.read, 1, show=lambda done, note: None)
    config.cache = str(tmp_path)
    found, _ = batches(config, processor, 2)
    assert all(same(a, b) for a, b in zip(straight, found, strict=True))
    assert [counts(host, config)["data/not_cached"] for host in found] == [
        sum(item.example.media[0] not in videos for item in host.examples) for host in straight
    ]


def test_batches_are_placed_ahead(config: ConfigDict, processor: Processor) -> None:
    """The next batch is on the device before it is asked for, and the saved position is that of the batch given."""
    placed = []

    def place(host: HostBatch) -> HostBatch:
        placed.append(host)
        return replace(host, batch=jax.device_put(host.batch))

    examples, _ = pipeline.load_examples(config)
    iterator = pipeline.train_iterator(prompts_of(examples, processor, config), 4, seed=3, put=place)
    straight, _ = batches(config, processor, 3)
    first = next(iterator)
    assert isinstance(first.batch.tokens, jax.Array) and same(first, straight[0])
    for _ in range(100):
        time.sleep(0.05)
        if len(placed) > 1:
            break
    assert len(placed) > 1
    rest, _ = batches(config, processor, 2, iterator.get_state())
    assert all(same(a, b) for a, b in zip(straight[1:], rest, strict=True))


def test_the_loss_is_on_the_assistants_tokens_alone(config: ConfigDict, processor: Processor) -> None:
    """Token by token: the prompt's tokens and then the target's are those of the whole conversation in the chat
    template, to the end token that closes the assistant's turn."""
    config.reflection, config.style = "", "think"
    tokenizer = processor.tokenizer
    for host in batches(config, processor, 3)[0]:
        for b, item in enumerate(host.examples):
            completion = tokenizer.decode(item.target_tokens[:-1])
            text = item.prompt.split("<|vision_end|>")[1].split("<|im_end|>")[0]
            content = [{"type": "video"}, {"type": "text", "text": text}]
            messages = [{"role": "user", "content": content}, {"role": "assistant", "content": completion}]
            whole = tokenizer.apply_chat_template(messages, tokenize=False)
            expected = processor.encode_text(whole, item.encoded.visuals).tokens.tolist()
            found = [*item.encoded.tokens, *item.target_tokens]
            assert found == expected[: len(found)]
            assert tokenizer.decode(expected[len(found) :]).strip() == ""
            assert found[-1] == tokenizer.convert_tokens_to_ids("<|im_end|>")
            count = len(item.target_tokens)
            assert host.weights[b, 0].tolist() == [1.0] * count + [0.0] * (host.weights.shape[2] - count)


def test_prompts_in_a_users_words(config: ConfigDict, processor: Processor, tmp_path: Path) -> None:
    words = {
        "questions": {"classification": "Which of {labels}?", "qa": "{options}|{question}"},
        "formats": {"reflection": "FORM"},
    }
    config.templates, config.wording = str(tmp_path / "words.json"), "full"
    Path(config.templates).write_text(json.dumps(words))
    for item in (item for host in batches(config, processor, 3)[0] for item in host.examples):
        assert "FORM" in item.prompt
        if item.example.task == "classification":
            assert "Which of Abuse, Agriculture, " in item.prompt
        if item.example.task == "qa":
            example = item.example
            assert f"A. {example.choices[0]}" in item.prompt and f"|{example.question}" in item.prompt


def test_what_a_row_says_is_no_template() -> None:
    asked = example("qa", question="What is {labels}?")
    assert prompts.question(asked, "think", "short").startswith("What is {labels}?")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "expected an object"),
        ('{"moods": {}}', "'moods' is unknown: expected some of formats, answer_instructions"),
        ('{"formats": {"loud": "x"}}', r"formats\.loud is unknown: expected some of reflection"),
        ('{"formats": {"think": 1}}', "formats must be an object of texts"),
    ],
)
def test_a_bad_file_of_words_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "words.json"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        prompts.load_templates(path)


def test_a_missing_video_is_excluded_and_listed(config: ConfigDict, tmp_path: Path, dataset: Path) -> None:
    import shutil

    shutil.copytree(dataset / "videos", tmp_path / "videos")
    (tmp_path / "videos" / "train_00003.mp4").unlink()
    config.videos = str(tmp_path / "videos")
    examples, audit = pipeline.load_examples(config)
    assert "train_00003.mp4" not in {e.video for e in examples}
    assert [e.video for e in audit.entries if e.reason.startswith("no such video")] == ["train_00003.mp4"]


def test_a_name_that_no_file_can_have_is_excluded_and_listed(config: ConfigDict, tmp_path: Path) -> None:
    name = "x" * 300 + ".mp4"
    path = tmp_path / "long.csv"
    path.write_text(Path(config.csv).read_text().replace("train_00003.mp4", name))
    config.csv = str(path)
    _, audit = pipeline.load_examples(config)
    assert [e.video for e in audit.entries if e.reason.startswith("no such video")] == [name]


def test_an_example_without_its_reflection_record_is_excluded_and_listed(config: ConfigDict, tmp_path: Path) -> None:
    lines = Path(config.reflection).read_text().splitlines(keepends=True)
    path = tmp_path / "some.jsonl"
    path.write_text("".join(lines[1:]))
    config.reflection = str(path)
    examples, audit = pipeline.load_examples(config)
    assert len(examples) == len(lines) - 1
    assert audit.counts() == {("excluded", "no reflection record"): 1}


# --- Several questions about one video ---------------------------------------------------------------------------


@pytest.fixture
def several(config: ConfigDict, tmp_path: Path) -> ConfigDict:
    """The first video's row, the same with another question, and the first once more, its options turned."""
    first = tables.read(config.csv)[0]
    options = [first[f"Option {i}"] for i in (2, 3, 4, 1)]
    letter = "ABCD"[options.index(first[f"Option {'ABCD'.index(first['Correct Option']) + 1}"])]
    turned = {**first, **{f"Option {i}": text for i, text in enumerate(options, 1)}, "Correct Option": letter}
    rows = [first, {**first, "Question": "Who comes last?"}, turned]
    config.csv = tables.write(tmp_path / "several.csv", rows)
    config.reflection, config.tasks = "", ("qa", "grounding")
    return config


def test_questions_about_one_video_are_examples_of_their_own(several: ConfigDict) -> None:
    examples, _ = pipeline.load_examples(several)
    asked = [(e.task, e.question if e.task == "qa" else "") for e in examples]
    assert asked == [("qa", examples[0].question), ("grounding", ""), ("qa", "Who comes last?")]
    assert len({e.id for e in examples}) == 3


def test_what_is_asked_twice_is_left_out_and_listed(several: ConfigDict) -> None:
    _, audit = pipeline.load_examples(several)
    again = [(e.line, e.what) for e in audit.entries if e.reason.startswith("asked by an earlier row")]
    assert again == [(2, "grounding"), (3, "qa"), (3, "grounding")]


def test_a_name_does_not_depend_on_the_order_of_options(several: ConfigDict, processor: Processor) -> None:
    examples, _ = pipeline.load_examples(several)
    loader = Loader(processor, several, FrameCache(None), augment=False, blind=True)
    shown = [loader(examples[0], np.random.default_rng(seed)).example for seed in range(4)]
    assert len({e.choices for e in shown}) > 1 and {e.id for e in shown} == {examples[0].id}


@pytest.fixture
def record(several: ConfigDict, dataset: Path) -> dict[str, Any]:
    """A reflection record of the first video's question, which names no example; grounding is not asked."""
    several.tasks = ("qa",)
    video = pipeline.load_examples(several)[0][0].video
    records = map(json.loads, (dataset / "train_reflection.jsonl").read_text().splitlines())
    return next(r for r in records if (r["video"], r["task"]) == (video, "qa"))


def write_records(path: Path, *records: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return str(path)


def test_a_reflection_record_goes_to_the_question_it_names(
    several: ConfigDict, record: dict[str, Any], tmp_path: Path
) -> None:
    names = [e.id for e in pipeline.load_examples(several)[0]]
    records = [{**record, "example": name, "reflect": name} for name in reversed(names)]
    several.reflection = write_records(tmp_path / "r.jsonl", *records)
    assert [e.reflection.reflect for e in pipeline.load_examples(several)[0]] == names


def test_a_reflection_record_that_could_be_of_two_questions_is_of_none(
    several: ConfigDict, record: dict[str, Any], tmp_path: Path
) -> None:
    names = [e.id for e in pipeline.load_examples(several)[0]]
    several.reflection = write_records(tmp_path / "r.jsonl", record, {**record, "example": names[1]})
    examples, audit = pipeline.load_examples(several)
    assert [e.id for e in examples] == names[1:]
    assert [e.line for e in audit.entries if "a video with several questions" in e.reason] == [1]


def test_a_second_reflection_record_of_an_example_is_refused(record: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"line 2 is a second record of train_00000\.mp4/qa"):
        reflections.load(write_records(tmp_path / "r.jsonl", record, record))


def test_no_usable_example_is_an_error(config: ConfigDict, tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    config.videos = str(tmp_path / "videos")
    with pytest.raises(InputError, match="no usable example"):
        pipeline.load_examples(config)


def test_blind_frames_are_grey(config: ConfigDict, processor: Processor) -> None:
    loader = Loader(processor, config, FrameCache(None), augment=False, blind=True)
    item = loader(pipeline.load_examples(config)[0][0], np.random.default_rng(0))
    assert np.unique(item.encoded.visuals[0].patches).tolist() == [loading.GREY]


def test_augmentation_changes_pixels_and_nothing_else(rng: np.random.Generator) -> None:
    clip = Clip(rng.integers(0, 256, (8, 28, 56, 3), dtype=np.uint8), 0.5)
    changed = loading.augment(clip, rng)
    assert changed.frames.shape == clip.frames.shape
    assert changed.seconds_per_frame == clip.seconds_per_frame
    assert (changed.frames != clip.frames).mean() > 0.5


def test_a_bad_reflection_record_is_named(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text('{"video": "a.mp4", "task": "qa"}\n')
    with pytest.raises(InputError, match="line 1"):
        reflections.load(path)


def test_section_weights_reach_their_tokens(config: ConfigDict, processor: Processor) -> None:
    config.section_weights.update({"think": 0.0, "reflect": 0.5, "revise": 0.25, "answer": 2.0, "wrong_draft": 0.75})
    for item in (item for host in batches(config, processor, 3)[0] for item in host.examples):
        by_weight = {
            weight: processor.tokenizer.decode(item.target_tokens[item.target_weights == weight])
            for weight in set(item.target_weights.tolist())
        }
        assert by_weight[0.0].startswith("<think>")
        assert "<reflect>" in by_weight[0.5] and "<revise>" in by_weight[0.25] and "<answer>" in by_weight[2.0]
        assert (0.75 in by_weight) == (not item.example.reflection.draft_is_right)
        assert item.target_weights[-1] == 1.0
