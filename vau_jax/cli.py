"""The command `vau`: all programs of the package and their options.

A program is imported only when it runs, so that help and completion are immediate. `python -m vau_jax.X` and `vau X`
are the same program.
"""

import argparse
import ast
import difflib
import importlib
import importlib.util
import os
import select
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NoReturn

from vau_jax.common import config_help
from vau_jax.common.files import InputError, exit_on_input_error


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, as all errors of users are."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} ({self.prog} --help explains all options)")


def no_options(parser: Parser) -> None:
    """A program whose only options are those of a config."""


@dataclass(frozen=True)
class Command:
    """A program. `module` has `run(config, workdir)` and `summary(config, workdir)` where only a config is taken,
    `main(args, rest)` where options are taken too, of which `rest` belong to the config, and `main(args)` where there
    is no config."""

    module: str
    summary: str
    options: Callable[[Parser], None] = no_options
    fields: str = ""  # name of the config that has the program's fields; empty: it takes no config
    config: str = ""  # default of --config; empty: it must be given
    flags: tuple[str, ...] = ("config", "workdir", "distributed")  # those that it takes, besides the config's fields

    def description(self) -> str:
        """The module's docstring, without importing it."""
        file = Path(importlib.util.find_spec(self.module).origin)
        return ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""


# --- Options of programs, in the order of COMMANDS ---


def ask(parser: Parser) -> None:
    parser.add_argument("--model", required=True, help="Hugging Face folder or workdir of a run")
    parser.add_argument("--video", action="append", required=True, help="a file, or a folder of files; may be repeated")
    parser.add_argument(
        "--task", action="append", required=True, help="qa, ground, classify, describe, or your own; may be repeated"
    )
    parser.add_argument("--option", action="append", default=[], help="an answer to choose from; qa needs two or more")
    dtype(parser)
    parser.add_argument("--max_new_tokens", type=int, default=0, help="0: the run's own, or 1024")
    parser.add_argument("--verbose", action="store_true", help="print the reasoning too")
    text = "folder of answers.jsonl and report.html; default, where there are several questions: answers"
    parser.add_argument("--out", type=Path, help=text)
    parser.add_argument("question", nargs="?", default="")


def app(parser: Parser) -> None:
    parser.add_argument("--model", required=True, help="Hugging Face folder or workdir of a run")
    dtype(parser)
    parser.add_argument("--max_new_tokens", type=int, default=0, help="0: the run's own, or 1024")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 opens the page to the network, to everybody in it")
    parser.add_argument("--port", type=int, default=7860)
    parser.add_argument("--name", action="append", default=[], help="another host name of the page, such as a proxy's")
    parser.add_argument("--max_mb", type=int, default=500, help="largest file taken")
    parser.add_argument("--max_total_mb", type=int, default=2000, help="largest size of all files that are kept")
    parser.add_argument("--max_seconds", type=float, default=1800, help="longest video taken")


def dtype(parser: Parser) -> None:
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"), help="of the model")


def report(parser: Parser) -> None:
    parser.add_argument("folders", nargs="*", type=Path, metavar="DIR")
    parser.add_argument("--out", type=Path, default=Path("report.html"))
    parser.add_argument("--examples", type=at_least(0), default=1000, help="most examples on the page")
    parser.add_argument(
        "--watch", action="store_true", help="serve the page, of runs that still go on, to this machine"
    )
    parser.add_argument("--port", type=at_least(0), default=0, help="of --watch; 0: any free one")
    parser.add_argument("--every", type=at_least(1), default=10, help="of --watch: seconds between looks at the files")
    text = "one of several processes, of which the first writes the page"
    parser.add_argument("--distributed", action="store_true", help=text)
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("A", "B"), help="folders of two evaluations")


def motion_strip(parser: Parser) -> None:
    parser.add_argument("video")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--m", type=float, help="slope before its bounds; default: as published for UCF-Crime")
    parser.add_argument("--n", type=float, help="shift before its bounds; likewise")
    parser.add_argument("--fps", type=float, default=2.0, help="frames a second")


