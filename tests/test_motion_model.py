"""A motion prompt in front of the vision tower: in the model, in training and sampling, in every file."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from tests import video_files
from tests.oracle import ask
from tests.runs import small
from vau_jax.common.files import InputError, read_json
from vau_jax.common.metric_writer import read_metrics
from vau_jax.configs import base
from vau_jax.data.processor import collate, encode_visual, patchify
from vau_jax.models import lora, motion_prompt
from vau_jax.models.config import MOTION_FILE
from vau_jax.models.motion_prompt import MotionPrompt
from vau_jax.models.vision import normalise
from vau_jax.train import loop
from vau_jax.types import Batch
from vau_jax.vlm import VideoLM


def motion(start: str = "mpii", **changes: object) -> ConfigDict:
    c = base.get_config().motion
    c.unlock()
    c.update({"enabled": True, "start": start, **changes})
    return c


@pytest.fixture(scope="module")
def prompted(family_folder: Path) -> VideoLM:
    return VideoLM.load(family_folder).with_motion(motion())


def frames(vlm: VideoLM, count: int = 5, seed: int = 0) -> np.ndarray:
    side = vlm.processor.factor
    return np.random.default_rng(seed).integers(0, 256, (count, 2 * side, 3 * side, 3), dtype=np.uint8)


def encoded(vlm: VideoLM, *shots: np.ndarray) -> Batch:
    """Rows of one clip each, whose first frame has no patches; without a motion prompt, it is not there."""
    rows, config = [], vlm.processor.vision
    for shot in shots:
        times = 0.5 * np.arange(len(shot))
        seen = (shot, times) if config.motion else (shot[1:], times[1:])
        visual = encode_visual(seen[0], config, 0.5, seen[1])
        content = [{"type": "video"}, {"type": "text", "text": "What happens?"}]
        text = vlm.processor.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        rows.append(vlm.processor.encode_text(text, [visual]))
    return collate(rows, config)


def layer(vlm: VideoLM, shot: np.ndarray) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`motion_prompt` on the clip's normalised frames."""
    c = vlm.processor.vision
    normal = (shot / 255 - np.asarray(c.image_mean)) / np.asarray(c.image_std)
    numbers = vlm.params["visual"]["motion_prompt"]
    return motion_prompt.motion_prompt(
        jnp.asarray(normal[None], jnp.float32), numbers["m"], numbers["n"], mean=c.image_mean, std=c.image_std
    )


def test_the_tower_sees_what_the_layer_gives(prompted: VideoLM) -> None:
    """Patches weighed in the model are patches of the layer's prompted frames."""
    c, shot = prompted.processor.vision, frames(prompted)
    batch = encoded(prompted, shot)
    weights = MotionPrompt(c).apply({"params": prompted.params["visual"]["motion_prompt"]}, batch.vision)
    real = np.asarray(batch.vision.motion.moves)[0]
    pixels = np.asarray(normalise(batch.vision.patches, c)).reshape(*real.shape, c.in_channels, -1)[real]
    ours = pixels * np.asarray(weights).reshape(*real.shape, 1, -1)[real]
    expected, _ = patchify(np.asarray(layer(prompted, shot)[0][0]), c)
    np.testing.assert_allclose(ours.reshape(expected.shape), expected, atol=1e-5)


def total(vlm: VideoLM, batch: Batch) -> float:
    """What a forward pass sows."""
    _, sown = vlm.model.apply(vlm.variables, batch, method="encode_vision", mutable=["losses"])
    (value,) = jax.tree.leaves(sown["losses"])
    return float(value)


def variation(vlm: VideoLM, batch: Batch) -> float:
    return total(vlm, batch) / float(vlm.model.loss_counts(batch)[motion_prompt.VARIATION])


def test_the_variation_is_the_layers(prompted: VideoLM) -> None:
    """Also over a batch of clips of different lengths, padded."""
    shots = frames(prompted, 5), frames(prompted, 9, seed=1)
    found = variation(prompted, encoded(prompted, *shots))
    parts = [(float(layer(prompted, shot)[2]), len(shot) - 2) for shot in shots]
    expected = sum(value * pairs for value, pairs in parts) / sum(pairs for _, pairs in parts)
    assert float(found) == pytest.approx(expected, rel=1e-5)


