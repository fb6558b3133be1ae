"""Qwen2-VL, Qwen2.5-VL, Qwen3-VL and the text models Qwen2 and Qwen3 as functions of their parameters: complete
sequences, prefill, one decoding step.

A prompt and its G completions are one packed sequence [T + N]: the prompt goes through the model once, each completion
attends to the prompt and itself (see `packing` and `attention`). SFT is the case G = 1; sampling reads the prompt's
cache.

`variables` is {"params": ...}, or {"params": ..., "lora": ...} for the model with its adapters.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from vau_jax.common import sharding
from vau_jax.models import attention, lora, rope
from vau_jax.models.attention import Keys
from vau_jax.models.config import QwenVLConfig, VisionConfig, with_motion
from vau_jax.models.embedding import Embedding
from vau_jax.models.layers import UNIT_NORMAL, Dense, RMSNorm, SwiGLU
from vau_jax.models.lora import LoRA
from vau_jax.models.motion_prompt import VARIATION, pairs_of
from vau_jax.models.packing import Packing
from vau_jax.models.vision import VisionTower
from vau_jax.types import Batch, Completions, Features, Groups, KVCache, Params, Variables, Vision


class Packed(NamedTuple):
    """Positions and masks of a packed sequence."""

    angles: jax.Array  # float32 [B, T + N, H / 2]
    prompt_mask: jax.Array  # bool [B, T]
    starts: jax.Array | None  # int32 [B, N]: where the completion of each token begins
    deep: jax.Array | None  # [n, B, T, D]: what the first n layers add to the prompt (DeepStack), zero on text


class Decoding(NamedTuple):
    """Positions and masks of one decoding step."""

    angles: jax.Array  # float32 [B, G, H / 2]
    prompt_mask: jax.Array  # bool [B, T]
    step: jax.Array  # int32 []: completion tokens that are in the cache


class DecoderLayer(nn.Module):
    """One layer: attention and a gated feed-forward network, each after a norm and beside a residual."""

    config: QwenVLConfig
    dtype: Any
    attention: str
    lora: LoRA | None
    longest: int = 0  # completion in a packed sequence
    fixed: bool = False  # each begins at a multiple of it
    keep_kv: bool = False

    @nn.compact
    def __call__(
        self, x: jax.Array, where: Packed | Decoding, number: jax.Array, caches: tuple[KVCache, KVCache] | None
    ) -> tuple[jax.Array, KVCache | None]:
        """x is [B, S, D]: a packed sequence, or one token of each completion when `caches` (prompt, own) are given."""
        c, packed = self.config, isinstance(where, Packed)
        # Tokens of a packed sequence are sharded, except in the matrix products; a decoding step has too few.
        gathered, split = (
            f if packed else (lambda same: same) for f in (sharding.whole_tokens, sharding.between_layers)
        )
        h = gathered(RMSNorm(c.rms_norm_eps, name="input_layernorm")(x))
        out, kv = self._attention(h, where, caches)
        x = split(x + self._dense("o_proj", c.hidden_size, c.out_bias)(out.reshape(*x.shape[:2], -1)))
        h = gathered(RMSNorm(c.rms_norm_eps, name="post_attention_layernorm")(x))
        x = x + SwiGLU(c.intermediate_size, self.dtype, self.lora, name="mlp")(h)
        x = _add_deep(x, where.deep, number) if packed and where.deep is not None else x
        return split(x), kv

    def _dense(self, name: str, features: int, bias: bool) -> Dense:
        return Dense(features, self.dtype, self.lora, bias, name=name)

    def _attention(
        self, h: jax.Array, where: Packed | Decoding, caches: tuple[KVCache, KVCache] | None
    ) -> tuple[jax.Array, KVCache | None]:
        c = self.config

        def project(name: str, heads: int) -> jax.Array:
            y = self._dense(f"{name}_proj", heads * c.head_dim, c.qkv_bias)(h)
            y = sharding.by_heads(y.reshape(*h.shape[:2], heads, c.head_dim))  # [B, S, heads, H]
            return RMSNorm(c.rms_norm_eps, name=f"{name}_norm")(y) if c.qk_norm and name != "v" else y

        q = rope.rotate(project("q", c.num_heads), where.angles)
        k = rope.rotate(project("k", c.num_kv_heads), where.angles)
        v = project("v", c.num_kv_heads)
        if caches is None:
            layout = None if where.starts is None else attention.Layout(where.starts, self.longest, self.fixed)
            out = attention.prefix_attention(q, k, v, where.prompt_mask, layout, self.attention)
            return out, KVCache(jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)) if self.keep_kv else None
        prompt, own = caches
        written = jnp.arange(own.k.shape[3]) < where.step  # [C]
        out = attention.decode_attention(
            q,
            k,
            v,
            Keys(prompt.k, prompt.v, where.prompt_mask[:, None]),
            Keys(own.k, own.v, written[None, None]),
        )
        return out, KVCache(k, v)


def _add_deep(x: jax.Array, deep: jax.Array, number: jax.Array) -> jax.Array:
    """Adds deep[number] to the prompt's part of x, in the layers that have one."""

    def add() -> jax.Array:
        return x.at[:, : deep.shape[2]].add(jax.lax.dynamic_index_in_dim(deep, number, keepdims=False))

    return jax.lax.cond(number < deep.shape[0], add, lambda: x)