def check(parser: Parser) -> None:
    parser.add_argument("file", nargs="?", type=Path, metavar="FILE", help="a CSV or JSONL of annotations")
    parser.add_argument("videos", nargs="?", type=Path, metavar="VIDEOS", help="the folder of its videos")
    parser.add_argument(
        "--source", default="auto", help="rules for times: msad (seconds), ucf, ecva, or auto by file name"
    )
    parser.add_argument("--no-probe", action="store_true", help="do not open the videos")
    parser.add_argument("--template", type=Path, metavar="NEW.csv", help="write a table to begin with")


def audit(parser: Parser) -> None:
    parser.add_argument("files", nargs="+")
    parser.add_argument("--source", default="auto", help="rules for times: msad, ucf, ecva, or auto by file name")
    parser.add_argument("--protocol", default="clean", help="clean: corrected; paper: as the published denominators")
    parser.add_argument("--rows", action="store_true", help="every entry, not their counts alone")


def import_splits(parser: Parser) -> None:
    for split in ("train", "val", "test"):
        parser.add_argument(f"--{split}", nargs="+", default=[], metavar="FILE")
    parser.add_argument("--videos", nargs="+", default=[], metavar="SOURCE=DIR")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--seed", type=at_least(0), default=0, help="of the options' order")
    parser.add_argument("--workers", type=at_least(1), default=0, help="processes that read videos; 0: one a core")
    parser.add_argument("--array_record", action="store_true", help="write the splits as ArrayRecord files too")


def join(parser: Parser) -> None:
    parser.add_argument(
        "--annotations", nargs="+", required=True, type=Path, metavar="PATH", help="CSV files, or folders of them"
    )
    text = "folders of videos as they were unpacked, with SOURCE msad, ucf or ecva; a source may have several"
    parser.add_argument("--videos", nargs="+", default=[], metavar="SOURCE=DIR", help=text)
    parser.add_argument("--out", required=True, type=Path, help="the folder to write")
    parser.add_argument("--workers", type=at_least(1), default=0, help="processes that read videos; 0: one a core")


def random_model(parser: Parser) -> None:
    parser.add_argument("--size", required=True, help="a published model, such as qwen2.5-vl-3b")
    parser.add_argument("--out", required=True, help="the folder to write")
    dtype(parser)


def sweep(parser: Parser) -> None:
    parser.add_argument("--config", required=True, metavar="configs/sweeps/X.py", help="a sweep: its path or name")
    parser.add_argument("--workdir", type=Path, required=True, metavar="DIR")
    parser.add_argument(
        "--backend", default="local", choices=("local", "gke", "xpk", "slurm"), help="where the trials run"
    )
    parser.add_argument("--submit", action="store_true", help="submit the jobs of another backend than local")
    parser.add_argument("--jobs", type=at_least(1), default=1, help="trials at once, with --backend=local")
    parser.add_argument("--dry-run", action="store_true", help="print the commands")


def reproduce(parser: Parser) -> None:
    parser.add_argument("--data", type=Path, metavar="JOINED", help="what `vau data join` wrote")
    parser.add_argument("--model", metavar="FOLDER", help="the weights that runs begin with")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where everything is written")
    parser.add_argument("--rows", default="all", metavar="ROW,ROW", help="of configs/reproduce, or base; default: all")
    text = "a checkout of VAU-R1's code, whose own prompts its rows then use"
    parser.add_argument("--prompts", type=Path, metavar="VAU-R1", help=text)
    parser.add_argument("--judge", default="", metavar="URL", help="a chat endpoint that marks descriptions")
    parser.add_argument("--judge-model", default="deepseek-chat", metavar="NAME", help="its model")
    parser.add_argument("--teacher", default="", metavar="URL", help="a chat endpoint that writes reflections")
    parser.add_argument("--teacher-model", default="", metavar="NAME", help="its model")
    parser.add_argument("--steps", type=at_least(0), default=0, help="updates of each run; 0: as published, an epoch")
    parser.add_argument("--train-only", action="store_true", help="no evaluation")
    text = "decode train.csv's videos every time; their frames are about 25 GB"
    parser.add_argument("--no-cache", dest="cache", action="store_false", help=text)
    parser.add_argument("--table", action="store_true", help="print the table of what is there")
    parser.add_argument("--dry-run", action="store_true", help="print the commands")


