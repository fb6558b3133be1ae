"""Messages to model inputs: patches, groups, sizes and positions against transformers' own processors; padding."""

import os
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import (
    AutoProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize
from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize as smart_resize_clip
from transformers.vision_utils import get_vision_interpolation_indices_and_weights, get_vision_window_index

from tests.oracle import ask
from tests.small_models import FAMILIES
from vau_jax.common.files import InputError
from vau_jax.data import processor, shapes
from vau_jax.data.processor import Processor
from vau_jax.data.video import clips as video_module
from vau_jax.data.video.clips import VideoError, VideoOptions
from vau_jax.models import config as model_config
from vau_jax.models.vision import normalise
from vau_jax.vlm import VideoLM

QWEN2 = model_config.named("qwen2.5-vl-3b").vision
QWEN3 = model_config.named("qwen3-vl-2b").vision


def theirs(frames: np.ndarray, oracle: type, **options: object) -> tuple[np.ndarray, list[int]]:
    """Patches and patch grid by transformers' video processor."""
    sizes = {"do_sample_frames": False, "cap_pixels_per_frame": False, **options}
    out = oracle()([torch.tensor(frames).permute(0, 3, 1, 2)], return_tensors="pt", **sizes)
    return out["pixel_values_videos"].numpy(), out["video_grid_thw"][0].tolist()


@pytest.mark.parametrize(
    ("config", "oracle"), [(QWEN2, Qwen2VLVideoProcessor), (QWEN3, Qwen3VLVideoProcessor)], ids=["qwen2", "qwen3"]
)
@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_patches_equal_transformers(
    rng: np.random.Generator, config: model_config.VisionConfig, oracle: type, count: int
) -> None:
    """Order and normalisation, an odd last frame repeated; 1e-5 since they divide in another order."""
    side = config.patch_size * config.spatial_merge_size
    frames = rng.integers(0, 256, (count, 2 * side, 3 * side, 3), dtype=np.uint8)
    ours, (t, h, w) = processor.patchify(frames, config)
    expected, grid = theirs(frames, oracle, do_resize=False)
    assert [t, 2 * h, 2 * w] == grid
    np.testing.assert_allclose(normalise(ours, config), expected, atol=1e-5)


SIZES = [(100, 150), (480, 640), (37, 900), (720, 1280)]
BOUNDS = {"shortest_edge": 28 * 28, "longest_edge": 64 * 28 * 28}  # the small model's


def picture(height: int, width: int) -> np.ndarray:
    """A smooth picture with edges and fine stripes: uint8 [H, W, 3]."""
    y, x = np.mgrid[:height, :width]
    waves = 127 + 60 * np.sin(x[..., None] / (7 + np.arange(3))) + 60 * np.cos(y[..., None] / 11)
    waves[height // 4 : height // 2, width // 3 : width // 2] = (20, 250, 90)
    return waves.astype(np.uint8)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_an_image_equals_transformers_bit_for_bit(
    vlm: VideoLM, rng: np.random.Generator, size: tuple[int, int]
) -> None:
    """Size, resizing and patch order of noise, against the processor that resizes with PIL as we do."""
    frame = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
    out = Qwen2VLImageProcessorPil(size=BOUNDS, do_rescale=False, do_normalize=False)(frame, return_tensors="np")
    visual = vlm.processor.encode(ask({"type": "image", "image": frame})).visuals[0]
    t, h, w = visual.grid
    assert out["image_grid_thw"][0].tolist() == [t, 2 * h, 2 * w]
    np.testing.assert_array_equal(visual.patches, out["pixel_values"])


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_clip_equals_transformers(vlm: VideoLM, size: tuple[int, int]) -> None:
    """Against torchvision's resizing, which rounds once, where PIL rounds and clips between rows and columns."""
    frames = np.stack([picture(*size), picture(*size)[::-1]] * 2)
    expected, grid = theirs(frames, Qwen2VLVideoProcessor, size=BOUNDS)
    visual = vlm.processor.encode(ask({"type": "video", "video": frames, "fps": 2.0})).visuals[0]
    t, h, w = visual.grid
    assert [t, 2 * h, 2 * w] == grid
    config = vlm.processor.vision
    levels = np.abs(np.asarray(normalise(visual.patches, config)) - expected) * 255 * min(config.image_std)
    assert (levels <= 1.1).mean() > 0.99
    assert levels.max() <= 16, "beside an edge that overshoots"


@settings(max_examples=300, deadline=None)
@given(
    height=st.integers(1, 3000),
    width=st.integers(1, 3000),
    factor=st.sampled_from([28, 32]),
    least=st.integers(1, 1 << 19),
    room=st.floats(1.2, 100),
)
def test_smart_resize_equals_transformers(height: int, width: int, factor: int, least: int, room: float) -> None:
    most = max(int(least * room), factor**2)
    try:
        expected = smart_resize(height, width, factor, least, most)
    except ValueError:
        with pytest.raises(VideoError):
            video_module.smart_resize(height, width, factor, least, most)
        return
    assume(min(expected) > 0)  # theirs can round a thin picture down to nothing
    assert video_module.smart_resize(height, width, factor, least, most) == expected


@settings(max_examples=300, deadline=None)
@given(
    frames=st.integers(2, 400),
    height=st.integers(8, 2000),
    width=st.integers(8, 2000),
    least=st.integers(1, 1 << 22),
    room=st.floats(2, 100),
)
def test_qwen3_sizes_equal_transformers(frames: int, height: int, width: int, least: int, room: float) -> None:
    """Bounds on the whole clip."""
    most = max(int(least * room), 32 * 32 * frames)
    options = VideoOptions(min_pixels=least, max_pixels=most, total_pixels=most, per_clip=True)
    try:
        expected = smart_resize_clip(frames, height, width, 2, 32, least, most)
    except ValueError:
        with pytest.raises(VideoError):
            video_module.frame_size(height, width, frames, options, 32, 2)
        return
    assert video_module.frame_size(height, width, frames, options, 32, 2) == expected


@pytest.mark.parametrize("frames", [4, 100, 400])
def test_a_long_clip_gets_transformers_share_of_the_whole_budget(frames: int) -> None:
    """Against `cap_pixels_per_frame`, which is qwen-vl-utils' rule, for a budget of 90% of 128000 tokens."""
    out = theirs(np.zeros((frames, 40, 60, 3), np.uint8), Qwen2VLVideoProcessor, cap_pixels_per_frame=True)[1]
    options = VideoOptions(total_pixels=int(128000 * 28 * 28 * 0.9))
    height, width = video_module.frame_size(40, 60, frames, options, 28, 2)
    assert [height // 14, width // 14] == out[1:]


@pytest.mark.parametrize("grid", [(1, 1, 1), (2, 5, 6), (3, 4, 4), (1, 9, 2)])
def test_groups_hold_every_patch_once(grid: tuple[int, int, int]) -> None:
    for groups in processor.patch_groups(grid, QWEN2):
        np.testing.assert_array_equal(np.sort(np.concatenate(groups)), np.arange(np.prod(grid) * 4))


@pytest.mark.parametrize("grid", [(2, 5, 6), (1, 1, 1), (3, 4, 8), (1, 9, 2)])
def test_windows_equal_transformers(grid: tuple[int, int, int]) -> None:
    t, h, w = grid
    _, windows = processor.patch_groups(grid, QWEN2)
    index, bounds = get_vision_window_index(torch.tensor([[t, 2 * h, 2 * w]]), 2, 112, 14)
    patches = (index[:, None] * 4 + torch.arange(4)).reshape(-1).numpy()
    expected = np.split(patches, bounds.numpy()[1:-1])
    assert [window.tolist() for window in windows] == [window.tolist() for window in expected]


@pytest.mark.parametrize("grid", [(2, 5, 6), (1, 1, 1), (3, 24, 24), (1, 40, 2)])
def test_learned_positions_are_interpolated_as_in_transformers(grid: tuple[int, int, int]) -> None:
    """As the sums they make of a table; a corner of weight 0 may be another entry."""
    t, h, w = grid
    index, weights = processor.table_corners(grid, QWEN3)
    table = np.random.default_rng(0).normal(size=(QWEN3.position_grid**2, 8))
    their_index, their_weights = get_vision_interpolation_indices_and_weights(
        torch.tensor([[t, 2 * h, 2 * w]]), QWEN3.position_grid, align_corners=True, spatial_merge_size=2
    )
    expected = (table[their_index.numpy()] * their_weights.numpy()[..., None]).sum(1)
    np.testing.assert_allclose((table[index] * weights[..., None]).sum(1), expected, atol=1e-5)


def test_qwen3_times_equal_transformers(family_folders: dict, rng: np.random.Generator) -> None:
    """The text around each frame: its processor leaves the clip's own marks around the row, which training did not."""
    ours = VideoLM.load(family_folders["qwen3_vl"]).processor
    oracle = Qwen3VLProcessor(
        Qwen2VLImageProcessor(patch_size=16), ours.tokenizer, Qwen3VLVideoProcessor(), ours.tokenizer.chat_template
    )
    frames = rng.integers(0, 256, (5, 64, 96, 3), dtype=np.uint8)
    text = ours.tokenizer.apply_chat_template(
        [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "What?"}]}],
        tokenize=False,
        add_generation_prompt=True,
    )
    options = {
        "do_sample_frames": False,
        "do_resize": False,
        "video_metadata": [{"fps": 1.7, "frames_indices": list(range(5)), "total_num_frames": 5}],
    }
    given = oracle(text=[text], videos=[torch.tensor(frames).permute(0, 3, 1, 2)], videos_kwargs=options)
    expected = ours.tokenizer.decode(given["input_ids"][0])
    expected = expected.replace("<|vision_start|><0", "<0").replace("<|vision_end|><|vision_end|>", "<|vision_end|>")
    item = {"type": "video", "video": frames, "fps": 1.7, "resized_height": 64, "resized_width": 96}
    assert ours.tokenizer.decode(ours.encode(ask(item, text="What?")).tokens) == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_of_transformers_5_gives_the_same_budgets(family_folders: dict, tmp_path: Path, family: str) -> None:
    """It writes one processor_config.json."""
    ours = Processor(family_folders[family])
    AutoProcessor.from_pretrained(family_folders[family]).save_pretrained(tmp_path)
    shutil.copy(family_folders[family] / "config.json", tmp_path)
    theirs = Processor(tmp_path)
    assert not (tmp_path / "preprocessor_config.json").exists()
    assert (theirs.image_options, theirs.video_options) == (ours.image_options, ours.video_options)
    assert theirs.config == ours.config


