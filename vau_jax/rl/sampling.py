"""Sampling on the device: one prefill a prompt, then G completions that all read the one prompt cache.

The host runs the decoding loop in chunks. A chunk ends when all completions have ended, when the cache of their
keys is full (it then grows by CACHE_GROWTH, so that short completions never read a long empty cache), or when so many
have ended that the others fit in a quarter of the rows (`row_shapes`): those are gathered into a smaller batch, and one
long straggler does not hold up a full one; or when somebody watches and WATCH_EVERY tokens are new. What is drawn does
not depend on any of it.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from vau_jax.common import sharding
from vau_jax.common.files import check_range
from vau_jax.models.layers import left_product
from vau_jax.models.qwen_vl import QwenVL, with_transposed_kernels
from vau_jax.rl import logprobs
from vau_jax.types import Array, Batch, KVCache, Sampled, Variables

DRAW_BLOCK = 128  # tokens
UNIFORM_STEP = 2.0**-23  # between the random numbers of float32
FIRST_CACHE, CACHE_GROWTH = 256, 4  # completion tokens that the cache has room for at first; few programs: it grows
WATCH_EVERY = 8  # tokens
LEAST_PENALTY = 0.01  # of repetition, where 1 is none
LEAST_TEMPERATURE, LEAST_TOP_P = 0.01, 1e-6  # below, logits exceed the range of float32, and masses its resolution
SHRINK = 4  # the batch shrinks when it has this many times the rows that it needs


@dataclass(frozen=True)
class StaticArgs:
    """Arguments that a program is compiled for, besides shapes."""

    model: QwenVL
    end_tokens: tuple[int, ...]
    greedy: bool
    top_p: float
    top_k: int
    mesh: Mesh | None

    @property
    def one_cpu(self) -> bool:
        """Whether one CPU is all there is."""
        if self.mesh is None:
            return jax.default_backend() == "cpu"
        return self.mesh.size == 1 and self.mesh.devices.flat[0].platform == "cpu"


class DynamicArgs(NamedTuple):
    """Arguments that change without recompilation."""

    key: jax.Array  # one, or [B * G]: one for each completion
    temperature: jax.Array
    min_new_tokens: jax.Array
    stop_table: Array | None
    penalty: jax.Array | None = None  # None: no repetition penalty


class _Prompts(NamedTuple):
    """The data of the prompts that decoding needs."""

    cache: KVCache  # [L, B, K, T, H]
    batch: Batch  # without the visual input


class _Loop(NamedTuple):
    """The completions being sampled; B and G shrink as they end."""

    step: jax.Array  # int32 []: completion tokens sampled
    number: jax.Array  # int32 [B, G]: of each completion in the full batch
    last: jax.Array  # int32 [B, G]: the newest token, not in the cache yet
    own: KVCache  # [L, B, G, K, room, H]
    tokens: jax.Array  # int32 [B, G, C]
    logps: jax.Array  # float32 [B, G, C]
    mask: jax.Array  # bool [B, G, C]
    done: jax.Array  # bool [B, G]
    stop_state: jax.Array  # int32 [B, G]: how much of a stop string has been read
    seen: jax.Array | None  # bool [B, G, V]: tokens of prompt and completion, for the repetition penalty


def restrict(scores: jax.Array, top_p: float, top_k: int) -> jax.Array:
    """Sets logits outside the `top_k` best (0: all) and outside the smallest set of mass `top_p` (1: all) to -inf."""
    if top_k:
        kth = jax.lax.top_k(scores, min(top_k, scores.shape[-1]))[0][..., -1:]
        scores = jnp.where(scores < kth, -jnp.inf, scores)
    if top_p < 1.0:
        ordered = jnp.sort(scores, axis=-1, descending=True)
        mass_before = jnp.cumsum(jax.nn.softmax(ordered), axis=-1) - jax.nn.softmax(ordered)
        last = jnp.min(jnp.where(mass_before < top_p, ordered, jnp.inf), axis=-1, keepdims=True)
        last = jnp.minimum(last, ordered[..., :1])  # the best one stays, however its mass is rounded
        scores = jnp.where(scores < last, -jnp.inf, scores)
    return scores


def penalised(scores: jax.Array, seen: jax.Array, penalty: jax.Array) -> jax.Array:
    """Logits [..., V] with those of `seen` tokens divided by `penalty` where positive, else multiplied by it
    (CTRL, arXiv 1909.05858; transformers' repetition_penalty)."""
    return jnp.where(seen, jnp.where(scores < 0, scores * penalty, scores / penalty), scores)


def draw(keys: jax.Array, scores: jax.Array) -> jax.Array:
    """One index int32 [...] for logits float32 [..., V] and keys [...], with probability softmax(scores).

    Inverts the distribution function in two steps, first to a block of the vocabulary and then inside it: two random
    numbers a row instead of V (making those costs more than the rest of a small model's step), and sums short enough
    that float32 loses no unlikely token. A token of logit -inf is never sampled.
    """
    chance = jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys.reshape(-1)).reshape(*keys.shape, 2)
    return invert(scores, chance + UNIFORM_STEP / 2)  # 0 would select the first token, however unlikely


