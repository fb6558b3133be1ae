"""The main job on videos that it makes itself: `configs/demo.py` in full, `configs/demo.py:quick` in two minutes."""

from ml_collections import ConfigDict

from vau_jax.configs import base

MODES = ("", "quick")


def get_config(mode: str = "") -> ConfigDict:
    """All stages of the demo; `mode` "quick" is the same with fewer videos and steps."""
    if mode not in MODES:
        raise ValueError(f"configs/demo.py:{mode} is unknown: expected configs/demo.py or configs/demo.py:quick")
    quick = mode == "quick"
    c = ConfigDict()
    c.seed = 0  # of weights, data order and sampling; the videos are the same for all seeds
    c.stages = ("sft", "rft")  # training, in this order; rft alone begins from the model's start
    c.shared = ""  # folder of videos and frames that several runs use; empty: the workdir
    c.style = "reflection"  # completions: think, two_pass, or reflection
    c.motion = base.get_config().motion  # the same for all stages
    c.videos = ConfigDict({"train": 60, "val": 0, "test": 24} if quick else {"train": 3000, "val": 0, "test": 240})
    c.video_seed = 0
    c.camera_shake = True  # cameras are not still
    c.eval_batch_size = 24 if quick else 48

    c.model = ConfigDict()
    c.model.vocab_size = 1024
    c.model.pixels = (28 * 28, 56 * 56)  # least and most a frame: clips become 28 x 56 or 56 x 28
    c.model.text = ConfigDict(  # sizes under Hugging Face's names
        {
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "initializer_range": 0.08,
        }
    )
    c.model.vision = ConfigDict(
        {"depth": 3, "hidden_size": 96, "intermediate_size": 256, "num_heads": 4, "fullatt_block_indexes": (1,)}
    )

    c.sft = stage("sft")  # all fields of configs/base.py, of which some are changed:
    c.sft.steps = 60 if quick else 700
    c.sft.data.max_examples = 0 if quick else 1200  # of 400 videos: reasoning is dear, RFT needs the answers alone
    c.sft.data.task_weights.qa = 2.0
    c.sft.batch_size = 16
    c.sft.optim.lr = 1e-3
    c.sft.optim.b2 = 0.98
    c.sft.optim.warmup_steps = 10 if quick else 150
    c.sft.optim.schedule = "cosine"
    c.sft.optim.final_lr = 0.1
    c.sft.optim.weight_decay = 0.05
    c.sft.log_every = 10

    c.rft = stage("rft")  # likewise
    c.rft.steps = 4 if quick else 300
    c.rft.batch_size = 4 if quick else 16
    c.rft.rollout.num_generations = 4 if quick else 8
    c.rft.optim.lr = 3e-4
    c.rft.optim.b2 = 0.99
    c.rft.optim.warmup_steps = 20
    c.rft.optim.schedule = "linear"
    c.rft.optim.final_lr = 0.1
    c.rft.data.task_weights.qa = 2.0
    c.rft.rewards.tiou = 1.0
    c.rft.rewards.reflection = 1.0
    return c


def stage(name: str) -> ConfigDict:
    """What both training stages share."""
    c = base.get_config()
    c.stage = name
    c.dtype = "float32"
    c.remat = False
    c.unroll = 4
    c.data.wording = "short"
    c.data.max_frames = 24
    c.data.budget = "model"
    c.data.augment = True
    c.data.max_completion_tokens = 80
    c.data.bucket = (64, 96, 12, 8, 12, 8)
    c.data.length_window = 1  # all clips fit the smallest bucket
    c.checkpoint.every = 100
    return c
