"""Seconds of TRL's GRPO step on the same model and as many visual tokens; called by benchmarks/grpo_step.py."""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
import numpy as np
import torch
import torchvision_operators  # noqa: F401 - before anything of transformers
from datasets import Dataset
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, TrainerCallback
from trl import GRPOConfig, GRPOTrainer
from turns import Turns  # beside this file


class Clock(TrainerCallback):
    """A step, with the generation in it, at each turn."""

    def __init__(self) -> None:
        self.turns = Turns()

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.turns.begin()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.turns.end()


def prompt(args: dict[str, Any]) -> dict[str, Any]:
    """A question about half as many images as the video has frames: two frames are one patch deep."""
    rng, side = np.random.default_rng(0), args["side"]
    pictures = rng.integers(0, 256, (args["frames"] // 2, side // 8 + 1, side // 8 + 1, 3), dtype=np.uint8)
    images = [Image.fromarray(np.kron(x, np.ones((8, 8, 1), np.uint8))[:side, :side]) for x in pictures]
    return {"prompt": [{"role": "user", "content": "What happens? A. a fire B. a fight"}], "images": images}


def main() -> None:
    args = json.loads(sys.argv[1])
    torch.manual_seed(0)
    processor = AutoProcessor.from_pretrained(args["model"])
    model = AutoModelForImageTextToText.from_pretrained(args["model"], dtype=getattr(torch, args["dtype"]))
    processor.tokenizer.padding_side = "left"
    pads = [model.config.image_token_id, model.config.video_token_id]
    count, clock, lengths = args["warmup"] + args["steps"], Clock(), []

    def reward(completions: list[Any], completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
        lengths.extend(map(len, completion_ids))
        return [float(len(set(ids))) for ids in completion_ids]

    with tempfile.TemporaryDirectory() as scratch:
        config = GRPOConfig(
            output_dir=scratch,
            per_device_train_batch_size=args["group"] * args["prompts"],
            num_generations=args["group"],
            max_completion_length=args["new"],
            # A sampled image pad would stop TRL: the model then counts more image tokens than features.
            generation_kwargs={"min_new_tokens": args["new"], "suppress_tokens": pads},
            max_steps=count,
            beta=args["beta"],
            temperature=1.0,
            learning_rate=1e-6,
            gradient_checkpointing=args["remat"],
            use_cpu=not torch.cuda.is_available(),
            bf16=args["dtype"] == "bfloat16",
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=reward,
            args=config,
            train_dataset=Dataset.from_list([prompt(args)] * args["prompts"] * count),
            processing_class=processor,
            callbacks=[clock],
        )
        trainer.train()
    assert set(lengths) == {args["new"]}, "every completion has all its tokens"
    inputs = trainer._buffered_inputs[0]
    visual = int((inputs["image_grid_thw"].prod(-1).sum() // 4 // len(inputs["prompt_ids"])).item())
    clock.turns.answer({"prompt_tokens": int(inputs["prompt_mask"].sum(-1).max()), "visual_tokens": visual})


if __name__ == "__main__":
    main()
