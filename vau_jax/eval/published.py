"""Published results, in percent, for comparison; all of Qwen2.5-VL-3B.

VAU-R1 (arXiv 2505.23504): its project page; answers with reasoning for questions, without for grounding. Its intervals
of ECVA were scored against misread times (see datasets/vau_bench.py). SRVAU-R1 (arXiv 2602.01004).
"""

_QA, _MIOU = ("tasks", "qa", "accuracy"), ("tasks", "grounding", "mIoU")
_RECALL = {t: ("tasks", "grounding", f"R@{t}") for t in (0.3, 0.5, 0.7)}


def _grounding(source: str, base: tuple, sft: tuple, rft: tuple) -> dict:
    paths = [("mIoU", _MIOU), *((f"R@{t}", path) for t, path in _RECALL.items())]
    return {
        (source, f"{title}, {source}", path): {"Qwen2.5-VL-3B": base[i], "VAU-R1 SFT": sft[i], "VAU-R1 RFT": rft[i]}
        for i, (title, path) in enumerate(paths)
    }


# (annotation file's source, title, path of the estimate in metrics.json) -> model -> percent
PUBLISHED: dict[tuple[str, str, tuple[str, ...]], dict[str, float]] = {
    ("MSAD", "QA accuracy, MSAD", _QA): {
        "Qwen2.5-VL-3B": 82.50,
        "VAU-R1 SFT": 84.58,
        "VAU-R1 RFT": 87.08,
        "SRVAU-R1": 89.58,
    },
    ("UCF-Crime", "QA accuracy, UCF-Crime", _QA): {
        "Qwen2.5-VL-3B": 83.27,
        "VAU-R1 SFT": 90.44,
        "VAU-R1 RFT": 91.63,
        "SRVAU-R1": 92.82,
    },
    ("ECVA", "QA accuracy, ECVA", _QA): {"SRVAU-R1": 92.22},
    **_grounding("MSAD", (21.27, 30.00, 10.83, 4.17), (30.65, 47.50, 30.00, 9.17), (35.77, 53.33, 34.17, 15.83)),
    **_grounding("ECVA", (14.21, 17.16, 6.47, 3.23), (45.30, 66.67, 49.75, 24.13), (35.09, 49.00, 28.86, 19.40)),
    **_grounding("UCF-Crime", (10.91, 15.32, 6.45, 3.23), (4.98, 3.23, 0.81, 0.0), (16.80, 23.39, 8.06, 4.03)),
}
PUBLISHED["ECVA", "mIoU, ECVA", _MIOU]["SRVAU-R1"] = 44.42
PUBLISHED["MSAD", "mIoU, MSAD", _MIOU]["SRVAU-R1"] = 20.40
