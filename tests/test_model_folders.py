"""A damaged or hostile model folder is refused in one line that names file and field, soon and without its memory."""

import json
import math
import os
import random
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.small_models import make_model, with_adapters
from vau_jax.common.files import InputError
from vau_jax.data import chat_template
from vau_jax.data_prep.random_model import CHAT_TEMPLATE
from vau_jax.models import hf
from vau_jax.models.lora import LoRA
from vau_jax.vlm import VideoLM

SECONDS = 20  # far above what any of these takes, far below what they took
MESSAGES = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "What?"}]}]
Damage = Callable[[Path], Any]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One layer and 60 kB, to be copied often."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    vision = {"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 2, "fullatt_block_indexes": [0]}
    return make_model(tmp_path_factory.mktemp("tiny") / "model", vision=vision, **sizes, **heads)


def changed(file: str, **fields: Any) -> Damage:
    """Sets fields of a JSON file; `vision_config` and `size` take what is new in them."""

    def damage(folder: Path) -> None:
        raw = json.loads((folder / file).read_text())
        for name, value in fields.items():
            raw[name] = {**raw[name], **value} if name == "vision_config" and isinstance(value, dict) else value
        (folder / file).write_text(json.dumps(raw))

    return damage


def config(**fields: Any) -> Damage:
    return changed("config.json", **fields)


def eyes(**fields: Any) -> Damage:
    return changed("config.json", vision_config=fields)


def written(file: str, data: bytes | str) -> Damage:
    return lambda folder: (folder / file).write_bytes(data.encode() if isinstance(data, str) else data)


def replaced(file: str, make: Damage) -> Damage:
    """Something else in the file's place."""

    def damage(folder: Path) -> None:
        (folder / file).unlink(missing_ok=True)
        make(folder / file)

    return damage


def sparse(size: int) -> Damage:
    def damage(path: Path) -> None:
        with path.open("wb") as file:
            file.truncate(size)

    return damage


def index(places: Any) -> Damage:
    """An index in place of the single file, which becomes a.safetensors."""

    def damage(folder: Path) -> None:
        (folder / hf.SINGLE).rename(folder / "a.safetensors")
        (folder / hf.INDEX).write_text(json.dumps({"weight_map": places}))

    return damage


def tensors(change: Callable[[dict[str, np.ndarray]], Any]) -> Damage:
    def damage(folder: Path) -> None:
        values = load_file(folder / hf.SINGLE)
        change(values)
        save_file(values, folder / hf.SINGLE)

    return damage


def header(change: Callable[[dict[str, Any]], Any]) -> Damage:
    """Another header before the same bytes."""

    def damage(folder: Path) -> None:
        data = (folder / hf.SINGLE).read_bytes()
        end = 8 + struct.unpack("<Q", data[:8])[0]
        raw = json.loads(data[8:end])
        change(raw)
        text = json.dumps(raw).encode()
        (folder / hf.SINGLE).write_bytes(struct.pack("<Q", len(text)) + text + data[end:])

    return damage


def with_value(value: float) -> Damage:
    def change(values: dict[str, np.ndarray]) -> None:
        values["model.layers.0.mlp.down_proj.weight"][3, 5] = value

    return tensors(change)