def rehearse(parser: Parser) -> None:
    parser.add_argument(
        "out", nargs="?", type=Path, default=Path("rehearsal"), metavar="DIR", help="default: rehearsal"
    )
    parser.add_argument("--annotations", type=Path, metavar="DIR", help="VAU-Bench's files; default: the checkout's")
    parser.add_argument("--scale", type=at_least(1), default=20, help="use one row in so many")
    parser.add_argument("--longest", type=float, default=300.0, help="seconds of the longest stand-in video")
    parser.add_argument("--small", action="store_true", help="no stand-in video above 240 pixels a side")
    parser.add_argument("--rows", default="", metavar="ROW,ROW", help="only these rows, for one step; default: all")


def compile_check(parser: Parser) -> None:
    parser.add_argument("--topology", required=True, help="such as v5e:4x4, v5p:2x2x4, v6e:8x8")
    parser.add_argument("--slices", type=at_least(1), default=1, help="slices of that topology; config.mesh.data")
    parser.add_argument("--size", default="", help="a published model, such as qwen2.5-vl-3b; default: config.model")
    parser.add_argument("--prompt", type=int, default=4096, help="tokens of a prompt")
    parser.add_argument("--visual", type=int, default=3584, help="of these, from the video")
    parser.add_argument("--only", action="append", default=[], help="a program's name; may be repeated")
    parser.add_argument("--json", default="", help="write everything there too")


def demo(parser: Parser) -> None:
    parser.add_argument("words", nargs="*", metavar="[quick] [WORKDIR]", help="quick: the same in about two minutes")
    parser.add_argument("--watch", action="store_true", help="serve a page of test clips, asked again while it trains")


def show_config(parser: Parser) -> None:
    parser.add_argument("name", metavar="CONFIG", help="a config: its path or name, with :arg where it takes one")
    parser.add_argument("--changed", action="store_true", help="only the fields that differ from configs/base.py")


def doctor(parser: Parser) -> None:
    parser.add_argument("--workdir", type=Path, default=Path("."), help="where runs would be written")
    parser.add_argument("--url", default="", help="a chat endpoint to try, such as http://localhost:8000/v1")
    parser.add_argument("--model", default="", help="name of the model at the endpoint")
    parser.add_argument("--quick", action="store_true", help="without the self-test of a minute")


def completion(parser: Parser) -> None:
    parser.add_argument("shell", choices=("bash", "zsh"))


