"""Messages to a prompt's text by a model folder's chat template, in a separate process.

A template is a program that came with the weights. Jinja's sandbox keeps it from files and from the interpreter, but
not from looping for ever, nor from filling memory, and a loop inside one operation (`10 ** 10 ** 10`) cannot be stopped
in the process that runs it. So it runs in `python -m vau_jax.data.chat_template`, whose memory the system limits and
which an alarm ends; a line of JSON goes in, one comes out. One process serves all templates of this one, from the first
prompt on, and then takes 0.1 ms a prompt.
"""

import json
import resource
import signal
import sys
from datetime import datetime
from functools import lru_cache, partial
from typing import Any, BinaryIO

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from vau_jax.common.files import InputError, dump_json
from vau_jax.common.workers import Died, Pool, Worker

SECONDS = 10.0  # for one prompt
MEMORY = 2**28  # bytes of data that the process may hold
MOST = 2**22  # characters of a prompt


_workers = Pool(1, lambda: Worker("vau_jax.data.chat_template"))


def render(template: str, values: dict[str, Any], where: str) -> str:
    """Renders a Jinja template with `values` (plain JSON), as transformers' `apply_chat_template` does.

    Raises InputError, which begins with `where`, for a template that is damaged, refuses the messages, or takes more
    than SECONDS, MEMORY or MOST.
    """
    try:
        answer, _ = _workers.ask({"template": template, "values": values, "seconds": SECONDS})
    except Died as died:
        if died.code > 0:
            raise RuntimeError(f"the process of the chat template could not start ({died}): see above") from died
        late = died.code == -signal.SIGALRM
        answer = {"error": f"it takes longer than {SECONDS:g} s" if late else f"it crashed ({died})"}
    if "error" in answer:
        raise InputError(f"{where}: the chat template cannot be used: {answer['error']}")
    return answer["text"]


# --- The process's side -------------------------------------------------------------------------------------------


def _refuse(message: object) -> None:
    raise TemplateError(str(message))


class _Generation(Extension):
    """`{% generation %}` marks an assistant's tokens for training; the text is the same without."""

    tags = frozenset({"generation"})

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@lru_cache(8)
def _compiled(template: str) -> Template:
    """Compiled as in transformers."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = partial(dump_json, ensure_ascii=False)  # not escaped for HTML
    environment.globals |= {"raise_exception": _refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
    return environment.from_string(template)


def answer(request: dict[str, Any]) -> dict[str, str]:
    """The text, or the reason why there is none, as one line."""
    try:
        text = _compiled(request["template"]).render(request["values"])
    except MemoryError:
        return {"error": f"it takes more than {MEMORY >> 20} MiB"}
    except Exception as error:  # whatever a template provokes
        return {"error": " ".join(f"{type(error).__name__}: {error}".split())[:300]}
    return {"text": text} if len(text) <= MOST else {"error": f"it writes more than {MOST} characters"}


def serve(requests: BinaryIO, answers: BinaryIO) -> None:
    """Answers requests until there are none."""
    for line in requests:
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, request["seconds"])
        line = dump_json(answer(request)).encode()
        signal.setitimer(signal.ITIMER_REAL, 0)
        answers.write(line + b"\n")
        answers.flush()


def main() -> None:
    """The process that renders: bounded in time and memory, it answers requests until its input ends."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # the default ends the process, whatever it is doing
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    serve(sys.stdin.buffer, sys.stdout.buffer)


if __name__ == "__main__":
    main()
