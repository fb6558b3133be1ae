"""One update: log-probabilities of a batch's completions, the loss of its stage, gradients, the optimiser's step."""

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vau_jax.common import sharding
from vau_jax.models import motion_prompt, qwen_vl
from vau_jax.models.qwen_vl import QwenVL
from vau_jax.rl import grpo, logprobs
from vau_jax.train import optim, sft
from vau_jax.types import Array, Batch, Completions, Params, State, TrainBatch, Variables

STAGES = {"sft": sft, "rft": grpo}
DROPOUT_STREAM = 2**31 - 1  # not a step number: dropout's keys never equal the sampler's

Metrics = dict[str, jax.Array]
Update = Callable[[State, Params | None, TrainBatch], tuple[State, Metrics]]


def policy_logps(
    variables: Variables, batch: Batch, completions: Completions, model: QwenVL, temperature: float
) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities of the completions' tokens and entropies, float32 [B, G, C], prompts read once a group."""
    return logps_and_losses(variables, batch, completions, model, temperature)[:2]


def logps_and_losses(
    variables: Variables,
    batch: Batch,
    completions: Completions,
    model: QwenVL,
    temperature: float,
    dropout_key: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, Metrics]:
    """`policy_logps`, and the totals of the losses that modules sow, by name. With a `dropout_key`, LoRA's dropout is
    on."""
    rngs = None if dropout_key is None else {"dropout": dropout_key}
    hidden, sown = model.apply(variables, batch, completions, method="hidden", rngs=rngs, mutable=["losses"])
    predicting = logprobs.completion_hidden(hidden, batch.mask, completions.tokens.shape[1])
    head, never = model.head(variables), model.config.never_sampled
    logps, entropies = logprobs.token_logps(predicting, head, completions.tokens, temperature, never, model.mesh)
    return logps, entropies, _totals(sown.get("losses", {}))


def _totals(sown: Mapping[str, Any]) -> Metrics:
    """The sum of each auxiliary loss over all modules that sowed it."""
    totals: Metrics = {}
    for path, value in jax.tree_util.tree_leaves_with_path(sown):
        name = next(key.key for key in reversed(path) if isinstance(key, jax.tree_util.DictKey))
        totals[name] = totals.get(name, 0.0) + value
    return totals


def policy(trained: Params, base: Params | None) -> Variables:
    """The trained model: all parameters, or adapters `trained` on the parameters `base`."""
    return qwen_vl.with_adapters(trained, None) if base is None else qwen_vl.with_adapters(base, trained)


def auxiliary_losses(config: ConfigDict) -> dict[str, float]:
    """Weights of the losses that modules of the model sow, by name."""
    return {motion_prompt.VARIATION: config.motion.weight}