NORM = "model.norm.weight"
CASES: dict[str, tuple[Damage, str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "has no config.json"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "has no tokenizer.json"),
    "no weights": (lambda f: (f / hf.SINGLE).unlink(), "has no model.safetensors"),
    "a pickle": (lambda f: (f / hf.SINGLE).rename(f / "pytorch_model.bin"), "those are pickles"),
    "another family": (config(model_type="llava"), "supported: qwen2_vl, qwen2_5_vl, qwen3_vl"),
    "another width": (config(intermediate_size=96), "expected [96, 16]"),
    "heads of another size": (config(hidden_size=96), "mrope_section"),
    "an index that leads up": (index({"a": "../a.safetensors"}), "index.json names the file '../a.safetensors'"),
    "an index with a path": (index({"a": "/etc/passwd"}), "index.json names the file '/etc/passwd'"),
    "an index of numbers": (index({"a": 3}), "weight_map: a=3"),
    "an index of nothing": (index({}), "lacks every tensor"),
    "an index that is a list": (index([]), "weight_map=[]: expected an object"),
    "an index to an absent file": (index({"a": "b.safetensors"}), "lacks b.safetensors"),
    "NaN": (with_value(math.nan), "model.safetensors: model.layers.0.mlp.down_proj.weight holds NaN or infinity"),
    "infinity": (with_value(-math.inf), "model.layers.0.mlp.down_proj.weight holds NaN or infinity"),
    "integers": (tensors(lambda t: t.update({NORM: np.ones(16, np.int8)})), f"{NORM!r} is I8, expected one of F32"),
    "another shape": (tensors(lambda t: t.update({NORM: np.ones(17, np.float32)})), f"{NORM} has shape [17]"),
    "one tensor too few": (tensors(lambda t: t.pop(NORM)), f"missing {NORM} [16]"),
    "two names of one tensor": (
        tensors(lambda t: t.update({"model.language_model.norm.weight": t[NORM]})),
        f"holds {NORM!r} twice",
    ),
    "a shortened file": (lambda f: os.truncate(f / hf.SINGLE, 20_000), "cannot read"),
    "an empty file": (written(hf.SINGLE, b""), "cannot read"),
    "a header of terabytes": (written(hf.SINGLE, struct.pack("<Q", 1 << 42) + b"{}"), "its header has 4398046511104"),
    "tensors over each other": (
        header(lambda raw: raw[NORM].update(data_offsets=[0, 64])),
        "cannot read",
    ),
    "a tensor beyond the end": (
        header(lambda raw: raw[NORM].update(shape=[1 << 60], data_offsets=[0, 1 << 62])),
        "cannot read",
    ),
    "a folder for weights": (replaced(hf.SINGLE, Path.mkdir), "has no model.safetensors"),
    "weights that lead to themselves": (
        replaced(hf.SINGLE, lambda path: path.symlink_to(path)),
        "has no model.safetensors",
    ),
    "layers without end": (config(num_hidden_layers=10**9), "config.json: num_hidden_layers=1000000000: expected an"),
    "more layers than weights": (config(num_hidden_layers=1000), "missing model.layers.1.input_layernorm.weight"),
    "no layers": (config(num_hidden_layers=0), "num_hidden_layers=0"),
    "a negative size": (config(hidden_size=-16), "hidden_size=-16"),
    "a size of NaN": (config(intermediate_size=math.nan), "intermediate_size=nan"),
    "a number as text": (config(vocab_size="many"), "vocab_size='many'"),
    "true for a number": (config(num_attention_heads=True), "num_attention_heads=True"),
    "an infinite epsilon": (config(rms_norm_eps=math.inf), "rms_norm_eps=inf"),
    "a token beyond the vocabulary": (config(video_token_id=10**6), "video_token_id=1000000"),
    "a model type that is a list": (config(model_type=["qwen2_vl"]), "model_type ['qwen2_vl'] is not supported"),
    "sections of text": (config(rope_scaling={"mrope_section": "abc"}), "rope_scaling: mrope_section='abc'"),
    "no rope": (config(rope_scaling=7), "rope_scaling=7"),
    "no vision": (config(vision_config=None), "lacks the field 'vision_config'"),
    "patches of no pixels": (eyes(patch_size=0), "vision_config: patch_size=0"),
    "a window below a patch": (eyes(window_size=5), "window_size 5 is smaller than 28"),
    "no heads": (eyes(num_heads=0), "vision_config: num_heads=0"),
    "a layer that is not there": (eyes(fullatt_block_indexes=[7]), "fullatt_block_indexes (7,) do not fit 1"),
    "other channels": (eyes(in_chans=1), "vision_config: in_chans=1"),
    "a config that is a list": (written("config.json", "[1]"), "config.json is [1]: expected a JSON object"),
    "a deep config": (written("config.json", "[" * 10**5), "config.json as JSON: it nests too deeply"),
    "a key twice": (written("config.json", '{"a": 1, "a": 2}'), "config.json as JSON: the key 'a' occurs twice"),
    "a number of many digits": (written("config.json", f'{{"a": {"9" * 5000}}}'), "cannot read"),
    "a byte order mark": (written("config.json", b"\xef\xbb\xbf{}"), "config.json as JSON: Unexpected UTF-8 BOM"),
    "no UTF-8": (written("config.json", b"\xff\xfe{}"), "config.json as JSON: 'utf-8' codec"),
    "a config of gigabytes": (replaced("config.json", sparse(1 << 32)), "it has 4294967296 bytes, expected at most"),
    "a mean of two numbers": (
        changed("preprocessor_config.json", image_mean=[0.5, 0.5]),
        "preprocessor_config.json: image_mean=[0.5, 0.5]: expected 3 numbers",
    ),
    "a deviation of zero": (changed("preprocessor_config.json", image_std=[0, 1, 1]), "image_std=[0, 1, 1]"),
    "a processor of other patches": (changed("preprocessor_config.json", patch_size=0), "json: patch_size=0"),
    "a video processor of other patches": (
        changed("video_preprocessor_config.json", merge_size=3),
        "video_preprocessor_config.json: merge_size=3",
    ),
    "pixels upside down": (
        changed("preprocessor_config.json", min_pixels=9, max_pixels=4),
        "the least number of pixels, 9, is above the most, 4",
    ),
    "a tokenizer of nothing": (written("tokenizer.json", b""), "cannot read the tokenizer"),
    "a tokenizer without a model": (written("tokenizer.json", "{}"), "cannot read the tokenizer"),
    "a tokenizer of gigabytes": (replaced("tokenizer.json", sparse(1 << 32)), "tokenizer.json has 4294967296 bytes"),
    "a smaller vocabulary": (config(vocab_size=360), "but config.json: vocab_size=360"),
    "settings that are a pipe": (
        replaced("tokenizer_config.json", os.mkfifo),
        "tokenizer_config.json as JSON: it is not a regular file",
    ),
    "settings that name other files": (
        changed("tokenizer_config.json", fast_tokenizer_files=["../tokenizer.1.0.json"]),
        "tokenizer_config.json: fast_tokenizer_files",
    ),
    "settings of another type": (changed("tokenizer_config.json", eos_token=[1]), "cannot read the tokenizer"),
    "an end that is no token": (
        changed("generation_config.json", eos_token_id=[-1]),
        "generation_config.json: eos_token_id=[-1]",
    ),
    "a motion prompt of NaN": (
        written("motion_prompt.json", '{"signed": true, "order": "rgb", "m": NaN, "n": 0}'),
        "motion_prompt.json: m=nan",
    ),
}