def invert(scores: jax.Array, chance: jax.Array) -> jax.Array:
    """`draw` with the given random numbers `chance` [..., 2] between 0 and 1."""
    weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    pad = -scores.shape[-1] % DRAW_BLOCK
    weights = jnp.pad(weights, [(0, 0)] * (scores.ndim - 1) + [(0, pad)])
    weights = weights.reshape(*scores.shape[:-1], -1, DRAW_BLOCK)

    def first(mass: jax.Array, share: jax.Array) -> jax.Array:
        """The first index with any mass whose cumulative mass exceeds `share` of the whole. Where rounding leaves none
        (the sums are computed in parallel, and may differ where there is no mass between), the one with the most."""
        total = jnp.cumsum(mass, axis=-1)
        reached = (mass > 0) & (total > share * total[..., -1:])
        return jnp.argmax(jnp.where(reached, jnp.inf, mass), axis=-1)

    block = first(weights.sum(-1), chance[..., :1])
    inside = jnp.take_along_axis(weights, block[..., None, None], axis=-2)[..., 0, :]
    return block * DRAW_BLOCK + first(inside, chance[..., 1:])


def check(
    prefix: str = "",
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_new_tokens: int = 0,
    num_generations: int = 1,
    repetition_penalty: float = 1.0,
) -> None:
    """Raises InputError for an invalid option of `sample`, under its name after `prefix`."""
    check_range(f"{prefix}repetition_penalty", repetition_penalty, LEAST_PENALTY, 1 / LEAST_PENALTY)
    check_range(f"{prefix}temperature", temperature, LEAST_TEMPERATURE)
    check_range(f"{prefix}top_p", top_p, LEAST_TOP_P, 1.0)
    check_range(f"{prefix}top_k", top_k, 0)
    check_range(f"{prefix}max_new_tokens", max_new_tokens, 1)
    check_range(f"{prefix}min_new_tokens", min_new_tokens, 0, max_new_tokens)
    check_range(f"{prefix}num_generations", num_generations, 1)


