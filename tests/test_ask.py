"""`python -m vau_jax.ask`: an answer about a real file from the command line, or one clear line."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vau_jax import ask, cli
from vau_jax.common.files import InputError

ROOT = Path(__file__).parents[1]


def command(*args: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    run = [sys.executable, "-m", "vau_jax.ask", *args]
    return subprocess.run(run, cwd=ROOT, env=env, capture_output=True, text=True, check=False)


def test_a_model_is_asked(model_folder: Path, dataset: Path) -> None:
    clip = str(dataset / "videos" / "test_00000.mp4")
    done = command(f"--model={model_folder}", f"--video={clip}", "--task=describe", "--max_new_tokens=8", "What?")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.mark.parametrize(
    ("completion", "task", "expected"),
    [
        ("<think>x</think><answer>B</answer>", "qa", "B. fire"),
        ("<think>x</think><answer>Anomaly</answer><glue>[3.0, 7.5]</glue>", "ground", "Anomaly\n3.0 s to 7.5 s"),
        ("<think>x</think><answer>Normal</answer><glue>[-1.0, -1.0]</glue>", "ground", "Normal"),
        ("<think>x</think><answer>Fire</answer>", "classify", "Fire"),
        ("A man falls. ", "describe", "A man falls."),
        ("hm", "qa", "no answer in the expected format; the model wrote:\nhm"),
    ],
)
def test_what_is_printed(completion: str, task: str, expected: str) -> None:
    question = ask.Question("", task, options=("a", "fire", "c", "d"))
    assert ask.read(completion, question, reflection=False).text == expected


@pytest.mark.parametrize(
    ("text", "options", "words"),
    [
        ("x" * 4001, (), "may have 4000 characters together, found 4001: shorten them"),
        ("x" * 2000, ("y" * 501,) * 4, "found 4004"),
        ("what \udcff", (), "the question contains an invalid character"),
    ],
    ids=["long", "long options", "no character"],
)
def test_a_question_that_no_model_should_read_is_named(text: str, options: tuple[str, ...], words: str) -> None:
    with pytest.raises(InputError, match=words):
        ask.check(ask.Question(__file__, "describe", text, options))


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--model=/none", "--video={clip}", "--task=ground"], "model folder /none does not exist"),
        (["--model={model}", "--video=/none.mp4", "--task=ground"], "video /none.mp4 does not exist"),
        (["--model={model}", "--video={clip}", "--task=qa", "Why?"], "2 to 26 options"),
        (["--model={model}", "--video={model}/config.json", "--task=classify"], "cannot open"),
    ],
    ids=["model", "video", "options", "not a video"],
)
def test_a_mistake_is_one_line(
    model_folder: Path,
    dataset: Path,
    args: list[str],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    clip = dataset / "videos" / "test_00000.mp4"
    monkeypatch.setattr("sys.argv", ["ask", *(arg.format(clip=clip, model=model_folder) for arg in args)])
    with pytest.raises(SystemExit) as ended:
        cli.main("ask")
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert ended.value.code == 2 and words in line
