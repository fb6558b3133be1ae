"""Programs of known shapes are compiled before the first step, which then compiles none of them."""

from pathlib import Path

import jax
import pytest

from tests.runs import small
from vau_jax.common.compiled import COMPILED
from vau_jax.data.shapes import Shape
from vau_jax.train.ahead import compile_ahead
from vau_jax.train.loop import Run

LARGE = {"_whole", "_part", "_start", "_advance", "_resize", "policy_logps", "score", "apply"}  # of prompts of a shape


@pytest.fixture
def compiled() -> list[str]:
    """Names of the programs that are compiled from here on."""
    names: list[str] = []

    def hear(event: str, _: float, fun_name: str = "", **__: object) -> None:
        if event == COMPILED:
            names.append(fun_name.removeprefix("jit(").removesuffix(")"))

    jax.monitoring.register_event_duration_secs_listener(hear)
    return names


@pytest.mark.parametrize(
    ("name", "changed", "expected"),
    [
        ("vau_r1_sft", {"optim.freeze": ("visual/.*",)}, {"_whole", "apply"}),
        ("vau_r1_multi_rft", {"micro_batches": 2}, {"_part", "_start", "_advance", "score"}),
        pytest.param(
            "srvau_r1_rft",
            {"lora.rank": 2, "grpo.iterations": 2, "dtype": "bfloat16", "data.max_completion_tokens": 200},
            LARGE - {"_part", "score"},
            marks=pytest.mark.long,
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_step_compiles_nothing_that_was_compiled_ahead(
    name: str,
    changed: dict[str, object],
    expected: set[str],
    compiled: list[str],
    model_folder: Path,
    dataset: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    config = small(name, model_folder, dataset)
    config.data.bucket = (256, 576, 48, 64, 12, 128)  # holds every batch
    config.update_from_flattened_dict(changed)
    run = Run(config)
    shape = Shape(*config.data.bucket)
    compile_ahead(run.learner, run.worker.engine if run.worker else None, [shape], run.learner.packed_lengths)
    assert LARGE & set(compiled) == expected
    assert "compile: " in capfd.readouterr().out
    compiled.clear()
    run.step(0)
    run.close()
    assert not LARGE & set(compiled), compiled