def sample(
    variables: Variables,
    batch: Batch,
    key: jax.Array,
    temperature: float = 1.0,
    min_new_tokens: int = 0,
    stop_table: Array | None = None,
    *,
    model: QwenVL,
    num_generations: int,
    max_new_tokens: int,
    end_tokens: tuple[int, ...],
    greedy: bool = False,
    top_p: float = 1.0,
    top_k: int = 0,
    repetition_penalty: float = 1.0,
    prompt_room: int = 0,
    watch: Callable[[Sampled], None] | None = None,
) -> Sampled:
    """Draws G = num_generations completions of at most C = max_new_tokens tokens for each prompt.

    A completion ends with the first of `end_tokens`, none of which is drawn among the first `min_new_tokens`, or with
    the token that completes a stop string of `stop_table` (see stop_strings.py); that token belongs to it. Token t of
    completion n (of all B * G) is drawn with fold_in(fold_in(key, n), t); where `key` is an array [B], a key for each
    prompt, n counts the prompt's own completions. The log-probabilities are those of the distribution drawn from,
    filters included; greedy ones are those at temperature 1. A `repetition_penalty` other than 1 makes tokens of the
    prompt and of the completion so far less likely (above 1), or more. Shorter prompts' caches are padded to
    `prompt_room` tokens, so that the same programs decode for prompts of all lengths.

    `watch` is called with what there is so far every WATCH_EVERY tokens; an exception that it raises ends the sampling.
    Raises InputError for options out of their range (see `check`).
    """
    check(
        max_new_tokens=max_new_tokens,
        temperature=1.0 if greedy else temperature,
        top_p=top_p,
        top_k=top_k,
        min_new_tokens=min_new_tokens,
        num_generations=num_generations,
        repetition_penalty=repetition_penalty,
    )
    static = StaticArgs(model, end_tokens, greedy, top_p, top_k, sharding.mesh_of(batch.tokens))
    variables = decode_weights(variables, model.dtype, static.mesh)
    if key.ndim:
        place = None if static.mesh is None else sharding.examples(static.mesh)
        key = _for_completions(num_generations, place)(key)
    penalty = None if repetition_penalty == 1 else jnp.float32(repetition_penalty)
    dynamic = DynamicArgs(key, jnp.float32(temperature), jnp.int32(min_new_tokens), stop_table, penalty)
    size = num_generations, max_new_tokens, min(FIRST_CACHE, max_new_tokens), prompt_room
    loop, prompts = _start(variables, batch, dynamic, static=static, size=size)
    if static.one_cpu and max_new_tokens > 1:
        variables = with_transposed_kernels(variables)
    whole = None  # completions that ended before the batch shrank
    while True:
        pause = jnp.int32(max_new_tokens) if watch is None else loop.step + WATCH_EVERY
        loop, prompts_left, most_left = _advance(variables, prompts, loop, dynamic, pause, static=static)
        rows = rows_needed(int(prompts_left), int(most_left), loop.done.shape, _least_rows(static.mesh))
        ended = rows == (0, 0) or int(loop.step) == max_new_tokens
        if watch or ended or rows != loop.done.shape:
            mine = jax.tree.map(jnp.copy, Sampled(loop.tokens, loop.logps, loop.mask))  # the loop is donated later
            whole = mine if whole is None else _scatter(whole, mine, loop.number)
        if watch:
            watch(whole)
        if ended:
            return whole
        room = loop.own.k.shape[4]
        room = next_room(room, max_new_tokens) if int(loop.step) > room else room
        loop, prompts = _resize(prompts, loop, shape=(*rows, room), mesh=static.mesh)


Results = Callable[[Any, tuple, dict[str, Any]], Any]  # of a function, arguments and static arguments


def abstract_programs(
    variables: Variables,
    batch: Batch,
    results: Results,
    rooms: Sequence[int],
    *,
    model: QwenVL,
    num_generations: int,
    max_new_tokens: int,
    end_tokens: tuple[int, ...],
    top_p: float = 1.0,
    top_k: int = 0,
    prompt_room: int = 0,
) -> Iterator[tuple[str, Any, tuple, dict[str, Any]]]:
    """Name, function, arguments and static arguments of the programs that `sample` runs for shapes with shardings until
    a batch shrinks: the prefill, and the decoding loop with a cache of each of `rooms`.

    `results` says what a program returns, as shapes with shardings.
    """
    mesh, scalar = model.mesh, partial(jax.ShapeDtypeStruct, ())  # numbers of the host are put where they are needed
    static = StaticArgs(model, end_tokens, False, top_p, top_k, mesh)
    shape = batch.tokens.shape[0], num_generations
    keys = jax.ShapeDtypeStruct((math.prod(shape),), jax.random.key(0).dtype, sharding=sharding.examples(mesh))
    dynamic = DynamicArgs(keys, scalar(jnp.float32), scalar(jnp.int32), None)
    variables = decode_weights(variables, model.dtype, mesh, _abstract_cast)
    size = {"static": static, "size": (num_generations, max_new_tokens, rooms[0], prompt_room)}
    yield "prefill", _start, (variables, batch, dynamic), size
    loop, prompts = results(_start, (variables, batch, dynamic), size)
    for number, room in enumerate(rooms):
        if number:
            shape_of_cache = {"shape": (*shape, room), "mesh": mesh}
            yield "larger cache", _resize, (prompts, loop), shape_of_cache
            loop, prompts = results(_resize, (prompts, loop), shape_of_cache)
        read = results(with_transposed_kernels, (variables,), {}) if static.one_cpu else variables
        args = read, prompts, loop, dynamic, scalar(jnp.int32)
        yield "decode step", _advance, args, {"static": static}
        loop, *_ = results(_advance, args, {"static": static})


