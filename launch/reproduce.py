"""Runs rows of the papers' tables, from the weights that they begin with to the table beside the published numbers.

    vau reproduce --data=JOINED --model=Qwen2.5-VL-3B-Instruct --out=DIR [--rows=rft_qa,rft_tag]
        [--prompts=VAU-R1] [--judge=URL --judge-model=NAME] [--teacher=URL --teacher-model=NAME] [--steps=N]
        [--dry-run] [--config.key=value]

JOINED is what `vau data join` wrote. ROWS are of configs/reproduce/vau_r1.py and srvau_r1.py, or `base` (the weights as
they are); a row runs after those that it begins with. VAU-R1 is a checkout of its code, whose own prompts its rows
then use. Each step is a command that is printed before it runs, and skips what is done, so that a killed call goes on.
Options --config.key=value go to training and evaluation, where they have such a field. DIR/frames: decoded frames of
train.csv, DIR/reflection: records, DIR/runs: runs, DIR/eval: evaluations, DIR/table.md: the table, also printed.
"""

import argparse
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from vau_jax import cli
from vau_jax.common import progress
from vau_jax.common.files import InputError, write_text
from vau_jax.configs.reproduce import Row, evaluate, srvau_r1, vau_r1
from vau_jax.eval import comparison, tables

BASE = "base"  # the weights before any training
ROWS = {name: ("vau_r1", row) for name, row in vau_r1.ROWS.items()}
ROWS |= {name: ("srvau_r1", row) for name, row in srvau_r1.ROWS.items()}
WITH_DRAFT = ("reflection", "two_pass")

Command = tuple[str, ...]  # words after `vau`


def chosen(names: str) -> list[str]:
    """Rows by a list of names, after the rows that they begin with. Raises InputError for an unknown one."""
    wanted: list[str] = []

    def add(name: str) -> None:
        if name != BASE and name not in ROWS:
            raise InputError(f"--rows: {name!r} is unknown: expected some of all, {BASE}, {', '.join(ROWS)}")
        begins = ROWS[name][1].begins if name != BASE else ""
        if begins:
            add(begins)
        if name not in wanted:
            wanted.append(name)

    for name in [BASE, *ROWS] if names == "all" else names.split(","):
        add(name)
    return wanted


def commands(args: argparse.Namespace, given: Sequence[str]) -> Iterator[Command]:
    """Everything that the rows need, in order; `given` are options of training and evaluation."""
    rows = chosen(args.rows)
    trained = [name for name in rows if name != BASE]
    if trained and args.cache:
        weights = f"--config.model={args.model}"
        options = (weights, *_data(args, "train.csv"), *_fitting(given, "base"))
        yield ("data", "cache", "--config=base", *options, f"--workdir={args.out / 'frames'}")
    for teacher in dict.fromkeys(ROWS[name][1].teacher for name in trained):
        if teacher:
            yield _records(args, teacher)
    for name in rows:
        if name != BASE:
            yield (
                "train",
                *_train_options(args, given, name, ROWS[name]),
                f"--workdir={_run(args, name)}",
                *_steps(args),
            )
        if not args.train_only:
            yield from _evaluations(args, given, name)


def _train_options(args: argparse.Namespace, given: Sequence[str], name: str, found: tuple[str, Row]) -> Command:
    family, row = found
    begins = f"--config.init_from={_run(args, row.begins)}" if row.begins else f"--config.model={args.model}"
    options = [f"--config=reproduce/{family}:{name}", begins, *_data(args, "train.csv")]
    options += [f"--config.data.cache={args.out / 'frames'}"] * args.cache
    if args.prompts and row.prompts:
        options.append(f"--config.data.templates={args.prompts / row.prompts}")
    if row.teacher:
        options.append(f"--config.data.reflection={args.out / 'reflection' / row.teacher / 'reflection.jsonl'}")
    return (*options, *_fitting(given, "base"))


def _steps(args: argparse.Namespace) -> Command:
    return ("--config.epochs=0", f"--config.steps={args.steps}") if args.steps else ()


def _run(args: argparse.Namespace, name: str) -> Path:
    return args.out / "runs" / name


def _data(args: argparse.Namespace, file: str) -> Command:
    return f"--config.data.csv={args.data / file}", f"--config.data.videos={args.data}"


