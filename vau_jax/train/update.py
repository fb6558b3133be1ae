"""One update: log-probabilities of a batch's completions, the loss of its stage, gradients, the optimiser's step."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vau_jax.common import sharding
from vau_jax.models import motion_prompt, qwen_vl
from vau_jax.models.packing import pack
from vau_jax.models.qwen_vl import QwenVL
from vau_jax.rl import grpo, logprobs
from vau_jax.train import optim, parts, sft
from vau_jax.types import Array, Batch, Completions, Params, State, TrainBatch, Variables

STAGES = {"sft": sft, "rft": grpo}
DROPOUT_STREAM = 2**31 - 1  # not a step number: dropout's keys never equal the sampler's

Metrics = dict[str, jax.Array]


def policy_logps(
    variables: Variables,
    batch: Batch,
    completions: Completions,
    model: QwenVL,
    temperature: float,
    length: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities of the completions' tokens and entropies, float32 [B, G, C], zero at padding. Prompts are read
    once a group; completions are packed into `length` tokens a prompt (see `packing.pack`)."""
    return logps_and_losses(variables, batch, completions, model, temperature, length)[:2]


def logps_and_losses(
    variables: Variables,
    batch: Batch,
    completions: Completions,
    model: QwenVL,
    temperature: float,
    length: int | None = None,
    dropout_key: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, Metrics]:
    """`policy_logps`, and the totals of the losses that modules sow, by name. With a `dropout_key`, LoRA's dropout is
    on."""
    rngs = None if dropout_key is None else {"dropout": dropout_key}
    packing = pack(completions, length)
    hidden, sown = model.apply(variables, batch, completions, packing, method="hidden", rngs=rngs, mutable=["losses"])
    predicting = logprobs.completion_hidden(hidden, batch.mask, packing.starts)
    head, never = model.head(variables), model.config.never_sampled
    targets = packing.take(completions.tokens)
    scored = logprobs.token_logps(predicting, head, targets, temperature, never, model.mesh)
    logps, entropies = (packing.back(x) for x in scored)
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


