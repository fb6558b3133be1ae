"""The one training loop, for SFT and RFT alike.

    python -m vau_jax.train --config=configs/vau_r1_sft.py --workdir=DIR [--config.key=value]

RFT adds one line to a step: it makes the batch by a rollout before the same update. A run that was killed goes on from
its last checkpoint and ends with the same bits.
"""

import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vau_jax import checkpoint, cli, grpo, logprobs, optim, sft, sharding
from vau_jax.data import pipeline
from vau_jax.data.pipeline import HostBatch
from vau_jax.files import InputError, read_json, write_text
from vau_jax.metric_writer import MetricWriter, Progress
from vau_jax.models import hf, lora, qwen_vl
from vau_jax.models.lora import LoRA
from vau_jax.models.qwen_vl import QwenVL
from vau_jax.rollout import Rollout
from vau_jax.types import Batch, Completions, Params, State, TrainBatch, Variables
from vau_jax.vlm import DTYPES, VideoLM

LOSSES = {"sft": sft.loss, "rft": grpo.loss}
DROPOUT_STREAM, ADAPTER_STREAM = 2**31 - 1, 2**31 - 2  # no step numbers: these keys and the sampler's never meet


def policy_logps(
    variables: Variables,
    batch: Batch,
    completions: Completions,
    model: QwenVL,
    temperature: float,
    dropout_key: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities of the completions' tokens and entropies, float32 [B, G, C], prompts read once a group.

    With a `dropout_key`, LoRA's dropout is on.
    """
    rngs = None if dropout_key is None else {"dropout": dropout_key}
    hidden = model.apply(variables, batch, completions, method="hidden", rngs=rngs)
    predicting = logprobs.completion_hidden(hidden, batch.mask, completions.tokens.shape[1])
    head = qwen_vl.unembedding(variables, model.config)
    return logprobs.token_logps(predicting, head, completions.tokens, temperature, model.config.never_sampled)


def policy(trained: Params, base: Params | None) -> Variables:
    """The model that is trained: all parameters, or adapters `trained` on the parameters `base`."""
    return qwen_vl.with_adapters(trained, None) if base is None else qwen_vl.with_adapters(base, trained)


def make_update(
    config: ConfigDict, model: QwenVL, optimiser: optax.GradientTransformation, shardings: State, mesh: Mesh
) -> Callable[[State, Params | None, TrainBatch], tuple[State, dict[str, jax.Array]]]:
    """The compiled update: State, frozen parameters (LoRA's base, or None) and TrainBatch to State and metrics.

    The old state's memory is given up.
    """
    loss_fn = LOSSES[config.stage]
    settings = loss_settings(config)
    temperature = config.rollout.temperature if config.stage == "rft" else 1.0

    def objective(
        trained: Params, base: Params | None, train: TrainBatch, step: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        key = None
        if model.lora is not None and model.lora.dropout:
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), DROPOUT_STREAM), step)
        variables = policy(trained, base)
        logps, entropy = policy_logps(variables, train.batch, train.completions, model, temperature, key)
        flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), train.loss_inputs)  # [B, G, ...] -> [N, ...]
        logps = logps.reshape(-1, logps.shape[-1])
        loss, metrics = loss_fn(logps, flat, settings)
        if "sampler_logps" in flat:
            gap = jnp.abs(flat["sampler_logps"] - logps)
            metrics["sampler_logp_gap"] = jnp.max(jnp.where(flat["mask"], gap, 0.0))
            metrics["entropy"] = grpo.masked_mean(entropy.reshape(logps.shape), flat["mask"].astype(jnp.float32))
        return loss, metrics

    @partial(jax.jit, donate_argnums=0, out_shardings=(shardings, sharding.replicated(mesh)))
    def update(state: State, base: Params | None, train: TrainBatch) -> tuple[State, dict[str, jax.Array]]:
        (loss, metrics), grads = jax.value_and_grad(objective, has_aux=True)(state.params, base, train, state.step)
        changes, opt_state = optimiser.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, changes)
        metrics = {**metrics, "loss": loss, "grad_norm": optax.global_norm(grads)}
        return State(state.step + 1, params, opt_state), metrics

    return update


def loss_settings(config: ConfigDict) -> Any:
    """What the loss reads: config.grpo and the completion length."""
    return ConfigDict({**config.grpo, "max_completion_length": config.data.max_completion_tokens})


class Trainer:
    """Everything of a run that is set up once: model, state, data, compiled functions."""

    def __init__(self, config: ConfigDict, workdir: str | Path) -> None:
        if config.stage not in LOSSES:
            raise InputError(f"stage={config.stage!r} is unknown: expected one of {', '.join(LOSSES)}")
        if config.stage == "sft" and config.data.style == "reflection" and not config.data.reflection:
            raise InputError(
                "SFT with data.style=reflection needs the records to learn from: set config.data.reflection"
            )
        self.config, self.workdir = config, Path(workdir)
        self.mesh = sharding.make_mesh(config.mesh)
        sharding.check_divisible(config.batch_size, self.mesh)
        self.examples, audit = pipeline.load_examples(config.data)
        print(audit.table(), flush=True)
        self.lora = LoRA(**config.lora) if config.lora.rank else None
        # What is not trained needs no more bits than it is used in.
        held = config.dtype if self.lora else config.param_dtype
        start = VideoLM.load(config.init_from or config.model, held, self.mesh).merged()
        self.processor = start.processor
        if config.dtype not in DTYPES:
            raise InputError(f"dtype={config.dtype!r} is unknown: expected one of {', '.join(DTYPES)}")
        self.model = QwenVL(
            self.processor.config, DTYPES[config.dtype], config.remat, config.unroll, config.attention, self.lora
        )
        # Unrolled layers pay in the update; in the sampler's loop their weights would be copied at every token.
        sampler = self.model.clone(unroll=1)
        self.rollout = Rollout(config, sampler, self.processor) if config.stage == "rft" else None
        trained, self.base = start.params, None
        if self.lora:
            trained, self.base = self._fresh_adapters(start.params), start.params
        self.optimiser = optim.make(config.optim, config.steps, trained, self.base)
        self.reference = self.base
        if config.stage == "rft" and config.grpo.beta and not self.lora:
            self.reference = jax.tree.map(jnp.copy, start.params)
        opt_state = jax.jit(self.optimiser.init)(trained)
        state = State(jnp.int32(0), trained, opt_state)
        self.shardings = sharding.state_shardings(state, self.mesh)
        self.state = jax.device_put(state, self.shardings)
        self.update = make_update(config, self.model, self.optimiser, self.shardings, self.mesh)
        self.reference_logps = jax.jit(partial(policy_logps, model=self.model, temperature=config.rollout.temperature))
        self.data = pipeline.train_iterator(
            self.examples, self.processor, config.data, config.batch_size, seed=config.seed
        )
        self.key = jax.random.key(config.seed)

    def _fresh_adapters(self, params: Params) -> Params:
        shapes = {path: leaf.shape for path, leaf in hf.flatten(params).items()}
        key = jax.random.fold_in(jax.random.key(self.config.seed), ADAPTER_STREAM)
        return hf.unflatten(lora.init(key, shapes, self.lora, jnp.dtype(self.config.param_dtype)))

    @property
    def variables(self) -> Variables:
        """The policy as it is now."""
        return policy(self.state.params, self.base)

    def resume(self, checkpoints: checkpoint.Checkpoints) -> int:
        """Puts the run where its last checkpoint left it; returns the steps done."""
        step = checkpoints.latest()
        if step is None:
            return 0
        self.state, place = checkpoints.restore(step, self.state)
        self.data.set_state(place)
        return step

    def step(self, number: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """One update: its metrics, and samples to read when there was a rollout."""
        began = time.monotonic()
        host = next(self.data)
        loaded = time.monotonic()
        batch = jax.device_put(host.batch, sharding.examples(self.mesh))
        metrics: dict[str, Any] = pipeline.counts(host, self.config.data)
        samples: list[dict[str, Any]] = []
        if self.rollout:
            scored = self.rollout(self.variables, host, batch, jax.random.fold_in(self.key, number))
            train, samples = self._with_reference(scored.train), scored.samples
            metrics.update(scored.metrics)
            metrics["seconds/rollout"] = time.monotonic() - loaded
        else:
            train = self._sft_batch(host, batch)
        train = jax.device_put(train, sharding.examples(self.mesh))
        with jax.transfer_guard("disallow"):  # everything is where the program wants it
            self.state, scalars = self.update(self.state, self.base, train)
        metrics.update(jax.device_get(scalars))
        metrics["seconds/data"] = loaded - began
        metrics["seconds/step"] = time.monotonic() - began
        return metrics, samples

    def _sft_batch(self, host: HostBatch, batch: Batch) -> TrainBatch:
        return TrainBatch(batch, host.completions, {"weights": host.weights})

    def _with_reference(self, train: TrainBatch) -> TrainBatch:
        """Adds the log-probabilities of the policy that RFT began from, where the loss has a KL term."""
        if not self.config.grpo.beta:
            return train
        reference = qwen_vl.with_adapters(self.reference, None)
        ref_logps, _ = self.reference_logps(reference, train.batch, train.completions)
        return TrainBatch(train.batch, train.completions, {**train.loss_inputs, "ref_logps": ref_logps})


def run(config: ConfigDict, workdir: str | Path) -> Path:
    """Trains to config.steps in `workdir`, from its last checkpoint where there is one. Returns the workdir."""
    workdir = Path(workdir)
    check_same_run(config, workdir)
    checkpoints = checkpoint.Checkpoints(workdir, config.checkpoint.keep)
    if (checkpoints.latest() or 0) >= config.steps:
        print(f"{config.stage}: {config.steps} steps are done already ({workdir})", flush=True)
        return workdir
    trainer = Trainer(config, workdir)
    checkpoint.copy_model_files(trainer.processor.folder, workdir)
    if trainer.lora:
        checkpoint.write_adapter(workdir, checkpoint.Adapter(config.init_from or config.model, trainer.lora))
    write_text(workdir / "config.json", config.to_json_best_effort(indent=1))
    done = trainer.resume(checkpoints)
    writer = MetricWriter(workdir, done)
    progress = Progress(config.stage, config.steps, start=done)
    for number in range(done, config.steps):
        metrics, samples = trainer.step(number)
        done = number + 1
        check_finite(metrics, done, checkpoints.latest())
        if done % config.log_every == 0 or done == config.steps:
            writer.write(done, metrics, samples)
        progress.show(done, headline(metrics))
        if done % config.checkpoint.every == 0 or done == config.steps:
            place = checkpoint.iterator_state(trainer.data.get_state())
            checkpoints.save(done, trainer.state, place)
    writer.close()
    checkpoints.close()
    return workdir


MAY_CHANGE = ("steps", "log_every", "checkpoint.every", "checkpoint.keep", "data.threads", "data.cache")


def check_same_run(config: ConfigDict, workdir: Path) -> None:
    """Raises InputError when `workdir` holds a run with other settings, but for those of MAY_CHANGE."""
    path = workdir / "config.json"
    if not path.exists() or not checkpoint.steps(workdir):
        return
    old, new = _flat(read_json(path)), _flat(json.loads(config.to_json_best_effort()))
    changed = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
    changed = [f"{name} (was {old.get(name)!r}, is {new.get(name)!r})" for name in changed if name not in MAY_CHANGE]
    if changed:
        raise InputError(f"{workdir} holds a run with other settings: {', '.join(changed)}; choose another --workdir")


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
                "lower optim.lr or optim.clip_norm and start again"
            )


if __name__ == "__main__":
    cli.main(run)
