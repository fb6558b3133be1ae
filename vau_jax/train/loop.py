"""The one training loop, for SFT and RFT alike.

    vau train --config=configs/vau_r1_sft.py --workdir=DIR [--config.key=value]

RFT adds one line to a step: it makes the batch by a rollout before the same update. A run that was killed resumes from
its last checkpoint and ends with the same bits.
"""

import errno
import json
import math
import operator
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from vau_jax.common import compiled, heartbeat, processes, progress, sharding
from vau_jax.common.about import about
from vau_jax.common.checks import COUNT, NOT_NEGATIVE, check_choices, check_ranges
from vau_jax.common.chips import chip
from vau_jax.common.fields import Fields
from vau_jax.common.files import InputError, check_range, dump_json, read_json, short, write_text
from vau_jax.common.heartbeat import naming_lost_processes
from vau_jax.common.metric_writer import RunLog
from vau_jax.common.processes import Rows
from vau_jax.data import pipeline
from vau_jax.data.feed import Feed
from vau_jax.data.pipeline import HostBatch
from vau_jax.models import checkpoint, flops, lora, motion_prompt
from vau_jax.rl import engine, grpo, scorer
from vau_jax.rl.difficulty import Difficulty
from vau_jax.rl.engine import Engine
from vau_jax.rl.rollout import Clock, RolloutWorker
from vau_jax.rl.scorer import Scorer
from vau_jax.tasks import prompts
from vau_jax.train import ahead, evaluation, memory, optim, space, update
from vau_jax.train.evaluation import Evaluation
from vau_jax.train.learner import Learner, shapes_of
from vau_jax.types import TrainBatch
from vau_jax.vlm import DTYPES, VideoLM

PREEMPTED = "preempted.json"  # in the workdir of a run that was preempted
RESUME_HINT = "the same command resumes from the last checkpoint"
STOPPED = "stopped.json"  # in the workdir of a run that stopped early
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


RANGES = {
    "steps": (1, 10**9),
    "epochs": NOT_NEGATIVE,
    "log_every": COUNT,
    "seed": (0, 2**31 - 1),
    "unroll": COUNT,
    "batch_size": COUNT,
}


def check(config: ConfigDict) -> None:
    """Raises InputError for the first invalid setting of a training run, before anything is loaded; each part of a
    config is checked by the module that reads it.
    """
    c, limit = config, config.data.max_completion_tokens
    check_choices(c, "", {"stage": tuple(update.STAGES), "dtype": tuple(DTYPES)})
    check_ranges(c, "", RANGES)
    check_ranges(c.checkpoint, "checkpoint.", {"every": COUNT, "keep": COUNT})
    check_range("data.max_completion_tokens", limit, 1)
    pipeline.check(c.data)
    if not (c.data.style and c.data.wording):
        raise InputError(f"data.style={c.data.style!r}, data.wording={c.data.wording!r}: a training run needs both")
    optim.check(c.optim)
    lora.check(c.lora)
    motion_prompt.check(c.motion)
    if len(c.profile_steps) != 2:
        raise InputError(f"profile_steps={tuple(c.profile_steps)}: expected the first and the last step of a trace")
    evaluation.check(c)
    memory.check(c)
    if c.stage == "rft":
        engine.check(c.rollout, limit, c.batch_size)
        grpo.check(c.grpo, limit)
        scorer.check(c)
    if c.stage == "rft" and c.lora.rank and c.lora.dropout:
        raise InputError(
            f"lora.dropout={c.lora.dropout} with stage=rft: completions are sampled, and their log-probabilities "
            "computed, without dropout, so that the update's ratios would be its noise: set lora.dropout=0"
        )
    if c.stage == "sft" and c.data.style in prompts.WITH_DRAFT and not c.data.reflection:
        raise InputError(
            f"SFT with data.style={c.data.style} needs the records to learn from: set config.data.reflection"
        )


