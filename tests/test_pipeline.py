"""Annotated videos to batches: targets, shuffled options, order, resuming, broken videos."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import demo
from vau_jax import parsing
from vau_jax.data import pipeline, prompts
from vau_jax.data.pipeline import Loader
from vau_jax.data.processor import Processor
from vau_jax.data.video import Clip, FrameCache
from vau_jax.files import InputError


@pytest.fixture(scope="module")
def processor(model_folder: Path) -> Processor:
    return Processor(model_folder)


@pytest.fixture
def config(dataset: Path) -> ConfigDict:
    c = demo.stage("sft").data
    c.csv, c.videos = str(dataset / "train.csv"), str(dataset / "videos")
    c.reflection = str(dataset / "train_reflection.jsonl")
    c.max_completion_tokens = 400
    return c


def batches(config: ConfigDict, processor: Processor, count: int, state: dict | None = None) -> tuple[list, dict]:
    examples, _ = pipeline.load_examples(config)
    iterator = pipeline.train_iterator(examples, processor, config, batch_size=4, seed=3)
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
        from vau_jax import rewards

        assert parsed.form.all(), texts
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
    originals = {e.name: e.row for e in pipeline.load_examples(config)[0]}
    orders = set()
    for host in batches(config, processor, 8)[0]:
        for item in host.examples:
            row, original = item.example.row, originals[item.example.name]
            assert row.options["ABCD".index(row.answer)] == original.options["ABCD".index(original.answer)]
            assert all(f"{letter}. {option}" in item.prompt for letter, option in zip("ABCD", row.options, strict=True))
            orders.add(tuple(original.options.index(option) for option in row.options))
    assert len(orders) > 4


def test_the_order_does_not_depend_on_threads(config: ConfigDict, processor: Processor) -> None:
    one, _ = batches(config, processor, 5)
    config.threads = 4
    four, _ = batches(config, processor, 5)
    assert all(same(a, b) for a, b in zip(one, four, strict=True))


def test_resuming_gives_the_batches_that_were_left(config: ConfigDict, processor: Processor) -> None:
    straight, _ = batches(config, processor, 6)
    _, state = batches(config, processor, 3)
    rest, _ = batches(config, processor, 3, state)
    assert all(same(a, b) for a, b in zip(straight[3:], rest, strict=True))


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
    iterator = pipeline.train_iterator(pipeline.load_examples(config)[0], processor, config, 1, seed=0)
    assert {next(iterator).examples[0].example.name for _ in range(3)} == {"train_00000.mp4/qa"}


def test_the_next_batches_are_loaded_during_a_step(
    config: ConfigDict, processor: Processor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without being asked for: after the first batch is taken, further videos are decoded while the caller is busy."""
    loaded, original = [], pipeline.Loader.__call__

    def counting(self: Loader, *args: Any) -> Any:
        loaded.append(1)
        return original(self, *args)

    monkeypatch.setattr(pipeline.Loader, "__call__", counting)
    iterator = pipeline.train_iterator(pipeline.load_examples(config)[0], processor, config, 2, seed=0)
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
    assert sum(pipeline.counts(host, config)["data/failed_videos"] for host in found) == len(failed)


def test_a_missing_video_is_excluded_and_listed(config: ConfigDict, tmp_path: Path, dataset: Path) -> None:
    import shutil

    shutil.copytree(dataset / "videos", tmp_path / "videos")
    (tmp_path / "videos" / "train_00003.mp4").unlink()
    config.videos = str(tmp_path / "videos")
    examples, audit = pipeline.load_examples(config)
    assert "train_00003.mp4" not in {e.row.video for e in examples}
    assert [e.video for e in audit.entries if e.reason.startswith("no such video")] == ["train_00003.mp4"]


def test_an_example_without_its_reflection_record_is_excluded_and_listed(config: ConfigDict, tmp_path: Path) -> None:
    lines = Path(config.reflection).read_text().splitlines(keepends=True)
    path = tmp_path / "some.jsonl"
    path.write_text("".join(lines[1:]))
    config.reflection = str(path)
    examples, audit = pipeline.load_examples(config)
    assert len(examples) == len(lines) - 1
    assert audit.counts() == {("excluded", "no reflection record"): 1}


def test_no_usable_example_is_an_error(config: ConfigDict, tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    config.videos = str(tmp_path / "videos")
    with pytest.raises(InputError, match="no usable example"):
        pipeline.load_examples(config)


def test_blind_frames_are_grey(config: ConfigDict, processor: Processor) -> None:
    loader = Loader(processor, config, FrameCache(None), augment=False, blind=True)
    item = loader(pipeline.load_examples(config)[0][0], np.random.default_rng(0))
    assert np.unique(item.encoded.visuals[0].patches).tolist() == [pipeline.GREY]


def test_augmentation_changes_pixels_and_nothing_else(rng: np.random.Generator) -> None:
    clip = Clip(rng.integers(0, 256, (8, 28, 56, 3), dtype=np.uint8), 0.5)
    changed = pipeline.augment(clip, rng)
    assert changed.frames.shape == clip.frames.shape
    assert changed.seconds_per_frame == clip.seconds_per_frame
    assert (changed.frames != clip.frames).mean() > 0.5


def test_a_bad_reflection_record_is_named(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text('{"video": "a.mp4", "task": "qa"}\n')
    with pytest.raises(InputError, match="line 1"):
        prompts.load_reflections(path)