def test_the_variations_of_parts_add_up_to_that_of_the_whole(prompted: VideoLM) -> None:
    batch = encoded(prompted, frames(prompted, 5), frames(prompted, 9, seed=1) // 4)
    pairs = prompted.model.loss_counts(batch)[motion_prompt.VARIATION]
    parts = [jax.tree.map(lambda x, i=i: x[i : i + 1], batch) for i in range(2)]
    assert variation(prompted, parts[0]) != pytest.approx(variation(prompted, parts[1]), rel=0.1)
    assert sum(total(prompted, part) for part in parts) / pairs == pytest.approx(variation(prompted, batch), rel=1e-5)


def test_two_clips_of_one_row_are_not_one(prompted: VideoLM) -> None:
    """The attention of the second clip's first frame is not set beside that of the first clip's last."""
    shots = frames(prompted, 5), frames(prompted, 5, seed=1)
    config = prompted.processor.vision
    content = [{"type": "video"}, {"type": "video"}, {"type": "text", "text": "What happens?"}]
    text = prompted.processor.tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    visuals = [encode_visual(shot, config, 0.5, 0.5 * np.arange(5)) for shot in shots]
    batch = collate([prompted.processor.encode_text(text, visuals)], config)
    found = variation(prompted, batch)
    expected = np.mean([float(layer(prompted, shot)[2]) for shot in shots])
    assert float(found) == pytest.approx(expected, rel=1e-5)


def test_gradients_reach_both_numbers_through_the_whole_model(prompted: VideoLM) -> None:
    batch = encoded(prompted, frames(prompted))

    def loss(numbers: dict[str, jax.Array]) -> jax.Array:
        variables = {"params": lora.overlay(prompted.params, {"visual": {"motion_prompt": numbers}})}
        return jnp.mean(prompted.model.apply(variables, batch, method="hidden") ** 2)

    numbers = {"m": jnp.float32(0.3), "n": jnp.float32(-0.2)}
    loss = jax.jit(loss)
    exact = jax.jit(jax.grad(loss))(numbers)
    for name, step in (("m", 1e-2), ("n", 1e-2)):
        high, low = (loss({**numbers, name: numbers[name] + sign * step}) for sign in (1, -1))
        assert float(exact[name]) == pytest.approx(float((high - low) / (2 * step)), rel=0.05, abs=1e-5)
        assert abs(float(exact[name])) > 1e-5


def test_near_identity_still_clips_look_as_without(family_folder: Path) -> None:
    plain = VideoLM.load(family_folder)
    still = frames(plain, 1).repeat(5, axis=0)
    with_prompt = plain.with_motion(motion("identity"))
    a = np.asarray(plain.logits(encoded(plain, still)))
    b = np.asarray(with_prompt.logits(encoded(with_prompt, still)))
    assert a.shape == b.shape and np.abs(a - b).max() < 0.02 * np.abs(a).max()


def test_still_images_stay_as_they_are(prompted: VideoLM, family_folder: Path) -> None:
    image = frames(prompted, 1)[0]
    question = ask({"type": "image", "image": image})
    plain = VideoLM.load(family_folder)
    a, b = (np.asarray(vlm.logits(vlm.encode([question]))) for vlm in (prompted, plain))
    np.testing.assert_allclose(a, b, atol=1e-5)  # two programs: sums in other orders


def test_a_file_gives_one_frame_more_and_the_times_of_the_later_ones(prompted: VideoLM, tmp_path: Path) -> None:
    """20 frames a second for 4 s at 2 a second: 9 are read for 8 that are seen, all 4 / 9 s apart."""
    path = video_files.write(tmp_path / "a.mp4", count=80)
    options = prompted.processor.video_options
    sampling = prompted.processor.sampling(options)
    assert sampling.options.lead == 1
    batch = prompted.encode([ask({"type": "video", "video": str(path), "fps": 2.0})])
    patches_a_frame = np.asarray(batch.vision.frames.members[0, 0] < batch.vision.patches.shape[1]).sum()
    assert np.asarray(batch.vision.motion.moves).sum() == 4 * patches_a_frame


def test_a_saved_folder_comes_back(prompted: VideoLM, tmp_path: Path) -> None:
    prompted.save(tmp_path / "saved")
    again = VideoLM.load(tmp_path / "saved")
    batch = encoded(prompted, frames(prompted))
    np.testing.assert_array_equal(again.logits(batch), prompted.logits(batch))
    assert read_json(tmp_path / "saved" / MOTION_FILE)["m"] == pytest.approx(0.257)


@pytest.mark.parametrize("text", ['{"m": 1.0}', '{"m": "x", "n": 0, "signed": true, "order": "rgb"}'])
def test_a_spoilt_side_file_is_named(prompted: VideoLM, tmp_path: Path, text: str) -> None:
    prompted.save(tmp_path / "saved")
    (tmp_path / "saved" / MOTION_FILE).write_text(text)
    with pytest.raises(InputError, match=MOTION_FILE):
        VideoLM.load(tmp_path / "saved")


# --- Training -----------------------------------------------------------------------------------------------------


def run(c: ConfigDict, workdir: Path) -> list[dict[str, float]]:
    c.motion.update({"enabled": True, "start": "ucf_crime"})
    c.optim.lr, c.optim.schedule = 1e-3, "constant"
    loop.run(c, workdir)
    return read_metrics(workdir)


def test_sft_trains_both_numbers_at_their_own_rate(model_folder: Path, dataset: Path, tmp_path: Path) -> None:
    c = small("srvau_r1_sft", model_folder, dataset)
    c.steps, c.motion.lr_scale = 2, 50.0
    run(c, tmp_path)
    numbers = VideoLM.load(tmp_path).params["visual"]["motion_prompt"]
    moved = [abs(float(numbers[name]) - value) for name, value in zip("mn", (0.8916, -0.2543), strict=True)]
    assert all(0.02 < change < 0.11 for change in moved), "two steps of Adam at 50 times 1e-3"
    low = VideoLM.load(tmp_path, "bfloat16")
    assert all(low.params["visual"]["motion_prompt"][name] == value for name, value in numbers.items()), (
        "float32 all the same"
    )
    assert low.params["embed_tokens"]["embedding"].dtype == jnp.bfloat16


def test_the_regulariser_is_in_the_loss(model_folder: Path, dataset: Path, tmp_path: Path) -> None:
    """Of a batch in parts, which have videos of different lengths, as much as of the whole."""
    losses = {}
    for weight, parts in ((0.0, 1), (100.0, 2)):
        c = small("srvau_r1_sft", model_folder, dataset)
        c.motion.weight, c.micro_batches, c.data.max_frames = weight, parts, 64
        losses[weight] = run(c, tmp_path / str(weight))[0]
    gap = losses[100.0]["loss"] - losses[0.0]["loss"]
    assert gap == pytest.approx(100 * losses[0.0]["motion/variation"], rel=1e-4)
    assert losses[100.0]["motion/variation"] == pytest.approx(losses[0.0]["motion/variation"], rel=1e-5)
    assert losses[0.0]["motion/variation"] > 1e-5


def test_rft_samples_with_the_prompt_that_it_trains(model_folder: Path, dataset: Path, tmp_path: Path) -> None:
    """The sampler's log-probabilities are the trainer's."""
    c = small("vau_r1_qa_rft", model_folder, dataset)
    c.motion.weight = 1.0  # the rewards of a random model are all alike
    step = run(c, tmp_path)[0]
    assert step["sampler_logp_gap/max"] < 1e-4
    assert step["loss"] == pytest.approx(step["motion/variation"], abs=1e-5)
    assert step["motion/m"] != pytest.approx(0.8916, abs=1e-6)


@pytest.mark.long
def test_with_adapters_alone_the_numbers_are_among_them(model_folder: Path, dataset: Path, tmp_path: Path) -> None:
    c = small("srvau_r1_sft", model_folder, dataset)
    c.lora.rank = 2
    run(c, tmp_path / "run")
    vlm = VideoLM.load(tmp_path / "run")
    m = float(vlm.adapters["visual"]["motion_prompt"]["m"])
    assert VideoLM.load(tmp_path / "run", "bfloat16").merged().params["visual"]["motion_prompt"]["m"] == m
    assert m != pytest.approx(0.8916, abs=1e-6)
    batch = encoded(vlm, frames(vlm))
    expected = np.asarray(vlm.logits(batch))
    vlm.save(tmp_path / "merged")
    np.testing.assert_allclose(VideoLM.load(tmp_path / "merged").logits(batch), expected, atol=1e-4)
    vlm.save_adapter(tmp_path / "adapter")
    again = VideoLM.load(model_folder, adapter=tmp_path / "adapter")
    np.testing.assert_allclose(again.logits(batch), expected, atol=1e-6)


def test_an_unknown_start_is_named(family_folder: Path) -> None:
    with pytest.raises(InputError, match=r"motion\.start='none'"):
        VideoLM.load(family_folder).with_motion(motion("none"))