@pytest.mark.parametrize("n", range(1, 200, 7))
def test_rounded_sizes_waste_at_most_half(n: int) -> None:
    assert n <= shapes.round_up(n) <= max(1.5 * n, n)


def test_batches_keep_to_few_shapes() -> None:
    assert len({shapes.round_up(n) for n in range(1, 4097)}) <= 26


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
        ([{"type": "image", "image": "/none.png"}], "no such file"),
        ([{"type": "image", "image": np.zeros((1, 300, 3), np.uint8)}], "aspect ratio"),
        ([{"type": "video", "video": np.zeros((2, 300, 1, 3), np.uint8)}], "aspect ratio"),
    ],
    ids=["type", "dtype", "video", "image", "image shape", "video shape"],
)
def test_a_bad_message_is_named(vlm: VideoLM, content: list, words: str) -> None:
    with pytest.raises(InputError, match=words):
        vlm.encode([[{"role": "user", "content": content}]])


def png_header(width: int, height: int) -> bytes:
    """A picture that ends where its pixels begin."""
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head)) + struct.pack(">I", 9) + b"IDAT"
    return b"\x89PNG\r\n\x1a\n" + data


PICTURES = {
    "too many pixels": (png_header(20_000, 20_000), "exceeds limit of"),
    "cut off": (png_header(64, 64), "cannot read image"),
    "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\n", "cannot identify"),
    "no file": (None, "no such file"),
}


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_that_cannot_be_read_is_one_line(name: str, model_folder: Path, tmp_path: Path) -> None:
    data, words = PICTURES[name]
    path = tmp_path / "picture.png"
    if data is None:
        os.mkfifo(path)
    else:
        path.write_bytes(data)
    with pytest.raises(InputError, match=words) as caught:
        Processor(model_folder).encode([{"role": "user", "content": [{"type": "image", "image": str(path)}]}])
    assert len(str(caught.value).splitlines()) == 1