def cache_rooms(max_new_tokens: int) -> list[int]:
    """The sizes in tokens that the cache of completions has one after the other."""
    rooms = [min(FIRST_CACHE, max_new_tokens)]
    while rooms[-1] < max_new_tokens:
        rooms.append(next_room(rooms[-1], max_new_tokens))
    return rooms


def results_by_rule(mesh: Mesh) -> Results:
    """What a program returns without compiling it: caches by rule, what has a row for each prompt by example."""

    def placed(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        if leaf.ndim >= 5:
            layout = sharding.cache(mesh, leaf.shape)
        else:
            layout = sharding.examples(mesh) if leaf.ndim else sharding.replicated(mesh)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=layout)

    return lambda function, args, static: jax.tree.map(placed, jax.eval_shape(partial(function, **static), *args))


def copies_weights(variables: Variables, dtype: Any, mesh: Mesh) -> bool:
    """Whether sampling reads a copy of the weights: gathered over fsdp, in the dtype of activations."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(variables)
    return mesh.shape["fsdp"] > 1 or any(x.dtype != _read_dtype(path, x, dtype) for path, x in leaves)


def _read_dtype(path: tuple[Any, ...], x: Any, dtype: Any) -> Any:
    """The dtype in which decoding reads a parameter: matrices are cast to the model's."""
    return jnp.dtype(dtype) if path[-1].key in ("kernel", "embedding", "lm_head") else x.dtype


@lru_cache(maxsize=64)
def _for_completions(generations: int, place: NamedSharding | None) -> Callable[[jax.Array], jax.Array]:
    """A program: keys [B] of prompts to keys [B * G] of their completions, sharded like that."""

    def fold(keys: jax.Array) -> jax.Array:
        return jax.vmap(lambda key: jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(generations)))(keys)

    return jax.jit(lambda keys: fold(keys).reshape(-1), out_shardings=place)


def decode_weights(
    variables: Variables, dtype: Any, mesh: Mesh | None, cast: Callable[..., Any] | None = None
) -> Variables:
    """The parameters as decoding reads them: matrices in the model's dtype, and on a mesh gathered over fsdp, which
    would otherwise be gathered for each token. Parameters that differ are copied, in additional memory; `cast`: how.
    """
    cast = cast or _cast
    split = mesh is not None and mesh.shape["fsdp"] > 1

    def one(path: tuple[Any, ...], x: jax.Array, place: NamedSharding | None = None) -> jax.Array:
        wanted = _read_dtype(path, x, dtype)
        if not split and x.dtype == wanted:
            return x
        return cast(wanted, place)(x)  # one by one: together they would need twice the memory

    places = () if mesh is None else (sharding.gathered(variables, mesh),)
    return jax.tree_util.tree_map_with_path(one, variables, *places)


@lru_cache(maxsize=64)
def _cast(dtype: Any, place: NamedSharding | None) -> Callable[[jax.Array], jax.Array]:
    """A program that casts an array, and then shards it like that."""
    return jax.jit(lambda x: jax.lax.optimization_barrier(x.astype(dtype)), out_shardings=place)


def _abstract_cast(dtype: Any, place: NamedSharding | None) -> Callable[[Any], jax.ShapeDtypeStruct]:
    """`_cast` of shapes."""
    return lambda x: jax.ShapeDtypeStruct(x.shape, dtype, sharding=place)


