"""Our evaluations beside published numbers: only where both are of the same model, training, data, protocol and way of
asking. What differs in one of these stands in a table of its own, with the reason.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from vau_jax.common.files import dump_json, read_json
from vau_jax.eval import charts, judge, published, records
from vau_jax.eval.published import AXES, POOLED, POOLED_TASK, SRVAU, Number, numbers
from vau_jax.eval.scores import score
from vau_jax.rl.judge import AXES as JUDGED
from vau_jax.tasks import TASKS

SHORT = {"qa": "QA", "grounding": "TAG", "classification": "CLS", "description": "description"}
TITLES = {
    "qa": "Questions, accuracy in %",
    "grounding": "Grounding, %",
    "classification": "Classification, accuracy in %",
    "vau_eval": "VAU-Eval, marks of 10 and total of 50",
}
METRICS = {  # by task: published name -> path in metrics.json
    "qa": {"accuracy": ("tasks", "qa", "accuracy")},
    "grounding": {m: ("tasks", "grounding", m) for m in ("mIoU", "R@0.3", "R@0.5", "R@0.7")},
    "classification": {m: ("tasks", "classification", m) for m in ("binary", "multiclass")},
}
INTRODUCTION = (
    "Published numbers are of VAU-R1's project page, or where it says so of an aggregator; with protocol paper, options"
    " in the order of the file, and greedy answers. Ours, with n and a 95% interval, stand beside them where model, "
    "training, reasoning, protocol, order of options and rows are the same; all others are in the last table, with the "
    "reason."
)


class Ours(NamedTuple):
    """One of our numbers, in the terms of a published one."""

    dataset: str
    task: str
    metric: str
    model: str
    training: str
    thinking: bool | None
    estimate: dict[str, Any]  # value, low, high in the published unit; n
    name: str
    prompts: str  # the templates, where they are not our own
    differs: str  # why it cannot be set beside a published number; empty: it can


def ours(results: Sequence[dict[str, Any]]) -> list[Ours]:
    """The numbers of all evaluations, classification pooled over the test files, and marks of judges."""
    found = [one for result in results for one in (*_scored(result), *_marked(result))]
    groups = defaultdict(list)
    for result in results:
        if list(result["settings"]["data"].get("tasks", ())) == [POOLED_TASK] and charts.source_of(result):
            groups[_without_file(result)].append(result)
    return found + [one for group in groups.values() for one in _pooled(group)]


def _scored(result: dict[str, Any]) -> Iterable[Ours]:
    dataset = charts.source_of(result)
    for task in ("qa", "grounding") if dataset else ():
        for metric, path in METRICS[task].items():
            if estimate := _at(result, path):
                yield _one(result, dataset, task, metric, _percent(estimate))


def _pooled(group: Sequence[dict[str, Any]]) -> Iterable[Ours]:
    newest = {charts.source_of(result): result for result in group}  # oldest first
    every = [record for result in newest.values() for record in records.load(result["folder"])]
    whole = {**group[-1], **score(every, group[-1]["protocol"])}
    for metric, path in METRICS[POOLED_TASK].items():
        if estimate := _at(whole, path):
            yield _one(whole, POOLED, POOLED_TASK, metric, _percent(estimate))


def _marked(result: dict[str, Any]) -> Iterable[Ours]:
    dataset = charts.source_of(result)
    for path in sorted((result["folder"] / judge.FOLDER).glob("*.json")) if dataset else ():
        marks = read_json(path)
        turns = "two turns" if result["settings"].get("description_turns") == 2 else "one turn"
        reason = f"judged by {marks['model']} with our own prompt, {turns}"
        estimates = dict(zip(AXES, [*(marks["axes"][axis] for axis in JUDGED), marks["total"]], strict=True))
        for axis, estimate in estimates.items():
            if estimate["value"] is not None:
                one = _one(result, dataset, "vau_eval", axis, estimate)
                yield one._replace(thinking=None, differs="; ".join(filter(None, [one.differs, reason])))


def _percent(estimate: dict[str, Any]) -> dict[str, Any]:
    return {name: value if name == "n" else 100 * value for name, value in estimate.items()}


def _one(result: dict[str, Any], dataset: str, task: str, metric: str, estimate: dict[str, Any]) -> Ours:
    model, data = model_of(result), result["settings"]["data"]
    thinking = data.get("style", "think") != "direct"
    if model.get("style") in ("reflection", "two_pass") and model["size"]:
        name, training = SRVAU, "" if model["style"] == "reflection" else "two passes"
    else:
        name, training = model["size"], _training(model, task)
    prompts, differs = data.get("templates") or "our own", _differs(result, dataset, task)
    return Ours(dataset, task, metric, name, training, thinking, estimate, result["name"], prompts, differs)


def _training(model: dict[str, Any], task: str) -> str:
    """How the published tables name a training run: SFT, or where the table has several tasks RFT QA-TAG."""
    if not model.get("stage"):
        return ""
    stage = model["stage"].upper()
    names = "-".join(SHORT[name] for name in model["tasks"])
    own = {"qa": "qa", "grounding": "grounding", "vau_eval": "qa"}.get(task)
    label = stage if [own] == list(model["tasks"]) else f"{stage} {names}"
    lora = ", full" if task == POOLED_TASK and stage == "SFT" and not model["lora"] else ""
    return f"{label}{lora}{', after SFT' if model['begins'] else ''}"


def _differs(result: dict[str, Any], dataset: str, task: str) -> str:
    """Why an evaluation's numbers are not like the published ones."""
    data, model = result["settings"]["data"], model_of(result)
    rows, expected = _rows(result, task), published.ROWS[dataset, task]
    reasons = {
        "blind": result["blind"],
        f"protocol {result['protocol']}": result["protocol"] != "paper",
        "options shuffled": task in TASKS and TASKS[task].shuffles and data.get("shuffle_options", True),
        f"{rows} of {expected} rows": rows != expected,
        "a model of another size": not model["size"],
        "several samples": result["settings"].get("samples", 1) > 1,
    }
    return "; ".join(reason for reason, there in reasons.items() if there)


