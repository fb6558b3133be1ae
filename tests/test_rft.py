"""The RFT engine on a real model and real videos: what a step computes, option by option."""

import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from tests import reward_functions
from tests.oracle import ask
from tests.rollouts import REWARD, assert_close, config, judged, loss_inputs
from tests.runs import first_gradient
from vau_jax.common import sharding
from vau_jax.common.files import InputError
from vau_jax.common.metric_writer import read_metrics
from vau_jax.configs import base
from vau_jax.data import loading, pipeline
from vau_jax.datasets import vau_bench
from vau_jax.models import checkpoint, vision
from vau_jax.rl import grpo
from vau_jax.rl.difficulty import Difficulty
from vau_jax.rl.engine import Engine
from vau_jax.rl.rollout import Clock, RolloutWorker
from vau_jax.train import learner, loop, memory, optim, update
from vau_jax.types import Completions, Features, TrainBatch
from vau_jax.vlm import VideoLM

ROOT = Path(__file__).parents[1]


def moved(trainer: loop.Run, number: int = 0) -> tuple[dict[str, Any], Any]:
    """Metrics of one step, and the parameters after it."""
    metrics, _ = trainer.step(number)
    return metrics, jax.device_get(trainer.learner.state.params)


# --- The vision tower ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("frozen", "passes"), [(True, 1), pytest.param(False, 3, marks=pytest.mark.long)])
def test_how_often_the_tower_sees_a_video(
    frozen: bool, passes: int, model_folder: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Frozen: once, for sampling, reference and two updates. Trained: once for the reference and in each forward pass
    of sampling and update."""
    seen, original = [], vision.normalise

    def counting(patches: jax.Array, *args: Any) -> jax.Array:
        jax.debug.callback(lambda: seen.append(1))
        return original(patches, *args)

    monkeypatch.setattr(vision, "normalise", counting)
    c = config(model_folder, dataset)
    if frozen:
        c.optim.freeze, c.grpo.iterations = ("visual/.*",), 2
    t = loop.Run(c)
    assert t.learner.tower_is_frozen == frozen
    t.step(0)
    jax.effects_barrier()
    assert len(seen) == passes


def test_a_frozen_tower_changes_nothing_but_the_work(model_folder: Path, dataset: Path) -> None:
    """The same gradients of the decoder from stored features as from patches."""
    c = config(model_folder, dataset, **{"optim.freeze": ("visual/.*",)})
    stored = loop.Run(c)
    again = loop.Run(c)
    again.tower_is_frozen = False
    (a, _), (b, _) = moved(stored), moved(again)
    np.testing.assert_allclose(a["loss"], b["loss"], atol=1e-5)
    np.testing.assert_allclose(a["grad_norm"], b["grad_norm"], rtol=1e-4)
    assert_close(first_gradient(stored), first_gradient(again), 1e-5)
    assert max(np.abs(leaf).max() for leaf in first_gradient(stored)) > 0.01


def test_features_stand_in_the_batch(model_folder: Path, dataset: Path) -> None:
    t = loop.Run(config(model_folder, dataset, **{"lora.rank": 2}))
    batch = t.supervised(next(t.feed.iterator))[0].batch
    assert isinstance(batch.vision, Features)
    assert batch.vision.tokens.shape[0] == t.config.batch_size


# --- Updates ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rolled(model_folder: Path, dataset: Path) -> tuple[loop.Run, TrainBatch]:
    """A trainer with two updates a rollout, and the batch of its first step."""
    t = loop.Run(config(model_folder, dataset, **{"grpo.iterations": 2, "optim.lr": 3e-3}))
    batch, *_ = t.worker.collect(t.learner, t.feed.next(), jax.random.fold_in(t.key, 0), Clock())
    return t, jax.device_put(batch, sharding.examples(t.mesh))


def test_old_log_probs_are_those_of_the_policy_that_sampled(rolled: tuple[loop.Run, TrainBatch]) -> None:
    """They stay while the policy moves: the second update's ratios are no longer one."""
    t, batch = rolled
    mask = np.asarray(batch.completions.mask)
    old, sampler = (np.asarray(batch.loss_inputs[name])[mask] for name in ("old_logps", "sampler_logps"))
    np.testing.assert_allclose(old, sampler, atol=1e-4)
    before = jax.tree.map(jnp.copy, t.learner.state)
    t.learner.state, first = t.learner.updates.whole(t.learner.state, t.learner.base, batch)
    now = t.learner.policy_logps(batch.batch, batch.completions)
    t.learner.state, second = t.learner.updates.whole(t.learner.state, t.learner.base, batch)
    t.learner.state = before
    assert np.abs(np.asarray(now)[mask] - old).max() > 0.01
    assert first["clip/low"] == first["clip/high"] == 0
    assert second["clip/low"] + second["clip/high"] > 0


def test_an_update_that_is_not_finite_can_be_left_out(rolled: tuple[loop.Run, TrainBatch]) -> None:
    t, batch = rolled
    with t.config.unlocked():
        t.config.skip_nonfinite = True
    careful = update.Updates(t.config, t.learner.model, t.learner.optimiser, t.learner.shardings, t.mesh).whole
    bad = {**batch.loss_inputs, "advantages": batch.loss_inputs["advantages"] * jnp.nan}
    before = jax.device_get(t.learner.state)
    state, metrics = careful(jax.tree.map(jnp.copy, t.learner.state), t.learner.base, replace(batch, loss_inputs=bad))
    assert metrics["skipped"] == 1 and np.isnan(metrics["loss"])
    assert_close(before, jax.device_get(state), 0)
    state, metrics = careful(jax.tree.map(jnp.copy, t.learner.state), t.learner.base, batch)
    assert metrics["skipped"] == 0
    assert not np.array_equal(before.params["decoder"]["norm"]["weight"], state.params["decoder"]["norm"]["weight"])


@pytest.mark.parametrize(("loss_type", "parts"), [("grpo", 4), pytest.param("dapo", 2, marks=pytest.mark.long)])
def test_parts_of_a_batch_give_the_same_update(loss_type: str, parts: int, rolled: tuple[loop.Run, TrainBatch]) -> None:
    """4 x 1 and 2 x 2 as 1 x 4, each part packed into its own length: every metric, and every gradient (one step of SGD
    with rate 1) to 1e-5."""
    t, batch = rolled
    results = []
    for number in (1, parts):
        c = t.config.copy_and_resolve_references()
        c.grpo.loss_type, c.grpo.entropy_bonus = loss_type, 0.01
        sgd = optim.optax.sgd(1.0)
        state = replace(t.learner.state, opt_state=sgd.init(t.learner.state.params))
        shardings = sharding.state_shardings(state, t.mesh)
        c.micro_batches = number
        again = learner.Learner(c, t.learner.model.config, learner.shapes_of(state.params), t.mesh)
        again.updates = update.Updates(c, again.model, sgd, shardings, t.mesh)
        again.state, again.base = jax.tree.map(jnp.copy, state), t.learner.base
        c.grpo.iterations = 1
        metrics = again.update(batch, np.asarray(batch.completions.mask).sum((1, 2)))
        results.append((jax.device_get(again.state), metrics))
    (whole, expected), (state, metrics) = results
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-4, atol=1e-5, err_msg=name)
    assert_close(state.params, whole.params, 1e-5)
    assert any(
        np.abs(a - b).max() > 1e-3
        for a, b in zip(*map(jax.tree.leaves, (whole.params, t.learner.state.params)), strict=True)
    )


