"""The one training loop, for SFT and RFT alike.

    python -m vau_jax.train --config=configs/vau_r1_sft.py --workdir=DIR [--config.key=value]

RFT adds one line to a step: it makes the batch by a rollout before the same update. A run that was killed goes on from
its last checkpoint and ends with the same bits.
"""

import errno
import json
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from vau_jax.common import processes, sharding
from vau_jax.common.about import about
from vau_jax.common.chips import chip
from vau_jax.common.fields import Fields
from vau_jax.common.files import InputError, content_hash, dump_json, read_json, write_text
from vau_jax.common.metric_writer import RunLog
from vau_jax.common.processes import Rows
from vau_jax.data import pipeline
from vau_jax.data.pipeline import HostBatch
from vau_jax.data.processor import Shape
from vau_jax.data.video.decoders import short
from vau_jax.models import checkpoint, flops, hf, lora, motion_prompt, qwen_vl
from vau_jax.models.lora import LoRA
from vau_jax.models.qwen_vl import QwenVL
from vau_jax.rl import grpo, rollout
from vau_jax.rl.difficulty import Difficulty
from vau_jax.rl.rollout import Outcome, Rollout, RolloutBatch, SelectedGroups
from vau_jax.train import optim, update
from vau_jax.train.settings import check
from vau_jax.types import Batch, Completions, Params, State, TrainBatch, Variables
from vau_jax.vlm import DTYPES, VideoLM

PREEMPTED = "preempted.json"  # in the workdir of a run that was asked to end before its last step
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
ADAPTER_STREAM = 2**31 - 2  # no step number: the key of fresh adapters and the sampler's never meet


