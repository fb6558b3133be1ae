"""Every row of the papers' tables: its settings as published, its commands in order, and the whole way on stand-ins."""

import argparse
import ast
import csv
import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from vau_jax import cli
from vau_jax.common.files import InputError
from vau_jax.configs import base
from vau_jax.configs import eval as evaluation
from vau_jax.configs.reproduce import evaluate, srvau_r1, vau_r1
from vau_jax.data.video.clips import BUDGETS
from vau_jax.launch import reproduce
from vau_jax.train import loop

ROOT = Path(__file__).parents[1]
with (Path(__file__).parent / "data" / "published_settings.csv").open(newline="", encoding="utf-8") as table:
    PUBLISHED = list(csv.DictReader(table))
EVERY = [*((vau_r1, name) for name in vau_r1.ROWS), *((srvau_r1, name) for name in srvau_r1.ROWS)]


def value(config: ConfigDict, name: str) -> object:
    return functools.reduce(getattr, name.split("."), config)


@pytest.mark.parametrize("line", PUBLISHED, ids=lambda line: f"{line['row']}-{line['field']}")
def test_a_setting_is_as_published(line: dict[str, str]) -> None:
    found = value(vau_r1.get_config(line["row"]), line["field"])
    expected = line["value"] if isinstance(found, str) else ast.literal_eval(line["value"])
    assert found == expected, line["source"]


@pytest.mark.parametrize(("module", "row"), EVERY, ids=lambda x: x if isinstance(x, str) else "")
def test_a_row_is_a_run_that_can_begin(module: object, row: str) -> None:
    config = module.get_config(row)
    config.data.reflection = "records.jsonl" if module.ROWS[row].teacher else ""
    loop.check(config)
    begins = module.ROWS[row].begins
    assert not begins or begins in module.ROWS


def test_ablations_differ_in_what_they_ablate_alone() -> None:
    """Of SRVAU-R1's rows each differs from the whole method in one field or two."""
    whole = json.loads(srvau_r1.get_config("rft_reflection").to_json_best_effort())
    for row, fields in {
        "rft_no_reflection": {"data.style", "rewards.reflection"},
        "rft_two_pass": {"data.style", "rewards.reflection"},
        "rft_scale_25": set(),
        "rft_out_of_domain": {"data.sources"},
    }.items():
        other = json.loads(srvau_r1.get_config(row).to_json_best_effort())
        flat, own = loop._flat(whole), loop._flat(other)
        assert {name for name in flat if flat[name] != own[name]} == fields, row
    assert srvau_r1.get_config("sft_scale_25").data.share == 0.25


@pytest.mark.parametrize("row", evaluate.ROWS)
def test_evaluation_has_the_published_frames_and_decoding(row: str) -> None:
    c = evaluate.get_config(row)
    least = BUDGETS[c.data.budget]["min_pixels"] // 28**2
    assert (c.data.fps, least) == ((1.0, 128) if row.startswith(("qa", "vau")) else (2.0, 256))
    assert BUDGETS[c.data.budget]["total_pixels"] == 115200 * 28**2
    assert (c.temperature, c.repetition_penalty, c.data.max_completion_tokens) == (0.0, 0.0, 1024)
    assert (c.data.protocol, c.data.shuffle_options) == ("paper", False)
    assert c.batch_size == 1
    assert c.description_turns == (2 if row == "vau_eval" else 1)


@pytest.mark.parametrize("module", [vau_r1, srvau_r1, evaluate])
def test_an_unknown_row_lists_the_known(module: object) -> None:
    with pytest.raises(ValueError, match=r"expected .*ROW"):
        module.get_config("rft_qb")


# --- Commands -----------------------------------------------------------------------------------------------------


def parsed(*words: str) -> argparse.Namespace:
    return cli.parser_of("reproduce").parse_args(["--data=J", "--model=M", "--out=O", *words])


def test_rows_run_after_those_that_they_begin_with() -> None:
    assert reproduce.chosen("rft_qa_after_sft,base") == ["sft_reasoning", "rft_qa_after_sft", "base"]
    assert set(reproduce.chosen("all")) == {"base", *vau_r1.ROWS, *srvau_r1.ROWS}
    with pytest.raises(InputError, match="'rft' is unknown"):
        reproduce.chosen("rft")


def test_every_command_is_one_of_vau() -> None:
    """Each has a known program, and options that are fields of its config."""
    every = list(reproduce.commands(parsed("--judge=http://j/v1", "--teacher=http://t/v1"), ["--config.data.fps=1"]))
    assert len(every) > 300
    for words in every:
        name = " ".join(words[:2]) if words[0] == "data" else words[0]
        assert name in cli.COMMANDS


