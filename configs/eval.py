"""Evaluation of a checkpoint or model folder on a split."""

from ml_collections import ConfigDict

from vau_jax.configs import base
from vau_jax.tasks.rewards import REWARDS


def get_config() -> ConfigDict:
    """Greedy decoding over the test split; `data` as in training, without augmentation."""
    train = base.get_config()
    c = ConfigDict()
    c.name = "evaluate"  # shown in progress lines and tables
    c.checkpoint = ""  # workdir of a run, workdir/checkpoints/STEP, or a Hugging Face folder
    c.endpoint = base.endpoint()  # or a model behind an endpoint, which gets the same prompts
    c.endpoint.frames = 16  # pictures of a video that it sees
    c.endpoint.temperature = 0.0  # 0: greedy
    c.endpoint.json_mode = False  # the answers are no JSON
    c.blind = False  # grey frames instead of the video
    c.seed = 0  # seed of the options' order and of sampling
    c.temperature = 0.0  # 0: greedy
    c.repetition_penalty = 1.0  # of tokens that prompt and completion have; 0: the model's generation_config.json
    c.description_turns = 1  # 2: a description, then an analysis, as VAU-Eval is published
    c.samples = 1  # completions per question; several give pass@k and majority votes, and need a temperature
    c.rotations = 1  # rotations of the options that each multiple-choice question is asked with, up to 4
    c.batch_size = 8
    c.dtype = train.dtype
    c.mesh = train.mesh
    c.compilation_cache = train.compilation_cache
    c.data = train.data
    c.data.style = ""  # as the run was trained; for a model folder and an endpoint: think
    c.data.wording = ""  # likewise; full
    c.data.templates = ""  # likewise; `default` for those of the tasks
    c.rewards = ConfigDict({name: train.rewards[name] for name in REWARDS})  # weights of the total, as in training
    return c