def compiled_programs() -> int:
    """How many programs sampling has compiled so far."""
    return sum(program._cache_size() for program in (_start, _advance, _scatter, _resize))


def next_room(room: int, limit: int) -> int:
    """The completion tokens that the cache has room for after `room`."""
    return min(CACHE_GROWTH * room, limit)


def row_shapes(shape: tuple[int, int], least: int = 1) -> list[tuple[int, int]]:
    """The batches [B, G] that decoding goes through from `shape` on, each SHRINK times smaller than the one before: of
    fewer completions a prompt, then of fewer prompts, but at least `least`. They are few, being programs each."""
    (prompts, generations), result = shape, [shape]
    while True:
        if generations >= SHRINK:
            generations //= SHRINK
        elif prompts % SHRINK == 0 and prompts // SHRINK >= least:
            prompts //= SHRINK
        else:
            return result
        result.append((prompts, generations))


def rows_needed(prompts: int, most: int, shape: tuple[int, int], least: int = 1) -> tuple[int, int]:
    """Of `row_shapes` the smallest that holds the unfinished completions of so many prompts, at `most` so many of each;
    (0, 0) for none."""
    if prompts == 0:
        return 0, 0
    return next(s for s in reversed(row_shapes(shape, least)) if s == shape or (s[0] >= prompts and s[1] >= most))


def steps(lengths: np.ndarray, limit: int, least: int = 1) -> Iterator[tuple[int, int, int]]:
    """The batch (B, G, room for completion tokens) of each step in which `sample` decodes completions of these lengths
    [B, G], of at most `limit` tokens, from the second token on; `least` as in `row_shapes`."""
    shape, room = lengths.shape, min(FIRST_CACHE, limit)
    for step in range(1, limit):
        left = (lengths > step).sum(1)
        rows = rows_needed(int((left > 0).sum()), int(left.max()), shape, least)
        if rows == (0, 0):
            return
        shape, room = rows, next_room(room, limit) if step > room else room
        yield *shape, room


def _least_rows(mesh: Mesh | None) -> int:
    """Prompts that a batch has at least: one for each device."""
    return 1 if mesh is None else sharding.example_parts(mesh)


@partial(jax.jit, static_argnames=("static", "size"))
def _start(
    variables: Variables,
    batch: Batch,
    dynamic: DynamicArgs,
    *,
    static: StaticArgs,
    size: tuple[int, int, int, int],
) -> tuple[_Loop, _Prompts]:
    """Reads the prompts and draws the first token of each completion; `size` is (G, C, room, prompt_room)."""
    hidden, prompt = static.model.apply(variables, batch, method="prefill")
    b, (g, c, room, prompt_room) = batch.tokens.shape[0], size
    more = max(0, prompt_room - batch.tokens.shape[1])
    prompt = _pin(jax.tree.map(lambda x: jnp.pad(x, ((0, 0),) * 3 + ((0, more), (0, 0))), prompt), static.mesh)
    layers, _, kv_heads, _, dim = prompt.k.shape
    blank = jnp.zeros((layers, b, g, kv_heads, room, dim), prompt.k.dtype)
    loop = _Loop(
        step=jnp.int32(0),
        number=jnp.arange(b * g, dtype=jnp.int32).reshape(b, g),
        last=jnp.zeros((b, g), jnp.int32),
        own=_pin(KVCache(blank, blank), static.mesh),
        tokens=jnp.zeros((b, g, c), jnp.int32),
        logps=jnp.zeros((b, g, c)),
        mask=jnp.zeros((b, g, c), bool),
        done=jnp.zeros((b, g), bool),
        stop_state=jnp.zeros((b, g), jnp.int32),
        seen=None if dynamic.penalty is None else _seen(batch, static.model.head(variables).shape[0], g),
    )
    first = jnp.broadcast_to(logprobs.last_token(hidden, batch.mask)[:, None], (b, g, hidden.shape[-1]))
    read = replace(batch, mask=jnp.pad(batch.mask, ((0, 0), (0, more))))
    return _add(loop, first, variables, dynamic, static), _Prompts(prompt, _for_decoding(read))


