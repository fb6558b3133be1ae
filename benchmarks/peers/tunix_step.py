"""Seconds of Tunix's GRPO step: text alone, the same decoder at random, as many prompt tokens; see grpo_step.py."""

import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from transformers import PreTrainedTokenizerFast
from tunix.models.qwen2 import model as qwen2
from tunix.rl import rl_cluster
from tunix.rl.grpo.grpo_learner import GRPOConfig, GRPOLearner
from tunix.rl.rollout.base_rollout import RolloutConfig
from turns import Turns  # beside this file

NO_TOKEN = 1 << 30  # ends no completion


def decoder(folder: Path, dtype: Any) -> qwen2.Qwen2:
    raw = json.loads((folder / "config.json").read_text())
    config = qwen2.ModelConfig(
        num_layers=raw["num_hidden_layers"],
        vocab_size=raw["vocab_size"],
        embed_dim=raw["hidden_size"],
        hidden_dim=raw["intermediate_size"],
        num_heads=raw["num_attention_heads"],
        head_dim=raw["hidden_size"] // raw["num_attention_heads"],
        num_kv_heads=raw["num_key_value_heads"],
        rope_theta=int(raw["rope_theta"]),
        norm_eps=raw["rms_norm_eps"],
        use_tied_embedding=raw["tie_word_embeddings"],
        dtype=dtype,
        param_dtype=dtype,
    )
    return qwen2.Qwen2(config, rngs=nnx.Rngs(0))


def prompt_of(tokenizer: PreTrainedTokenizerFast, length: int) -> str:
    """A text of exactly so many tokens."""
    text = "What happens? a fire or a fight; "
    ids = tokenizer.encode(text * length)[:length]
    return tokenizer.decode(ids)


def main() -> None:
    args = json.loads(sys.argv[1])
    folder, dtype = Path(args["model"]), getattr(jnp, args["dtype"])
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    count, turns = args["warmup"] + args["steps"], Turns()

    def reward(prompts: list[str], completions: list[str], **kwargs: Any) -> list[float]:
        """Called once a step: a step is what lies between two calls."""
        if turns.began:
            turns.end()
        if turns.steps < count:
            turns.begin()
        return [float(len(set(text))) for text in completions]

    length = -(-args["prompt_tokens"] // 32) * 32  # padded as ours is
    cluster = rl_cluster.RLCluster(
        actor=decoder(folder, dtype),
        reference=decoder(folder, dtype),
        tokenizer=tokenizer,
        cluster_config=rl_cluster.ClusterConfig(
            role_to_mesh={
                role: mesh for role in (rl_cluster.Role.ACTOR, rl_cluster.Role.REFERENCE, rl_cluster.Role.ROLLOUT)
            },
            rollout_engine="vanilla",
            training_config=rl_cluster.RLTrainingConfig(
                actor_optimizer=optax.adamw(1e-6), max_steps=count + 1, eval_every_n_steps=1 << 30
            ),
            rollout_config=RolloutConfig(
                max_tokens_to_generate=args["new"],
                max_prompt_length=length,
                kv_cache_size=length + args["new"] + 8,
                temperature=1.0,
                eos_tokens=[NO_TOKEN],
            ),
        ),
    )
    config = GRPOConfig(num_generations=args["group"], num_iterations=1, beta=args["beta"], epsilon=0.2)
    learner = GRPOLearner(rl_cluster=cluster, algo_config=config, reward_fns=reward)
    text = prompt_of(tokenizer, args["prompt_tokens"])
    with mesh:
        learner.train([{"prompts": np.asarray([text] * args["prompts"])}] * (count + 1))
    turns.answer({"prompt_tokens": len(tokenizer.encode(text))})


if __name__ == "__main__":
    main()