class Run:
    """Everything that a run sets up once: data, learner, and for RFT the rollout.

    Answers of a judge are kept in `workdir`, if given. `source` is the model folder or the checkpoint that the run
    starts from; by default the one that config names, of a run its last checkpoint.
    """

    def __init__(self, config: ConfigDict, workdir: Path | None = None, source: str = "") -> None:
        check(config)
        self.config = config
        self.mesh = sharding.make_mesh(config.mesh)
        sharding.check_divisible(memory.largest_part(config), self.mesh)
        examples, audit = pipeline.load_examples(config.data)
        if processes.is_first():
            print(audit.table(), flush=True)
        # Frozen parameters need no more precision than the activations.
        held = config.dtype if config.lora.rank else config.param_dtype
        start = VideoLM.load(source or config.init_from or config.model, held, self.mesh, merge=True)
        if config.motion.enabled:
            start = start.with_motion(config.motion)
        self.processor = start.processor
        self.learner = Learner(config, self.processor.config, shapes_of(start.params), self.mesh)
        self.learner.begin(start.params)
        rows = Rows(engine.prompts_at_once(config), self.mesh)
        self.feed = Feed(config, examples, audit, self.processor, rows)
        self.difficulty = Difficulty(config.data.difficulty)
        self.worker = self._worker(workdir) if config.stage == "rft" else None
        self.tokens_seen = 0
        self.evaluation = Evaluation(config, self.processor, self.mesh) if config.eval.csv else None
        self.best = checkpoint.BestMetric(config)
        self.key = jax.random.key(config.seed)

    def _worker(self, workdir: Path | None) -> RolloutWorker:
        c, end_tokens = self.config, self.processor.end_tokens
        answers = processes.own_lines(workdir / "judge.jsonl") if workdir and c.rewards.get("judge") else None
        room = max((shape.tokens for shape in self.feed.collate.plan.shapes), default=0)
        sampler = Engine(c.rollout, self.learner.sampler, end_tokens, c.data.max_completion_tokens, room)
        return RolloutWorker(c, sampler, Scorer(c, self.processor, answers), self.feed, self.difficulty)

    # --- Where a run stands, besides its state ---

    def position(self) -> dict[str, Any]:
        """The part of a checkpoint besides the state, as JSON."""
        return {
            "iterator": checkpoint.iterator_state(self.feed.state()),
            "difficulty": self.difficulty.accuracy,
            "tokens_seen": self.tokens_seen,
            "data_counts": dict(self.feed.counts),
            "scores": self.best.values,
            "evaluation": self.evaluation.state if self.evaluation else None,
        }

    def resume(self, checkpoints: checkpoint.Checkpoints) -> int:
        """Restores the last checkpoint; returns the steps done."""
        step = checkpoints.latest()
        if step is None:
            return 0
        self.learner.state, position = checkpoints.restore(step, self.learner.state)
        self.feed.resume(position["iterator"])
        self.difficulty.accuracy, self.tokens_seen = position["difficulty"], position["tokens_seen"]
        self.feed.counts, self.best.values = Counter(position["data_counts"]), position["scores"]
        if self.evaluation:
            self.evaluation.state = position["evaluation"]
        return step

    def close(self) -> None:
        """Ends the threads that load data ahead, and the processes of user rewards."""
        self.feed.close()
        if self.worker:
            self.worker.scorer.user.close()

    def compile_ahead(self) -> None:
        """Compiles the programs for the planned shapes, and completions packed into at most half of the longest; what
        longer ones need, which are rare, is left to the steps."""
        shapes, learner = self.feed.collate.plan.shapes, self.learner
        if shapes and self.config.compile_ahead:
            lengths = learner.packed_lengths
            lengths = [length for length in lengths if 2 * length <= lengths[-1]] or lengths
            ahead.compile_ahead(learner, self.worker and self.worker.engine, shapes, lengths)

    # --- One step ---

    def step(self, number: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """One update (or, with grpo.iterations, several): its metrics, and sampled texts when there was a rollout."""
        clock, heads = Clock(), self.processor.config.num_heads
        with memory.explained(self.config, self.mesh, heads, lambda: clock.phase):
            with clock("data"):
                host = self.feed.next()
            if self.worker:
                train, tokens, metrics, samples = self.worker.collect(
                    self.learner, host, jax.random.fold_in(self.key, number), clock
                )
            else:
                (train, tokens), metrics, samples = self.supervised(host), {}, []
            metrics |= self.feed.counts
            train = jax.device_put(train, sharding.examples(self.mesh))
            with clock("update"):
                metrics |= self.learner.update(train, tokens)
            self.learner.follow_reference(number)
        metrics |= clock.seconds()
        metrics |= self._speed(train, metrics)
        return metrics, samples

    def evaluate(self, step: int, metrics: dict[str, Any], preemption: processes.Preemption) -> dict[str, float]:
        """The metrics of an evaluation after `step`, whose own are `metrics`; empty where there is none."""
        if self.evaluation is None:
            return {}
        heads = self.processor.config.num_heads
        with memory.explained(self.config, self.mesh, heads, lambda: "rollout"):  # it samples too
            return self.evaluation.after(step, metrics["seconds/step"], self.learner, preemption.due)

    @property
    def stops_early(self) -> bool:
        """Whether evaluations say that the run is to end."""
        return self.evaluation is not None and self.evaluation.ends_run

    def is_best_at(self, step: int) -> bool:
        """Whether an evaluation says that `step` is the best so far."""
        return self.best.by_evaluation and self.evaluation.improved_at(step)

    def headline(self, metrics: dict[str, Any]) -> str:
        """The two or three numbers that a progress line shows, with those of the last evaluation."""
        shown = {name: metrics[name] for name in ("loss", "reward", "kl") if name in metrics}
        shown |= self.evaluation.last if self.evaluation else {}
        return "  ".join(f"{name} {float(value):.3f}" for name, value in shown.items())

    def supervised(self, host: HostBatch) -> tuple[TrainBatch, np.ndarray]:
        """The batch of an SFT update: the right completions, weighted by section; and the tokens of each."""
        completions, inputs = self.feed.rows.put((host.completions, {"weights": host.weights}))
        tokens = self.feed.rows.gather(host.completions.mask.sum((1, 2)).tolist())
        return TrainBatch(self.learner.encode_vision(host.batch), completions, inputs), np.asarray(tokens)

    def _speed(self, train: TrainBatch, metrics: dict[str, Any]) -> dict[str, float]:
        """Tokens per second, and where the devices' peak is known the share of it that the updates used (MFU): the
        operations of real tokens, forward and backward, without recomputation.
        """
        size = jax.device_get(flops.sizes(train.batch, train.completions))
        size = {name: float(value) for name, value in size.items()}
        tokens, seconds = size["prompt"] + size["drawn"], metrics["seconds/step"]
        self.tokens_seen += int(tokens)
        speed = {"tokens_per_s": tokens / seconds, "completion_tokens_per_s": size["drawn"] / seconds}
        if known := chip(jax.devices()[0].device_kind):
            work = sum(flops.forward(self.processor.config, size).values()) * (2 if self.learner.lora else 3)
            rounds = self.config.grpo.iterations if self.worker else 1
            speed["mfu"] = work * rounds / metrics["seconds/update"] / known.flops / jax.device_count()
        return {"tokens_seen": self.tokens_seen, **speed}


def run(config: ConfigDict, workdir: str | Path) -> Path:
    """Trains to config.steps in `workdir`, from its last checkpoint if there is one. Returns the workdir.

    On SIGTERM the current step is finished and saved, PREEMPTED is written to the workdir, and SystemExit(0) raised:
    the same command resumes. Raises InputError where the workdir cannot be written to, or another run uses it.
    """
    workdir = Path(workdir)
    check(config)
    if not (config.model or config.init_from):
        raise InputError("model is not set: expected a Hugging Face folder, or in init_from an earlier run")
    compiled.use(config.compilation_cache, workdir)
    if config.epochs:
        config.steps = processes.broadcast_from_first(lambda: steps_of_epochs(config))
    with _writing_to(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
        with processes.exclusive(workdir):
            _train(config, workdir)
    return workdir


def steps_of_epochs(config: ConfigDict) -> int:
    """The steps that show config.epochs times as many prompts as there are examples. With one task, or where
    data.task_weights are in proportion to the tasks' examples, each is shown so often."""
    examples, _ = pipeline.load_examples(config.data)
    return math.ceil(config.epochs * len(examples) / engine.prompts_at_once(config))


def summary(config: ConfigDict, workdir: Path) -> str:
    """The last lines of the program; empty in all processes but the first."""
    if not processes.is_first():
        return ""
    best = read_json(workdir / "best.json")
    last = checkpoint.steps(workdir)[-1]
    early = f", and no more: {patience_of(config)}" if (workdir / STOPPED).exists() else ""
    title = f"{config.stage}: {last} steps are done{early}; best checkpoint by {best['metric']}: step {best['step']}"
    places = {
        "checkpoints": workdir / "checkpoints",
        "metrics": f"{workdir / 'metrics.jsonl'}, and for TensorBoard {workdir / 'tensorboard'}",
    }
    test = ("--config.data.csv=TEST.csv", f"--config.data.videos={config.data.videos}")
    evaluation = ("vau", "evaluate", f"--workdir={workdir}/eval", f"--config.checkpoint={workdir}", *test)
    return progress.summary(title, places, [evaluation, ("vau", "report", workdir)])


def _train(config: ConfigDict, workdir: Path) -> None:
    check_same_run(config, workdir)
    with closing(checkpoint.Checkpoints(workdir, config.checkpoint.keep)) as checkpoints:  # saves finish on errors too
        if (checkpoints.latest() or 0) >= config.steps:
            print(f"{config.stage}: {config.steps} steps are done already ({workdir})", flush=True)
        elif stopped_early(config, workdir):
            print(f"{config.stage}: stopped early already ({workdir}): {patience_of(config)}", flush=True)
        else:
            _train_from(checkpoints, config, workdir)


def _train_from(checkpoints: checkpoint.Checkpoints, config: ConfigDict, workdir: Path) -> None:
    """Trains from the last checkpoint, and notes how the run ended."""
    preemption = processes.Preemption()
    read = processes.broadcast_from_first(lambda: inputs(config, workdir))
    source = checkpoint.read_source(Fields(read["source"], checkpoint.INPUTS))
    run = Run(config, workdir, source.path)
    processes.broadcast_from_first(lambda: space.check(config, run.learner.abstract_state, workdir))
    if processes.is_first():
        _describe(run, workdir, source)
        write_text(workdir / checkpoint.INPUTS, dump_json(read, indent=1))
    processes.barrier("described")
    run.compile_ahead()
    done = _loop(run, workdir, checkpoints, preemption)
    if processes.is_first():
        best = {"step": checkpoints.best(), "metric": run.best.name}
        write_text(workdir / "best.json", dump_json(best))
    preemption.close()
    if run.stops_early and done < config.steps:
        if processes.is_first():
            note = {"step": done, "without_improvement": run.evaluation.without_improvement}
            write_text(workdir / STOPPED, dump_json(note))
    elif done < config.steps:
        _exit_preempted(workdir, done)


def stopped_early(config: ConfigDict, workdir: Path) -> bool:
    """Whether the run in `workdir` stopped early, and config.eval.patience does not ask for more."""
    note = processes.broadcast_from_first(lambda: read_json(workdir / STOPPED) if (workdir / STOPPED).exists() else {})
    return bool(note) and 0 < config.eval.patience <= note["without_improvement"]


def patience_of(config: ConfigDict) -> str:
    """Why a run stopped early, and how it goes on."""
    return (
        f"its last {config.eval.patience} evaluations brought no improvement (it goes on with a higher eval.patience, "
        "or 0)"
    )


def _loop(run: Run, workdir: Path, checkpoints: checkpoint.Checkpoints, preemption: processes.Preemption) -> int:
    """Trains from the last checkpoint; returns the steps done, fewer than all when the run was preempted."""
    config, done = run.config, run.resume(checkpoints)
    log = RunLog(config, workdir, done)
    while done < config.steps and not run.stops_early:  # a kill may have come before it was noted
        log.begin(done + 1)
        with naming_lost_processes(log.heartbeat, RESUME_HINT):
            metrics, samples = run.step(done)
        done += 1
        if not config.skip_nonfinite:
            check_finite(metrics, done, checkpoints.latest)
        with naming_lost_processes(log.heartbeat, RESUME_HINT):
            evaluated = run.evaluate(done, metrics, preemption)
        log.end(done, metrics | evaluated, samples, run.headline(metrics), always=bool(evaluated))
        run.best.add(metrics | evaluated)
        stop = preemption.due() or run.stops_early
        due = done % config.checkpoint.every == 0 or done == config.steps
        if stop or due or run.is_best_at(done):
            # A checkpoint in between has no mean to be the best by; an evaluation is of its own step.
            value = run.best.take() if due or run.best.by_evaluation else -np.inf
            with log.saving():
                checkpoints.save(done, run.learner.state, run.position(), value)
        if stop and done < config.steps:
            break
    run.close()
    log.close()
    checkpoints.wait()
    return done


def _exit_preempted(workdir: Path, done: int) -> None:
    """Ends a preempted run."""
    if processes.is_first():
        write_text(workdir / PREEMPTED, dump_json({"step": done}))
        print(f"SIGTERM received: checkpoint saved at step {done}; rerun the same command to resume", flush=True)
    raise SystemExit(0)


@contextmanager
def _writing_to(workdir: Path) -> Iterator[None]:
    """Turns system errors of writing into an InputError that says which checkpoint is kept."""
    try:
        yield
    except (OSError, ValueError) as error:
        full = isinstance(error, OSError) and error.errno in FULL
        if isinstance(error, InputError) or not (full or str(workdir) in str(error)):
            raise
        saved = checkpoint.steps(workdir)
        kept = (
            f"the checkpoint of step {saved[-1]} is complete; rerun the same command to resume from it"
            if saved
            else ("no checkpoint was written yet")
        )
        raise InputError(f"cannot write to {workdir}: {short(error)}; {kept}: make room, or choose another") from error


def _describe(run: Run, workdir: Path, source: checkpoint.Source) -> None:
    """Writes the description of a run: its model's files, config, versions and devices."""
    config = run.config
    for note in (PREEMPTED, STOPPED):
        (workdir / note).unlink(missing_ok=True)
    shutil.rmtree(workdir / heartbeat.FOLDER, ignore_errors=True)
    checkpoint.copy_model_files(run.processor.folder, workdir)
    if motion := run.processor.motion:
        numbers = run.learner.state.params["visual"]["motion_prompt"]
        motion_prompt.write_file(workdir / checkpoint.MODEL_FOLDER, motion, numbers)
    if run.learner.lora:
        checkpoint.write_adapter(workdir, checkpoint.Adapter(source, run.learner.lora))
    checkpoint.need(source, workdir)
    write_text(workdir / "config.json", config.to_json_best_effort(indent=1))
    write_text(workdir / "about.json", dump_json(about(), indent=1))


REMOVED = ("data.threads", "rollout.reward_threads")  # fields of earlier versions that changed no result
RENAMED = {"data.source": "data.time_rules"}  # earlier name -> today's
MAY_CHANGE = (
    "format",
    "steps",
    "epochs",
    "micro_batches",
    "log_every",
    "compilation_cache",
    "compile_ahead",
    "checkpoint.every",
    "checkpoint.keep",
    "eval.every",
    "eval.videos",
    "eval.share",
    "eval.patience",
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
    """Raises InputError when `workdir` holds a run with other settings, except those of MAY_CHANGE, or with a later
    format of configs."""
    path = workdir / "config.json"
    if not path.exists() or not checkpoint.steps(workdir):
        return
    from vau_jax.configs import base  # noqa: PLC0415 - which imports our own names in turn

    fields = Fields(read_json(path), str(path))
    if (version := fields.integer("format", 1, 10**6, 1)) > config.format:
        raise InputError(
            f"{path} has format {version}, of a later version: this one resumes runs up to {config.format}"
        )
    stored = {RENAMED.get(name, name): value for name, value in _flat(fields.raw).items()}
    new = _flat(json.loads(config.to_json_best_effort()))
    # A field that the run's config lacks had its default.
    old = _flat(json.loads(base.get_config().to_json_best_effort())) | stored
    changed = sorted(name for name in new if old.get(name) != new[name] and name not in MAY_CHANGE)
    changed = [f"{name} (was {old.get(name)!r}, is {new[name]!r})" for name in changed]
    if changed:
        raise InputError(f"{workdir} holds a run with other settings: {', '.join(changed)}; choose another --workdir")
    unknown = [f"{name}={value!r}" for name, value in stored.items() if name not in new and name not in REMOVED]
    if unknown:
        raise InputError(
            f"{path} has settings that this configuration lacks: {', '.join(unknown)}; choose another --workdir, or "
            "resume with the version of vau_jax that began the run (about.json)"
        )


def inputs(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """The inputs of the run in `workdir` besides videos: the `source` of its weights, and hashes of its `data` files.

    A resumed run keeps its source, also where config names a run that has a later checkpoint by now. Raises InputError
    when the source, or one of the files, has changed since the run began.
    """
    path, old = workdir / checkpoint.INPUTS, None
    if path.exists() and checkpoint.steps(workdir):
        old = Fields(read_json(path), str(path))
    data = pipeline.input_hashes(config.data) | evaluation.input_hashes(config)
    for name, found in data.items() if old else ():
        if old.object("data").text(name, "") != found:
            raise InputError(
                f"{operator.attrgetter(name)(config)} ({name}) has changed since the run in {workdir} began: put "
                "it back as it was, or choose another --workdir"
            )
    if old:
        known = checkpoint.read_source(old.object("source"))
        source = known._replace(path=checkpoint.find_source(known, workdir))
    else:
        source = checkpoint.source(config.init_from or config.model, workdir)
    return {"source": source._asdict(), "data": data}


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as {"a.b": value}."""
    result: dict[str, Any] = {}
    for name, value in config.items():
        result |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return result


def check_finite(metrics: dict[str, Any], step: int, saved: Callable[[], int | None]) -> None:
    """Raises InputError when the loss or the gradient is not a number; `saved` waits for the last checkpoint."""
    for name in ("loss", "grad_norm"):
        if not np.isfinite(metrics[name]):
            raise InputError(
                f"{name} is {metrics[name]} at step {step}; the last good checkpoint is of step {saved()}: "
                "lower optim.lr or optim.clip_norm and start again, or leave such updates out: --config.skip_nonfinite"
            )