# --- The reference policy -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, pytest.param(2, marks=pytest.mark.long)], ids=["full", "lora"])
def test_a_reference_that_follows_is_the_policy_again(
    rank: int, model_folder: Path, dataset: Path, tmp_path: Path
) -> None:
    """After two steps the KL is 0 at the start of the third; a resumed run has the same reference."""
    c = config(model_folder, dataset, **{"grpo.reference_every": 2, "lora.rank": rank, "steps": 2, "optim.lr": 3e-3})
    loop.run(c, tmp_path)
    c.steps = 4
    loop.run(c, tmp_path)
    kl = [step["kl"] for step in read_metrics(tmp_path)]
    assert kl[1] > 10 * max(abs(kl[0]), 1e-7)
    assert abs(kl[2]) < 1e-6 < kl[3]


def test_half_a_step_towards_the_policy(model_folder: Path, dataset: Path) -> None:
    t = loop.Run(config(model_folder, dataset, **{"grpo.reference_every": 1, "grpo.reference_mix": 0.5}))
    before = jax.device_get(t.learner.state.params)
    _, after = moved(t)
    assert_close(jax.device_get(t.learner.state.reference), jax.tree.map(lambda a, b: (a + b) / 2, before, after), 1e-6)


# --- Rewards ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scorer(model_folder: Path, dataset: Path) -> tuple[RolloutWorker, pipeline.HostBatch, ConfigDict]:
    """A rollout whose model is never run, and a batch of prompts."""
    c = config(model_folder, dataset)
    t = loop.Run(c)
    return t.worker, t.feed.next(), c


