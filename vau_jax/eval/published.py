"""Published results, with what each number is: data set, task, model, training, with or without reasoning, and source.

VAU-R1's (arXiv 2505.23504) are of its project page, August 2025. SRVAU-R1's (arXiv 2602.01004) are as the aggregator
wizwand lists them, not checked against the paper: its two numbers for questions of MSAD and UCF-Crime are without
reasoning, and its MSAD grounding is out of domain.
"""

from collections.abc import Iterator
from typing import NamedTuple

PAGE = "VAU-R1, project page"
AGGREGATOR = "SRVAU-R1, by an aggregator"
POOLED = "MSAD, UCF-Crime and ECVA"
POOLED_TASK = "classification"  # over the rows of all three test files; its SFT is of LoRA
AXES = ("CLS", "KM", "FLU", "INF", "FAC", "total")  # of VAU-Eval: five of 10, and their sum as the judge said it
RECALLS = ("mIoU", "R@0.3", "R@0.5", "R@0.7")
ROWS = {  # (data set, task) -> rows of the test file that are asked under the published protocol
    **{("MSAD", task): 240 for task in ("qa", "grounding", "classification", "vau_eval")},
    **{("ECVA", task): 402 for task in ("qa", "grounding", "classification", "vau_eval")},
    ("UCF-Crime", "qa"): 251,
    ("UCF-Crime", "vau_eval"): 251,
    ("UCF-Crime", "grounding"): 274,  # of which 124 have an interval
    ("UCF-Crime", "classification"): 290,
    (POOLED, POOLED_TASK): 932,
}


class Number(NamedTuple):
    """A published number."""

    dataset: str
    task: str  # qa, grounding, classification, or vau_eval
    metric: str
    model: str
    training: str  # empty: none
    thinking: bool | None  # answers after reasoning; None: not stated
    value: float  # percent, or for VAU-Eval marks
    source: str
    note: str = ""


BASE_2B, BASE_3B, BASE_7B = "Qwen2-VL-2B", "Qwen2.5-VL-3B", "Qwen2.5-VL-7B"
SFT, RFT = "SFT", "RFT"

# (model, training) -> accuracy without and with reasoning, then VAU-Eval
QUESTIONS = {
    "MSAD": {
        ("InternVL2.5-2B", ""): (76.67, 72.08, 6.84, 6.23, 8.55, 6.64, 6.64, 34.90),
        (BASE_7B, ""): (84.58, 83.33, 6.75, 6.41, 9.27, 7.74, 6.92, 37.08),
        ("InternVL2.5-8B-MPO", ""): (82.50, 84.17, 6.83, 6.33, 8.32, 6.37, 6.86, 34.72),
        (BASE_2B, ""): (77.08, 72.50, 5.94, 5.43, 8.77, 6.29, 5.90, 32.25),
        (BASE_2B, SFT): (82.92, 85.83, 6.04, 5.43, 8.89, 6.55, 5.93, 32.84),
        (BASE_2B, RFT): (82.92, 83.75, 6.05, 5.49, 8.89, 6.50, 6.05, 32.98),
        (BASE_3B, ""): (85.83, 82.50, 5.77, 5.24, 9.02, 6.74, 5.70, 32.47),
        (BASE_3B, SFT): (86.25, 84.58, 2.89, 2.22, 4.89, 3.52, 2.44, 15.96),
        (BASE_3B, RFT): (88.33, 87.08, 5.97, 5.49, 9.05, 6.84, 6.03, 33.38),
    },
    "UCF-Crime": {
        ("InternVL2.5-2B", ""): (84.86, 68.13, 4.40, 3.08, 8.09, 5.69, 3.47, 24.74),
        (BASE_7B, ""): (92.03, 89.64, 4.80, 3.73, 8.95, 7.05, 4.25, 28.78),
        ("InternVL2.5-8B-MPO", ""): (89.64, 90.44, 3.79, 3.20, 8.23, 5.77, 3.48, 24.47),
        (BASE_2B, ""): (87.25, 83.67, 3.47, 2.48, 7.75, 4.49, 2.82, 21.02),
        (BASE_2B, SFT): (83.67, 86.06, 3.61, 2.26, 7.30, 4.79, 2.70, 20.66),
        (BASE_2B, RFT): (88.45, 88.05, 4.04, 2.75, 7.72, 4.89, 3.11, 22.52),
        (BASE_3B, ""): (91.63, 83.27, 4.31, 2.88, 8.70, 5.95, 3.27, 25.10),
        (BASE_3B, SFT): (90.84, 90.44, 1.80, 1.01, 4.15, 2.82, 1.11, 10.89),
        (BASE_3B, RFT): (92.03, 91.63, 4.42, 2.98, 8.71, 5.98, 3.39, 25.49),
    },
}

