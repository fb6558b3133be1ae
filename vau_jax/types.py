"""Every pytree shared between modules, each field with dtype and shape.

Axes: B prompts, G generations per prompt, T prompt tokens, C completion tokens, P patches, M merged visual tokens, L
layers, K kv heads, H head.
"""

from dataclasses import dataclass, fields
from typing import Any

import jax
import numpy as np

Array = jax.Array | np.ndarray
Params = dict[str, Any]
Variables = dict[str, Params]  # {"params": ...}, and {"lora": ...} for a model with adapters


def pytree(cls: type) -> type:
    """A frozen dataclass whose fields are all array leaves (or pytrees, or None)."""
    cls = dataclass(frozen=True)(cls)
    return jax.tree_util.register_dataclass(cls, data_fields=[f.name for f in fields(cls)], meta_fields=[])


@pytree
class Groups:
    """Segments of patches that attend to each other, packed into groups of equal size.

    Attention is computed by group, so that no score matrix ever spans a whole video. Small segments share a group.
    """

    members: Array  # int32 [B, n_groups, size]: patch numbers; P marks padding
    segments: Array  # int32 [B, n_groups, size]: number of the patch's segment in its group; -1 for padding
    slots: Array  # int32 [B, P]: index of patch p in members' last two axes, flattened; 0 for padding patches


@pytree
class Vision:
    """The visual input of B rows, patches of all clips and images of a row concatenated and padded to P."""

    patches: Array  # uint8 [B, P, channels * temporal_patch * patch * patch], in Hugging Face's patch order
    positions: Array  # int32 [B, P, 2]: row and column of the patch in its frame
    frames: Groups  # all patches of one temporal patch
    windows: Groups | None  # spatial windows inside one temporal patch, for models that have them
    corners: (
        Array | None
    )  # int32 [B, P, 4]: entries of the learned position table around the patch, for models with one
    corner_weights: Array | None  # float32 [B, P, 4]: their shares
    motion: "Motion | None" = None


@pytree
class Motion:
    """The input of a Video Motion Prompt for the patches of `Vision`."""

    before: Array  # uint8 like patches: the same positions one frame earlier
    moves: Array  # bool [B, P]: patches of clips, not of still images or padding
    following: Array  # int32 [B, P]: the patch at the same position one temporal patch later; P: none


@pytree
class Features:
    """The output of the vision tower for `Vision`; `deep` goes to the first n decoder layers, one entry each."""

    tokens: Array  # [B, M, D]
    deep: Array | None  # [B, n, M, D]


@pytree
class Batch:
    """B prompts, padded to T tokens."""

    tokens: Array  # int32 [B, T]
    mask: Array  # bool [B, T], True on real tokens
    positions: Array  # int32 [B, 3, T]: time, height, width (M-RoPE)
    visual_index: Array  # int32 [B, T]: index of the row's merged visual token at this position, -1 on text
    next_position: Array  # int32 [B]: M-RoPE position of the first completion token
    vision: Vision | Features | None  # features instead of patches where a frozen tower has encoded them already


@pytree
class Completions:
    """G completions a prompt, padded to C tokens."""

    tokens: Array  # int32 [B, G, C]
    mask: Array  # bool [B, G, C], True up to and including the first end token


@pytree
class KVCache:
    """Keys (after RoPE) and values of every layer: of prompts [L, B, K, T, H], of completions [L, B, G, K, C, H]."""

    k: Array
    v: Array


@pytree
class Sampled:
    """The result of `sampling.sample`."""

    tokens: Array  # int32 [B, G, C]
    logps: Array  # float32 [B, G, C]: log-probability of each token under the distribution it was sampled from
    mask: Array  # bool [B, G, C]


@pytree
class TrainBatch:
    """One update: prompts, their completions, and the inputs of the loss.

    `loss_inputs` are arrays with leading axes [B, G] or [B, G, C], named as in the loss.
    """

    batch: Batch
    completions: Completions
    loss_inputs: dict[str, Array]


@pytree
class State:
    """The state that an update changes."""

    step: Array  # int32 []
    params: Params  # trained parameters; with LoRA the adapters
    opt_state: Any
    reference: Params | None = None  # the same of the reference policy, where it follows the trained one
