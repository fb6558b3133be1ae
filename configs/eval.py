"""Evaluation of a checkpoint or model folder on a split."""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    """Greedy decoding over the test split; `data` as in training, without augmentation."""
    train = base.get_config()
    c = ConfigDict()
    c.name = "evaluate"  # shown in progress lines and tables
    c.checkpoint = ""  # workdir of a run, workdir/checkpoints/STEP, or a Hugging Face folder
    c.blind = False  # grey frames instead of the video
    c.seed = 0  # of the options' order, and of sampling
    c.temperature = 0.0  # 0: greedy
    c.batch_size = 8
    c.dtype = train.dtype
    c.data = train.data
    return c
