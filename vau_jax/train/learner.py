"""The learner: the training state, its compiled programs, and the policies they read.

A learner is built from shapes alone, so that its programs can be compiled for absent devices (launch/compile_check.py);
`begin` gives it parameters. Sharding follows from parameter names.
"""

import re
from collections.abc import Callable, Iterator
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
from vau_jax.rl import engine
from vau_jax.rl.rollout import abstract_inputs
from vau_jax.train import memory, optim, parts, update
from vau_jax.train.parts import Part
from vau_jax.train.update import Metrics, Updates
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
        rounds = engine.prompts_at_once(config) // config.batch_size
        rounds *= config.grpo.iterations if config.stage == "rft" else 1
        self.optimiser = optim.make(config.optim, config.steps * rounds, trained, self.abstract_base, self.groups)
        state = jax.eval_shape(self._initial, trained)
        self.shardings = sharding.state_shardings(state, mesh)
        self.abstract_state: State = jax.tree.map(_with_sharding, state, self.shardings)
        names = list(hf.flatten(shapes))
        self.tower_is_frozen = self._tower_is_frozen([name for name in names if name.startswith("visual/")], trained)
        self.base: Params | None = None
        self.reference: Params | None = None  # the reference policy of the KL, where it is fixed
        self.state: State | None = None
        self._fitting: dict[tuple, int] = {}  # parts with micro_batches=auto, by shapes of a batch

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

    def reference_logps(self, batch: Batch, completions: Completions, tokens: np.ndarray | None = None) -> jax.Array:
        """float32 [B, G, C] of the reference policy. `tokens` int [B] are those of each row's completions, which then
        are packed."""
        return self._logps(self.reference_variables, batch, completions, tokens)

    def policy_logps(self, batch: Batch, completions: Completions, tokens: np.ndarray | None = None) -> jax.Array:
        """float32 [B, G, C] of the current policy; `tokens` likewise."""
        return self._logps(self.variables, batch, completions, tokens)

    def _logps(
        self, variables: Variables, batch: Batch, completions: Completions, tokens: np.ndarray | None
    ) -> jax.Array:
        found = self._split_by_length(completions, tokens, self.score_parts(len(batch.tokens)))
        if found[0].rows is None:
            return self.logps_program(variables, batch, completions, length=found[0].length)[0]
        logps = self._no_logps(completions)
        for part in found:
            rows = self._on_devices(part.rows)
            logps = self.part_logps_program(logps, variables, batch, completions, rows, length=part.length)
        return logps

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

    def _rows(self, count: int, *shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        """An array with a row for each of `count` prompts."""
        return jax.ShapeDtypeStruct((count, *shape), dtype, sharding=sharding.examples(self.mesh))

    def abstract_batch(self, shape: Shape, count: int = 0) -> Batch:
        """`count` prompts that are padded to `shape`; 0: those of an update."""
        blank, count = collate([], self.model.config.vision, shape), count or self.config.batch_size
        return jax.tree.map(lambda x: self._rows(count, *x.shape[1:], dtype=x.dtype), blank)

    def abstract_completions(self, count: int = 0) -> Completions:
        """Completions of `count` prompts; 0: of those of an update."""
        generations = self.config.rollout.num_generations if self.config.stage == "rft" else 1
        shape = count or self.config.batch_size, generations, self.config.data.max_completion_tokens
        return Completions(self._rows(*shape), self._rows(*shape, dtype=bool))

    def abstract_train(self, batch: Batch) -> TrainBatch:
        """The batch of an update, of prompts as `abstract_encoded` gives them."""
        rows, length = partial(self._rows, self.config.batch_size), self.config.data.max_completion_tokens
        if self.config.stage == "rft":
            inputs = abstract_inputs(self.config, length, rows)
        else:
            inputs = {"weights": rows(1, length, dtype=jnp.float32)}
        return TrainBatch(batch, self.abstract_completions(), inputs)

    def _abstract_rows(self, prompts: int, count: int) -> jax.ShapeDtypeStruct:
        """The numbers of the rows of one of `count` parts."""
        devices = sharding.example_parts(self.mesh)
        return self._rows(devices, prompts // count // devices)

    # --- Programs ---

    @cached_property
    def updates(self) -> Updates:
        """The programs of an update."""
        return Updates(self.config, self.model, self.optimiser, self.shardings, self.mesh, self.groups)

    @cached_property
    def logps_program(self) -> Callable[..., tuple[jax.Array, jax.Array]]:
        """(variables, Batch, Completions) to log-probabilities and entropies, with `length` as in `packing.pack`."""
        score = partial(update.policy_logps, model=self.model, temperature=self.config.rollout.temperature)
        return jax.jit(score, static_argnames="length")

    @cached_property
    def part_logps_program(self) -> Callable[..., jax.Array]:
        """(log-probabilities so far, variables, Batch, Completions, rows) to log-probabilities with those of a part."""
        temperature = self.config.rollout.temperature

        def score(
            known: jax.Array,
            variables: Variables,
            batch: Batch,
            completions: Completions,
            rows: jax.Array,
            length: int,
        ) -> jax.Array:
            own = parts.take((batch, completions), rows)
            found, _ = update.policy_logps(variables, *own, self.model, temperature, length)
            return parts.put(known, found, rows)

        rows = sharding.examples(self.mesh)
        return jax.jit(score, static_argnames="length", donate_argnums=0, out_shardings=rows)

    @cached_property
    def _no_logps(self) -> Callable[[Completions], jax.Array]:
        rows = sharding.examples(self.mesh)
        return jax.jit(lambda completions: jnp.zeros(completions.tokens.shape, jnp.float32), out_shardings=rows)

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

    def update(self, train: TrainBatch, tokens: np.ndarray | None = None) -> dict[str, float]:
        """The updates of one batch (several with grpo.iterations, and where more prompts were sampled than an update
        takes): their metrics, mean or (/max) largest. `tokens` int [B] are those of each row's completions, which are
        then packed; None: each keeps its C places."""
        metrics = []
        for _ in range(self.config.grpo.iterations if self.config.stage == "rft" else 1):
            for own, own_tokens in self._mini_batches(train, tokens):
                found = self._split_by_length(own.completions, own_tokens, self._parts_of(own, own_tokens))
                metrics.append(jax.device_get(self._update(own, found)))
        return {
            name: (np.max if name.endswith("/max") else np.mean)([scalars[name] for scalars in metrics])
            for name in metrics[0]
        }

    def _mini_batches(
        self, train: TrainBatch, tokens: np.ndarray | None
    ) -> Iterator[tuple[TrainBatch, np.ndarray | None]]:
        """The batch in mini-batches of config.batch_size prompts: of each device's rows the first, the next and so
        on."""
        count = len(train.batch.tokens) // self.config.batch_size
        if count == 1:
            yield train, tokens
            return
        devices = sharding.example_parts(self.mesh)
        places = np.arange(len(train.batch.tokens), dtype=np.int32).reshape(devices, -1)
        for rows in np.split(places, count, axis=1):
            own = self._take_program(train, self._on_devices(rows - places[:, :1]))
            yield own, None if tokens is None else tokens[rows.reshape(-1)]

    @cached_property
    def _take_program(self) -> Callable[[TrainBatch, jax.Array], TrainBatch]:
        return jax.jit(parts.take, out_shardings=sharding.examples(self.mesh))

    def _update(self, train: TrainBatch, found: list[Part]) -> Metrics:
        programs = self.updates
        if found[0].rows is None:
            with jax.transfer_guard("disallow"):  # all inputs are on the devices already
                self.state, metrics = programs.whole(self.state, self.base, train, length=found[0].length)
            return metrics
        sums, metrics = programs.begin(self.state.params), []
        numbered = [(jax.device_put(np.int32(n)), self._on_devices(part.rows)) for n, part in enumerate(found)]
        with jax.transfer_guard("disallow"):
            for (number, rows), part in zip(numbered, found, strict=True):
                sums, of_part = programs.part(
                    self.state.params, self.state.step, self.base, sums, train, rows, number, length=part.length
                )
                metrics.append(of_part)
            self.state, total = programs.apply(self.state, sums, metrics)
        return total

    def _split_by_length(self, completions: Completions, tokens: np.ndarray | None, count: int) -> list[Part]:
        """The batch in `count` parts, with what completions of so many `tokens` are packed into."""
        known = self.packed_lengths
        if tokens is None:
            _, g, c = completions.tokens.shape
            tokens, known = np.zeros(len(completions.tokens), np.int64), [g * c]
        return parts.split(tokens, count, sharding.example_parts(self.mesh), known)

    @property
    def packed_lengths(self) -> tuple[int, ...]:
        """What completions are packed into."""
        c = self.config
        generations = c.rollout.num_generations if c.stage == "rft" else 1
        return parts.lengths(c.data.completion_shares, generations, c.data.max_completion_tokens)

    def _on_devices(self, rows: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(rows.shape, sharding.examples(self.mesh), lambda index: rows[index])

    def _parts_of(self, train: TrainBatch, tokens: np.ndarray | None) -> int:
        """The number of parts of an update: with micro_batches=auto as few as fit into the devices' memory."""
        found, limit = memory.candidates(self.config, self.mesh), memory.limit()
        if len(found) == 1 or not limit:
            return found[0]
        splits = {count: self._split_by_length(train.completions, tokens, count) for count in found}
        longest = {count: max(part.length for part in split) for count, split in splits.items()}
        key = *((x.shape, x.dtype) for x in jax.tree.leaves(train)), *longest.values()
        if key not in self._fitting:
            self._fitting[key] = memory.fitting(
                self.config,
                self.mesh,
                self.model.config.num_heads,
                lambda count: self.planned_bytes(train, count, longest[count]),
                limit - self.beside_update,
            )
        return self._fitting[key]

    def planned_bytes(self, train: TrainBatch, count: int, length: int) -> float:
        """Bytes of each device that an update takes in `count` parts, by the compiler's plan."""
        program, arguments, beside = self.update_program(train, count)
        return beside + memory.planned(program.lower(*arguments, length=length).compile())

    def update_program(self, train: TrainBatch, count: int) -> tuple[Any, tuple[Any, ...], float]:
        """The program that computes gradients, for all of an update or for one of `count` parts, its arguments but for
        `length`, what depends on the batch as shapes, and the bytes of each device that are held beside them."""
        begun = self.state is not None
        state, base = (self.state, self.base) if begun else (self.abstract_state, self.abstract_base)
        if count == 1:
            return self.updates.whole, (state, base, train), 0.0
        sums = jax.tree.map(_with_sharding, jax.eval_shape(self.updates.begin, state.params), self.updates.sums)
        rows, number = self._abstract_rows(self.config.batch_size, count), jax.ShapeDtypeStruct((), np.int32)
        arguments = state.params, state.step, base, sums, train, rows, number
        return self.updates.part, arguments, memory.held((state.opt_state, state.reference))

    def score_program(self, variables: Variables, batch: Batch) -> tuple[Any, tuple[Any, ...]]:
        """The program that scores completions with a policy, at once or in parts, and its arguments but for `length`;
        what depends on the batch as shapes."""
        prompts = len(batch.tokens)
        completions, count = self.abstract_completions(prompts), self.score_parts(prompts)
        if count == 1:
            return self.logps_program, (variables, batch, completions)
        known = self._rows(*completions.tokens.shape, dtype=jnp.float32)
        return self.part_logps_program, (known, variables, batch, completions, self._abstract_rows(prompts, count))

    def score_parts(self, prompts: int) -> int:
        """The parts in which so many prompts are scored: those of the update, or where their number is to be found, one
        prompt of each device at a time."""
        return memory.candidates(self.config, self.mesh)[-1] * prompts // self.config.batch_size

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
