"""Messages to model inputs: patches, groups, padding."""

import numpy as np
import pytest
import torch

from vau_jax.data import processor
from vau_jax.files import InputError
from vau_jax.models.vision import IMAGE_MEAN, IMAGE_STD, normalise
from vau_jax.vlm import VideoLM


def test_patches_equal_transformers_order(vlm: VideoLM, rng: np.random.Generator) -> None:
    """Against the permutation that Qwen2VLVideoProcessor applies, written out in torch."""
    frames = rng.integers(0, 256, (4, 56, 84, 3), dtype=np.uint8)
    patches, grid = processor.patchify(frames, vlm.processor.config.vision)
    video = torch.tensor(frames).permute(0, 3, 1, 2)[None]
    blocks = video.reshape(1, 2, 2, 3, 2, 2, 14, 3, 2, 14).permute(0, 1, 4, 7, 5, 8, 3, 2, 6, 9)
    np.testing.assert_array_equal(patches, blocks.reshape(-1, 3 * 2 * 14 * 14).numpy())
    assert grid == (2, 2, 3)


def test_an_odd_number_of_frames_repeats_the_last(vlm: VideoLM, rng: np.random.Generator) -> None:
    frames = rng.integers(0, 256, (3, 28, 28, 3), dtype=np.uint8)
    config = vlm.processor.config.vision
    padded = np.concatenate([frames, frames[-1:]])
    np.testing.assert_array_equal(processor.patchify(frames, config)[0], processor.patchify(padded, config)[0])


def test_pixels_are_normalised_by_channel(rng: np.random.Generator) -> None:
    patches = rng.integers(0, 256, (5, 3 * 8), dtype=np.uint8)
    expected = (patches.reshape(5, 3, 8) / 255.0 - np.asarray(IMAGE_MEAN)[:, None]) / np.asarray(IMAGE_STD)[:, None]
    np.testing.assert_allclose(normalise(patches, 3), expected.reshape(5, 24), atol=1e-5)


@pytest.mark.parametrize("grid", [(1, 1, 1), (2, 5, 6), (3, 4, 4), (1, 9, 2)])
def test_groups_hold_every_patch_once(vlm: VideoLM, grid: tuple[int, int, int]) -> None:
    for groups in processor.patch_groups(grid, vlm.processor.config.vision):
        np.testing.assert_array_equal(np.sort(np.concatenate(groups)), np.arange(np.prod(grid) * 4))


def test_windows_equal_transformers(vlm: VideoLM) -> None:
    from transformers.vision_utils import get_vision_window_index

    t, h, w = 2, 5, 6
    windows, _ = processor.patch_groups((t, h, w), vlm.processor.config.vision)
    index, bounds = get_vision_window_index(torch.tensor([[t, 2 * h, 2 * w]]), 2, 112, 14)
    patches = (index[:, None] * 4 + torch.arange(4)).reshape(-1).numpy()
    theirs = np.split(patches, bounds.numpy()[1:-1])
    assert [window.tolist() for window in windows] == [window.tolist() for window in theirs]


@pytest.mark.parametrize("n", range(1, 200, 7))
def test_rounded_sizes_waste_at_most_half(n: int) -> None:
    assert n <= processor.round_up(n) <= max(1.5 * n, n)


def test_batches_keep_to_few_shapes() -> None:
    assert len({processor.round_up(n) for n in range(1, 4097)}) <= 26


def test_an_image_and_a_video_in_one_prompt(vlm: VideoLM, rng: np.random.Generator) -> None:
    items = [
        {"type": "image", "image": rng.integers(0, 256, (56, 56, 3), dtype=np.uint8)},
        {"type": "video", "video": rng.integers(0, 256, (4, 56, 84, 3), dtype=np.uint8), "fps": 2.0},
        {"type": "text", "text": "What?"},
    ]
    batch = vlm.encode([[{"role": "user", "content": items}]])
    assert (np.asarray(batch.visual_index) >= 0).sum() == 4 + 12
    np.testing.assert_array_equal(np.asarray(batch.visual_index)[np.asarray(batch.visual_index) >= 0], np.arange(16))


def test_padding_changes_no_logits(vlm: VideoLM, rng: np.random.Generator) -> None:
    """The same prompt alone, and beside a much longer one."""
    short = [
        {
            "role": "user",
            "content": [
                {"type": "video", "video": rng.integers(0, 256, (2, 56, 56, 3), dtype=np.uint8)},
                {"type": "text", "text": "a"},
            ],
        }
    ]
    long = [
        {
            "role": "user",
            "content": [
                {"type": "video", "video": rng.integers(0, 256, (8, 112, 140, 3), dtype=np.uint8)},
                {"type": "text", "text": "b"},
            ],
        }
    ]
    alone, beside = vlm.encode([short]), vlm.encode([short, long])
    n = int(np.asarray(alone.mask).sum())
    assert beside.tokens.shape[1] > alone.tokens.shape[1]
    np.testing.assert_allclose(vlm.logits(alone)[0, :n], vlm.logits(beside)[0, :n], atol=2e-5)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([{"type": "audio"}], "content type 'audio'"),
        ([{"type": "video", "video": np.zeros((2, 8, 8, 3))}], "uint8"),
        ([{"type": "video", "video": "/none.mp4"}], "no such file"),
        ([{"type": "image", "image": "/none.png"}], "cannot read image"),
    ],
    ids=["type", "dtype", "video", "image"],
)
def test_a_bad_message_is_named(vlm: VideoLM, content: list, words: str) -> None:
    with pytest.raises(InputError, match=words):
        vlm.encode([[{"role": "user", "content": content}]])