def _for_decoding(batch: Batch) -> Batch:
    """What decoding reads of prompts; the rest has one token, so that it does not depend on their length."""
    return replace(
        batch,
        tokens=batch.tokens[:, :1],
        positions=batch.positions[..., :1],
        visual_index=batch.visual_index[:, :1],
        vision=None,
    )


def _seen(batch: Batch, vocabulary: int, generations: int) -> jax.Array:
    """bool [B, G, V]: which tokens a prompt has."""
    rows = jnp.arange(batch.tokens.shape[0])[:, None]
    seen = jnp.zeros((batch.tokens.shape[0], vocabulary), bool).at[rows, batch.tokens].max(batch.mask)
    return jnp.broadcast_to(seen[:, None], (seen.shape[0], generations, vocabulary))


@partial(jax.jit, static_argnames=("static",), donate_argnames=("loop",))
def _advance(
    variables: Variables,
    prompts: _Prompts,
    loop: _Loop,
    dynamic: DynamicArgs,
    pause: jax.Array,
    *,
    static: StaticArgs,
) -> tuple[_Loop, jax.Array, jax.Array]:
    """Samples tokens until a chunk ends, at the latest after `pause` tokens; returns how many prompts have unfinished
    completions then, and the largest number of them for one prompt.
    """
    c, room = loop.tokens.shape[2], loop.own.k.shape[4]
    shape, least = loop.done.shape, _least_rows(static.mesh)
    enough = np.asarray(  # [B + 1, G + 1]: whether a smaller batch would do
        [[rows_needed(p, m, shape, least) != shape for m in range(shape[1] + 1)] for p in range(shape[0] + 1)]
    )

    def left(loop: _Loop) -> tuple[jax.Array, jax.Array]:
        each = jnp.sum(~loop.done, axis=1)
        return jnp.sum(each > 0), jnp.max(each)

    def goes_on(loop: _Loop) -> jax.Array:
        return (loop.step < jnp.minimum(c, pause)) & (loop.step <= room) & ~jnp.asarray(enough)[left(loop)]

    def body(loop: _Loop) -> _Loop:
        at = loop.step - 1  # of the newest token
        caches = prompts.cache, loop.own
        hidden, new = static.model.apply(variables, loop.last, prompts.batch, at, caches, method="decode")
        own = KVCache(*(_write(old, x, at) for old, x in ((loop.own.k, new.k), (loop.own.v, new.v))))
        return _add(loop._replace(own=own), hidden, variables, dynamic, static)

    loop = jax.lax.while_loop(goes_on, body, loop)
    return loop, *left(loop)


def _add(loop: _Loop, hidden: jax.Array, variables: Variables, dynamic: DynamicArgs, static: StaticArgs) -> _Loop:
    """The loop after one more token, predicted by hidden [B, G, D]."""
    token, logp = _pick(loop, hidden, variables, dynamic, static)
    at, alive = (0, 0, loop.step), ~loop.done
    table = dynamic.stop_table
    state = loop.stop_state if table is None else jnp.asarray(table)[loop.stop_state, token]
    done = loop.done | jnp.isin(token, jnp.asarray(static.end_tokens, jnp.int32))
    return loop._replace(
        step=loop.step + 1,
        last=token,
        tokens=jax.lax.dynamic_update_slice(loop.tokens, jnp.where(alive, token, 0)[..., None], at),
        logps=jax.lax.dynamic_update_slice(loop.logps, jnp.where(alive, logp, 0.0)[..., None], at),
        mask=jax.lax.dynamic_update_slice(loop.mask, alive[..., None], at),
        done=done if table is None else done | (state == len(table) - 1),
        stop_state=state,
        seen=None if loop.seen is None else loop.seen | jax.nn.one_hot(token, loop.seen.shape[-1], dtype=bool),
    )


