"""Programs of known shapes are compiled before the first step, which then compiles none of them."""

from pathlib import Path

import jax
import pytest

from tests.runs import small
from vau_jax.common.compiled import COMPILED
from vau_jax.data.shapes import Shape
from vau_jax.data_prep import vau_bench as vau_bench_tool
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


@pytest.fixture(scope="module")
def imported(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The synthetic training split with its videos' sizes."""
    folder = tmp_path_factory.mktemp("imported")
    vau_bench_tool.import_splits(folder, {"train": [str(dataset / "train.csv")]}, {"msad": dataset / "videos"}, 0, 1)
    return folder


@pytest.mark.parametrize("name", [pytest.param("vau_r1_sft", marks=pytest.mark.long), "vau_r1_multi_rft"])
def test_a_run_that_knows_its_videos_has_the_planned_shapes(
    name: str, imported: Path, model_folder: Path, dataset: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its programs are compiled ahead, and every batch has one of the shapes, of which most is real."""
    config = small(name, model_folder, dataset)
    config.data.csv, config.data.bucket = str(imported / "train.jsonl"), (1, 1, 0, 0, 0, 0)
    config.data.shapes, config.data.max_frames, config.micro_batches = 2, 24, 2
    config.data.tasks = ("qa", "grounding")
    run = Run(config)
    plan = run.feed.collate.plan
    run.compile_ahead()
    assert "compile: " in capfd.readouterr().out
    found, share = set(), []
    for _ in range(8):
        host = run.feed.next()
        found.add(host.shape)
        share.append(float(host.batch.mask.mean()))
    run.step(0)
    run.close()
    assert found <= set(plan.shapes) and 1 <= len(plan.shapes) <= 2
    assert sum(share) / len(share) > 0.7