# (model, training) -> RECALLS without, and with reasoning; trained on MSAD and ECVA
INTERVALS = {
    "MSAD": {
        (BASE_2B, ""): ((0.0, 0.0, 0.0, 0.0), (0.0, 0.0, 0.0, 0.0)),
        (BASE_7B, ""): ((45.90, 70.83, 45.83, 21.67), (17.57, 26.67, 11.67, 3.33)),
        (BASE_3B, ""): ((21.27, 30.00, 10.83, 4.17), (13.00, 16.67, 5.83, 1.67)),
        (BASE_3B, SFT): ((30.65, 47.50, 30.00, 9.17), (35.17, 50.83, 34.17, 15.00)),
        (BASE_3B, RFT): ((35.77, 53.33, 34.17, 15.83), (30.70, 48.33, 29.17, 12.50)),
    },
    "ECVA": {
        (BASE_2B, ""): ((0.0, 0.0, 0.0, 0.0), (0.17, 0.30, 0.0, 0.0)),
        (BASE_7B, ""): ((19.85, 25.87, 15.17, 9.70), (5.71, 7.96, 4.73, 2.99)),
        (BASE_3B, ""): ((14.21, 17.16, 6.47, 3.23), (6.35, 7.21, 1.99, 0.50)),
        (BASE_3B, SFT): ((45.30, 66.67, 49.75, 24.13), (45.96, 65.67, 51.00, 26.12)),
        (BASE_3B, RFT): ((35.09, 49.00, 28.86, 19.40), (33.25, 48.51, 30.60, 18.41)),
    },
    "UCF-Crime": {
        (BASE_2B, ""): ((2.74, 4.84, 0.0, 0.0), (0.12, 0.0, 0.0, 0.0)),
        (BASE_7B, ""): ((22.72, 33.87, 16.13, 8.06), (4.89, 8.06, 1.61, 0.0)),
        (BASE_3B, ""): ((10.91, 15.32, 6.45, 3.23), (7.68, 10.48, 4.84, 1.61)),
        (BASE_3B, SFT): ((4.98, 3.23, 0.81, 0.0), (5.76, 5.65, 0.81, 0.81)),
        (BASE_3B, RFT): ((16.80, 23.39, 8.06, 4.03), (9.21, 9.68, 4.03, 1.61)),
    },
}
NOTES = {"ECVA": "truth with times misread as seconds", "UCF-Crime": "out of domain"}

# training of Qwen2.5-VL-3B -> binary and multi-class accuracy without, and with reasoning
CLASSES = {
    "": ((62.77, 47.96), (59.33, 39.06)),
    "SFT CLS": ((81.12, 29.08), (83.37, 32.19)),
    "RFT CLS": ((60.30, 46.14), (59.01, 42.27)),
    "RFT QA": ((59.01, 46.14), (58.91, 41.95)),
    "RFT TAG": ((67.81, 49.46), (74.14, 46.14)),
    "RFT QA-TAG": ((65.77, 47.53), (67.60, 45.06)),
    "RFT QA-TAG-CLS": ((64.70, 48.61), (65.02, 45.60)),
}

SRVAU = "SRVAU-R1"
REFLECTED = (
    Number("MSAD", "qa", "accuracy", SRVAU, "", False, 89.58, AGGREGATOR),
    Number("UCF-Crime", "qa", "accuracy", SRVAU, "", False, 92.82, AGGREGATOR),
    Number("ECVA", "qa", "accuracy", SRVAU, "", None, 92.22, AGGREGATOR),
    Number("ECVA", "qa", "accuracy", BASE_3B, RFT, None, 89.53, "VAU-R1, by the aggregator"),
    Number("MSAD", "vau_eval", "CLS", SRVAU, "", None, 7.65, AGGREGATOR),
    Number("UCF-Crime", "vau_eval", "CLS", SRVAU, "", None, 7.22, AGGREGATOR),
    Number("ECVA", "vau_eval", "CLS", SRVAU, "", None, 2.86, AGGREGATOR),
    Number("ECVA", "vau_eval", "CLS", BASE_3B, RFT, None, 1.45, "VAU-R1, by the aggregator"),
    Number("ECVA", "grounding", "mIoU", SRVAU, "", None, 44.42, AGGREGATOR),
    Number("MSAD", "grounding", "mIoU", SRVAU, "", None, 20.40, AGGREGATOR, "out of domain"),
)


def numbers() -> Iterator[Number]:
    """All of them."""
    for dataset, rows in QUESTIONS.items():
        for (model, training), (direct, think, *marks) in rows.items():
            yield Number(dataset, "qa", "accuracy", model, training, False, direct, PAGE)
            yield Number(dataset, "qa", "accuracy", model, training, True, think, PAGE)
            for axis, mark in zip(AXES, marks, strict=True):
                yield Number(dataset, "vau_eval", axis, model, training, None, mark, PAGE, "judged by DeepSeek-chat")
    for dataset, rows in INTERVALS.items():
        for (model, training), both in rows.items():
            for thinking, values in zip((False, True), both, strict=True):
                for metric, value in zip(RECALLS, values, strict=True):
                    note = NOTES.get(dataset, "")
                    yield Number(dataset, "grounding", metric, model, training, thinking, value, PAGE, note)
    for training, both in CLASSES.items():
        for thinking, values in zip((False, True), both, strict=True):
            for metric, value in zip(("binary", "multiclass"), values, strict=True):
                yield Number(POOLED, POOLED_TASK, metric, BASE_3B, training, thinking, value, PAGE)
    yield from REFLECTED
