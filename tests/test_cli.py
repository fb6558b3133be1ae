"""The command `vau`: help of every program without importing it, configs by name, and mistakes as one line."""

import importlib
import io
import os
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest

from vau_jax import cli
from vau_jax.common import config_flags, config_help
from vau_jax.common.files import InputError

ROOT = Path(__file__).parents[1]


def said(*words: str) -> str:
    with redirect_stdout(io.StringIO()) as out:
        cli.call(words)
    return out.getvalue()


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_names_every_option_of_a_program(name: str) -> None:
    text = said(*name.split(), "--help")
    assert text.startswith(f"usage: vau {name} ")
    parser = cli.parser_of(name)
    options = [option for action in parser._actions for option in action.option_strings]
    assert len(options) >= 2 and all(option in text for option in options)


def test_help_imports_no_program() -> None:
    calls = [["--help"], *([*name.split(), "--help"] for name in cli.COMMANDS)]
    code = f"import sys; from vau_jax import cli\nfor words in {calls!r}: cli.call(words)\nprint('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


def test_the_overview_lists_every_command_once() -> None:
    lines = [line.split("  ")[1] for line in said("--help").splitlines() if line.startswith("  vau ")]
    assert lines == [f"vau {name}" for name in cli.COMMANDS]
    assert said() == said("--help")


@pytest.mark.parametrize("name", ["base", "eval", "judge", "reflection", "demo"])
def test_help_lists_the_fields_that_a_config_has(name: str) -> None:
    """With their defaults, where these are written as values; a group that code fills stands for its fields."""
    listed = config_help.fields(ROOT / "configs" / f"{name}.py")
    config = importlib.import_module(f"vau_jax.configs.{name}").get_config()
    real = dict(config_flags.fields(config))
    names = [field.name for field in listed]
    assert [n for n in names if n not in real and not any(r.startswith(f"{n}.") for r in real)] == []
    assert [r for r in real if not any(r == n or r.startswith(f"{n}.") for n in names)] == []
    plain = [field for field in listed if field.name in real and field.default[0] in '"0123456789TF']
    plain = [field for field in plain if " if " not in field.default]
    assert plain and all(repr(real[f.name]) in (f.default, f.default.replace('"', "'")) or
                         float(f.default) == real[f.name] for f in plain)  # fmt: skip


def test_help_of_training_shows_defaults_and_comments_of_base() -> None:
    text = " ".join(said("train", "--help").split())
    assert "--config.optim.lr VALUE peak learning rate (default: 2e-5)" in text
    assert "--config.judge.url VALUE such as http://localhost:8000/v1" in text


@pytest.mark.parametrize("name", ["vau_r1_qa_rft", "vau_r1_qa_rft.py", "configs/vau_r1_qa_rft.py"])
def test_a_config_is_found_by_name_from_any_folder(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config, _ = config_flags.read(["vau", f"--config={name}", "--config.optim.lr=1e-3"])
    assert tuple(config.data.tasks) == ("qa",) and config.optim.lr == 1e-3


def test_a_file_goes_before_a_config_of_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    text = "from vau_jax.configs import base\ndef get_config():\n    c = base.get_config()\n    c.seed = 77\n"
    text += "    return c\n"
    (tmp_path / "configs" / "vau_r1_qa_rft.py").write_text(text)
    assert config_flags.read(["vau", "--config=configs/vau_r1_qa_rft.py"])[0].seed == 77


def test_config_prints_what_differs_from_base() -> None:
    lines = said("config", "vau_r1_qa_rft", "--config.seed=3", "--changed").splitlines()
    assert "seed = 3  # configs/base.py: 0" in lines and "stage = 'rft'  # configs/base.py: 'sft'" in lines
    assert lines[-1].endswith("fields differ from configs/base.py") and len(lines) < 12
    whole = said("config", "vau_r1_qa_rft").splitlines()
    assert len(whole) == len(dict(config_flags.fields(config_flags.read(["vau", "--config=base"])[0]))) + 1


@pytest.mark.parametrize("first", ["vau_jax", "jax"])
def test_a_machine_without_an_accelerator_hears_nothing_of_libtpu(first: str) -> None:
    """Where it is installed, to compile for absent TPUs; in any order of imports."""
    code = f"import {first}, vau_jax, jax; print(jax.devices()[0].platform)"
    env = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    assert done.stderr == "" or done.stdout.strip() != "cpu"


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    command = f"set -o pipefail; {sys.executable} -m vau_jax.completion zsh | head -n 1"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("#")


def test_ctrl_c_is_one_line() -> None:
    code = "import os, signal; from vau_jax import cli; cli.call = lambda words: os.kill(os.getpid(), signal.SIGINT)"
    command = [sys.executable, "-c", f"{code}; cli.main()"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "interrupted: the same command goes on with what is not done\n")


MISTAKES = {
    "trian": "vau trian is no command: did you mean vau train?",
    "data audi": "did you mean vau data audit?",
    "ask --video=x": "the following arguments are required: --model",
    "report --exmples=3": "unrecognized arguments: --exmples=3",
    "train --workdir=x": "--config=CONFIG is needed: a file, or one of",
    "train --config=nope": "--config=nope does not exist: expected a file, or one of",
    "train --config=base": "--workdir=DIR is needed",
    "train --config=base --workdir=x --config.optim.lrr=1": "has no field optim.lrr: did you mean optim.lr?",
    "train --config=base --workdir=x --config.optim=1": "config.optim is a group",
    "train --config=base --workdir=x more": "unexpected argument(s) more",
    "config demo:fast": "expected configs/demo.py or configs/demo.py:quick",
    "demo slow fast": "expected `vau demo [quick] [WORKDIR]`",
    "ask --model=x --video=README.md --task=guess": "--task=guess is unknown: expected one of qa, ground",
}


@pytest.mark.parametrize("words", MISTAKES)
def test_a_mistake_is_one_line_that_says_the_way_out(words: str) -> None:
    with pytest.raises(InputError) as caught:
        cli.call(words.split())
    assert MISTAKES[words] in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_knows_commands_options_and_fields(shell: str) -> None:
    script = said("completion", shell)
    assert all(word in script for word in ("compile-check", "--topology", "--config.optim.lr", "random-model"))


def test_bash_takes_the_completion() -> None:
    """Words of a shell that has read the script, after `vau tr` and `vau train --config.opt`."""
    script = said("completion", "bash")
    ask = """
    complete_words() { COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=(); _shtab_vau; echo "${COMPREPLY[@]}"; }
    complete_words vau tr; complete_words vau train --config.optim.l; complete_words vau data ""
    complete_words vau train --config vau_r1_q
    """
    done = subprocess.run(["bash", "-c", f"{script}\n{ask}"], capture_output=True, text=True, check=True)
    first, field, data, config = done.stdout.splitlines()
    assert (first, field, config) == ("train", "--config.optim.lr", "vau_r1_qa_rft")
    assert data.split() == [name.removeprefix("data ") for name in cli.COMMANDS if name.startswith("data ")]
