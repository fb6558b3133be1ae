"""Evaluation as the papers do it: in two turns, by models behind endpoints, with a penalty, and asked as trained."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ml_collections import ConfigDict

from tests import tables
from tests.chat_server import Answer, pictures, serve
from tests.runs import small
from vau_jax.common import sharding
from vau_jax.common.files import InputError
from vau_jax.configs import base
from vau_jax.data import loading, pipeline
from vau_jax.eval import answers, evaluate, records
from vau_jax.models import checkpoint
from vau_jax.tasks import prompts
from vau_jax.types import State
from vau_jax.vlm import VideoLM


@pytest.fixture
def config(model_folder: Path, dataset: Path, tmp_path: Path) -> ConfigDict:
    """Three videos' questions and intervals."""
    c = small("eval", model_folder, dataset, "test")
    c.data.csv = tables.write(tmp_path / "annotations" / "rows.csv", tables.read(dataset / "test.csv")[:3])
    c.data.tasks = ("qa", "grounding")
    return c


# --- A model behind an endpoint -----------------------------------------------------------------------------------


@pytest.fixture
def remote(config: ConfigDict) -> ConfigDict:
    config.checkpoint = ""
    config.endpoint.model, config.endpoint.frames, config.endpoint.retries = "InternVL2.5-2B", 3, 0
    return config


def said(request: dict[str, Any]) -> str:
    """The text of a request's last message, apart from what stands between pictures."""
    content = request["messages"][-1]["content"]
    return content if isinstance(content, str) else content[-1]["text"]


def test_an_endpoint_gets_the_prompts_and_orders_of_our_own_model(
    config: ConfigDict, remote: ConfigDict, model_folder: Path, tmp_path: Path
) -> None:
    ours = {}
    plain = ConfigDict(config.to_dict())
    plain.checkpoint, plain.endpoint.url = str(model_folder), ""
    evaluate.run(plain, tmp_path / "ours")
    ours = {record.example: record for record in records.load(tmp_path / "ours")}
    with serve(lambda request, number: Answer("<think>x</think><answer>A</answer>")) as server:
        remote.endpoint.url = server.url
        result = evaluate.run(remote, tmp_path / "theirs")
        theirs = {record.example: record for record in records.load(tmp_path / "theirs")}
    assert theirs.keys() == ours.keys() and result["examples"] == 6
    assert all(theirs[name].choices == record.choices for name, record in ours.items())
    assert all(theirs[name].truth == record.truth for name, record in ours.items())
    loader = [e for e in pipeline.load_examples(evaluate.as_trained(remote).data)[0] if e.task == "qa"]
    asked = {said(request) for request in server.requests}
    for example in loader:
        shown = loading.in_order(example, loading.rng_of(example, remote.seed), remote.data.shuffle_options)
        assert prompts.question(shown, "think", remote.data.wording) in asked
    assert all(len(pictures(request)) == 3 for request in server.requests)
    assert result["model"] == {"size": "InternVL2.5-2B"}


def test_what_an_endpoint_leaves_open_is_asked_again_and_nothing_else(remote: ConfigDict, tmp_path: Path) -> None:
    def script(request: dict[str, Any], number: int) -> Answer:
        return Answer(status=400) if number == 2 else Answer("<answer>B</answer>")

    with serve(script) as server:
        remote.endpoint.url, remote.endpoint.concurrency = server.url, 1
        with pytest.raises(InputError, match=r"left 1 of 6 questions unanswered.*same command asks these again"):
            evaluate.run(remote, tmp_path / "eval")
        assert not (tmp_path / "eval" / "metrics.json").exists()
        evaluate.run(remote, tmp_path / "eval")
    assert len(server.requests) == 7


def test_a_broken_video_is_a_wrong_answer_of_an_endpoint_too(remote: ConfigDict, tmp_path: Path) -> None:
    rows = tables.read(remote.data.csv)
    (tmp_path / "videos").mkdir()
    for row in rows:
        (tmp_path / "videos" / row["Video Name"]).write_bytes(b"broken")
    remote.data.videos = str(tmp_path / "videos")
    with serve(lambda request, number: Answer("<answer>B</answer>")) as server:
        remote.endpoint.url = server.url
        result = evaluate.run(remote, tmp_path / "eval")
    assert (result["failed"], result["tasks"]["qa"]["accuracy"]["n"], len(server.requests)) == (6, 3, 0)