def _rows(result: dict[str, Any], task: str) -> int:
    """How many rows were asked, those of failed videos too."""
    by_class = result["by_class"].get(task)
    return sum(one["n"] for one in by_class.values()) if by_class else result.get("examples", 0)


def model_of(result: dict[str, Any]) -> dict[str, Any]:
    """What an evaluation says of its model; results of earlier versions say nothing."""
    return result.get("model", {"size": ""})


def _without_file(result: dict[str, Any]) -> str:
    settings = result["settings"] | {"data": result["settings"]["data"] | {"csv": ""}}
    return dump_json([result["name"], settings], sort_keys=True)


def _at(result: dict[str, Any], path: Sequence[str]) -> dict[str, Any] | None:
    value: Any = result
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return value if value and value.get("value") is not None else None


# --- Tables -------------------------------------------------------------------------------------------------------

Table = tuple[str, list[list[str]]]  # a title, and rows of text, the first one the header


def tables(results: Sequence[dict[str, Any]], whole: bool = False) -> list[Table]:
    """A table for each data set, task and way of asking, and one of what is not comparable; `whole`: also those that
    none of our evaluations is in."""
    every, mine = list(numbers()), ours(results)
    beside = [one for one in mine if not one.differs]
    groups = list(dict.fromkeys((n.task, n.dataset, n.thinking) for n in [*every, *beside]))
    shown = [group for group in groups if whole or group in {(o.task, o.dataset, o.thinking) for o in beside}]
    found = [_table(group, every, beside) for group in sorted(shown, key=lambda g: list(TITLES).index(g[0]))]
    apart = [
        [o.name, o.task, o.dataset, _asked(o.thinking), o.metric, _shown(o), str(o.estimate["n"]), o.differs]
        for o in mine
        if o.differs
    ]
    if apart:
        header = ["evaluation", "task", "data set", "asked", "metric", "ours", "n", "why it is not comparable"]
        found.append(("Not comparable with published numbers", [header, *apart]))
    return found


def _table(group: tuple[str, str, bool | None], every: Sequence[Number], mine: Sequence[Ours]) -> Table:
    task, dataset, thinking = group

    def belongs(one: Number | Ours) -> bool:
        return (one.task, one.dataset, one.thinking) == group

    known = {(n.model, n.training, n.metric): n for n in every if belongs(n)}
    own = {(o.model, o.training, o.metric): o for o in mine if belongs(o)}
    lines = [["model", "training", "metric", "published", "ours", "n", "prompts of ours", "source"]]
    for key in dict.fromkeys([*known, *own]):
        number, result = known.get(key), own.get(key)
        told = [f"{number.value:.2f}", "; ".join(filter(None, [number.source, number.note]))] if number else ["", ""]
        mine_told = [_shown(result), str(result.estimate["n"]), result.prompts] if result else ["", "", ""]
        lines.append([*key, told[0], *mine_told, told[1]])
    return f"{TITLES[task]}: {dataset}, {_asked(thinking)}", lines


def _asked(thinking: bool | None) -> str:
    return {True: "with reasoning", False: "without reasoning", None: "not stated how asked"}[thinking]


def _shown(one: Ours) -> str:
    e = one.estimate
    return f"{e['value']:.2f} [{e['low']:.1f}, {e['high']:.1f}]"
