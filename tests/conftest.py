"""What many tests share: a small data set of real mp4 files, and small models with weights that hide nothing."""

import lzma
import os
import shutil
import signal
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    # Tests that start processes compile the same programs again and again: all share what is compiled.
    shared = tempfile.TemporaryDirectory(prefix="vau_jax_compiled_", ignore_cleanup_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = shared.name

# Most of the tests' time is compilation. Programs that LLVM leaves as they are, with fused loops by XLA's older
# emitters, compile in a third of it. The demo's test runs without this, as users do.
# Flags of your own stand after them: of two values of a flag XLA takes the later.
os.environ["XLA_FLAGS"] = (
    f"--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false {os.environ.get('XLA_FLAGS', '')}"
)

from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from playwright.sync_api import Browser, sync_playwright

import benchmarks.torchvision_operators  # noqa: F401 - before anything of transformers
from tests.small_models import FAMILIES, make_model
from vau_jax.common import compiled
from vau_jax.datasets import synthetic
from vau_jax.vlm import VideoLM

compiled.use("")  # entries of the folder are complete also here

SLOWEST = ("test_processes", "test_demo", "test_rft", "test_sharding", "test_resume", "test_motion_model", "test_train")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="also the tests that only repeat others in more cases")


def pytest_configure(config: pytest.Config) -> None:
    """Ctrl-C ends the programs of tests also where a shell started this one in the background, and so ignores it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The files that take minutes first: two processes that share the files then end at about the same time."""
    if not config.getoption("--long"):
        long = [item for item in items if item.get_closest_marker("long")]
        config.hook.pytest_deselected(items=long)
        items[:] = [item for item in items if item not in long]
    items.sort(key=lambda item: SLOWEST.index(item.path.stem) if item.path.stem in SLOWEST else len(SLOWEST))


@pytest.fixture(autouse=True, scope="module")
def _forget_programs() -> Iterator[None]:
    """A process may hold 65,530 pieces of memory, and every compiled program takes some: none outlives its module."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "small")


@pytest.fixture(scope="session")
def family_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One small model of each family."""
    return {family: make_model(tmp_path_factory.mktemp("family") / family, family=family) for family in FAMILIES}


@pytest.fixture(scope="session", params=FAMILIES)
def family_folder(request: pytest.FixtureRequest, family_folders: dict[str, Path]) -> Path:
    """Each of `family_folders` in turn."""
    return family_folders[request.param]


@pytest.fixture(scope="session")
def vlm(model_folder: Path) -> VideoLM:
    return VideoLM.load(model_folder)


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 training and 12 test clips with their annotations."""
    return synthetic.make_dataset(tmp_path_factory.mktemp("data"), {"train": 24, "val": 0, "test": 12}, seed=7)


@pytest.fixture(scope="session")
def vau_bench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The published annotation files."""
    folder = tmp_path_factory.mktemp("vau_bench")
    for packed in (Path(__file__).parent / "data" / "vau_bench").glob("*.xz"):
        (folder / packed.stem).write_bytes(lzma.decompress(packed.read_bytes()))
    return folder


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    if not (chromium := shutil.which("chromium")):
        pytest.skip("no chromium on PATH: install Debian's package")
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
