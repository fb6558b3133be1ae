"""Video Motion Prompts: the layer beside the published code's numbers, numpy and finite differences.

data/motion_prompts.json holds one case computed by the authors' code (commit 879ec93 of their repository) in float64:
mean 0.45, standard deviation 0.225, frames [B, C, T, H, W].
"""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import video_files
from vau_jax.common.files import InputError
from vau_jax.models import motion_prompt as module
from vau_jax.models.motion_prompt import motion_prompt

ROOT = Path(__file__).parents[1]
GOLDEN = json.loads((ROOT / "tests" / "data" / "motion_prompts.json").read_text())
UPSTREAM = {"mean": (0.45,) * 3, "std": (0.225,) * 3}
PLAIN = {"mean": (0.0,) * 3, "std": (1.0,) * 3}


def golden(name: str) -> np.ndarray:
    return np.moveaxis(np.asarray(GOLDEN[name]), 1, -1)


def test_the_published_code_gives_the_same() -> None:
    with jax.enable_x64(True):
        prompted, _, variation = motion_prompt(
            jnp.asarray(golden("x")), GOLDEN["m"], GOLDEN["n"], order="bgr", **UPSTREAM
        )
        np.testing.assert_allclose(prompted, golden("y"), rtol=0, atol=1e-10)
        assert float(variation * GOLDEN["lam"]) == pytest.approx(GOLDEN["reg_loss"], abs=1e-10)


def test_the_published_code_has_the_same_gradients() -> None:
    def value(m: jax.Array, n: jax.Array) -> jax.Array:
        prompted, _, variation = motion_prompt(jnp.asarray(golden("x")), m, n, order="bgr", **UPSTREAM)
        return jnp.sum(prompted**2) + GOLDEN["lam"] * variation

    with jax.enable_x64(True):
        found = jax.grad(value, argnums=(0, 1))(GOLDEN["m"], GOLDEN["n"])
    assert [float(g) for g in found] == pytest.approx([GOLDEN["grad_m"], GOLDEN["grad_n"]], rel=1e-10)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("order", module.ORDERS)
def test_every_form_equals_numpy(rng: np.random.Generator, signed: bool, order: str) -> None:
    frames, m, n = rng.normal(size=(2, 5, 6, 4, 3)), -0.7, 0.4
    weights = np.array([0.299, 0.587, 0.114])
    grey = (frames * 0.3 + 0.5) @ (weights if order == "rgb" else weights[::-1])
    difference = np.diff(grey, axis=1)
    difference = difference if signed else np.abs(difference)
    attention = 1 / (1 + np.exp(-5 / (0.45 * abs(np.tanh(m)) + 0.1) * (difference - 0.6 * np.tanh(n))))
    with jax.enable_x64(True):
        found = motion_prompt(jnp.asarray(frames), m, n, mean=(0.5,) * 3, std=(0.3,) * 3, signed=signed, order=order)
    expected = attention[..., None] * frames[:, 1:], attention, np.mean(np.diff(attention, axis=1) ** 2)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-12)


def test_gradients_reach_both_numbers_through_the_patch_embedding(rng: np.random.Generator) -> None:
    """Finite differences of a loss behind a linear map of 2 x 2 x 2 patches."""
    frames, kernel = rng.normal(size=(1, 5, 4, 4, 3)), rng.normal(size=(24, 7))

    def loss(m: jax.Array, n: jax.Array) -> jax.Array:
        prompted, _, _ = motion_prompt(jnp.asarray(frames), m, n, **UPSTREAM)
        patches = prompted.reshape(1, 2, 2, 2, 2, 2, 2, 3).transpose(0, 1, 3, 5, 2, 4, 6, 7).reshape(-1, 24)
        return jnp.sum(jnp.tanh(patches @ kernel) ** 2)

    with jax.enable_x64(True):
        exact = jax.grad(loss, argnums=(0, 1))(0.3, -0.4)
        step = 1e-6
        by_m = (loss(0.3 + step, -0.4) - loss(0.3 - step, -0.4)) / (2 * step)
        by_n = (loss(0.3, -0.4 + step) - loss(0.3, -0.4 - step)) / (2 * step)
    assert [float(g) for g in exact] == pytest.approx([float(by_m), float(by_n)], rel=1e-6)
    assert all(abs(float(g)) > 1e-3 for g in exact)