def refusal(folder: Path) -> str:
    """What `load` says of the folder, or its first prompt."""
    with pytest.raises(InputError) as caught:
        VideoLM.load(folder).processor.chat_text(MESSAGES)
    return str(caught.value)


@pytest.mark.parametrize("name", CASES)
def test_a_broken_folder_is_one_line_soon(name: str, tiny: Path, tmp_path: Path) -> None:
    damage, words = CASES[name]
    folder = Path(shutil.copytree(tiny, tmp_path / "model"))
    damage(folder)
    began = time.monotonic()
    said = refusal(folder)
    assert time.monotonic() - began < SECONDS
    assert words in said and len(said.splitlines()) == 1 and len(said) < 2000


TEMPLATES = {
    "loops in loops": (
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "longer than",
    ),
    "one long operation": ("{{ 10 ** (10 ** 9) }}", "longer than"),
    "a text that doubles": (
        "{% set t = namespace(x='ab') %}{% for i in range(99) %}{% set t.x = t.x + t.x %}{% endfor %}{{ t.x }}",
        "more than 256 MiB",
    ),
    "a long text": ("{{ 'abcdefgh' * 1000000 }}", "writes more than 4194304 characters"),
    "a damaged template": ("{% for m in messages %}", "TemplateSyntaxError"),
    "a deep template": ("{{ " + "(" * 20_000 + "1" + ")" * 20_000 + " }}", "RecursionError"),
    "the interpreter": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "SecurityError"),
    "a refusal": ("{{ raise_exception('no\nvideos') }}", "no videos"),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_hostile_template_is_one_line_soon(
    name: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    template, words = TEMPLATES[name]
    folder = Path(shutil.copytree(tiny, tmp_path / "model"))
    (folder / "chat_template.jinja").write_text(template)
    if words == "longer than":
        monkeypatch.setattr(chat_template, "SECONDS", 0.5)
    said = refusal(folder)
    assert words in said and str(folder) in said and len(said.splitlines()) == 1


def test_after_a_hostile_template_others_are_rendered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "SECONDS", 0.2)
    with pytest.raises(InputError, match="longer than"):
        chat_template.render(TEMPLATES["loops in loops"][0], {}, "here")
    monkeypatch.undo()
    assert chat_template.render("{{ a }}", {"a": "ü\n"}, "here") == "ü\n"


def test_a_folder_without_a_template_says_so(tiny: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny, tmp_path / "model"))
    (folder / "chat_template.jinja").unlink()
    assert "has no chat template" in refusal(folder)