class Decoder(nn.Module):
    """All decoder layers and the last norm."""

    config: QwenVLConfig
    dtype: Any
    attention: str
    lora: LoRA | None
    remat: bool
    unroll: int

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        where: Packed | Decoding,
        caches: tuple[KVCache, KVCache] | None = None,
        longest: int = 0,
        fixed: bool = False,
        keep_kv: bool = False,
    ) -> tuple[jax.Array, KVCache | None]:
        """x [B, S, D] -> [B, S, D], and the keys and values of every layer, stacked."""
        c = self.config
        layers = nn.scan(
            nn.remat(DecoderLayer) if self.remat else DecoderLayer,
            variable_axes={"params": 0, "lora": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(nn.broadcast, 0, 0),
            length=c.num_layers,
            unroll=self.unroll,
        )(c, self.dtype, self.attention, self.lora, longest, fixed, keep_kv, name="layers")
        x, kv = layers(x, where, jnp.arange(c.num_layers), caches)
        return RMSNorm(c.rms_norm_eps, name="norm")(x), kv


def _on_mesh(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of `QwenVL` whose arrays are sharded over its mesh."""

    @wraps(method)
    def on_mesh(self: "QwenVL", *args: Any, **kwargs: Any) -> Any:
        with sharding.on(self.mesh):
            return method(self, *args, **kwargs)

    return on_mesh


class QwenVL(nn.Module):
    """The complete model; `QwenVL(config).apply(variables, ..., method="hidden")` and so on."""

    config: QwenVLConfig
    dtype: Any = jnp.float32
    remat: bool = False  # recompute activations in the backward pass
    unroll: int = 1  # layers in one round of the scan: more is faster for small models, and slower to compile
    attention: str = "auto"  # of the decoder, a name in attention.IMPLEMENTATIONS
    lora: LoRA | None = None  # the kind of adapters that collection "lora" holds
    mesh: Mesh | None = None  # of parameters and batches; None: one device

    def setup(self) -> None:
        c = self.config
        self.embed_tokens = Embedding(c.vocab_size, c.hidden_size, self.dtype)
        if c.vision:
            self.visual = VisionTower(c.vision, self.dtype, self.lora, self.remat, self.unroll)
        self.decoder = Decoder(c, self.dtype, self.attention, self.lora, self.remat, self.unroll)
        if not c.tie_word_embeddings:
            self.lm_head = self.param("lm_head", UNIT_NORMAL, (c.vocab_size, c.hidden_size))

    def _angles(self, positions: jax.Array) -> jax.Array:
        c = self.config
        return rope.mrope_angles(positions, c.head_dim, c.rope_theta, c.mrope_section, c.mrope_interleaved)

    @_on_mesh
    def encode_vision(self, batch: Batch) -> Features:
        """The visual features of a batch that has visual input."""
        if isinstance(batch.vision, Features):
            return batch.vision
        return self.visual(batch.vision)

    @nn.nowrap
    def loss_counts(self, batch: Batch) -> dict[str, jax.Array]:
        """Divisors of the totals that a forward pass sows among the "losses", by name: float32 [] each."""
        prompted = self.config.motion and isinstance(batch.vision, Vision)
        return {VARIATION: pairs_of(batch.vision, self.config.vision)} if prompted else {}

    @nn.nowrap
    def head(self, variables: Variables) -> jax.Array:
        """The matrix [V, D] that turns hidden states into logits: its own, or the embedding where tied."""
        params = variables["params"]
        return params["embed_tokens"]["embedding"] if self.config.tie_word_embeddings else params["lm_head"]

    def embed(self, batch: Batch, gathered: bool = False) -> tuple[jax.Array, jax.Array | None]:
        """Token embeddings [B, T, D] with visual features at the positions of visual tokens, and `Packed.deep`;
        `gathered` as in `Embedding`."""
        x = self.embed_tokens(batch.tokens, gathered)
        if batch.vision is None:
            return x, None
        features = self.encode_vision(batch)
        visual = batch.visual_index[..., None] >= 0  # [B, T, 1]
        index = jnp.maximum(batch.visual_index, 0)[..., None]
        x = jnp.where(visual, jnp.take_along_axis(features.tokens, index, axis=1), x)
        if features.deep is None:
            return x, None
        deep = jnp.take_along_axis(features.deep, index[:, None], axis=2)  # [B, n, T, D]
        return x, jnp.swapaxes(jnp.where(visual[:, None], deep, 0), 0, 1)

    @_on_mesh
    def hidden(self, batch: Batch, completions: Completions | None = None, packing: Packing | None = None) -> jax.Array:
        """Last hidden states of the packed sequence, [B, T + N, D]; of the prompt alone without completions."""
        (x, deep), positions = self.embed(batch), batch.positions
        if completions is None:
            return self.decoder(x, Packed(self._angles(positions), batch.mask, None, deep))[0]
        (b, g, longest), length = completions.tokens.shape, packing.starts.shape[1]
        x = jnp.concatenate([x, self.embed_tokens(packing.take(completions.tokens))], axis=1)
        own = batch.next_position[:, None] + jnp.arange(length) - packing.starts  # [B, N]
        positions = jnp.concatenate([positions, jnp.broadcast_to(own[:, None], (b, 3, length))], axis=2)
        where = Packed(self._angles(positions), batch.mask, packing.starts, deep)
        return self.decoder(x, where, longest=longest, fixed=length == g * longest)[0]

    @_on_mesh
    def prefill(self, batch: Batch) -> tuple[jax.Array, KVCache]:
        """Hidden states [B, T, D] of the prompts and their cache [L, B, K, T, H]; as in `decode`, weights are not split
        over the mesh's fsdp axis."""
        x, deep = self.embed(batch, gathered=True)
        return self.decoder(x, Packed(self._angles(batch.positions), batch.mask, None, deep), keep_kv=True)

    @_on_mesh
    def decode(
        self, tokens: jax.Array, batch: Batch, step: jax.Array, caches: tuple[KVCache, KVCache]
    ) -> tuple[jax.Array, KVCache]:
        """One step: tokens int32 [B, G] at completion position `step` -> hidden [B, G, D], new keys [L, B, G, K, H]."""
        position = jnp.broadcast_to((batch.next_position + step)[:, None, None], (tokens.shape[0], 3, tokens.shape[1]))
        where = Decoding(self._angles(position), batch.mask, step)
        return self.decoder(self.embed_tokens(tokens, gathered=True), where, caches)


def init(config: QwenVLConfig, key: jax.Array) -> Params:
    """Random float32 parameters with Hugging Face's distribution: normal(initializer_range), norms one, biases zero.

    Without those of a motion prompt, which come from its own file or from where training starts.
    """
    config = with_motion(config, None)
    token = jnp.zeros((1, 1), jnp.int32)
    batch = Batch(
        tokens=token,
        mask=token == 0,
        positions=jnp.zeros((1, 3, 1), jnp.int32),
        visual_index=token,
        next_position=token[0],
        vision=_one_unit(config.vision) if config.vision else None,
    )
    params = QwenVL(config).init(key, batch, method="hidden")["params"]
    drawn = ("kernel", "embedding", "lm_head", "pos_embed")
    return jax.tree_util.tree_map_with_path(
        lambda path, x: x * config.initializer_range if path[-1].key in drawn else x, params
    )


def _one_unit(v: VisionConfig) -> Vision:
    """The smallest visual input: the patches of one visual token."""
    n = v.spatial_merge_size**2
    groups = Groups(jnp.arange(n)[None, None], jnp.zeros((1, 1, n), jnp.int32), jnp.arange(n)[None])
    patches = jnp.zeros((1, n, v.in_channels * v.temporal_patch_size * v.patch_size**2), jnp.uint8)
    return Vision(
        patches=patches,
        positions=jnp.zeros((1, n, 2), jnp.int32),
        frames=groups,
        windows=groups if v.window_size else None,
        corners=jnp.zeros((1, n, 4), jnp.int32) if v.position_grid else None,
        corner_weights=jnp.zeros((1, n, 4)) if v.position_grid else None,
    )


@jax.jit
def with_transposed_kernels(variables: Variables) -> Variables:
    """Variables for `decode` on CPU, with a copy of the decoder's kernels, transposed."""
    flat = flatten_dict(variables["params"]["decoder"])
    turned = {
        (*path[:-1], "transposed") if path[-1] == "kernel" else path: x.mT if path[-1] == "kernel" else x
        for path, x in flat.items()
    }
    return {**variables, "params": {**variables["params"], "decoder": unflatten_dict(turned)}}


def with_adapters(params: Params, trained: Params | None) -> Variables:
    """The variables for `apply`: the parameters, LoRA's factors, and fully trained parameters in place of those in
    `params`.
    """
    if trained is None:
        return {"params": params}
    adapters, whole = lora.split(trained)
    return {"params": lora.overlay(params, whole), "lora": adapters}