def _fitting(given: Sequence[str], config: str) -> Command:
    """The options that name a field of a config."""
    fields = {field.name for field in cli.config_help.fields(cli.config_help.CONFIGS / f"{config}.py")}
    return tuple(option for option in given if option.partition("=")[0].removeprefix("--config.") in fields)


def _records(args: argparse.Namespace, teacher: str) -> Command:
    """Reflection records of train.csv: by a model, or by rule where none is given."""
    words = ["data", "reflection", f"--workdir={args.out / 'reflection' / teacher}", *_data(args, "train.csv")]
    if teacher == "model":
        if not args.teacher:
            raise InputError(
                "rows of SRVAU-R1 need a model that writes reflections: give --teacher=URL and --teacher-model=NAME; "
                "the rows sft_teacher_rules and rft_teacher_rules need none"
            )
        words += [f"--config.teacher.url={args.teacher}", f"--config.teacher.model={args.teacher_model}"]
    return tuple(words)


def _evaluations(args: argparse.Namespace, given: Sequence[str], name: str) -> Iterator[Command]:
    """Every way in which a row is tested, on every test file, with the marks of a judge."""
    row = ROWS[name][1] if name != BASE else Row("", (), tested=evaluate.ROWS[:-1])
    style = dict(row.changed).get("data.style", "think")
    checkpoint = _run(args, name) if name != BASE else args.model
    for asked in row.tested:
        for file in evaluate.asked(asked).files:
            workdir = args.out / "eval" / name / asked / file
            own = [f"--config.data.style={style}"] * (style in WITH_DRAFT and asked.endswith("think"))
            if args.prompts and (row.prompts or name == BASE):
                own.append(f"--config.data.templates={args.prompts / 'src' / 'evaluation'}")
            config = (f"--config=reproduce/evaluate:{asked}", f"--workdir={workdir}", f"--config.name={name}")
            options = (f"--config.checkpoint={checkpoint}", *_data(args, f"{file}.csv"), *own, *_fitting(given, "eval"))
            yield ("evaluate", *config, *options)
            if asked.startswith("vau_eval") and args.judge:
                judge = (f"--config.url={args.judge}", f"--config.model={args.judge_model}")
                yield ("judge", f"--workdir={workdir}", *judge)


def run(args: argparse.Namespace, given: Sequence[str], call: Callable[[Command], None]) -> str:
    """Runs everything by `call`, and returns the table in Markdown."""
    every = list(commands(args, given))
    for number, words in enumerate(every, start=1):
        print(f"--- {number}/{len(every)} {shlex.join(('vau', *words))}", flush=True)
        if not args.dry_run:
            call(words)
    return "" if args.dry_run else write_table(args.out)


def write_table(out: Path) -> str:
    """Writes out/table.md, and returns it: every published number, with ours where they are comparable."""
    found = comparison.tables(tables.evaluations([out / "eval"]), whole=True)
    parts = [
        f"### {title}\n\n{tables.markdown([list(map(tables.escape, line)) for line in lines])}"
        for title, lines in found
    ]
    text = "\n\n".join([comparison.INTRODUCTION, *parts]) + "\n"
    write_text(out / "table.md", text)
    return text


def in_own_process(words: Command) -> None:
    """Runs a command in a process of its own. Raises InputError where it fails."""
    code = subprocess.run([sys.executable, "-m", "vau_jax.cli", *words], check=False).returncode  # noqa: S603 - ours
    if code:
        raise InputError(f"`{shlex.join(('vau', *words))}` ended with exit code {code}: mend it; the same call goes on")


def main(args: argparse.Namespace, rest: Sequence[str]) -> None:
    """The program: see its options in `vau_jax.cli`."""
    unknown = [word for word in rest if not word.startswith("--config.")]
    if unknown:
        raise InputError(f"unexpected argument {unknown[0]!r}: --help explains all options")
    if unfit := [word for word in rest if not _fitting([word], "base") and not _fitting([word], "eval")]:
        raise InputError(f"{unfit[0]} is a field of neither training nor evaluation: --help lists them")
    if not args.table and not (args.data and args.model):
        raise InputError(
            "give --data=JOINED (`vau data join` writes it) and --model=FOLDER, or --table for what is there"
        )
    if args.table:
        print(write_table(args.out))
        return
    print(run(args, rest, in_own_process))
    if not args.dry_run:
        print(progress.summary("reproduced", {"table": args.out / "table.md"}, [("vau", "report", args.out)]))


if __name__ == "__main__":
    cli.main("reproduce")