class Updates:
    """The compiled programs of an update, for State, frozen parameters (LoRA's base, or None) and TrainBatch.

    A batch is computed at once (`whole`), or in parts (`part`) whose losses and gradients add up to those of the batch
    (`apply`): the result does not depend on their number. `length` is what completions are packed into.
    """

    def __init__(
        self,
        config: ConfigDict,
        model: QwenVL,
        optimiser: optax.GradientTransformation,
        shardings: State,
        mesh: Mesh,
        groups: Sequence[optim.Group] = (),
    ) -> None:
        self.config, self.model, self.optimiser, self.mesh, self.groups = config, model, optimiser, mesh, groups
        self.stage, self.settings = STAGES[config.stage], loss_settings(config)
        self.weights = auxiliary_losses(config)
        self.temperature = config.rollout.temperature if config.stage == "rft" else 1.0
        replicated = sharding.replicated(mesh)
        self.whole = jax.jit(
            self._whole, static_argnames="length", donate_argnums=0, out_shardings=(shardings, replicated)
        )
        self.sums = sums = Sums(replicated, shardings.params)  # their shardings
        self.begin = jax.jit(_no_gradient, out_shardings=sums)
        self.part = jax.jit(self._part, static_argnames="length", donate_argnums=3, out_shardings=(sums, replicated))
        self.apply = jax.jit(self._apply, donate_argnums=0, out_shardings=(shardings, replicated))

    def _whole(
        self, state: State, base: Params | None, train: TrainBatch, *, length: int | None = None
    ) -> tuple[State, Metrics]:
        """The new state and metrics; the old state is donated."""
        (loss, metrics), grads = self._gradient(state.params, state.step, base, train, train, None, length)
        return self._step(state, loss, metrics, jax.tree.map(lambda x: x.astype(jnp.float32), grads))

    def _part(
        self,
        trained: Params,
        step: jax.Array,
        base: Params | None,
        sums: "Sums",
        train: TrainBatch,
        rows: jax.Array,
        number: jax.Array,
        *,
        length: int,
    ) -> tuple["Sums", Metrics]:
        """The sums with those of part `number`, which has the `rows` of the batch (see `parts.take`), and its
        metrics; the old sums are donated."""
        own = parts.take(train, rows)
        (loss, metrics), grads = self._gradient(trained, step, base, own, train, number, length)
        inputs = (self.stage.totals(_by_completion(x.loss_inputs))["num_tokens"] for x in (own, train))
        metrics["share"] = jnp.divide(*inputs)
        return Sums(sums.loss + loss, jax.tree.map(jnp.add, sums.grads, grads)), metrics

    def _apply(self, state: State, sums: "Sums", metrics: list[Metrics]) -> tuple[State, Metrics]:
        """The new state and metrics from those of all parts; the old state is donated."""
        return self._step(state, sums.loss, _combined(metrics, self.weights), sums.grads)

    def _gradient(
        self,
        trained: Params,
        step: jax.Array,
        base: Params | None,
        own: TrainBatch,
        train: TrainBatch,
        number: jax.Array | None,
        length: int | None,
    ) -> tuple[tuple[jax.Array, Metrics], Params]:
        """The loss of `own`, all of the batch `train` or its part `number`, its metrics, and its gradients."""
        key = None
        if self.model.lora is not None and self.model.lora.dropout:
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(self.config.seed), DROPOUT_STREAM), step)
            key = key if number is None else jax.random.fold_in(key, number)
        totals = self.stage.totals(_by_completion(train.loss_inputs))
        counts = self.model.loss_counts(train.batch)

        def objective(trained: Params) -> tuple[jax.Array, Metrics]:
            variables = policy(optim.stop_frozen(self.config.optim, trained, self.groups), base)
            logps, entropies, sown = logps_and_losses(
                variables, own.batch, own.completions, self.model, self.temperature, length, key
            )
            inputs = _by_completion(own.loss_inputs)
            logps, entropies = (x.reshape(-1, x.shape[-1]) for x in (logps, entropies))
            loss, metrics = self.stage.loss(logps, {**inputs, "entropies": entropies, **totals}, self.settings)
            for name, total in sown.items():
                metrics[name] = total / jnp.maximum(counts[name], 1)
                loss += self.weights[name] * metrics[name]
            if "sampler_logps" in inputs:
                metrics |= _token_metrics(logps, entropies, inputs)
            return loss, metrics

        return jax.value_and_grad(objective, has_aux=True)(trained)

    def _step(self, state: State, loss: jax.Array, metrics: Metrics, grads: Params) -> tuple[State, Metrics]:
        """The optimiser's step."""
        changes, opt_state = self.optimiser.update(grads, state.opt_state, state.params)
        # The optimiser computes in float32; its state keeps its dtypes: one program for all steps.
        opt_state = jax.tree.map(lambda new, old: new.astype(old.dtype), opt_state, state.opt_state)
        new = State(state.step + 1, optax.apply_updates(state.params, changes), opt_state, state.reference)
        metrics = {**metrics, "loss": loss, "grad_norm": optax.global_norm(grads)}
        if self.model.config.motion:
            metrics |= {f"motion/{name}": value for name, value in new.params["visual"]["motion_prompt"].items()}
        if self.config.skip_nonfinite:
            good = jnp.isfinite(loss) & jnp.isfinite(metrics["grad_norm"])
            new = jax.tree.map(lambda a, b: jnp.where(good, a, b), new, state)
            metrics["skipped"] = 1.0 - good
        return new, metrics


class Sums(NamedTuple):
    """Of the parts computed so far."""

    loss: jax.Array  # float32 []
    grads: Params  # float32


def _no_gradient(trained: Params) -> Sums:
    return Sums(jnp.float32(0), jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), trained))


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


def _combined(parts: Sequence[Metrics], sums: Collection[str]) -> Metrics:
    """Metrics of the parts as those of the whole: maxima of maxima, the sums of `sums`, the others mean by tokens."""
    metrics = jax.tree.map(lambda *x: jnp.stack(x), *parts)
    share = metrics.pop("share")

    def one(name: str, values: jax.Array) -> jax.Array:
        if name.endswith("/max"):
            return values.max()
        return values.sum() if name in sums else jnp.sum(share * values)

    return {name: one(name, values) for name, values in metrics.items()}
