"""Prompts from VAU-R1's own source files (GVCLab/VAU-R1), as they are downloaded; nothing of them is run.

A folder of that code holds the prompts of one stage: `src/open_r1` of RFT, `src/sft` of SFT, `src/evaluation` of
evaluation. They are string constants (QUESTION_TEMPLATE with [QUESTION] and [OPTION], FIXED_QUESTION, FIXED_OPTION) and
f-strings that functions return, which are read from the syntax tree.
"""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from vau_jax.common.files import InputError

TASK_OF_NAME = (  # parts of file names -> task; the first that occurs counts
    ("gqa", "grounding"),
    ("tag", "grounding"),
    ("grounding", "grounding"),
    ("cls", "classification"),
    ("reasoning", "description"),
    ("description", "description"),
    ("qa", "qa"),
)
OTHER_MODELS = re.compile("internvl|deepseek")  # files of these have prompts of their own
FIELD_OF_COLUMN = {"Question": "question", **{f"Option {n}": f"option_{n}" for n in range(1, 5)}}
MOST_BYTES = 2**20  # of a source file


@dataclass
class Found:
    """What the files of one task hold."""

    texts: dict[str, str] = field(default_factory=dict)  # by the names of their constants and functions
    option_text: str = ""  # what [OPTION] becomes, where the source says so
    joined: bool = False  # options stand in one line, instead of as a Python list
    text_first: bool = False  # the question stands before the video


def files(folder: Path) -> list[Path]:
    """The source files of a folder that hold prompts, sorted."""
    return [path for path in sorted(folder.rglob("*.py")) if _task(path) and not OTHER_MODELS.search(path.name)]


def _task(path: Path) -> str:
    return next((task for part, task in TASK_OF_NAME if part in path.stem.lower()), "")


def read(folder: Path) -> tuple[dict[str, dict[str, str]], bool, list[str]]:
    """Whole prompts by task and style ("think", "direct"), with the placeholders of `prompts.Templates`; whether they
    stand before the video; and the two turns of a description, none where the folder lacks them.

    Raises InputError for a file that is no Python, and for a folder without any prompt.
    """
    found: dict[str, Found] = {}
    for path in files(folder):
        _collect(_tree(path), found.setdefault(_task(path), Found()))
    whole = {task: forms for task, one in found.items() if (forms := _forms(task, one))}
    turns = found.get("description", Found()).texts
    both = [turns[name] for name in ("description_prompt", "analysis_prompt") if name in turns]
    if not (whole or both):
        raise InputError(
            f"{folder} (data.templates) has no prompts: expected a JSON file, or of VAU-R1's code the folder "
            "src/open_r1 (RFT), src/sft (SFT) or src/evaluation"
        )
    return whole, any(one.text_first for one in found.values()), both if len(both) == 2 else []


def _tree(path: Path) -> ast.Module:
    try:
        if path.stat().st_size > MOST_BYTES:
            raise ValueError(f"more than {MOST_BYTES} bytes")
        return ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, SyntaxError, RecursionError, MemoryError) as error:
        raise InputError(f"{path} (data.templates) is not Python source: {error}") from error


def _collect(tree: ast.Module, found: Found) -> None:
    for node in ast.walk(tree):
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=ast.Constant(value=str(text))):
                found.texts.setdefault(name, text)
            case ast.FunctionDef(name=name, body=[*_, ast.Return(value=ast.JoinedStr() as text)]):
                found.texts[name] = _template(text)
            case ast.Call(func=ast.Attribute(attr="replace"), args=[ast.Constant("[OPTION]"), ast.Constant(str(text))]):
                found.option_text = text
            case ast.Call(func=ast.Attribute(value=ast.Constant(" "), attr="join")):
                found.joined = True
            case ast.Dict():
                _collect_options(node, found)
            case ast.List():
                kinds = [kind for item in node.elts for kind in _kind(item)]
                found.text_first |= kinds == ["text", "video"]


def _collect_options(node: ast.Dict, found: Found) -> None:
    """`"options": ["Normal", "Anomaly"]`."""
    for key, value in zip(node.keys, node.values, strict=True):
        if isinstance(key, ast.Constant) and key.value == "options" and isinstance(value, ast.List):
            names = [item.value for item in value.elts if isinstance(item, ast.Constant)]
            found.option_text = found.option_text or str(names)


def _kind(item: ast.expr) -> Iterator[str]:
    """`{"type": "video", ...}` is a "video"."""
    if isinstance(item, ast.Dict):
        for key, value in zip(item.keys, item.values, strict=True):
            if isinstance(key, ast.Constant) and key.value == "type" and isinstance(value, ast.Constant):
                yield str(value.value)


def _template(text: ast.JoinedStr) -> str:
    """An f-string whose values are `data["Column"]`, with our placeholders. Raises InputError for other values."""
    parts = []
    for value in text.values:
        match value:
            case ast.Constant(value=str(plain)):
                parts.append(plain)
            case ast.FormattedValue(value=ast.Subscript(slice=ast.Constant(value=column))) if column in FIELD_OF_COLUMN:
                parts.append(f"{{{FIELD_OF_COLUMN[column]}}}")
            case _:
                parts.append(ast.unparse(value))
    return "".join(parts)


def _forms(task: str, found: Found) -> dict[str, str]:
    """The whole prompt of each style."""
    texts, forms = found.texts, {}
    if task == "description":
        return {style: texts["FIXED_QUESTION"] for style in ("think", "direct") if "FIXED_QUESTION" in texts}
    plain = texts.get("QUESTION_TEMPLATE", "")
    sources = {
        "think": (texts.get("THINK_QUESTION_TEMPLATE") or plain * ("<think>" in plain), "generate_prompt"),
        "direct": (
            texts.get("NO_THINK_QUESTION_TEMPLATE") or plain * ("<think>" not in plain),
            "generate_prompt_w_o_think",
        ),
    }
    for style, (template, function) in sources.items():
        prefix = "NO_THINK_" if style == "direct" else "THINK_"
        question = texts.get(f"{prefix}FIXED_QUESTION") or texts.get("FIXED_QUESTION") or "{question}"
        options = (
            found.option_text or texts.get("FIXED_OPTION") or ("{options_line}" if found.joined else "{options_list}")
        )
        if template:
            forms[style] = template.replace("[QUESTION]", question).replace("[OPTION]", options)
        elif function in texts:
            forms[style] = texts[function]
    return forms