def test_a_blind_endpoint_sees_grey(remote: ConfigDict, tmp_path: Path) -> None:
    with serve(lambda request, number: Answer("<answer>B</answer>")) as server:
        remote.endpoint.url, remote.blind = server.url, True
        evaluate.run(remote, tmp_path / "eval")
    assert all(np.ptp(picture) < 8 for request in server.requests for picture in pictures(request))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"checkpoint": ""}, r"expected one of them, a run or model folder"),
        ({"endpoint.url": "http://localhost:1/v1"}, r"expected one of them"),
        ({"description_turns": 3}, r"description_turns=3: expected 1, or 2"),
        ({"repetition_penalty": -1.0}, r"repetition_penalty=-1"),
    ],
)
def test_impossible_settings_are_one_line(
    config: ConfigDict, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    config.update_from_flattened_dict(changes)
    with pytest.raises(InputError, match=message):
        evaluate.run(config, tmp_path / "eval")


# --- Two turns ----------------------------------------------------------------------------------------------------


def test_a_description_in_two_turns_goes_on_from_the_first(config: ConfigDict, tmp_path: Path) -> None:
    """By an endpoint: the second request holds the first text; the record has both."""
    config.data.tasks, config.description_turns, config.checkpoint = ("description",), 2, ""

    def script(request: dict[str, Any], number: int) -> Answer:
        return Answer("They fight." if len(request["messages"]) == 1 else "It is an assault.")

    with serve(script) as server:
        config.endpoint.url, config.endpoint.model = server.url, "m"
        evaluate.run(config, tmp_path / "eval")
    second = [request["messages"] for request in server.requests if len(request["messages"]) == 3]
    assert [m[1]["content"] for m in second] == ["They fight."] * len(second) and second
    assert all(m[2]["content"] == prompts.TURNS[1] for m in second)
    assert {r.completions[0] for r in records.load(tmp_path / "eval")} == {"They fight.\n\nIt is an assault."}


def test_our_second_turn_is_the_chat_after_the_first(
    family_folder: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tokens of the second prompt are those of the whole conversation, encoded at once."""
    c = small("eval", family_folder, dataset, "test")
    c.data.tasks, c.description_turns, c.data.max_examples = ("description",), 2, 2
    c = evaluate.as_trained(c)
    vlm = VideoLM.load(family_folder, mesh=sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}))
    examples = pipeline.load_examples(c.data)[0]
    hosts = []
    decode = answers._decoded
    monkeypatch.setattr(answers, "_decoded", lambda host, *rest: (hosts.append(host), decode(host, *rest))[1])
    found = list(answers.by_model(examples, vlm, c))
    first, second = hosts
    for a, b, record in zip(first.examples, second.examples, found, strict=False):
        text = record.completions[0].split(answers.BETWEEN)[0]
        turns = [*a.messages, {"role": "assistant", "content": text}, {"role": "user", "content": prompts.TURNS[1]}]
        whole = vlm.processor.encode_text(vlm.processor.chat_text(turns), list(a.visuals))
        assert b.encoded.tokens.tolist() == whole.tokens.tolist()
        assert len(whole.tokens) > len(a.encoded.tokens) and prompts.TURNS[0] in a.prompt


# --- Asked as trained ---------------------------------------------------------------------------------------------


@pytest.fixture
def run(model_folder: Path, vlm: VideoLM, tmp_path: Path) -> Callable[..., Path]:
    """A run with one checkpoint, trained as the arguments say."""

    def make(**data: Any) -> Path:
        workdir = tmp_path / "run"
        checkpoint.copy_model_files(model_folder, workdir)
        checkpoints = checkpoint.Checkpoints(workdir)
        checkpoints.save(1, State(np.int32(1), vlm.params, {}), {}, 0.0)
        checkpoints.close()
        c = base.get_config()
        c.data.update(data)
        (workdir / "config.json").write_text(c.to_json_best_effort())
        return workdir

    return make


def test_a_run_is_asked_as_it_was_trained(config: ConfigDict, run: Callable[..., Path], tmp_path: Path) -> None:
    words = tmp_path / "words.json"
    words.write_text(json.dumps({"short_questions": {"qa": "Which? {options}"}}))
    config.checkpoint = str(run(style="two_pass", wording="short", templates=str(words)))
    config.data.style = config.data.wording = config.data.templates = ""
    asked = evaluate.as_trained(config).data
    assert (asked.style, asked.wording, asked.templates) == ("two_pass", "short", str(words))
    result = evaluate.run(config, tmp_path / "eval")
    assert result["settings"]["data"]["style"] == "two_pass" == result["model"]["style"]


def test_what_is_given_goes_before_what_was_trained_and_says_so(
    config: ConfigDict, run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    config.checkpoint = str(run(style="reflection", templates="gone.json"))
    config.data.style, config.data.templates = "direct", "default"
    result = evaluate.run(config, tmp_path / "eval")
    assert result["settings"]["data"]["style"] == "direct"
    assert "asks in style direct a run trained in reflection" in capsys.readouterr().out


def test_a_model_folder_is_asked_for_reasoning(config: ConfigDict) -> None:
    config.data.style = config.data.wording = ""
    asked = evaluate.as_trained(config).data
    assert (asked.style, asked.wording, asked.templates) == ("think", "full", "")


# --- The checkpoint's own repetition penalty ----------------------------------------------------------------------


def test_penalty_0_is_that_of_the_models_generation_config(config: ConfigDict, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(config.checkpoint, folder)
    raw = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(raw | {"repetition_penalty": 1.7}))
    texts = {}
    for name, path, penalty in (("own", folder, 0.0), ("given", config.checkpoint, 1.7), ("none", folder, 1.0)):
        config.checkpoint, config.repetition_penalty = str(path), penalty
        evaluate.run(config, tmp_path / name)
        texts[name] = [record.completions for record in records.load(tmp_path / name)]
    assert texts["own"] == texts["given"] != texts["none"]