def at_least(least: int) -> Callable[[str], int]:
    """An argument type: integers from `least`."""

    def number(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{value}: expected at least {least}")
        return value

    number.__name__ = "integer"  # argparse names it in errors
    return number


COMMANDS = {
    "demo": Command(
        "vau_jax.launch.demo", "the whole job on videos that it renders", demo, "demo", flags=("config", "workdir")
    ),
    "doctor": Command("vau_jax.launch.doctor", "what works on this machine", doctor),
    "ask": Command("vau_jax.ask", "ask a model about a video", ask),
    "app": Command("vau_jax.app", "a local page to ask a model about videos", app),
    "train": Command("vau_jax.train.loop", "SFT or RFT by a config", fields="base"),
    "evaluate": Command("vau_jax.eval.evaluate", "decode a split and score it", fields="eval", config="eval"),
    "judge": Command("vau_jax.eval.judge", "marks for descriptions by a model", fields="judge", config="judge"),
    "report": Command("vau_jax.eval.report", "runs to one page", report),
    "config": Command("vau_jax.show_config", "print a config, and what it changes", show_config, "base", flags=()),
    "data check": Command("vau_jax.data_prep.check", "what to mend in your own table and its videos", check),
    "data audit": Command("vau_jax.data_prep.vau_bench", "what is irregular in annotation files", audit),
    "data join": Command("vau_jax.data_prep.join", "annotations as published, and where their videos are", join),
    "data import": Command("vau_jax.data_prep.vau_bench", "corrected annotations joined with videos", import_splits),
    "data cache": Command("vau_jax.data_prep.cache_frames", "decode the videos of a config once", fields="base"),
    "data reflection": Command(
        "vau_jax.data_prep.reflection", "build reflection records for SFT", fields="reflection", config="reflection"
    ),
    "data annotate": Command(
        "vau_jax.data_prep.annotate", "annotate new videos by a model", fields="annotate", config="annotate"
    ),
    "data random-model": Command("vau_jax.data_prep.random_model", "a model folder with random weights", random_model),
    "sweep": Command("vau_jax.launch.sweep", "run the trials of a sweep and tabulate them", sweep),
    "reproduce": Command(
        "vau_jax.launch.reproduce", "rows of the papers' tables, to the table", reproduce, "base", flags=()
    ),
    "rehearse": Command("vau_jax.launch.rehearse", "the papers' whole experiment on stand-ins", rehearse),
    "compile-check": Command(
        "vau_jax.launch.compile_check",
        "compile a config for a TPU pod that is not there",
        compile_check,
        "base",
        flags=("config",),
    ),
    "motion-strip": Command("vau_jax.motion_strip", "a picture of a motion prompt", motion_strip),
    "completion": Command("vau_jax.completion", "print completion for bash or zsh", completion),
}


# --- Parsers ---


def fill(parser: Parser, name: str, with_fields: bool = False) -> Parser:
    """Adds the options of a command, with those of its config where they are only shown, and not parsed."""
    command = COMMANDS[name]
    command.options(parser)
    if command.fields and with_fields:
        if "config" in command.flags:
            default = f" (default: {command.config})" if command.config else ""
            text = f"a config: its path or name, with :arg where it takes one{default}"
            parser.add_argument("--config", metavar="CONFIG", choices=config_help.known(), help=text)
        if "workdir" in command.flags:
            parser.add_argument("--workdir", metavar="DIR", help="where everything is written")
        if "distributed" in command.flags:
            parser.add_argument("--distributed", action="store_true", help="one of several processes of this run")
        parser.usage = f"{parser.format_usage().removeprefix('usage: ').rstrip()} [--config.FIELD=VALUE ...]"
        group = parser.add_argument_group(f"fields of the config, with defaults from configs/{command.fields}.py")
        for field in config_help.fields(config_help.CONFIGS / f"{command.fields}.py"):
            text = f"{field.comment} (default: {field.default})".strip()
            group.add_argument(f"--config.{field.name}", metavar="VALUE", help=text.replace("%", "%%"))
    return parser


def parser_of(name: str, with_fields: bool = False) -> Parser:
    """The parser of a command; `with_fields` for its help."""
    description = COMMANDS[name].description() if with_fields else ""
    parser = Parser(
        prog=f"vau {name}",
        description=description,
        allow_abbrev=False,
        formatter_class=partial(argparse.RawDescriptionHelpFormatter, max_help_position=34),
    )
    return fill(parser, name, with_fields)


def whole_parser() -> Parser:
    """One parser of all commands, for completion."""
    root = Parser(prog="vau")
    commands = root.add_subparsers()
    data = commands.add_parser("data", help="annotations, videos, frames, models").add_subparsers()
    for name, command in COMMANDS.items():
        parent = data if name.startswith("data ") else commands
        fill(parent.add_parser(name.removeprefix("data "), help=command.summary), name, with_fields=True)
    return root


def overview(prefix: str = "") -> str:
    """The commands, a line each, of those that begin with `prefix`."""
    shown = {name: command for name, command in COMMANDS.items() if name.startswith(prefix)}
    width = max(map(len, shown))
    lines = [f"  vau {name:{width}}  {command.summary}" for name, command in shown.items()]
    return "\n".join(
        [
            "Video anomaly understanding with reinforcement fine-tuning, in JAX.",
            "",
            *lines,
            "",
            "`vau COMMAND --help` explains one, with all its options.",
            'Completion: source <(vau completion bash), or eval "$(vau completion zsh)" after compinit.',
        ]
    )


# --- Calls ---


def main(name: str = "") -> None:
    """Runs this process's command line: of `vau`, or of the program that is `vau NAME`."""
    try:
        exit_on_input_error(lambda: call([*name.split(), *sys.argv[1:]]))
    except KeyboardInterrupt:
        print("interrupted: the same command goes on with what is not done", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        output = select.poll()
        output.register(sys.stdout, select.POLLERR)
        if not output.poll(0):  # another pipe
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what reads it, such as head, has seen enough


def call(words: Sequence[str]) -> None:
    """Runs `vau WORDS`. Raises InputError for a mistake in them."""
    name, rest = _split(words)
    if not name:
        print(overview(rest[0] if rest else ""))
        return
    command = COMMANDS[name]
    if any(word in ("-h", "--help", "-help") for word in rest):
        parser_of(name, with_fields=True).print_help()
        return
    if command.options is no_options:
        from vau_jax.common import config_flags  # noqa: PLC0415 - help needs none of it

        module = importlib.import_module(command.module)
        config, workdir = config_flags.parse([f"vau {name}", *rest], command.config)
        module.run(config, workdir)
        if text := module.summary(config, workdir):
            print(text, flush=True)
    elif command.fields:
        args, own = parser_of(name).parse_known_args(rest)
        _fetch_addresses(args)
        importlib.import_module(command.module).main(args, own)
    else:
        args = parser_of(name).parse_args(rest, argparse.Namespace(command=name))
        _fetch_addresses(args)
        importlib.import_module(command.module).main(args)


def _fetch_addresses(args: argparse.Namespace) -> None:
    """Replaces gs:// addresses of models and videos by paths of their copies. Raises InputError, and for an address of
    anything else."""
    for name, value in vars(args).items():
        values = value if isinstance(value, list) else [value]
        if not any(isinstance(v, str | Path) and str(v).lower().startswith("gs:") for v in values):
            continue
        from vau_jax.common import remote  # noqa: PLC0415 - needed for addresses alone

        for number, one in enumerate(values):
            if name in ("model", "video") and remote.is_address(one):
                values[number] = remote.fetch(one, name)
            remote.refuse(values[number], name)
        setattr(args, name, values if isinstance(value, list) else values[0])


def _split(words: Sequence[str]) -> tuple[str, list[str]]:
    """A command's name and its own words; no name, and a prefix, where the commands are to be listed."""
    first = words[0] if words else "--help"
    if first in ("-h", "--help", "-help", "help"):
        return "", []
    if first in ("-V", "--version"):
        from importlib.metadata import version  # noqa: PLC0415 - slow, and only here

        print(f"vau_jax {version('vau_jax')}")
        raise SystemExit(0)
    count = 2 if first == "data" else 1
    name = " ".join(words[:count])
    if name in COMMANDS:
        return name, list(words[count:])
    if name in ("data", "data --help", "data -h"):
        return "", ["data "]
    close = difflib.get_close_matches(name, COMMANDS, n=1)
    hint = f"did you mean vau {close[0]}? " if close else ""
    raise InputError(f"vau {name} is no command: {hint}vau --help lists them")


if __name__ == "__main__":
    main()
