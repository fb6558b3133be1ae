"""TRL's GRPOTrainer as an oracle: its own loss code, called on given log-probabilities, in float64."""

import functools
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch


@functools.cache
def trainer() -> type:
    from trl import GRPOTrainer

    return GRPOTrainer


def loss(logps: np.ndarray, batch: dict[str, np.ndarray], options: Any) -> tuple[float, dict[str, np.ndarray]]:
    """TRL's loss and its gradients by `logps` and `entropies`; `options` are those of vau_jax.grpo.loss."""
    tensors = {name: torch.tensor(np.asarray(value, np.float64)) for name, value in batch.items()}
    given = torch.tensor(logps, requires_grad=True)
    entropies = tensors["entropies"].requires_grad_()
    corrected = bool(options.importance_cap)
    ratio = torch.exp(tensors["old_logps"] - tensors["sampler_logps"]).clamp(max=options.importance_cap or torch.inf)
    inputs = {
        "prompt_ids": torch.zeros(len(logps), 1),
        "prompt_mask": torch.ones(len(logps), 1),
        "completion_ids": torch.zeros(logps.shape),
        "completion_mask": tensors["mask"],
        "advantages": tensors["advantages"],
        "old_per_token_logps": tensors["old_logps"],
        "ref_per_token_logps": tensors["ref_logps"],
        "importance_sampling_ratio": ratio,
        "num_items_in_batch": tensors["mask"].sum(),
    }
    fake = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *a, **k: (given, entropies, None),
        loss_type="grpo" if options.loss_type == "gspo" else options.loss_type,
        importance_sampling_level="sequence" if options.loss_type == "gspo" else "token",
        beta=options.beta,
        epsilon_low=options.epsilon_low,
        epsilon_high=options.epsilon_high,
        max_completion_length=options.max_completion_length,
        args=SimpleNamespace(delta=options.delta or None, use_bias_correction_kl=False, steps_per_generation=1),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        use_vllm=corrected,
        vllm_importance_sampling_correction=corrected,
        model=SimpleNamespace(training=True),
        current_gradient_accumulation_steps=1,
        accelerator=SimpleNamespace(
            num_processes=1, sync_gradients=True, gather=lambda x: x, reduce=lambda x, reduction: x
        ),
        _entropy_bonus_enabled=bool(options.entropy_bonus),
        use_adaptive_entropy=False,
        entropy_coef=options.entropy_bonus,
        _metrics={"train": defaultdict(list)},
    )
    value = trainer()._compute_loss(fake, None, inputs)
    by_logps, by_entropies = torch.autograd.grad(value, (given, entropies), allow_unused=True)
    by_entropies = torch.zeros_like(entropies) if by_entropies is None else by_entropies
    metrics = {name: values[-1] for name, values in fake._metrics["train"].items()}
    return value.item(), {"logps": by_logps.numpy(), "entropies": by_entropies.numpy(), **metrics}