class Trainer:
    """Everything of a run that is set up once: model, state, data, compiled functions.

    Answers of a judge are kept in `workdir`, where there is one. `source` is the model folder or the checkpoint that
    the run begins with; else what config names now, which of a run is its last checkpoint.
    """

    def __init__(self, config: ConfigDict, workdir: Path | None = None, source: str = "") -> None:
        check(config)
        self.config = config
        self.mesh = sharding.make_mesh(config.mesh)
        sharding.check_divisible(config.batch_size // config.micro_batches, self.mesh)
        self.rows = Rows(config.batch_size, self.mesh)
        examples, audit = pipeline.load_examples(config.data)
        if processes.is_first():
            print(audit.table(), flush=True)
        self.lora = LoRA(**config.lora) if config.lora.rank else None
        # What is not trained needs no more bits than it is used in.
        held = config.dtype if self.lora else config.param_dtype
        start = VideoLM.load(source or config.init_from or config.model, held, self.mesh, merge=True)
        if config.motion.enabled:
            start = start.with_motion(config.motion)
        self.processor = start.processor
        self.model = QwenVL(
            self.processor.config,
            DTYPES[config.dtype],
            config.remat,
            config.unroll,
            config.attention,
            self.lora,
            self.mesh,
        )
        # Unrolled layers pay in the update; in the sampler's loop their weights would be copied at every token.
        sampler = self.model.clone(unroll=1)
        judged = processes.own_lines(workdir / "judge.jsonl") if workdir and config.rewards.get("judge") else None
        self.rollout = Rollout(config, sampler, self.processor, self.rows, judged) if config.stage == "rft" else None
        trained, self.base = start.params, None
        if self.lora:
            trained, self.base = self._fresh_adapters(start.params), start.params
        self._make_state(trained)
        self._compile()
        self.collate = pipeline.Collator(self.processor, config.data)
        self.data = pipeline.train_iterator(
            examples,
            self.processor,
            config.data,
            config.batch_size,
            seed=config.seed,
            rows=self.rows.mine,
            # Several processes first agree on the size.
            place=self._on_devices if jax.process_count() == 1 else None,
        )
        self.difficulty = Difficulty(config.data.difficulty)
        self.tokens_seen = 0
        self.data_counts = Counter(pipeline.excluded(audit))  # what is wrong with the data, since the run began
        self.best_score = checkpoint.BestMetric(config)
        self.key = jax.random.key(config.seed)

    def _make_state(self, trained: Params) -> None:
        c = self.config
        updates = c.steps * (c.grpo.iterations if c.stage == "rft" else 1)
        motion = c.motion if self.processor.config.vision.motion else None
        self.optimiser = optim.make(c.optim, updates, trained, self.base, motion)
        self.reference, following = self.base, None  # the policy that the KL is measured from: fixed, or in the state
        if c.stage == "rft" and c.grpo.beta:
            if c.grpo.reference_every:
                following = jax.tree.map(jnp.copy, trained)
            elif not self.lora:
                self.reference = jax.tree.map(jnp.copy, trained)
        state = State(jnp.int32(0), trained, jax.jit(self.optimiser.init)(trained), following)
        self.shardings = sharding.state_shardings(state, self.mesh)
        self.state = jax.device_put(state, self.shardings)

    def _compile(self) -> None:
        c = self.config
        self.update = update.make(c, self.model, self.optimiser, self.shardings, self.mesh)
        self.reference_logps = jax.jit(
            partial(update.policy_logps, model=self.model, temperature=c.rollout.temperature)
        )
        self.encode_vision = jax.jit(partial(self.model.apply, method="encode_vision"))
        names = list(hf.flatten(self.base or self.state.params))
        towers = [name for name in names if name.startswith("visual/")]
        adapted = self.lora and any(name.startswith("visual/") for name in hf.flatten(self.state.params))
        self.tower_is_frozen = not adapted if self.lora else optim.all_frozen(c.optim, towers)
        if self.processor.config.vision.motion:  # what goes into the tower is trained
            self.tower_is_frozen = False
        mix = c.grpo.reference_mix
        self.follow = jax.jit(
            lambda old, new: jax.tree.map(lambda a, b: (1 - mix) * a + mix * b, old, new),
            out_shardings=self.shardings.reference,
        )

    def _fresh_adapters(self, params: Params) -> Params:
        shapes = {path: leaf.shape for path, leaf in hf.flatten(params).items()}
        key = jax.random.fold_in(jax.random.key(self.config.seed), ADAPTER_STREAM)
        dtype = jnp.dtype(self.config.param_dtype)
        flat = lora.init(key, shapes, self.lora, dtype)
        if "motion_prompt" in params:
            flat |= {f"motion_prompt/{name}": jnp.copy(x) for name, x in params["motion_prompt"].items()}
        return hf.unflatten(flat)

    @property
    def variables(self) -> Variables:
        """The policy as it is now."""
        return update.policy(self.state.params, self.base)

    # --- Where a run stands, besides its state ---

    def place(self) -> dict[str, Any]:
        """What a checkpoint keeps beside the state, as JSON."""
        iterator = checkpoint.iterator_state(self.data.get_state())
        return {
            "iterator": iterator,
            "difficulty": self.difficulty.accuracy,
            "tokens_seen": self.tokens_seen,
            "data_counts": dict(self.data_counts),
            "scores": self.best_score.values,
        }

    def resume(self, checkpoints: checkpoint.Checkpoints) -> int:
        """Puts the run where its last checkpoint left it; returns the steps done."""
        step = checkpoints.latest()
        if step is None:
            return 0
        self.state, place = checkpoints.restore(step, self.state)
        self.data.set_state(place["iterator"])
        self.difficulty.accuracy, self.tokens_seen = place["difficulty"], place["tokens_seen"]
        self.data_counts, self.best_score.values = Counter(place["data_counts"]), place["scores"]
        return step

    def close(self) -> None:
        """Ends the threads that load data ahead, and the processes of users' rewards."""
        self.data.close()
        if self.rollout:
            self.rollout.user.close()

    # --- One step ---

    def step(self, number: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """One update (or, with grpo.iterations, several): its metrics, and samples to read when there was a rollout."""
        clock = _Clock()
        with clock("data"):
            host = self._next()
        metrics: dict[str, Any] = {}
        if self.rollout:
            train, found, samples = self._rollout(host, number, clock)
            metrics |= found
        else:
            given = self.rows.put((host.completions, {"weights": host.weights}))
            train, samples = TrainBatch(self._place(self._agreed(host)), *given), []
        metrics |= self.data_counts
        train = jax.device_put(train, sharding.examples(self.mesh))
        with clock("update"):
            metrics |= self._update(train)
        self._follow_reference(number)
        metrics |= clock.seconds()
        metrics |= self._speed(train, metrics)
        return metrics, samples

    def _next(self) -> HostBatch:
        """This process's rows of the next batch; what is wrong with the whole of it is counted."""
        host = next(self.data)
        troubles = [pipeline.troubles(item, self.config.data) for item in host.examples]
        self.data_counts.update(pipeline.summed(self.rows.gather(troubles)))
        return host

    def _shape(self, host: HostBatch) -> Shape:
        """What every process pads its rows of a batch to: the largest of their sizes."""
        own = self.collate.shape(host.examples)
        return Shape(*map(max, *self.rows.gather([own] * len(host.examples)), own))

    def _agreed(self, host: HostBatch) -> HostBatch:
        """The same rows padded as every process pads its own."""
        return host if jax.process_count() == 1 else self.collate(host.examples, self._shape(host))

    def _on_devices(self, host: HostBatch) -> HostBatch:
        return replace(host, batch=self.rows.put(host.batch))

    def _place(self, host: HostBatch) -> Batch:
        return self._seen(self._on_devices(host).batch)

    def _seen(self, batch: Batch) -> Batch:
        """Where the vision tower is frozen it sees the prompts here, once for all uses."""
        return replace(batch, vision=self.encode_vision(self.variables, batch)) if self.tower_is_frozen else batch

    def _update(self, train: TrainBatch) -> dict[str, float]:
        """The updates of one batch; their metrics, mean or (/max) largest."""
        rounds = self.config.grpo.iterations if self.rollout else 1
        found = []
        for _ in range(rounds):
            with jax.transfer_guard("disallow"):  # everything is where the program wants it
                self.state, scalars = self.update(self.state, self.base, train)
            found.append(jax.device_get(scalars))
        return {
            name: (np.max if name.endswith("/max") else np.mean)([scalars[name] for scalars in found])
            for name in found[0]
        }

    def _rollout(
        self, host: HostBatch, number: int, clock: "_Clock"
    ) -> tuple[TrainBatch, dict[str, Any], list[dict[str, Any]]]:
        """Completions with what the loss needs of them."""
        chosen, outcomes, levels = self._draw(host, jax.random.fold_in(self.key, number), clock)
        metrics: dict[str, Any] = {**levels, **self.rollout.metrics(outcomes)}
        if self.config.rollout.max_draws > 1:
            alike = int((~chosen.outcome.varied).sum())
            metrics |= {"dynamic/draws": len(outcomes), "dynamic/left_without_variance": alike}
            metrics["dynamic/replaced"] = int((~outcomes[0].varied).sum()) - alike
        with clock("score"):
            completions = self.rollout.completions(chosen)
            placed = self.rows.put(completions)
            scored = self._scored(chosen.batch, placed)
            kl = self._kl_in_reward(chosen.batch, placed, scored)
            inputs, advantages = self.rollout.loss_inputs(chosen, completions.mask, kl)
        samples = [{**record, "advantage": float(a)} for record, a in zip(chosen.first, advantages[0], strict=True)]
        return TrainBatch(chosen.batch, placed, {**self.rows.put(inputs), **scored}), metrics, samples

    def _draw(
        self, host: HostBatch, key: jax.Array, clock: "_Clock"
    ) -> tuple[SelectedGroups, list[Outcome], dict[str, int]]:
        """The groups to train on, how all that were drawn did, and how many prompts were of each level of difficulty.

        With rollout.max_draws, groups whose rewards are all alike are replaced by groups of further prompts, as long as
        draws are left (DAPO's dynamic sampling, arXiv 2503.14476); those that remain have advantage 0.
        """
        draws: list[RolloutBatch] = []
        outcomes: list[Outcome] = []
        levels: list[dict[str, int]] = []
        while True:
            if self.config.data.difficulty.enabled:
                with clock("data"):
                    host, own_levels = self.difficulty.choose(host, self.collate)
                levels += self.rows.gather(own_levels)
            with clock("rollout"):
                host = self._agreed(host)
                batch = self._place(host)
                sampled = self.rollout.sample(self.variables, batch, jax.random.fold_in(key, len(draws)))
                sampled = self.rows.fetch(sampled)
            with clock("reward"):
                draws.append(self.rollout.read(host, sampled))
                outcomes.append(draws[-1].gathered(self.rows))
                self.difficulty.learn(outcomes[-1])
            enough = sum(outcome.varied.sum() for outcome in outcomes) >= self.config.batch_size
            if enough or len(draws) >= self.config.rollout.max_draws:
                break
            with clock("data"):
                host = self._next()
        if len(draws) == 1:
            chosen = SelectedGroups(outcomes[0], batch, draws[0].sampled, self._first(draws, 0))
        else:
            chosen = self._chosen(draws, outcomes)
        return chosen, outcomes, pipeline.summed(levels)

    def _chosen(self, draws: list[RolloutBatch], outcomes: list[Outcome]) -> SelectedGroups:
        """Of several draws; a group may go to the devices of another process than the one that has read it."""
        every = rollout.joined(outcomes)
        numbers = np.argsort(~every.varied, kind="stable")[: self.config.batch_size]
        shape = Shape(*map(max, *(self._shape(draw.host) for draw in draws)))
        pools = [(self.collate(draw.host.examples, shape).batch, draw.sampled) for draw in draws]
        batch, sampled = self.rows.take(pools, numbers)
        first = self._first(draws, int(numbers[0]))
        return SelectedGroups(every.groups(numbers), self._seen(batch), self.rows.fetch(sampled), first)

    def _first(self, draws: list[RolloutBatch], number: int) -> list[dict[str, Any]]:
        """Records of the group `number`, counted through all draws, from the process that has read it."""
        draw, row = divmod(number, self.config.batch_size)
        mine = [self.rollout.records(draws[draw], i) if r == row else None for i, r in enumerate(self.rows.mine)]
        return self.rows.gather(mine)[row]

    def _scored(self, batch: Batch, completions: Completions) -> dict[str, jax.Array]:
        """Log-probabilities of the reference policy, where there is a KL term, and of the policy that sampled, where
        one rollout serves several updates."""
        c, scored = self.config.grpo, {}
        if c.beta:
            reference = qwen_vl.with_adapters(self.reference, None)
            if self.state.reference is not None:
                reference = update.policy(self.state.reference, self.base)
            scored["ref_logps"] = self.reference_logps(reference, batch, completions)[0]
        if c.iterations > 1:
            scored["old_logps"] = self.reference_logps(self.variables, batch, completions)[0]
        return scored

    def _kl_in_reward(self, batch: Batch, completions: Completions, scored: dict[str, jax.Array]) -> np.ndarray | None:
        """Where the KL is part of the reward, that of each token, float32 [b, G, C] of this process's rows. Both sides
        are scored alike: the sampler's log-probabilities can be those of another distribution (see sampling.py), and
        are rounded otherwise."""
        c = self.config.grpo
        if c.kl_in != "reward" or not c.beta:
            return None
        own = (
            scored["old_logps"]
            if "old_logps" in scored
            else self.reference_logps(self.variables, batch, completions)[0]
        )
        own, reference = self.rows.fetch(own), self.rows.fetch(scored["ref_logps"])
        return np.asarray(grpo.kl_divergence(own, reference, c.kl))

    def _follow_reference(self, number: int) -> None:
        """Moves the reference to (a mix with) the policy, every grpo.reference_every steps."""
        if self.state.reference is not None and (number + 1) % self.config.grpo.reference_every == 0:
            self.state = replace(self.state, reference=self.follow(self.state.reference, self.state.params))

    def _speed(self, train: TrainBatch, metrics: dict[str, Any]) -> dict[str, float]:
        """Tokens a second, and where the devices' peak is known the share of it that the updates used (MFU): the
        operations of real tokens, forward and backward, without what is computed again."""
        size = jax.device_get(flops.sizes(train.batch, train.completions))
        size = {name: float(value) for name, value in size.items()}
        tokens, seconds = size["prompt"] + size["drawn"], metrics["seconds/step"]
        self.tokens_seen += int(tokens)
        found = {"tokens_per_s": tokens / seconds, "completion_tokens_per_s": size["drawn"] / seconds}
        if known := chip(jax.devices()[0].device_kind):
            work = sum(flops.forward(self.processor.config, size).values()) * (2 if self.lora else 3)
            rounds = self.config.grpo.iterations if self.rollout else 1
            found["mfu"] = work * rounds / metrics["seconds/update"] / known.flops / jax.device_count()
        return {"tokens_seen": self.tokens_seen, **found}


class _Clock:
    """Seconds spent in each phase of a step."""

    def __init__(self) -> None:
        self.began, self.spent = time.monotonic(), {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        self.spent[phase] = self.spent.get(phase, 0.0) + time.monotonic() - began

    def seconds(self) -> dict[str, float]:
        whole = {"seconds/step": time.monotonic() - self.began}
        return whole | {f"seconds/{phase}": value for phase, value in self.spent.items()}


def run(config: ConfigDict, workdir: str | Path) -> Path:
    """Trains to config.steps in `workdir`, from its last checkpoint where there is one. Returns the workdir.

    On SIGTERM the step is ended and saved, PREEMPTED is left in the workdir, and SystemExit(0) raised: the same command
    goes on. Raises InputError where the workdir cannot be written to, or another run is in it.
    """
    workdir = Path(workdir)
    check(config)
    with _writing_to(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
        with processes.alone_in(workdir):
            _train(config, workdir)
    return workdir


def _train(config: ConfigDict, workdir: Path) -> None:
    check_same_run(config, workdir)
    checkpoints = checkpoint.Checkpoints(workdir, config.checkpoint.keep)
    if (checkpoints.latest() or 0) >= config.steps:
        print(f"{config.stage}: {config.steps} steps are done already ({workdir})", flush=True)
        return
    preemption = processes.Preemption()
    read = processes.from_first(lambda: inputs(config, workdir))
    source = checkpoint.read_source(Fields(read["source"], checkpoint.INPUTS))
    trainer = Trainer(config, workdir, source.path)
    if processes.is_first():
        _describe(trainer, workdir, source)
        write_text(workdir / checkpoint.INPUTS, dump_json(read, indent=1))
    processes.meet("described")
    done = _loop(trainer, workdir, checkpoints, preemption)
    if processes.is_first():
        best = {"step": checkpoints.best(), "metric": trainer.best_score.name}
        write_text(workdir / "best.json", dump_json(best))
    checkpoints.close()
    preemption.close()
    if done < config.steps:
        _leave(workdir, done)


def _loop(
    trainer: Trainer, workdir: Path, checkpoints: checkpoint.Checkpoints, preemption: processes.Preemption
) -> int:
    """Trains from the last checkpoint on; the steps done, fewer than all when the run was asked to end."""
    config, done = trainer.config, trainer.resume(checkpoints)
    log = RunLog(config, workdir, done)
    while done < config.steps:
        log.begin(done + 1)
        with _losses_told(log):
            metrics, samples = trainer.step(done)
        done += 1
        if not config.skip_nonfinite:
            check_finite(metrics, done, checkpoints.latest())
        log.end(done, metrics, samples, headline(metrics))
        trainer.best_score.add(metrics)
        stop, due = preemption.due(done), done % config.checkpoint.every == 0 or done == config.steps
        if stop or due:
            value = trainer.best_score.take() if due else -np.inf  # a checkpoint in between is never the best
            checkpoints.save(done, trainer.state, trainer.place(), value)
        if stop and done < config.steps:
            break
    trainer.close()
    log.close()
    return done


@contextmanager
def _losses_told(log: RunLog) -> Iterator[None]:
    """Ends the process with a message that names the other processes of the run that are gone, if any are."""
    try:
        yield
    except Exception as error:
        if jax.process_count() == 1 or isinstance(error, InputError) or not (lost := log.heartbeat.lost(error)):
            raise
        print(
            f"error: process {jax.process_index()} of {jax.process_count()} ends because it lost {lost}; the same "
            f"command goes on from the last checkpoint ({short(error)})",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)  # an orderly end would wait for those that are gone


def _leave(workdir: Path, done: int) -> None:
    """Ends a run that was asked to end."""
    if processes.is_first():
        write_text(workdir / PREEMPTED, dump_json({"step": done}))
        print(f"asked to end (SIGTERM): step {done} is saved, and the same command goes on from it", flush=True)
    raise SystemExit(0)


@contextmanager
def _writing_to(workdir: Path) -> Iterator[None]:
    """Turns the system's errors of writing into an InputError that says what is left."""
    try:
        yield
    except (OSError, ValueError) as error:
        full = isinstance(error, OSError) and error.errno in FULL
        if isinstance(error, InputError) or not (full or str(workdir) in str(error)):
            raise
        saved = checkpoint.steps(workdir)
        kept = (
            f"the checkpoint of step {saved[-1]} is whole, and the same command goes on from it"
            if saved
            else ("no checkpoint was written yet")
        )
        raise InputError(f"cannot write to {workdir}: {short(error)}; {kept}: make room, or choose another") from error


def _describe(trainer: Trainer, workdir: Path, source: checkpoint.Source) -> None:
    """Writes what a run is: its model's files, config, versions and devices."""
    config = trainer.config
    (workdir / PREEMPTED).unlink(missing_ok=True)
    shutil.rmtree(workdir / "heartbeats", ignore_errors=True)
    checkpoint.copy_model_files(trainer.processor.folder, workdir)
    if motion := trainer.processor.config.vision.motion:
        motion_prompt.write_file(workdir / checkpoint.MODEL_FOLDER, motion, trainer.state.params["motion_prompt"])
    if trainer.lora:
        checkpoint.write_adapter(workdir, checkpoint.Adapter(source, trainer.lora))
    checkpoint.need(source, workdir)
    write_text(workdir / "config.json", config.to_json_best_effort(indent=1))
    write_text(workdir / "about.json", dump_json(about(), indent=1))


MAY_CHANGE = (
    "steps",
    "log_every",
    "checkpoint.every",
    "checkpoint.keep",
    "wandb",
    "profile_steps",
    "mesh.data",
    "mesh.fsdp",
    "mesh.tensor",
    "data.workers",
    "data.video_seconds",
    "data.cache",
    "rollout.reward_workers",
    "rollout.reward_seconds",
    "judge.url",
    "judge.concurrency",
    "judge.seconds",
    "judge.retries",
)


def check_same_run(config: ConfigDict, workdir: Path) -> None:
    """Raises InputError when `workdir` holds a run with other settings, but for those of MAY_CHANGE."""
    path = workdir / "config.json"
    if not path.exists() or not checkpoint.steps(workdir):
        return
    from configs import base  # noqa: PLC0415 - which imports our own names in turn

    new = _flat(json.loads(config.to_json_best_effort()))
    # A field that was not there yet did what its default does; one that is there no longer does nothing.
    old = _flat(json.loads(base.get_config().to_json_best_effort())) | _flat(read_json(path))
    changed = sorted(name for name in new if old.get(name) != new[name] and name not in MAY_CHANGE)
    changed = [f"{name} (was {old.get(name)!r}, is {new[name]!r})" for name in changed]
    if changed:
        raise InputError(f"{workdir} holds a run with other settings: {', '.join(changed)}; choose another --workdir")


def inputs(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """What the run in `workdir` reads besides videos: the `source` of its weights, and hashes of its `data` files.

    A run that goes on keeps its source, also where config names a run that has another last checkpoint by now. Raises
    InputError when that, or one of the files, is not what it was when the run began.
    """
    path, old = workdir / checkpoint.INPUTS, None
    if path.exists() and checkpoint.steps(workdir):
        old = Fields(read_json(path), str(path))
    data = {}
    for name in ("csv", "reflection", "templates"):
        file = config.data[name]
        if file and Path(file).is_file():  # where it is not, loading it says so
            data[f"data.{name}"] = content_hash(file)
            if old and old.object("data").text(f"data.{name}", "") != data[f"data.{name}"]:
                raise InputError(
                    f"{file} (data.{name}) has changed since the run in {workdir} began: put it back as it was, or "
                    "choose another --workdir"
                )
    if old:
        known = checkpoint.read_source(old.object("source"))
        source = known._replace(path=checkpoint.find_source(known, workdir))
    else:
        source = checkpoint.source(config.init_from or config.model, workdir)
    return {"source": source._asdict(), "data": data}


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as {"a.b": value}."""
    found: dict[str, Any] = {}
    for name, value in config.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


def headline(metrics: dict[str, Any]) -> str:
    """The two or three numbers that a progress line shows."""
    shown = {name: metrics[name] for name in ("loss", "reward", "kl") if name in metrics}
    return "  ".join(f"{name} {float(value):.3f}" for name, value in shown.items())


def check_finite(metrics: dict[str, Any], step: int, saved: int | None) -> None:
    """Raises InputError when the loss or the gradient is not a number."""
    for name in ("loss", "grad_norm"):
        if not np.isfinite(metrics[name]):
            raise InputError(
                f"{name} is {metrics[name]} at step {step}; the last good checkpoint is of step {saved}: "
                "lower optim.lr or optim.clip_norm and start again, or leave such updates out: --config.skip_nonfinite"
            )
