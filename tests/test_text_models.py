"""Models of text alone: the same decoder without a vision tower, from transformers' folders to a training step.

Tolerance 1e-4 on logits as in test_model_parity.py.
"""

import inspect
import json
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tests.runs import small
from tests.small_models import TEXT, with_adapters
from vau_jax.common.files import InputError
from vau_jax.common.metric_writer import read_metrics
from vau_jax.data_prep import random_model
from vau_jax.models import protocol, qwen_vl
from vau_jax.models.lora import LoRA
from vau_jax.train import loop
from vau_jax.vlm import VideoLM

TEXTS = ["Which is warm? fire, ice, <answer>A</answer> What happens? It burns, it freezes"]
QUESTIONS = [
    [{"role": "user", "content": "Which is warm?"}],
    [{"role": "user", "content": "What happens? It burns, it freezes"}],
]


@pytest.fixture(scope="module", params=[("qwen2", True), ("qwen3", False)], ids=["qwen2", "qwen3"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as transformers writes it, every parameter at random."""
    family, tied = request.param
    folder = tmp_path_factory.mktemp(family)
    tokenizer = random_model.train_tokenizer(TEXTS * 9, 512)
    tokenizer.save_pretrained(folder)
    sizes = {**TEXT, **({"head_dim": 24} if family == "qwen3" else {}), "vocab_size": len(tokenizer)}
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes, **ends, tie_word_embeddings=tied))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.1)
    model.save_pretrained(folder)
    return folder


def theirs(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def test_logits_are_those_of_transformers(folder: Path) -> None:
    vlm = VideoLM.load(folder)
    batch = vlm.encode(QUESTIONS)
    assert batch.vision is None
    ids, mask = (torch.tensor(np.asarray(x)).long() for x in (batch.tokens, batch.mask))
    expected = theirs(folder)(input_ids=ids, attention_mask=mask).logits.detach().numpy()
    real = np.asarray(batch.mask)
    assert np.abs(expected[real]).max() > 1
    np.testing.assert_allclose(np.asarray(vlm.logits(batch))[real], expected[real], atol=1e-4)


def test_sampled_log_probabilities_are_those_of_transformers(folder: Path) -> None:
    vlm = VideoLM.load(folder)
    batch = vlm.encode(QUESTIONS[1:])
    out = vlm.generate(batch, 3, 8, seed=1)
    tokens, mask = np.asarray(out.tokens)[0], np.asarray(out.mask)[0]
    prompt = np.asarray(batch.tokens)[np.asarray(batch.mask)]
    for own, real, logps in zip(tokens, mask, np.asarray(out.logps)[0], strict=True):
        ids = torch.tensor(np.concatenate([prompt, own])[None]).long()
        expected = torch.log_softmax(theirs(folder)(input_ids=ids).logits[0], -1).detach().numpy()
        chosen = expected[np.arange(len(prompt) - 1, len(prompt) - 1 + len(own)), own]
        np.testing.assert_allclose(logps[real], chosen[real], atol=1e-4)


def test_a_saved_model_is_opened_by_transformers(folder: Path, tmp_path: Path) -> None:
    VideoLM.load(folder).save(tmp_path / "copy")
    ours, before = theirs(tmp_path / "copy").state_dict(), theirs(folder).state_dict()
    assert set(ours) == set(before)
    assert all(torch.equal(ours[name], before[name]) for name in before)


def test_questions_without_videos_train_a_model_of_text(folder: Path, tmp_path: Path) -> None:
    """SFT of one family, RFT of the other."""
    name = "vau_r1_sft" if "qwen2" in folder.name else "vau_r1_qa_rft"
    lines = [
        {"problem": f"Which is warm? ({i})", "options": ["A. fire", "B. ice"], "answer": "<answer>A</answer>"}
        for i in range(4)
    ]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    c = small(name, folder, tmp_path)
    c.data.dataset, c.data.csv, c.data.videos = "video_qa", str(tmp_path / "train.jsonl"), str(tmp_path)
    c.data.tasks = ("qa",)
    if c.stage == "rft":
        c.user_rewards = (("tests.reward_functions:vowels", 1.0),)
    loop.run(c, tmp_path / "run")
    (step,) = read_metrics(tmp_path / "run")
    assert step["grad_norm"] > 0


def test_peft_opens_the_adapters(folder: Path, tmp_path: Path) -> None:
    """Logits of the model with random adapters are the same there."""
    vlm = with_adapters(VideoLM.load(folder), LoRA(rank=2, alpha=4.0))
    vlm.save_adapter(tmp_path / "adapter")
    batch = vlm.encode(QUESTIONS[1:])
    ids, mask = (torch.tensor(np.asarray(x)).long() for x in (batch.tokens, batch.mask))
    adapted = peft.PeftModel.from_pretrained(theirs(folder), str(tmp_path / "adapter")).eval()
    expected = adapted(input_ids=ids, attention_mask=mask).logits.detach().numpy()
    real = np.asarray(batch.mask)
    plain = np.asarray(VideoLM.load(folder).logits(batch))
    np.testing.assert_allclose(np.asarray(vlm.logits(batch))[real], expected[real], atol=1e-4)
    assert np.abs(plain[real] - expected[real]).max() > 1e-2


def test_a_video_for_a_model_of_text_is_one_clear_error(folder: Path) -> None:
    video = {"type": "video", "video": np.zeros((4, 56, 56, 3), np.uint8), "fps": 2.0}
    with pytest.raises(InputError, match="reads text alone: give it examples without images and videos"):
        VideoLM.load(folder).encode([[{"role": "user", "content": [video]}]])


def test_the_model_has_the_methods_of_the_protocol() -> None:
    """With the same parameters, in the same order."""
    methods = [name for name, _ in inspect.getmembers(protocol.Model, inspect.isfunction) if not name.startswith("_")]
    assert set(methods) == {"encode_vision", "hidden", "prefill", "decode", "head", "loss_counts"}
    for name in methods:
        ours, wanted = (inspect.signature(getattr(owner, name)) for owner in (qwen_vl.QwenVL, protocol.Model))
        assert list(ours.parameters.values()) == list(wanted.parameters.values()), name