def test_a_users_reward_that_fails_costs_its_completion_alone(scorer: tuple, capsys: pytest.CaptureFixture) -> None:
    texts = [("abcdefgh" * 3)[: 4 + i] for i in range(16)]  # lengths 4 to 19: every case of `fussy`
    r, draw = judged(scorer, texts, user_rewards=((REWARD.format("fussy"), 1.0),))
    failing = np.asarray([len(text) % 5 in (0, 1, 2) for text in texts])
    np.testing.assert_array_equal(draw.counts, ~failing)
    metrics = r.scorer.metrics([draw])
    assert metrics["rewards/failed"] == failing.sum()
    inputs = loss_inputs(r, draw)
    assert not inputs["mask"].reshape(16, -1)[failing].any()
    assert inputs["mask"].reshape(16, -1)[~failing].any(1).all()
    assert np.isfinite(inputs["advantages"]).all() and not inputs["advantages"].reshape(-1)[failing].any()
    by_group = np.where(failing, np.nan, np.asarray([len(text) % 5 == 4 for text in texts], float)).reshape(-1, 4)
    expected = grpo.group_advantages(by_group.reshape(-1), 4)
    np.testing.assert_allclose(inputs["advantages"].reshape(-1), expected, atol=1e-6)
    shown = capsys.readouterr().out
    assert "no such judge" in shown and "the reward is inf" in shown
    assert any("no such judge" in (sample["error"] or "") for sample in r.scorer.records(draw, 0))


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"grpo.loss_type": "ppo"}, "grpo.loss_type='ppo' is unknown: expected one of grpo"),
        ({"grpo.kl_in": "both"}, "grpo.kl_in='both'"),
        ({"grpo.importance": "yes"}, "grpo.importance='yes'"),
        ({"grpo.iterations": 0}, "grpo.iterations=0: expected at least 1"),
        ({"micro_batches": 3}, "micro_batches=3 does not divide batch_size=4"),
        ({"user_rewards": ("tests.reward_functions:vowels", 1.0)}, "expected pairs"),
        ({"rollout.num_generations": 1}, "rollout.num_generations=1: expected at least 2"),
        ({"rollout.temperature": 0.0}, "rollout.temperature=0.0: expected at least 0.01"),
        ({"rollout.temperature": math.nan}, "rollout.temperature=nan: expected"),
        ({"rollout.top_p": 0.0}, "rollout.top_p=0.0: expected from 1e-06 to 1.0"),
        ({"rollout.top_k": -1}, "rollout.top_k=-1: expected at least 0"),
        ({"rollout.min_new_tokens": 17}, "rollout.min_new_tokens=17: expected from 0 to 16"),
        ({"data.max_completion_tokens": 0}, "data.max_completion_tokens=0: expected at least 1"),
        ({"checkpoint.every": 0}, "checkpoint.every=0: expected at least 1"),
        ({"checkpoint.keep": 0}, "checkpoint.keep=0: expected at least 1"),
        ({"seed": -5}, "seed=-5: expected from 0 to"),
        ({"optim.b1": 2.0}, "optim.b1=2.0: expected from 0 to 1"),
        ({"optim.clip_norm": 0.0}, "optim.clip_norm=0.0: expected from"),
        ({"motion.order": "RGB"}, "motion.order='RGB'"),
        ({"motion.start": "zero"}, "motion.start='zero'"),
        ({"data.bucket": (1,) * 7}, "expected 6 numbers, tokens, patches"),
        (
            {"data.task_weights": {name: 0.0 for name in ("qa", "grounding", "classification")}},
            "is 0 for all of data.tasks",
        ),
        ({"optim.freeze": ("(",)}, "optim.freeze has '(', which is not a valid regular expression"),
        ({"lora.targets": ("[",)}, "lora.targets has '[', which is not a valid regular expression"),
        ({"profile_steps": (1,)}, "profile_steps=(1,): expected the first and the last step"),
        ({"data.workers": -1}, "data.workers=-1: expected at least 1"),
        ({"data.fps": 0.0}, "data.fps=0.0: expected from 0.001"),
        ({"data.max_frames": 0}, "data.max_frames=0: expected at least 1"),
        ({"data.video_seconds": -1.0}, "data.video_seconds=-1.0: expected from"),
        ({"data.task_weights.qa": -1.0}, "data.task_weights.qa=-1.0: expected at least 0"),
        ({"grpo.beta": -0.1}, "grpo.beta=-0.1: expected at least 0"),
        ({"grpo.importance_cap": 0.0}, "grpo.importance_cap=0.0: expected at least 1"),
        ({"grpo.reference_mix": 1.5}, "grpo.reference_mix=1.5: expected from 0 to 1"),
        ({"grpo.overlong_buffer": 17}, "grpo.overlong_buffer=17: expected from 0 to 16"),
        ({"rewards.format": math.nan}, "rewards.format=nan: expected a finite number"),
        ({"data.style": "direct"}, "data.style=direct can earn none of rewards.accuracy=1.0, rewards.format=1.0"),
        (
            {"user_rewards": (), "rewards.format": 0.0, "rewards.accuracy": 0.0, "rewards.tiou": 0.0},
            "no reward has a weight",
        ),
    ],
    ids=str,
)
def test_a_setting_that_cannot_be_is_named(
    changed: dict[str, Any], words: str, model_folder: Path, dataset: Path
) -> None:
    with pytest.raises(InputError, match=re.escape(words)):
        loop.Run(config(model_folder, dataset, **changed))


