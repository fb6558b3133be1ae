"""Makes torchvision, which transformers' image and video processors import, usable beside torch's CPU build."""

import torch

try:
    import torchvision  # noqa: F401
except RuntimeError:
    # PyPI's build is for CUDA, and lacks two operators here, which only have to exist.
    for operator in ("nms", "qnms"):
        torch.library.define(f"torchvision::{operator}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