COUNTING = """
{%- set seen = namespace(pictures=0, clips=0) -%}
{%- for message in messages -%}
{%- if loop.first and message['role'] != 'system' -%}a first line of its own{{ '\\n' }}{%- endif -%}
{{ message['role'] | upper }}: {% if message['content'] is string %}{{ message['content'] }}{% else %}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' or 'image' in part or 'image_url' in part -%}
{%- set seen.pictures = seen.pictures + 1 -%}<|vision_start|><|image_pad|><|vision_end|>
{%- elif 'video' in part -%}
{%- set seen.clips = seen.clips + 1 -%}<|vision_start|><|video_pad|><|vision_end|>
{%- elif 'text' in part -%}{{ part['text'] }}
{%- endif -%}
{%- endfor -%}
{%- endif %}
{% endfor -%}
{{ seen.pictures }} and {{ seen.clips }}{% if add_generation_prompt %}, ASSISTANT:{% endif %}
"""
PIECES = """
{%- for message in messages[::-1] %}
  {{ message | tojson }} {{ message | tojson(indent=2) }}
  {%- if loop.index > 1 %}{% break %}{% endif %}
  {% generation %}{{ eos_token }}{% endgeneration %}
{% endfor %}
{{ tools is none }} {{ strftime_now("%%") }} {{ dict(a=1) }}
"""


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, COUNTING, PIECES], ids=["ours", "counting", "pieces"])
def test_a_template_writes_what_transformers_writes(template: str, tiny: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny, tmp_path / "model"))
    (folder / "chat_template.jinja").write_text(template)
    processor = VideoLM.load(folder).processor
    messages = [
        {"role": "system", "content": "ü <b>\n", "name": None},
        {"role": "user", "content": [{"type": "image"}, *MESSAGES[0]["content"]]},
        {"role": "assistant", "content": "yes"},
        MESSAGES[0],
    ]
    theirs = processor.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert processor.chat_text(messages) == theirs


