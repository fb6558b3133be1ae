"""The learner: the training state, its compiled programs, and the policies they read.

A learner is built from shapes alone, so that its programs can be compiled for absent devices (launch/compile_check.py);
`begin` gives it parameters. Sharding follows from parameter names.
"""

import re
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vau_jax.common import sharding
from vau_jax.data.processor import Shape, collate
from vau_jax.models import hf, lora, motion_prompt, qwen_vl
from vau_jax.models.config import QwenVLConfig
from vau_jax.models.lora import LoRA
from vau_jax.models.qwen_vl import QwenVL
from vau_jax.rl.rollout import abstract_inputs
from vau_jax.train import memory, optim, update
from vau_jax.types import Batch, Completions, Params, State, TrainBatch, Variables
from vau_jax.vlm import DTYPES

ADAPTER_STREAM = 2**31 - 2  # not a step number: the key of fresh adapters never equals the sampler's


class Learner:
    """Trains a model of `model_config` from parameters with the shapes, dtypes and shardings of `shapes`."""

    def __init__(self, config: ConfigDict, model_config: QwenVLConfig, shapes: Params, mesh: Mesh) -> None:
        self.config, self.mesh = config, mesh
        self.lora = LoRA(**config.lora) if config.lora.rank else None
        self.model = QwenVL(
            model_config, DTYPES[config.dtype], config.remat, config.unroll, config.attention, self.lora, mesh
        )
        # Unrolled layers pay in the update; in the sampler's loop their weights would be copied at every token.
        self.sampler = self.model.clone(unroll=1)
        self.groups = groups_of(config, model_config)
        trained, self.abstract_base = self._split(shapes)
        rounds = config.grpo.iterations if config.stage == "rft" else 1
        self.optimiser = optim.make(config.optim, config.steps * rounds, trained, self.abstract_base, self.groups)
        state = jax.eval_shape(self._initial, trained)
        self.shardings = sharding.state_shardings(state, mesh)
        self.abstract_state: State = jax.tree.map(_with_sharding, state, self.shardings)
        names = list(hf.flatten(shapes))
        self.tower_is_frozen = self._tower_is_frozen([name for name in names if name.startswith("visual/")], trained)
        self.base: Params | None = None
        self.reference: Params | None = None  # the reference policy of the KL, where it is fixed
        self.state: State | None = None
        self._fitting: dict[tuple, update.Update] = {}  # with micro_batches=auto, by shapes of a batch

    # --- What is trained, and the state ---

    @property
    def has_reference(self) -> bool:
        """Whether the loss has a KL term."""
        return self.config.stage == "rft" and bool(self.config.grpo.beta)

    @property
    def copies_reference(self) -> bool:
        """Whether the reference policy is a separate, fixed copy of the parameters: with adapters it is the base."""
        return self.has_reference and not self.config.grpo.reference_every and self.lora is None

    @property
    def beside_update(self) -> float:
        """Bytes of each device that the run's state occupies and an update does not use."""
        return memory.held(self.abstract_state.params) if self.copies_reference else 0.0

    def begin(self, params: Params) -> None:
        """Starts training from parameters with the shapes that the learner was built for."""
        trained, self.base = self._split(params)
        self.reference = jax.tree.map(jnp.copy, trained) if self.copies_reference else self.base
        self.state = jax.device_put(self._initial(trained), self.shardings)

    def _split(self, params: Params) -> tuple[Params, Params | None]:
        """(trained, frozen base), of arrays or shapes: all parameters and None; or fresh adapters together with the
        fully trained parameters, and their base.
        """
        if self.lora is None:
            return params, None
        if all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(params)):
            layout = sharding.layout(self.mesh)
            fresh = hf.flatten(jax.eval_shape(self._fresh_adapters, params))
            laid_out = {path: _with_sharding(leaf, layout(path, leaf.shape)) for path, leaf in fresh.items()}
            return hf.unflatten(laid_out), params
        return self._fresh_adapters(params), params

    def _fresh_adapters(self, params: Params) -> Params:
        shapes = {path: leaf.shape for path, leaf in hf.flatten(params).items()}
        key = jax.random.fold_in(jax.random.key(self.config.seed), ADAPTER_STREAM)
        flat = lora.init(key, shapes, self.lora, jnp.dtype(self.config.param_dtype))
        whole = {
            path: jnp.copy(x)
            for path, x in hf.flatten(params).items()
            if any(re.fullmatch(group.pattern, path) for group in self.groups)
        }
        return hf.unflatten(flat | whole)

    def _initial(self, trained: Params) -> State:
        following = None
        if self.has_reference and self.config.grpo.reference_every:
            following = jax.tree.map(jnp.copy, trained)
        return State(jnp.int32(0), trained, jax.jit(self.optimiser.init)(trained), following)

    def _tower_is_frozen(self, tower: list[str], trained: Params) -> bool:
        if self.groups:  # the input of the tower is trained
            return False
        if self.lora is None:
            return optim.all_frozen(self.config.optim, tower)
        return not any(name.startswith("visual/") for name in hf.flatten(trained))

    # --- Policies ---

    @property
    def variables(self) -> Variables:
        """The current policy."""
        return update.policy(self.state.params, self.base)

    @property
    def abstract_variables(self) -> Variables:
        """Shapes and shardings of the policy."""
        return update.policy(self.abstract_state.params, self.abstract_base)

    @property
    def reference_variables(self) -> Variables:
        """The policy that the KL is measured against."""
        if self.state.reference is not None:
            return update.policy(self.state.reference, self.base)
        return qwen_vl.with_adapters(self.reference, None)

    @property
    def abstract_reference(self) -> Variables:
        """Shapes and shardings of the reference policy."""
        if self.abstract_state.reference is not None:
            return update.policy(self.abstract_state.reference, self.abstract_base)
        return qwen_vl.with_adapters(self.abstract_base or self.abstract_state.params, None)

    def reference_logps(self, batch: Batch, completions: Completions) -> jax.Array:
        """float32 [B, G, C] of the reference policy."""
        return self.logps_program(self.reference_variables, batch, completions)[0]

    def policy_logps(self, batch: Batch, completions: Completions) -> jax.Array:
        """float32 [B, G, C] of the current policy."""
        return self.logps_program(self.variables, batch, completions)[0]

    def encode_vision(self, batch: Batch) -> Batch:
        """Where the vision tower is frozen: the batch with its visual features, which are reused by all passes."""
        if batch.vision is None or not self.tower_is_frozen:
            return batch
        return replace(batch, vision=self.vision_program(self.variables, batch))

    def abstract_encoded(self, batch: Batch) -> Batch:
        """`encode_vision` of shapes."""
        if batch.vision is None or not self.tower_is_frozen:
            return batch
        features = jax.eval_shape(self.vision_program, self.abstract_variables, batch)
        rows = sharding.examples(self.mesh)
        return replace(batch, vision=jax.tree.map(lambda x: _with_sharding(x, rows), features))

    # --- Shapes of what a step takes ---

    def _rows(self, *shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        """An array with a row for each prompt."""
        return jax.ShapeDtypeStruct((self.config.batch_size, *shape), dtype, sharding=sharding.examples(self.mesh))

    def abstract_batch(self, shape: Shape) -> Batch:
        """Prompts that are padded to `shape`."""
        blank = collate([], self.model.config.vision, shape)
        return jax.tree.map(lambda x: self._rows(*x.shape[1:], dtype=x.dtype), blank)

    def abstract_completions(self, length: int) -> Completions:
        """Completions that are padded to `length`."""
        generations = self.config.rollout.num_generations if self.config.stage == "rft" else 1
        return Completions(self._rows(generations, length), self._rows(generations, length, dtype=bool))

    def abstract_train(self, batch: Batch, length: int) -> TrainBatch:
        """The batch of an update, of prompts as `abstract_encoded` gives them."""
        if self.config.stage == "rft":
            inputs = abstract_inputs(self.config, length, self._rows)
        else:
            inputs = {"weights": self._rows(1, length, dtype=jnp.float32)}
        return TrainBatch(batch, self.abstract_completions(length), inputs)

    # --- Programs ---

    @cached_property
    def update_program(self) -> update.Update:
        """(State, base, TrainBatch) to State and metrics, in config.micro_batches parts (`auto`: in one)."""
        return self.update_in(1 if memory.is_auto(self.config) else self.config.micro_batches)

    def update_in(self, parts: int) -> update.Update:
        """The update that computes a batch in so many parts."""
        return update.make(self.config, self.model, self.optimiser, self.shardings, self.mesh, self.groups, parts)

    def _update_for(self, train: TrainBatch) -> update.Update:
        """The update that fits into the devices' memory for batches of these shapes."""
        limit = memory.limit()
        if not (memory.is_auto(self.config) and limit):
            return self.update_program
        shapes = tuple((x.shape, x.dtype) for x in jax.tree.leaves(train))
        if shapes not in self._fitting:
            heads, arguments = self.model.config.num_heads, (self.state, self.base, train)
            self._fitting[shapes] = memory.fitting(
                self.config, self.mesh, heads, self.update_in, arguments, limit - self.beside_update
            )
        return self._fitting[shapes]

    @cached_property
    def logps_program(self) -> Callable[..., tuple[jax.Array, jax.Array]]:
        """(variables, Batch, Completions) to log-probabilities and entropies."""
        temperature = self.config.rollout.temperature
        return jax.jit(partial(update.policy_logps, model=self.model, temperature=temperature))

    @cached_property
    def vision_program(self) -> Callable[..., Any]:
        """(variables, Batch) to Features."""
        encode = partial(self.model.apply, method="encode_vision")
        return jax.jit(encode, out_shardings=sharding.examples(self.mesh))

    @cached_property
    def _follow_program(self) -> Callable[[Params, Params], Params]:
        mix = self.config.grpo.reference_mix
        return jax.jit(
            lambda old, new: jax.tree.map(lambda a, b: (1 - mix) * a + mix * b, old, new),
            out_shardings=self.shardings.reference,
        )

    # --- One step ---

    def update(self, train: TrainBatch) -> dict[str, float]:
        """The updates of one batch (several with grpo.iterations): their metrics, mean or (/max) largest."""
        rounds = self.config.grpo.iterations if self.config.stage == "rft" else 1
        program, metrics = self._update_for(train), []
        for _ in range(rounds):
            with jax.transfer_guard("disallow"):  # all inputs are on the devices already
                self.state, scalars = program(self.state, self.base, train)
            metrics.append(jax.device_get(scalars))
        return {
            name: (np.max if name.endswith("/max") else np.mean)([scalars[name] for scalars in metrics])
            for name in metrics[0]
        }

    def follow_reference(self, number: int) -> None:
        """After step `number`, from 0: moves the reference to (a mix with) the policy every grpo.reference_every."""
        if self.state.reference is not None and (number + 1) % self.config.grpo.reference_every == 0:
            self.state = replace(self.state, reference=self._follow_program(self.state.reference, self.state.params))


def groups_of(config: ConfigDict, model_config: QwenVLConfig) -> tuple[optim.Group, ...]:
    """Parameters with optimiser settings of their own: those of a motion prompt."""
    if model_config.motion is None:
        return ()
    return (optim.Group(motion_prompt.PREFIX + ".*", config.motion.lr_scale, config.motion.weight_decay),)


def _with_sharding(shape: jax.ShapeDtypeStruct, layout: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=layout)


def shapes_of(params: Params) -> Params:
    """Shapes, dtypes and shardings of arrays."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), params)