def test_options_go_where_they_fit() -> None:
    given = ["--config.optim.lr=1", "--config.samples=1", "--config.data.fps=1"]
    train, *evaluations = [w for w in reproduce.commands(parsed("--rows=rft_cls"), given) if w[0] != "data"]
    assert {"--config.optim.lr=1", "--config.data.fps=1"} <= set(train) and "--config.samples=1" not in train
    assert all({"--config.samples=1", "--config.data.fps=1"} <= set(e) for e in evaluations)


def test_a_reflection_run_is_asked_in_its_own_style() -> None:
    every = list(reproduce.commands(parsed("--rows=rft_reflection", "--teacher=http://t/v1"), []))
    asked = {w for words in every if words[0] == "evaluate" for w in words if "style" in w}
    assert asked == {"--config.data.style=reflection"}


def test_their_prompts_go_to_their_rows_alone() -> None:
    every = list(reproduce.commands(parsed("--prompts=VAU-R1", "--rows=sft_cls,rft_qa,rft_qa_after_sft,base"), []))
    named: dict[tuple[str, str], set[str]] = {}
    for words in every:
        if words[0] in ("train", "evaluate"):
            row = next(w for w in words if w.startswith("--workdir=")).split("/")[2]
            found = {w.partition("=")[2] for w in words if w.startswith("--config.data.templates=")}
            named[words[0], row] = named.get((words[0], row), set()) | found
    assert named["train", "sft_cls"] == {"VAU-R1/src/sft"} and named["train", "rft_qa"] == {"VAU-R1/src/open_r1"}
    assert named["evaluate", "base"] == named["evaluate", "rft_qa"] == {"VAU-R1/src/evaluation"}
    assert not any(named[kind, row] for kind in ("train", "evaluate") for row in ("sft_reasoning", "rft_qa_after_sft"))


def test_reflection_rows_need_a_teacher_and_rules_are_the_way_out() -> None:
    with pytest.raises(InputError, match=r"give --teacher=URL.*sft_teacher_rules"):
        list(reproduce.commands(parsed("--rows=sft_reflection"), []))
    assert list(reproduce.commands(parsed("--rows=sft_teacher_rules"), []))


@pytest.mark.parametrize("word", ["--config.nothing=1", "what"])
def test_a_word_that_fits_nothing_is_one_line(word: str) -> None:
    with pytest.raises(InputError, match=r"field of neither|unexpected argument"):
        reproduce.main(parsed(), [word])


def test_evaluation_fields_have_those_of_the_eval_config() -> None:
    assert set(loop._flat(json.loads(evaluate.get_config("qa_think").to_json_best_effort()))) == set(
        loop._flat(json.loads(evaluation.get_config().to_json_best_effort()))
    )
    assert base.get_config().format == 3


# --- The whole way ------------------------------------------------------------------------------------------------

SMALLEST = ("--scale=150", "--longest=6", "--small")


def rehearse(folder: Path, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "vau_jax.launch.rehearse", str(folder), *SMALLEST, *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)


def test_a_chain_goes_from_stand_ins_to_the_table_and_survives_a_kill(tmp_path: Path) -> None:
    """One update of a row after the row that it begins with; killed while it trains, the same call goes on."""
    first = rehearse(tmp_path / "r", "--rows=rft_cls_after_sft")
    while not (tmp_path / "r" / "reproduced" / "runs" / "sft_reasoning").is_dir():
        assert first.poll() is None, first.stdout.read()
        time.sleep(0.2)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    second = rehearse(tmp_path / "r", "--rows=rft_cls_after_sft")
    said = second.communicate()[0]
    assert second.returncode == 0, said[-3000:]
    table = (tmp_path / "r" / "reproduced" / "table.md").read_text()
    assert "### Questions, accuracy in %: MSAD, with reasoning" in table
    joined = json.loads((tmp_path / "r" / "joined" / "join.json").read_text())
    assert set(joined["rows"]) == {"train.csv", "val.csv", "test_msad.csv", "test_ucf_crime.csv", "test_ecva.csv"}
    assert (tmp_path / "r" / "reproduced" / "runs" / "rft_cls_after_sft" / "best.json").is_file()


@pytest.mark.long
def test_the_whole_rehearsal_ends(tmp_path: Path) -> None:
    done = rehearse(tmp_path / "r")
    said = done.communicate()[0]
    assert done.returncode == 0, said[-3000:]
    table = (tmp_path / "r" / "reproduced" / "table.md").read_text()
    assert "a model of another size" in table, "ours is not the published model, so that nothing stands beside it"