def test_two_frames_have_no_variation(rng: np.random.Generator) -> None:
    frames = jnp.asarray(rng.normal(size=(1, 2, 4, 4, 3)))
    prompted, attention, variation = motion_prompt(frames, 0.3, 0.1, **UPSTREAM)
    assert prompted.shape == (1, 1, 4, 4, 3) and attention.shape == (1, 1, 4, 4)
    assert float(variation) == 0.0
    assert np.isfinite(jax.grad(lambda m: motion_prompt(frames, m, 0.1, **UPSTREAM)[2])(0.3))


def test_bfloat16_frames_lose_no_more_than_their_own_rounding(rng: np.random.Generator) -> None:
    frames = jnp.asarray(rng.normal(size=(1, 4, 8, 8, 3)), jnp.bfloat16)
    low = motion_prompt(frames, 0.05, 0.1, **UPSTREAM)
    high = motion_prompt(frames.astype(jnp.float32), 0.05, 0.1, **UPSTREAM)
    assert low[0].dtype == jnp.bfloat16
    np.testing.assert_array_equal(low[1], high[1])
    np.testing.assert_allclose(low[0].astype(np.float32), high[0], rtol=2**-8)


@pytest.mark.parametrize("n", [-20.0, 20.0])
def test_extreme_numbers_stay_finite(n: float) -> None:
    frames = jnp.stack([jnp.zeros((1, 4, 4, 3)), jnp.ones((1, 4, 4, 3))], 1)
    value, slope = jax.value_and_grad(lambda m: motion_prompt(frames, m, n, **PLAIN)[0].sum())(1e-3)
    assert np.isfinite(value) and np.isfinite(slope)


def test_the_weight_of_still_pixels() -> None:
    """With the numbers learned on MPII static pixels weigh 0.32, as the paper's code gives."""
    frames = jnp.ones((1, 3, 2, 2, 3))
    attention = motion_prompt(frames, *module.PUBLISHED["mpii"], **PLAIN)[1]
    np.testing.assert_allclose(attention, 0.32, atol=5e-3)


def test_what_moves_is_weighed_above_what_does_not() -> None:
    frames = np.zeros((1, 2, 2, 2, 3), np.float32)
    frames[:, 1, 0, 0] = 0.8
    attention = motion_prompt(jnp.asarray(frames), *module.PUBLISHED["mpii"], **PLAIN)[1][0, 0]
    assert attention[0, 0] > 0.99 > 0.4 > attention[1, 1]


@pytest.mark.parametrize(
    ("shape", "order", "message"),
    [((1, 1, 4, 4, 3), "rgb", "T at least 2"), ((2, 4, 4, 3), "rgb", "expected"), ((1, 2, 4, 4, 3), "grb", "unknown")],
)
def test_mistakes_are_named(shape: tuple[int, ...], order: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        motion_prompt(jnp.zeros(shape), 0.1, 0.1, order=order, **PLAIN)


def test_the_strip_shows_four_rows_over_time(tmp_path: Path) -> None:
    from PIL import Image

    clip = video_files.write(tmp_path / "a.mp4", count=80)
    command = [sys.executable, "-m", "vau_jax.motion_strip", str(clip), f"--out={tmp_path / 'strip.png'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    image = np.asarray(Image.open(tmp_path / "strip.png"))
    height, width = image.shape[0] // 4, image.shape[1] // 7  # 8 frames, 7 pairs
    assert (image.shape[0] % 4, image.shape[1] % 7) == (0, 0)
    frames, attention, prompted = (image[row * height : (row + 1) * height].astype(float) for row in (0, 2, 3))
    np.testing.assert_allclose(prompted, frames * attention / 255, atol=1.5)
    moving = attention[:, :width].std()
    assert moving > 5


def test_the_strip_of_no_video_is_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "vau_jax.motion_strip", "/none.mp4", f"--out={tmp_path / 'strip.png'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr == "error: no such file: /none.mp4\n"
