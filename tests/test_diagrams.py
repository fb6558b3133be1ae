"""The diagrams of the READMEs are those that the code draws now, name what exists, and can be read."""

import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from playwright.sync_api import Browser

from tests import reports, video_files
from tests.records import record
from vau_jax.common.files import InputError
from vau_jax.launch import diagrams
from vau_jax.models import config, hf

ROOT = Path(__file__).parents[1]
DRAWN = ("data", "packed", "mesh")


@pytest.mark.parametrize("name", DRAWN)
def test_a_diagram_is_the_one_that_the_code_draws(name: str) -> None:
    text = (diagrams.FOLDER / f"{name}.svg").read_text()
    assert text == getattr(diagrams, name)(), "renew it: python -m vau_jax.launch.diagrams"
    root = ElementTree.fromstring(text)
    assert root.find("{*}title").text and root.find("{*}desc").text


def test_every_module_of_the_datas_way_exists() -> None:
    named = re.findall(r">(vau_jax/[\w/]+(?:\.py)?)<", diagrams.data())
    assert len(named) > 15 and [name for name in named if not (ROOT / name).exists()] == []


def test_the_packed_sequence_shows_what_a_completion_may_see() -> None:
    seen = diagrams.visible(3, 2, 2)
    causal = np.tril(np.ones((3, 3), bool))
    own = np.tril(np.ones((2, 2), bool))
    assert (seen[:3, :3] == causal).all() and not seen[:3, 3:].any()
    assert seen[3:, :3].all() and (seen[3:5, 3:5] == own).all() and (seen[5:, 5:] == own).all()
    assert not seen[3:5, 5:].any() and not seen[5:, 3:5].any()


@pytest.mark.parametrize("name", DRAWN)
def test_texts_stay_inside_of_their_boxes_and_of_the_page(name: str, browser: Browser) -> None:
    page = browser.new_page(viewport={"width": 900, "height": 500})
    page.set_content((diagrams.FOLDER / f"{name}.svg").read_text())
    outside = page.evaluate(
        """() => [...document.querySelectorAll("text")].filter(text => {
          const own = text.getBBox(), box = text.closest(".boxed")?.querySelector("rect").getBBox()
            ?? document.querySelector("svg").viewBox.baseVal;
          return own.x < box.x || own.x + own.width > box.x + box.width || own.y + own.height > box.y + box.height;
        }).map(text => text.textContent)"""
    )
    assert outside == []
    page.close()


def test_the_mesh_shows_parameters_that_a_model_has(model_folder: Path) -> None:
    names = hf.parameter_shapes(config.load(model_folder))
    tied = {"lm_head"}  # of models that do not share it with the embedding
    assert [name for _, name, _ in diagrams.SHOWN if name not in names and name not in tied] == []


def test_the_picture_shows_frames_and_intervals(tmp_path: Path) -> None:
    """Of an example whose draft reflection corrected: its frames, then a bar for each interval, in their colours."""
    video_files.write(tmp_path / "v0.mp4", count=40)
    found = reports.record(0, "grounding", "[2.0, 6.0]", "Anomaly [2.0, 7.0]")
    reports.evaluation(tmp_path / "eval", [found], "e", tmp_path)
    image = np.asarray(diagrams.picture(tmp_path / "eval"))
    assert image.shape[1:] == (diagrams.WIDTH, 3)
    for colour in diagrams.COLOURS.values():
        wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        assert (image == wanted).all(-1).sum() > 1000, colour


def test_a_picture_needs_an_example_that_reflection_corrected(tmp_path: Path) -> None:
    from vau_jax.eval.records import to_line

    wrong = record("grounding", "<think>x</think><answer>Normal</answer><glue>[-1.0, -1.0]</glue>")
    (tmp_path / "predictions.jsonl").write_text(to_line(wrong, "f"))
    with pytest.raises(InputError, match="no example whose interval reflection corrected"):
        diagrams.picture(tmp_path)