def make(
    config: ConfigDict,
    model: QwenVL,
    optimiser: optax.GradientTransformation,
    shardings: State,
    mesh: Mesh,
    groups: Sequence[optim.Group] = (),
    parts: int = 1,
) -> Update:
    """The compiled update: State, frozen parameters (LoRA's base, or None) and TrainBatch to State and metrics.

    The batch is computed in sequential `parts`, whose losses and gradients add up to those of the full batch: the
    result does not depend on their number. The old state is donated.
    """
    stage, settings, weights = STAGES[config.stage], loss_settings(config), auxiliary_losses(config)
    temperature = config.rollout.temperature if config.stage == "rft" else 1.0

    def objective(
        trained: Params,
        base: Params | None,
        part: TrainBatch,
        whole: Metrics,
        counts: Metrics,
        key: jax.Array | None,
    ) -> tuple[jax.Array, Metrics]:
        """The part's share of the loss, and its metrics. `whole` are sums over the whole batch, `counts` those that
        auxiliary losses are divided by."""
        variables = policy(optim.stop_frozen(config.optim, trained, groups), base)
        logps, entropies, totals = logps_and_losses(variables, part.batch, part.completions, model, temperature, key)
        inputs = _by_completion(part.loss_inputs)
        logps, entropies = (x.reshape(-1, x.shape[-1]) for x in (logps, entropies))
        loss, metrics = stage.loss(logps, {**inputs, "entropies": entropies, **whole}, settings)
        for name, total in totals.items():
            metrics[name] = total / jnp.maximum(counts[name], 1)
            loss += weights[name] * metrics[name]
        if "sampler_logps" in inputs:
            metrics |= _token_metrics(logps, entropies, inputs)
        return loss, metrics

    def gradient(state: State, base: Params | None, train: TrainBatch) -> tuple[jax.Array, Metrics, Params]:
        key = None
        if model.lora is not None and model.lora.dropout:
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), DROPOUT_STREAM), state.step)
        whole = stage.totals(_by_completion(train.loss_inputs))
        counts = model.loss_counts(train.batch)
        differentiate = jax.value_and_grad(objective, has_aux=True)
        if parts == 1:
            (loss, metrics), grads = differentiate(state.params, base, train, whole, counts, key)
            return loss, metrics, jax.tree.map(lambda x: x.astype(jnp.float32), grads)

        def add(sums: tuple[jax.Array, Params], numbered: tuple[jax.Array, TrainBatch]) -> tuple[Any, Metrics]:
            number, part = numbered
            part_key = None if key is None else jax.random.fold_in(key, number)
            (loss, metrics), grads = differentiate(state.params, base, part, whole, counts, part_key)
            share = stage.totals(_by_completion(part.loss_inputs))["num_tokens"] / whole["num_tokens"]
            return (sums[0] + loss, jax.tree.map(jnp.add, sums[1], grads)), {**metrics, "share": share}

        blank = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), state.params)
        numbered = jnp.arange(parts), _split(train, parts)
        (loss, grads), metrics = jax.lax.scan(add, (jnp.float32(0), blank), numbered)
        return loss, _combine(metrics, counts), grads

    @partial(jax.jit, donate_argnums=0, out_shardings=(shardings, sharding.replicated(mesh)))
    def update(state: State, base: Params | None, train: TrainBatch) -> tuple[State, Metrics]:
        loss, metrics, grads = gradient(state, base, train)
        changes, opt_state = optimiser.update(grads, state.opt_state, state.params)
        # The optimiser computes in float32; its state keeps its dtypes: one program for all steps.
        opt_state = jax.tree.map(lambda new, old: new.astype(old.dtype), opt_state, state.opt_state)
        new = State(state.step + 1, optax.apply_updates(state.params, changes), opt_state, state.reference)
        metrics = {**metrics, "loss": loss, "grad_norm": optax.global_norm(grads)}
        if model.config.motion:
            metrics |= {f"motion/{name}": value for name, value in new.params["visual"]["motion_prompt"].items()}
        if config.skip_nonfinite:
            good = jnp.isfinite(loss) & jnp.isfinite(metrics["grad_norm"])
            new = jax.tree.map(lambda a, b: jnp.where(good, a, b), new, state)
            metrics["skipped"] = 1.0 - good
        return new, metrics

    return update


def loss_settings(config: ConfigDict) -> Any:
    """Settings of the loss: config.grpo with the completion length, the group size, and the cap of the correction."""
    grpo_config, c = config.grpo, config.rollout
    restricted = c.top_p < 1 or c.top_k > 0 or c.min_new_tokens > 0  # only the sampler filters tokens
    corrected = grpo_config.importance == "always" or (grpo_config.importance == "auto" and restricted)
    return ConfigDict(
        {
            **grpo_config,
            "importance_cap": grpo_config.importance_cap if corrected else 0.0,
            "max_completion_length": config.data.max_completion_tokens,
            "num_generations": c.num_generations,
        }
    )


def _by_completion(inputs: dict[str, Array]) -> dict[str, Array]:
    """[B, G, ...] -> [N, ...]."""
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), inputs)


def _token_metrics(logps: jax.Array, entropies: jax.Array, inputs: dict[str, Array]) -> Metrics:
    """Entropy, and how far the sampler's log-probabilities are from the trainer's."""
    mask = inputs["mask"].astype(jnp.float32)
    gap = jnp.where(mask > 0, jnp.abs(inputs["sampler_logps"] - logps), 0.0)
    return {
        "entropy": grpo.masked_mean(entropies, mask),
        "sampler_logp_gap/mean": grpo.masked_mean(gap, mask),
        "sampler_logp_gap/max": gap.max(),
    }


def _split(train: TrainBatch, parts: int) -> TrainBatch:
    """[B, ...] -> [parts, B / parts, ...]. A part takes every parts-th prompt, so that each device has its share of it
    without communication.
    """
    return jax.tree.map(lambda x: jnp.swapaxes(x.reshape(-1, parts, *x.shape[1:]), 0, 1), train)


def _combine(metrics: Metrics, sums: Collection[str]) -> Metrics:
    """Metrics of the parts [parts] as those of the whole: maxima of maxima, the sums of `sums`, the others mean
    by tokens."""
    share = metrics.pop("share")

    def one(name: str, values: jax.Array) -> jax.Array:
        if name.endswith("/max"):
            return values.max()
        return values.sum() if name in sums else jnp.sum(share * values)

    return {name: one(name, values) for name, values in metrics.items()}
