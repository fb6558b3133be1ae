"""Every layer alone, fed with what transformers' own layer was fed, gives what that layer gave.

Tolerance 1e-4 on values of size 1 to 10: one layer's float32 sums in another order differ by about 1e-6.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.vision_utils import get_vision_window_index

from tests import oracle
from tests.oracle import ask, image, video
from vau_jax.models import rope
from vau_jax.models.qwen_vl import DecoderLayer, Packed
from vau_jax.models.vision import Merger, VisionBlock
from vau_jax.vlm import VideoLM

TOLERANCE = 1e-4


class Recorded:
    """One batch through transformers' model, with the input and output of every layer."""

    def __init__(self, folder: Path) -> None:
        self.vlm, rng = VideoLM.load(folder), np.random.default_rng(0)
        n = self.vlm.processor.factor
        conversation = ask(video(rng, 6, 5 * n, 6 * n, 1.3), image(rng, 2 * n, 3 * n), text="What happens?")
        self.batch, given = oracle.conversation_inputs(self.vlm, [conversation])
        model = oracle.load(folder)
        self.seen: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        for name, module in model.named_modules():
            module.register_forward_hook(self._note(name))
        with torch.no_grad():
            model(**given)

    def _note(self, name: str) -> Any:
        def hook(module: torch.nn.Module, args: tuple, output: Any) -> None:
            if args and isinstance(args[0], torch.Tensor) and isinstance(output, torch.Tensor):
                # The tower runs once for images and once for videos: the last call is the one compared.
                self.seen[name] = args[0].numpy(), output.numpy()

        return hook


@pytest.fixture(scope="module")
def recorded(family_folder: Path) -> Recorded:
    return Recorded(family_folder)


def layers(tree: dict, count: int) -> Iterator[dict]:
    return (jax.tree.map(lambda leaf, i=i: leaf[i], tree) for i in range(count))


def test_every_decoder_layer(recorded: Recorded) -> None:
    vlm, batch = recorded.vlm, recorded.batch
    c = vlm.processor.config
    real = np.asarray(batch.mask)
    angles = rope.mrope_angles(
        jnp.asarray(batch.positions), c.head_dim, c.rope_theta, c.mrope_section, c.mrope_interleaved
    )
    layer = DecoderLayer(c, jnp.float32, "jnp", None)
    for i, params in enumerate(layers(vlm.params["decoder"]["layers"], c.num_layers)):
        given, expected = recorded.seen[f"model.language_model.layers.{i}"]
        where = Packed(angles, jnp.asarray(batch.mask), starts=None, deep=None)
        ours, _ = layer.apply({"params": params}, jnp.asarray(given), where, jnp.int32(i), None)
        assert np.abs(np.asarray(ours) - expected)[real].max() <= TOLERANCE, i


def clip_only(recorded: Recorded) -> tuple[Any, np.ndarray]:
    """The visual input of the clip alone, and the order in which Qwen2.5-VL's tower holds its patches."""
    vlm, rng = recorded.vlm, np.random.default_rng(0)
    n = vlm.processor.factor
    batch = vlm.encode([ask(video(rng, 6, 5 * n, 6 * n, 1.3), text="What happens?")])
    count = 3 * 5 * 6 * 4
    order = np.arange(count)
    if vlm.processor.vision.window_size:
        index, _ = get_vision_window_index(torch.tensor([[3, 10, 12]]), 2, 112, 14)
        order = (index[:, None] * 4 + torch.arange(4)).reshape(-1).numpy()
    return batch.vision, order


def test_every_vision_block(recorded: Recorded) -> None:
    vlm = recorded.vlm
    c = vlm.processor.vision
    vision, order = clip_only(recorded)
    angles = rope.patch_angles(jnp.asarray(vision.positions), c.head_dim)
    block = VisionBlock(c, jnp.float32, None)
    for i, params in enumerate(layers(vlm.params["visual"]["blocks"], c.depth)):
        given, expected = recorded.seen[f"model.visual.blocks.{i}"]
        assert len(given) == len(order), "the tower's last call was the clip's"
        x = np.zeros((1, vision.patches.shape[1], c.hidden_size), np.float32)
        x[0, order] = given
        whole = jnp.asarray(i in c.full_attention_layers)
        (ours, _), _ = block.apply({"params": params}, (jnp.asarray(x), None), vision, angles, whole, jnp.int32(0))
        assert np.abs(np.asarray(ours)[0, order] - expected).max() <= TOLERANCE, i


def test_every_merger(recorded: Recorded) -> None:
    """The merger, and Qwen3-VL's DeepStack mergers."""
    vlm = recorded.vlm
    c = vlm.processor.vision
    given, expected = recorded.seen["model.visual.merger"]
    merger = Merger(c, jnp.float32, None)
    ours = merger.apply({"params": vlm.params["visual"]["merger"]}, jnp.asarray(given)[None])[0]
    assert np.abs(np.asarray(ours) - expected).max() <= TOLERANCE
    for i in range(len(c.deepstack_layers)):
        params = jax.tree.map(lambda leaf, i=i: leaf[i], vlm.params["visual"]["deepstack"])
        given, expected = recorded.seen[f"model.visual.deepstack_merger_list.{i}"]
        ours = Merger(c, jnp.float32, None, norm_merged=True).apply({"params": params}, jnp.asarray(given)[None])[0]
        assert np.abs(np.asarray(ours) - expected).max() <= TOLERANCE, i
