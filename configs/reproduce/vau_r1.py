"""VAU-R1's training runs (arXiv 2505.23504), with the settings of its code (GVCLab/VAU-R1 at 845c33b).

    vau train --config=reproduce/vau_r1:rft_qa --workdir=DIR --config.model=Qwen2.5-VL-3B-Instruct \
        --config.data.csv=JOINED/train.csv --config.data.videos=JOINED

All are one epoch of single prompts over train.csv. What differs from the code on purpose: nothing is filtered in
sampling (there top-k 50, while scoring is not), SFT's loss is on the completion alone, parameters are float32, frames
are chosen by time, LoRA is applied once, grounding's direct answer also says Anomaly or Normal, and prompts are ours
unless data.templates names their files.
"""

from typing import Any

from ml_collections import ConfigDict

from vau_jax.configs.reproduce import Row, config_of

PUBLISHED = (("epochs", 1.0), ("batch_size", 1), ("data.shuffle_options", False), ("data.protocol", "paper"))
SFT = (*PUBLISHED, ("optim.lr", 2e-5), ("data.style", "direct"))
RFT = (*PUBLISHED, ("optim.lr", 1e-6), ("data.style", "think"))
INSTRUCT = (("rewards.gate", "none"),)  # a model that has not learned the grammar is rewarded without it
TIMED = (("rewards.tiou", 1.0),)
WITHOUT_UCF = (("data.sources", ("msad", "ecva")),)  # the intervals of UCF-Crime's train videos are not known
CLS = (("optim.lr", 2e-6), ("batch_size", 2))  # on two processes
LORA = (
    ("lora.rank", 16),
    ("lora.alpha", 16.0),
    ("lora.dropout", 0.05),
    ("lora.targets", (r"decoder/layers/.*_proj",)),  # q k v o gate up down
)
REASONING = (*PUBLISHED, ("optim.lr", 2e-5), ("data.style", "think"))  # ours: teaches the grammar, by the annotations

SFT_CODE, RFT_CODE = "src/sft", "src/open_r1"
QA, TAG, CLASSES = ("qa",), ("grounding",), ("classification",)
ASKED = ("qa_think", "qa_direct")
TIMES = ("tag_think", "tag_direct")
KINDS = ("cls_think", "cls_direct")

ROWS = {
    "sft_description": Row("sft", ("description",), changed=(*REASONING,), tested=("vau_eval",), prompts=SFT_CODE),
    "sft_qa": Row("sft", QA, changed=SFT, tested=(*ASKED, "vau_eval"), prompts=SFT_CODE),
    "sft_tag": Row("sft", TAG, changed=(*SFT, *WITHOUT_UCF), tested=TIMES, prompts=SFT_CODE),
    "sft_cls": Row("sft", CLASSES, changed=(*SFT, *LORA), tested=KINDS, prompts=SFT_CODE),
    "sft_cls_full": Row("sft", CLASSES, changed=SFT, tested=KINDS, prompts=SFT_CODE),
    "rft_qa": Row("rft", QA, changed=(*RFT, *INSTRUCT), tested=(*ASKED, "vau_eval", *KINDS), prompts=RFT_CODE),
    "rft_tag": Row(
        "rft", TAG, changed=(*RFT, *INSTRUCT, *TIMED, *WITHOUT_UCF), tested=(*TIMES, *KINDS), prompts=RFT_CODE
    ),
    "rft_cls": Row("rft", CLASSES, changed=(*RFT, *INSTRUCT, *CLS), tested=KINDS, prompts=RFT_CODE),
    "rft_qa_tag": Row("rft", (*QA, *TAG), changed=(*RFT, *INSTRUCT, *TIMED), tested=KINDS, prompts=RFT_CODE),
    "rft_qa_tag_cls": Row(
        "rft", (*QA, *TAG, *CLASSES), changed=(*RFT, *INSTRUCT, *TIMED), tested=KINDS, prompts=RFT_CODE
    ),
    # The code's first version began RFT with a description SFT.
    "rft_qa_after_description": Row(
        "rft", QA, "sft_description", (*RFT, *INSTRUCT), tested=(*ASKED, "vau_eval"), prompts=RFT_CODE
    ),
    # Ours: RFT after SFT that teaches the grammar.
    "sft_reasoning": Row("sft", (*QA, *TAG, *CLASSES), changed=REASONING, tested=(*ASKED, *TIMES, *KINDS)),
    "rft_qa_after_sft": Row("rft", QA, "sft_reasoning", RFT, tested=ASKED),
    "rft_tag_after_sft": Row("rft", TAG, "sft_reasoning", (*RFT, *TIMED, *WITHOUT_UCF), tested=TIMES),
    "rft_cls_after_sft": Row("rft", CLASSES, "sft_reasoning", (*RFT, *CLS), tested=KINDS),
}


def get_config(row: Any = "") -> ConfigDict:
    """The config of a row of ROWS."""
    return config_of(ROWS, row, "reproduce/vau_r1")