def test_direct_answers_may_earn_a_users_reward(model_folder: Path, dataset: Path) -> None:
    off = {"rewards.format": 0.0, "rewards.accuracy": 0.0, "rewards.tiou": 0.0}
    loop.check(config(model_folder, dataset, **{"data.style": "direct", **off}))


def test_the_readmes_reward_runs_from_the_command_line(model_folder: Path, dataset: Path, tmp_path: Path) -> None:
    text = (ROOT / "launch" / "README.md").read_text()
    source = re.search(r"```python\n(def brief.*?)```", text, re.DOTALL)[1]
    (tmp_path / "my_rewards.py").write_text(source)
    flag = re.search(r"--config.user_rewards=\"(.*?)\"", text)[1]
    settings = {
        **{
            "user_rewards": flag,
            "model": model_folder,
            "steps": 1,
            "batch_size": 4,
            "dtype": "float32",
            "remat": False,
        },
        **{"data.csv": dataset / "train.csv", "data.videos": dataset / "videos", "data.max_frames": 8},
        **{"data.max_completion_tokens": 16, "data.bucket": "(128, 576, 48, 64, 12, 64)", "data.wording": "short"},
    }
    flags = [f"--config.{name}={value}" for name, value in settings.items()]
    command = [
        sys.executable,
        "-m",
        "vau_jax.train",
        "--config=configs/vau_r1_qa_rft.py",
        f"--workdir={tmp_path / 'run'}",
    ]
    env = {**os.environ, "PYTHONPATH": str(tmp_path), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([*command, *flags], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    step = read_metrics(tmp_path / "run")[0]
    assert -1 <= step["rewards/my_rewards:brief"] < 0


def test_truncated_completions_leave_the_loss_but_not_the_baseline(scorer: tuple) -> None:
    texts = ["a fire " * (9 if i % 4 == 0 else 1) for i in range(16)]
    _, plain = judged(scorer, texts)
    r, draw = judged(scorer, texts, **{"grpo.mask_truncated": True})
    np.testing.assert_array_equal(draw.ended, np.arange(16) % 4 != 0)
    inputs, before = loss_inputs(r, draw), loss_inputs(r, plain)
    np.testing.assert_array_equal(inputs["mask"].any(-1).reshape(-1), draw.ended)
    np.testing.assert_array_equal(inputs["advantages"], before["advantages"])
    assert np.abs(inputs["advantages"]).max() > 0


def test_long_completions_are_penalised_in_tokens(scorer: tuple) -> None:
    texts = ["fire" * n for n in range(1, 17)]
    r, draw = judged(scorer, texts, user_rewards=(), **{"grpo.overlong_buffer": 8, "rewards.format": 0.0})
    lengths = draw.sampled.mask.sum(-1).reshape(-1)
    column = draw.rewards[:, list(r.scorer.weights).index("overlong")]
    np.testing.assert_allclose(column, -np.clip((lengths - 8) / 8, 0, 1), atol=1e-6)
    assert column.min() == -1 and column.max() == 0
    assert "rewards/overlong" in r.scorer.metrics([draw])


def test_log_probabilities_beside_the_rewards_are_those_after_them(rolled: tuple[loop.Run, TrainBatch]) -> None:
    t, _ = rolled
    chosen, _, _ = t.worker.select(t.learner, t.feed.next(), jax.random.key(0), Clock())
    after = t.worker.score(t.learner, chosen.batch, chosen.sampled, chosen.outcome.lengths)
    assert set(after.logps) == {"ref_logps", "old_logps"}
    found, expected = (jax.tree.leaves((s.tokens, s.completions, s.logps)) for s in (chosen.scored, after))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)


def test_rewards_of_several_draws_come_before_log_probabilities(model_folder: Path, dataset: Path) -> None:
    """They say which groups are trained on."""
    t = loop.Run(config(model_folder, dataset, **{"rollout.max_draws": 2}))
    chosen, _, _ = t.worker.select(t.learner, t.feed.next(), jax.random.key(0), Clock())
    assert chosen.scored is None


def test_kl_in_the_reward(scorer: tuple) -> None:
    """Beta times the sum of a completion's KL is taken off its reward."""
    texts = [("abcdefgh" * 3)[: 4 + i] for i in range(16)]
    r, draw = judged(scorer, texts, **{"grpo.kl_in": "reward", "grpo.beta": 0.5})
    mask = draw.sampled.mask
    kl = np.random.default_rng(0).normal(0.0, 0.3, mask.shape).astype(np.float32)
    expected = grpo.group_advantages(draw.total - 0.5 * np.where(mask, kl, 0).sum(-1).reshape(-1), 4)
    np.testing.assert_allclose(loss_inputs(r, draw, kl)["advantages"].reshape(-1), expected, atol=1e-5)


def test_a_policy_that_is_its_reference_pays_no_kl_in_the_reward(model_folder: Path, dataset: Path) -> None:
    """However its tokens are drawn. A random model's rewards are all 0, so that advantages would come from the KL."""
    filters = {"rollout.top_k": 5, "rollout.top_p": 0.9, "rollout.min_new_tokens": 12}
    changed = {"user_rewards": (), "grpo.kl_in": "reward", "grpo.kl": "k1", **filters}
    t = loop.Run(config(model_folder, dataset, **changed))
    batch, _, metrics, _ = t.worker.collect(t.learner, t.feed.next(), jax.random.fold_in(t.key, 0), Clock())
    assert metrics["reward"] == metrics["reward_std"] == 0
    ref, sampler = (np.asarray(batch.loss_inputs[name]) for name in ("ref_logps", "sampler_logps"))
    drawn = np.asarray(batch.loss_inputs["mask"])
    assert np.abs(sampler - ref)[drawn].max() > 0.5, "the sampler's distribution is another"
    assert not np.asarray(batch.loss_inputs["advantages"]).any()


@pytest.mark.parametrize(
    ("importance", "top_p", "cap"), [("auto", 1.0, 0.0), ("auto", 0.9, 2.0), ("always", 1.0, 2.0), ("never", 0.9, 0.0)]
)
def test_filtered_sampling_is_corrected(importance: str, top_p: float, cap: float, scorer: tuple) -> None:
    c = scorer[2].copy_and_resolve_references()
    c.grpo.importance, c.rollout.top_p = importance, top_p
    assert update.loss_settings(c).importance_cap == cap


score = jax.jit(update.policy_logps, static_argnames="model")
NOT_OF_SAMPLING = {"batch_size", "annotated", "num_generations", "max_draws", "reward_workers", "reward_seconds"}
SAMPLING = {"temperature": 0.6, "top_p": 0.8, "top_k": 3, "min_new_tokens": 12}


@pytest.mark.parametrize("name", sorted(set(base.get_config().rollout) - NOT_OF_SAMPLING))
def test_tokens_are_weighed_where_they_are_not_drawn_as_they_are_scored(name: str, vlm: VideoLM, dataset: Path) -> None:
    """Each field of config.rollout that the sampler reads, one at a time."""
    c = config(vlm.processor.folder, dataset, **{f"rollout.{name}": SAMPLING[name]})
    batch = vlm.encode([ask(text="fire")])
    engine = Engine(c.rollout, vlm.model, vlm.processor.end_tokens, c.data.max_completion_tokens)
    out = engine.sample(vlm.variables, batch, jax.random.key(0))
    scored, _ = score(vlm.variables, batch, Completions(out.tokens, out.mask), vlm.model, c.rollout.temperature)
    gap = np.abs(np.where(out.mask, out.logps - scored, 0)).max()
    assert (gap > 1e-3) == (update.loss_settings(c).importance_cap > 0), gap


# --- What draws depend on -----------------------------------------------------------------------------------------


@pytest.mark.long
def test_what_is_drawn_for_an_example_depends_on_it_alone(model_folder: Path, dataset: Path) -> None:
    """Not on the order of the batch, nor on its size; another step draws anew, and so does an example that repeats."""
    t = loop.Run(config(model_folder, dataset))
    items = t.feed.next().examples
    t.close()

    def drawn(items: list[loading.Loaded], key: int = 0) -> dict[str, list]:
        batch = t.learner.encode_vision(jax.device_put(t.feed.collate(items).batch, sharding.examples(t.mesh)))
        repeats = [items[:i].count(item) for i, item in enumerate(items)]
        keys = pipeline.keys_of(jax.random.key(key), pipeline.draw_numbers(items, repeats))
        out = t.worker.engine.sample(t.learner.variables, batch, keys)
        return {f"{item.example.id}/{i}": row.tolist() for item, i, row in zip(items, repeats, out.tokens, strict=True)}

    whole = drawn(items)
    assert drawn(items[::-1]) == whole
    assert drawn(items[2:]).items() <= whole.items()
    assert all(drawn(items, 1)[name] != tokens for name, tokens in whole.items())
    twice = drawn([items[0], items[0]])
    assert twice[f"{items[0].example.id}/0"] == whole[f"{items[0].example.id}/0"] != twice[f"{items[0].example.id}/1"]


# --- Dynamic sampling ---------------------------------------------------------------------------------------------


def test_groups_without_variance_are_replaced(model_folder: Path, dataset: Path) -> None:
    """Only classification prompts have rewards that differ: the batch is filled with them from further draws."""
    c = config(model_folder, dataset, "only_classification", **{"rollout.max_draws": 6})
    t = loop.Run(c)
    chosen, outcomes, _ = t.worker.select(t.learner, t.feed.next(), jax.random.key(0), Clock())
    assert 1 < len(outcomes) <= 6
    assert len(chosen.outcome.kinds) == len(chosen.batch.tokens) == c.batch_size
    assert all(kind.startswith("classification") for kind in chosen.outcome.kinds)
    assert chosen.outcome.varied.all()
    # Each prompt still has its own completions and rewards.
    texts = [
        text for group in t.processor.decode_completions(chosen.sampled.tokens, chosen.sampled.mask) for text in group
    ]
    np.testing.assert_allclose(chosen.outcome.rewards[:, -1], [reward_functions.vowels(text, None) for text in texts])
    assert [record["completion"] for record in chosen.first] == texts[:4]
    logps = t.learner.policy_logps(chosen.batch, Completions(chosen.sampled.tokens, chosen.sampled.mask))
    np.testing.assert_allclose(np.where(chosen.sampled.mask, logps - chosen.sampled.logps, 0), 0, atol=1e-4)


@pytest.fixture(scope="module")
def draws_in_vain(model_folder: Path, dataset: Path) -> tuple[ConfigDict, dict[str, Any], list[str]]:
    """A step whose rewards never differ and whose prompts are all too hard: its config, metrics, and all prompts."""
    changed = {"user_rewards": (), "rollout.max_draws": 3, "grpo.beta": 0.0, "data.difficulty.enabled": True}
    t = loop.Run(config(model_folder, dataset, **changed))
    t.difficulty.accuracy = {f"{task}/{label}": 0.0 for task in t.config.data.tasks for label in vau_bench.LABELS}
    read, prompts = t.worker.scorer.read, []
    t.worker.scorer.read = lambda host, sampled: prompts.extend(i.prompt for i in host.examples) or read(host, sampled)
    return t.config, t.step(0)[0], prompts


def test_the_number_of_draws_is_bounded_and_counted(draws_in_vain: tuple) -> None:
    """Where no reward ever differs, the step ends after max_draws with nothing to learn from."""
    c, metrics, _ = draws_in_vain
    assert metrics["dynamic/draws"] == 3
    assert metrics["dynamic/replaced"] == 0 and metrics["dynamic/left_without_variance"] == c.batch_size
    assert metrics["loss"] == 0 and metrics["grad_norm"] == 0


def test_prompts_of_every_draw_have_their_level(draws_in_vain: tuple) -> None:
    c, metrics, prompts = draws_in_vain
    assert len(prompts) == 3 * c.batch_size == metrics["difficulty/hard"]
    assert all("Hint:" in prompt for prompt in prompts)


# --- Difficulty ---------------------------------------------------------------------------------------------------


def test_levels_follow_the_running_accuracy(model_folder: Path, dataset: Path) -> None:
    c = config(model_folder, dataset, **{"data.difficulty.enabled": True})
    t = loop.Run(c)
    host = t.feed.next()
    plain, counts = t.difficulty.choose(host, t.feed.collate)
    assert plain is host and pipeline.summed(counts) == {"difficulty/easy": 0, "difficulty/hard": 0}
    examples = [item.example for item in host.examples]
    d = Difficulty(c.data.difficulty)
    d.accuracy = dict(zip((e.kind for e in examples), (0.9, 0.5, 0.1, 0.1), strict=True))
    levels = [d.level(e) for e in examples]
    chosen, counts = d.choose(host, t.feed.collate)
    assert pipeline.summed(counts) == {"difficulty/easy": levels.count("easy"), "difficulty/hard": levels.count("hard")}
    assert {"easy", "hard"} <= set(levels)
    for before, after, level in zip(host.examples, chosen.examples, levels, strict=True):
        assert ("Hint:" in after.prompt) == (level == "hard")
        same = all(
            np.array_equal(a.patches, b.patches)
            for a, b in zip(before.encoded.visuals, after.encoded.visuals, strict=True)
        )
        assert same == (level != "easy")


def test_the_running_accuracy_is_a_moving_mean(scorer: tuple) -> None:
    _, draw = judged(scorer, ["fire"] * 16)
    d = Difficulty(scorer[2].data.difficulty)
    d.learn(replace(draw, final_score=np.ones(16, np.float32)))
    assert set(d.accuracy.values()) == {1.0}
    d.learn(replace(draw, final_score=np.zeros(16, np.float32)))
    times = {name: [i.example.kind for i in draw.host.examples].count(name) for name in d.accuracy}
    for name, value in d.accuracy.items():
        assert math.isclose(value, 0.9 ** times[name], rel_tol=1e-6)


def test_harder_frames_keep_their_number_and_most_of_the_picture(rng: np.random.Generator) -> None:
    frames = rng.integers(60, 200, (12, 28, 28, 3), dtype=np.uint8)
    kinds = set()
    for _ in range(20):
        worse = loading.harder(frames, rng, noise=16.0, drop=0.25)
        assert worse.shape == frames.shape and worse.dtype == np.uint8
        repeated = [any(np.array_equal(frame, old) for old in frames) for frame in worse]
        if all(repeated):
            np.testing.assert_array_equal(worse[0], frames[0])
            kinds.add("dropped")
        else:
            assert abs(np.std(worse.astype(float) - frames) - 16) < 1
            kinds.add("noise")
    assert kinds == {"dropped", "noise"}


def test_a_resumed_run_remembers_difficulty_and_tokens(model_folder: Path, dataset: Path, tmp_path: Path) -> None:
    c = config(model_folder, dataset, **{"data.difficulty.enabled": True})
    loop.run(c, tmp_path)
    first = read_metrics(tmp_path)[0]
    c.steps = 2
    t = loop.Run(c)
    assert t.resume(checkpoint.Checkpoints(tmp_path)) == 1
    assert t.tokens_seen == first["tokens_seen"] > 0
    assert t.difficulty.accuracy and set(t.difficulty.accuracy.values()) == {0.0}


def fitted(t: loop.Run, batch: TrainBatch, limit: float, monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Metrics of an update with micro_batches=auto on devices with so much memory, which CPUs do not report."""
    config = t.config.copy_and_resolve_references()
    with config.ignore_type():
        config.micro_batches = "auto"
    monkeypatch.setattr(memory, "limit", lambda: limit)
    again = learner.Learner(config, t.learner.model.config, learner.shapes_of(t.learner.state.params), t.mesh)
    again.base, again.reference = t.learner.base, t.learner.reference
    again.state = jax.tree.map(jnp.copy, t.learner.state)
    return again.update(batch)


def test_micro_batches_are_as_few_as_fit_by_the_compilers_plan(
    rolled: tuple[loop.Run, TrainBatch], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    """One byte less than the whole batch takes: it is computed in two parts; what no number fits is one line."""
    t, batch = rolled
    plans, planned = [], memory.planned
    monkeypatch.setattr(memory, "planned", lambda program: plans.append(planned(program)) or plans[-1])
    beside = t.learner.beside_update
    assert beside == memory.held(t.learner.state.params), "the reference policy"
    with pytest.raises(InputError, match=r"micro_batches=auto: with one prompt a device at a time .* lora.rank=16"):
        fitted(t, batch, beside, monkeypatch)
    assert len(plans) == 3 and plans[0] > plans[1] > plans[2] > 0, "in 1, 2 and 4 parts"
    metrics = fitted(t, batch, plans[0] - 1 + beside, monkeypatch)
    assert "micro_batches=2: an update takes" in capfd.readouterr().out
    whole = fitted(t, batch, math.inf, monkeypatch)
    assert metrics.keys() == whole.keys() and metrics["loss"] == pytest.approx(whole["loss"], abs=1e-5)


def test_micro_batches_are_as_many_as_fit_in_every_process(
    model_folder: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Devices of another process have less memory: all take what fits there."""
    c = config(model_folder, dataset)
    with c.ignore_type():
        c.micro_batches = "auto"
    tried: list[int] = []
    monkeypatch.setattr(memory.processes, "exchange", lambda fits: [fits, len(tried) == 2])
    mesh = sharding.make_mesh(c.mesh, jax.devices()[:1])
    assert memory.fitting(c, mesh, 2, lambda parts: tried.append(parts) or 1.0, math.inf) == 2
    assert tried == [1, 2]
