"""What many tests share: a small data set of real mp4 files, and a small model with weights that hide nothing."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from pathlib import Path

import numpy as np
import pytest

from data_prep import demo_model
from vau_jax.data import synthetic
from vau_jax.models import config as model_config
from vau_jax.models import hf
from vau_jax.vlm import VideoLM

TEXT = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
VISION = {"depth": 3, "hidden_size": 48, "intermediate_size": 96, "num_heads": 4, "fullatt_block_indexes": [1]}


def randomise(folder: Path, seed: int = 0) -> None:
    """Draws every parameter of a model folder anew, none at zero or one, so that nothing can be left out unseen."""
    config = model_config.load(folder)
    rng = np.random.default_rng(seed)
    params = {
        name: (rng.normal(1.0 if name.endswith("/weight") else 0.0, 0.1, shape)).astype(np.float32)
        for name, shape in hf.parameter_shapes(config).items()
    }
    hf.save_weights(folder, hf.unflatten(params), config)


def make_model(folder: Path, tied: bool = True, **sizes: int) -> Path:
    texts = ["What happens in the video? a fire breaks out, 0 calm 1 calm 2 fire [12.0, 30.5]", *synthetic.KINDS]
    text = {**TEXT, **sizes, "tie_word_embeddings": tied}
    demo_model.write(folder, texts, 512, text, VISION, (28 * 28, 64 * 28 * 28))
    randomise(folder)
    return folder


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "small")


@pytest.fixture(scope="session")
def vlm(model_folder: Path) -> VideoLM:
    return VideoLM.load(model_folder)


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 training and 12 test clips with their annotations."""
    return synthetic.make_dataset(tmp_path_factory.mktemp("data"), {"train": 24, "val": 0, "test": 12}, seed=7)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