def test_parameters_that_do_not_fit_the_machine_are_refused(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = os.sysconf
    monkeypatch.setattr(os, "sysconf", lambda name: 1 if name == "SC_PHYS_PAGES" else size(name))
    with pytest.raises(InputError, match="the parameters take 0 GiB as float32, this machine has 0 GiB"):
        VideoLM.load(tiny)


# --- Adapters -----------------------------------------------------------------------------------------------------

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture(scope="module")
def adapter(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter") / "lora"
    with_adapters(VideoLM.load(tiny), LoRA(rank=2, alpha=4, targets=(r"decoder/layers/q_proj",))).save_adapter(folder)
    return folder


def half(values: dict[str, np.ndarray]) -> None:
    for name in [name for name in values if ".lora_B." in name]:
        del values[name]


ADAPTERS: dict[str, tuple[Damage, str]] = {
    "a rank of text": (changed(CONFIG, r="8"), "adapter_config.json: r='8'"),
    "a rank of 0": (changed(CONFIG, r=0), "adapter_config.json: r=0"),
    "a rank without end": (changed(CONFIG, r=10**12), "adapter_config.json: r=1000000000000"),
    "a dropout of 1": (changed(CONFIG, lora_dropout=1), "adapter_config.json: lora_dropout=1"),
    "an infinite alpha": (changed(CONFIG, lora_alpha=math.inf), "adapter_config.json: lora_alpha=inf"),
    "no factors": (lambda f: save_file({}, f / WEIGHTS), "it holds no adapter"),
    "half of the factors": (
        lambda f: tensors_of(f, half),
        "decoder/layers/q_proj/a has no decoder/layers/q_proj/b beside it",
    ),
    "NaN": (lambda f: tensors_of(f, lambda t: next(iter(t.values())).fill(math.nan)), "holds NaN or infinity"),
    "another rank": (changed(CONFIG, r=3), "expected [3, 16]"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "has no adapter_model.safetensors"),
}


def tensors_of(folder: Path, change: Callable[[dict[str, np.ndarray]], Any]) -> None:
    values = {name: value.copy() for name, value in load_file(folder / WEIGHTS).items()}
    change(values)
    save_file(values, folder / WEIGHTS)


LORA = {"rank": 2, "alpha": 4, "dropout": 0.0, "targets": ["decoder/layers/q_proj"], "rank_stabilised": False}
NOTES = {
    "no base": ({"lora": LORA}, "adapter.json lacks the field 'base'"),
    "a base that is a number": ({"base": 3, "lora": LORA}, "adapter.json: base=3: expected an object"),
    "no kind": ({"base": "run", "lora": None}, "adapter.json lacks the field 'lora'"),
    "a rank of text": ({"base": "run", "lora": {**LORA, "rank": "2"}}, "adapter.json: lora: rank='2'"),
    "targets of numbers": ({"base": "run", "lora": {**LORA, "targets": [1]}}, "adapter.json: lora: targets=[1]"),
    "itself": ({"base": "run", "lora": LORA}, "run holds adapters for itself"),
}


@pytest.mark.parametrize("name", NOTES)
def test_a_broken_note_of_adapters_is_one_line(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    note, words = NOTES[name]
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "1").mkdir(parents=True)
    (tmp_path / "run" / "adapter.json").write_text(json.dumps(note))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as caught:
        VideoLM.load("run/checkpoints/1" if name != "itself" else "run")
    assert words in str(caught.value) and len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("path", ["x" * 300, "a\0b", "/dev/null", "no/such"], ids=ascii)
def test_what_is_no_folder_is_said(path: str) -> None:
    with pytest.raises(InputError, match="does not exist"):
        VideoLM.load(path)


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_broken_adapter_is_one_line(name: str, tiny: Path, adapter: Path, tmp_path: Path) -> None:
    damage, words = ADAPTERS[name]
    folder = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    damage(folder)
    with pytest.raises(InputError) as caught:
        VideoLM.load(tiny, adapter=folder)
    assert words in str(caught.value) and len(str(caught.value).splitlines()) == 1


# --- At random ----------------------------------------------------------------------------------------------------

ODD = (
    None,
    True,
    0,
    -1,
    1,
    3,
    2**31,
    2**63,
    10**400,
    0.5,
    -0.0,
    math.nan,
    math.inf,
    "",
    "x\ny",
    "\ud800",
    [],
    [0],
    [[]],
)
ODD += ([1, "a"], [-1] * 3, {}, {"a": {}}, [10**9] * 3)


def places(raw: Any, here: tuple = ()) -> list[tuple]:
    """The path of every value in a JSON object."""
    inside = raw.items() if isinstance(raw, dict) else enumerate(raw) if isinstance(raw, list) else ()
    return [path for key, value in inside for path in [(*here, key), *places(value, (*here, key))]]


SETTINGS = (
    "model_max_length",
    "padding_side",
    "truncation_side",
    "model_input_names",
    "split_special_tokens",
    "unk_token",
)
SETTINGS += ("added_tokens_decoder", "extra_special_tokens", "chat_template", "init_inputs", "auto_map", "vocab_file")
SETTINGS += ("tokenizer_object", "tokenizer_file", "gguf_file", "backend", "name_or_path", "add_prefix_space", "errors")
SETTINGS += ("clean_up_tokenization_spaces", "special_tokens_pattern", "merges", "vocab", "bos_token", "max_length")


def mutated_json(raw: Any, rng: random.Random, more: tuple[str, ...] = ()) -> None:
    """Takes a value out, or puts an odd one in its place, or in one of the fields `more`."""
    if more and rng.random() < 0.7:
        raw[rng.choice(more)] = rng.choice(ODD)
        return
    *parents, last = rng.choice(places(raw))
    for key in parents:
        raw = raw[key]
    if rng.random() < 0.2:
        del raw[last]
    else:
        raw[last] = rng.choice(ODD)


def mutated_bytes(data: bytes, rng: random.Random) -> bytes:
    """Flips, cuts, repeats or inserts bytes, mostly near the beginning."""
    at = int(len(data) * rng.random() ** 4)
    end = at + rng.randrange(1, 9)
    noise = bytes(rng.randrange(256) for _ in range(end - at))
    return rng.choice(
        [data[:at] + noise + data[end:], data[:at], data[:end] + data[at:], data[:at] + noise + data[at:]]
    )


def mutate(folder: Path, rng: random.Random) -> str:
    """Changes one file of a folder, and says which."""
    path = rng.choice(sorted(folder.iterdir()))
    if path.suffix == ".json" and rng.random() < 0.7:
        raw = json.loads(path.read_text())
        mutated_json(raw, rng, SETTINGS if path.name == "tokenizer_config.json" else ())
        path.write_text(json.dumps(raw))
    elif path.name == hf.SINGLE and rng.random() < 0.7:
        header(lambda raw: mutated_json(raw, rng))(folder)
    else:
        path.write_bytes(mutated_bytes(path.read_bytes(), rng))
    return path.name


@pytest.mark.long
@pytest.mark.parametrize("seed", range(600))
def test_a_folder_changed_at_random_loads_or_is_refused(seed: int, tiny: Path, tmp_path: Path) -> None:
    rng = random.Random(seed)
    folder = Path(shutil.copytree(tiny, tmp_path / "model"))
    name = mutate(folder, rng)
    began = time.monotonic()
    try:
        frames = np.zeros((4, 56, 56, 3), np.uint8)
        video = {"type": "video", "video": frames, "fps": 2.0}
        VideoLM.load(folder).encode([[{"role": "user", "content": [video, {"type": "text", "text": "What?"}]}]])
    except InputError as error:
        assert len(str(error).splitlines()) == 1 and len(str(error)) < 2000, name
    assert time.monotonic() - began < SECONDS, name
