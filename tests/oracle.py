"""transformers' torch models as an oracle: the same folder, the same batch, its own positions and windows."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForImageTextToText, PreTrainedModel

from vau_jax.data.processor import Encoded
from vau_jax.models.vision import normalise
from vau_jax.types import Batch
from vau_jax.vlm import VideoLM


def load(folder: Path) -> PreTrainedModel:
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def clip(rng: np.random.Generator, frames: int, height: int, width: int) -> np.ndarray:
    return rng.integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


def video(rng: np.random.Generator, frames: int, height: int, width: int, fps: float = 2.0) -> dict[str, Any]:
    size = {"resized_height": height, "resized_width": width}
    return {"type": "video", "video": clip(rng, frames, height, width), "fps": fps, **size}


def image(rng: np.random.Generator, height: int, width: int) -> dict[str, Any]:
    return {
        "type": "image",
        "image": clip(rng, 1, height, width)[0],
        "resized_height": height,
        "resized_width": width,
    }


def ask(*items: dict[str, Any], text: str = "What happens?") -> list[dict]:
    return [{"role": "user", "content": [*items, {"type": "text", "text": text}]}]


def inputs(vlm: VideoLM, batch: Batch, rows: list[Encoded], fps: list[float]) -> dict[str, torch.Tensor]:
    """`batch` as transformers takes it; `fps` of its clips in order. Integers other than tokens are its own."""
    config = vlm.processor.config
    ids, mask = torch.tensor(np.asarray(batch.tokens)).long(), torch.tensor(np.asarray(batch.mask)).long()
    kinds = torch.where(ids == config.video_token_id, 2, 0) + torch.where(ids == config.image_token_id, 1, 0)
    result = {"input_ids": ids, "attention_mask": mask, "mm_token_type_ids": kinds * mask}
    for name, token, pixels in (
        ("image", config.image_token_id, "pixel_values"),
        ("video", config.video_token_id, "pixel_values_videos"),
    ):
        visuals = []
        for row in rows:
            pads = np.flatnonzero(np.isin(row.tokens, config.never_sampled))
            at = 0
            for visual in row.visuals:
                if row.tokens[pads[at]] == token:
                    visuals.append(visual)
                at += visual.token_count
        if visuals:
            patches = np.concatenate([np.asarray(normalise(v.patches, config.vision)) for v in visuals])
            merge = config.vision.spatial_merge_size
            result[pixels] = torch.tensor(patches)
            result[f"{name}_grid_thw"] = torch.tensor(
                [[v.grid[0], merge * v.grid[1], merge * v.grid[2]] for v in visuals]
            )
    if config.model_type == "qwen2_5_vl" and fps:
        result["second_per_grid_ts"] = torch.tensor([config.vision.temporal_patch_size / rate for rate in fps])
    return result


def conversation_inputs(vlm: VideoLM, conversations: list, left: bool = False) -> tuple[Batch, dict[str, torch.Tensor]]:
    batch = vlm.encode(conversations, left=left)
    rows = [vlm.processor.encode(messages) for messages in conversations]
    fps = [
        item["fps"]
        for c in conversations
        for m in c
        if isinstance(m["content"], list)
        for item in m["content"]
        if item["type"] == "video"
    ]
    return batch, inputs(vlm, batch, rows, fps)


def difference(torch_model: PreTrainedModel, vlm: VideoLM, conversations: list, left: bool = False) -> float:
    """Largest difference of logits on real tokens."""
    batch, given = conversation_inputs(vlm, conversations, left)
    with torch.no_grad():
        theirs = torch_model(**given).logits.numpy()
    return float(np.abs(np.asarray(vlm.logits(batch)) - theirs)[np.asarray(batch.mask)].max())