def _pick(
    loop: _Loop, hidden: jax.Array, variables: Variables, dynamic: DynamicArgs, static: StaticArgs
) -> tuple[jax.Array, jax.Array]:
    """One token [B, G] and its log-probability."""
    config = static.model.config
    head = static.model.head(variables)
    temperature = 1.0 if static.greedy else dynamic.temperature
    product = left_product if static.one_cpu else logprobs.logits
    scores = logprobs.sampling_logits(hidden, head, temperature, config.never_sampled, product)  # [B, G, V]
    if loop.seen is not None:
        scores = penalised(scores, loop.seen, dynamic.penalty)
    ends = jnp.asarray(static.end_tokens, jnp.int32)
    scores = scores.at[..., ends].add(jnp.where(loop.step < dynamic.min_new_tokens, -jnp.inf, 0.0))
    if static.greedy:
        token = jnp.argmax(scores, axis=-1)
    else:
        scores = restrict(scores, static.top_p, static.top_k)
        own = partial(jax.random.fold_in, dynamic.key) if dynamic.key.ndim == 0 else dynamic.key.__getitem__
        keys = jax.vmap(lambda n: jax.random.fold_in(own(n), loop.step))
        token = draw(keys(loop.number.reshape(-1)).reshape(loop.number.shape), scores)
    logp = jnp.take_along_axis(scores, token[..., None], axis=-1)[..., 0] - jax.nn.logsumexp(scores, axis=-1)
    return token.astype(jnp.int32), logp


def _write(cache: jax.Array, new: jax.Array, step: jax.Array) -> jax.Array:
    """Puts new [L, B, G, K, H] at completion position `step` of cache [L, B, G, K, room, H]."""
    return jax.lax.dynamic_update_slice(cache, new[..., None, :], (0, 0, 0, 0, step, 0))


@jax.jit
def _scatter(whole: Sampled, part: Sampled, number: jax.Array) -> Sampled:
    """Writes completions to their positions in the full batch."""

    def write(all_rows: jax.Array, rows: jax.Array) -> jax.Array:
        flat = all_rows.reshape(-1, all_rows.shape[-1])
        return flat.at[number.reshape(-1)].set(rows.reshape(-1, rows.shape[-1])).reshape(all_rows.shape)

    return jax.tree.map(write, whole, part)


@partial(jax.jit, static_argnames=("shape", "mesh"))
def _resize(
    prompts: _Prompts, loop: _Loop, *, shape: tuple[int, int, int], mesh: Mesh | None
) -> tuple[_Loop, _Prompts]:
    """Gathers the completions that have not ended into [B, G] = shape[:2], with room for shape[2] tokens each."""
    b, g, room = shape
    if (b, g) != loop.done.shape:
        chosen = jnp.argsort(jnp.all(loop.done, axis=1), stable=True)[:b]  # prompts with completions left come first
        order = jnp.argsort(loop.done[chosen], axis=1, stable=True)[:, :g]

        def rows(x: jax.Array, axis: int) -> jax.Array:
            """x [..., B, G, ...] with the chosen rows; `axis` is that of B."""
            x = jnp.take(x, chosen, axis=axis)
            index = jnp.expand_dims(order, [i for i in range(x.ndim) if i not in (axis, axis + 1)])
            return jnp.take_along_axis(x, index, axis=axis + 1)

        own = KVCache(rows(loop.own.k, 1), rows(loop.own.v, 1))
        rest = {name: value for name, value in loop._asdict().items() if name not in ("step", "own")}
        rest = jax.tree.map(lambda x: rows(x, 0), rest)
        loop = _Loop(step=loop.step, own=own, **rest)
        cache = jax.tree.map(lambda x: jnp.take(x, chosen, axis=1), prompts.cache)
        prompts = _Prompts(_pin(cache, mesh), jax.tree.map(lambda x: jnp.take(x, chosen, axis=0), prompts.batch))
    more = ((0, 0),) * 4 + ((0, room - loop.own.k.shape[4]), (0, 0))
    return loop._replace(own=_pin(jax.tree.map(lambda x: jnp.pad(x, more), loop.own), mesh)), prompts


def _pin(cache: KVCache, mesh: Mesh | None) -> KVCache:
    """The cache with the sharding of `sharding.cache`."""
    if mesh is None:
        return cache
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, sharding.cache(mesh, x.shape)), cache)
