"""data.templates takes the source files of VAU-R1 as they are: their prompts are read, and nothing of them is run.

The stand-ins have the structure of those files, with other words.
"""

from pathlib import Path

import pytest

from vau_jax.common.files import InputError
from vau_jax.configs import base
from vau_jax.data.loading import make_loader
from vau_jax.data.processor import Processor
from vau_jax.tasks import TASKS, prompts
from vau_jax.tasks.classification import LABELS
from vau_jax.tasks.example import Example

TRAINER = '''
QUESTION_TEMPLATE = """Say: "[QUESTION]" Out of :[OPTION].
Think in <think> </think>, say it in <answer> </answer>.
"""

class Trainer:
    def make(self, example):
        text = QUESTION_TEMPLATE.replace("[QUESTION]", example["problem"]["question"])
        text = text.replace("[OPTION]", str(example["problem"]["options"]))
        return [{"role": "user", "content": [
            {"type": "text", "text": text}, {"type": "video", "video": example["video_path"], "min_pixels": 16 * 28},
        ]}]
'''
OPENED = 'raise SystemExit("this code must not run")\n'
FILES = {
    "open_r1/trainer/grpo_trainer_video_qa.py": OPENED + TRAINER,
    "open_r1/trainer/grpo_trainer_video_gqa.py": OPENED + TRAINER.replace("</answer>.", "</answer>, when in <glue>."),
    "open_r1/trainer/grpo_trainer_video_cls.py": OPENED + TRAINER,
    "open_r1/grpo_qa.py": OPENED,
    "open_r1/grpo_gqa.py": """
def load():
    FIXED_QUESTION = "Is it odd?"
    return {"problem": {"question": FIXED_QUESTION, "options": ["Normal", "Anomaly"]}}
""",
    "open_r1/grpo_cls.py": "FIXED_QUESTION = \"Which kind?\"\nFIXED_OPTION = \"['Fire', 'Normal']\"\n",
    "sft/sft_qa.py": """
QUESTION_TEMPLATE = "Say: [QUESTION] Out of :[OPTION]. In <answer> </answer>."
def convert(example):
    options = ' '.join(example["options"])
    return [{"type": "text"}, {"type": "video"}]
""",
    "sft/sft_description.py": 'FIXED_QUESTION = "Tell of the video."\n',
    "evaluation/inference_qa_qwen.py": '''
def generate_prompt(data):
    return f"""Asked: {data["Question"]}
    "A. "{data["Option 1"]} "B. "{data["Option 2"]} "C. "{data["Option 3"]} "D. "{data["Option 4"]}
    <think> </think><answer> </answer>"""

def generate_prompt_w_o_think(data):
    return f"""Only a letter: {data["Question"]} {data["Option 4"]}"""
''',
    "evaluation/inference_tag_qwen.py": """
THINK_FIXED_QUESTION = "Odd? Think."
NO_THINK_FIXED_QUESTION = "Odd?"
THINK_QUESTION_TEMPLATE = "With thought: [QUESTION] of [OPTION]"
NO_THINK_QUESTION_TEMPLATE = "Without: [QUESTION]"
def inference(model):
    return THINK_QUESTION_TEMPLATE.replace("[QUESTION]", THINK_FIXED_QUESTION).replace("[OPTION]", "[Anomaly, Normal]")
""",
    "evaluation/inference_reasoning_qwen.py": """
def inference(model):
    description_prompt = "First, in five."
    analysis_prompt = 'Then, why.'
""",
    "evaluation/inference_reasoning_internvl.py": 'description_prompt = "of another model"\n',
}


@pytest.fixture
def code(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        path = tmp_path / "src" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "src"


def example(task: str) -> Example:
    choices = {"qa": ("a {labels}", "b", "c", "d"), "classification": LABELS}.get(task, ())
    truth = {"qa": {"choice": 0}, "classification": {"label": "Fire"}, "grounding": {"intervals": []}}
    return Example("x", task, (), "What {options}?", choices, truth.get(task, {}))


def asked(folder: Path, task: str, style: str) -> str:
    return prompts.question(example(task), style, "full", prompts.load_templates(folder))


def test_rft_asks_with_the_trainers_template_and_a_list_of_options(code: Path) -> None:
    text = asked(code / "open_r1", "qa", "think")
    assert text.startswith("""Say: "What {options}?" Out of :['A. a {labels}', 'B. b', 'C. c', 'D. d'].\nThink in""")
    assert "Say: \"Is it odd?\" Out of :['Normal', 'Anomaly']." in asked(code / "open_r1", "grounding", "think")
    assert "Say: \"Which kind?\" Out of :['Fire', 'Normal']." in asked(code / "open_r1", "classification", "think")


def test_sft_asks_with_the_options_in_a_line(code: Path) -> None:
    text = asked(code / "sft", "qa", "direct")
    assert text == "Say: What {options}? Out of :A. a {labels} B. b C. c D. d. In <answer> </answer>."
    assert asked(code / "sft", "description", "think") == "Tell of the video."


def test_evaluation_has_a_form_with_and_one_without_thinking(code: Path) -> None:
    folder = code / "evaluation"
    assert asked(folder, "qa", "think").startswith('Asked: What {options}?\n    "A. "a {labels} "B. "b "C. "c "D. "d\n')
    assert asked(folder, "qa", "direct") == "Only a letter: What {options}? d"
    assert asked(folder, "grounding", "think") == "With thought: Odd? Think. of [Anomaly, Normal]"
    assert asked(folder, "grounding", "direct") == "Without: Odd?"


def test_the_two_turns_are_those_of_the_qwen_file(code: Path) -> None:
    assert prompts.load_templates(code / "evaluation").turns == ("First, in five.", "Then, why.")
    assert prompts.load_templates(code / "open_r1").turns == prompts.TURNS


def test_a_style_that_the_files_lack_is_one_line(code: Path) -> None:
    with pytest.raises(InputError, match=r"data\.templates has no prompt of qa for data\.style=think: it has direct"):
        asked(code / "sft", "qa", "think")


def test_tasks_that_the_files_lack_keep_their_own_prompt(code: Path) -> None:
    assert asked(code / "sft", "classification", "think") == prompts.question(
        example("classification"), "think", "full", prompts.default_templates()
    )


@pytest.mark.parametrize(("folder", "first"), [("open_r1", "text"), ("evaluation", "video")])
def test_the_text_stands_where_theirs_does(code: Path, model_folder: Path, folder: str, first: str) -> None:
    c = base.get_config().data
    c.templates, c.shuffle_options = str(code / folder), False
    loader = make_loader(Processor(model_folder), c, augment=False)
    content = loader._prompt(example("qa"), [])[2][0]["content"]
    assert [item["type"] for item in content] == ["text"]
    assert loader.templates.text_first == (first == "text")


def test_files_are_read_and_not_run(code: Path) -> None:
    """They begin with a statement that would end the process."""
    assert asked(code / "open_r1", "qa", "think")


@pytest.mark.parametrize("text", ["x = (", "\0", "(" * 5000])
def test_files_that_are_no_python_are_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "sft_qa.py").write_text(text)
    with pytest.raises(InputError, match=r"sft_qa\.py \(data\.templates\) is not Python source"):
        prompts.load_templates(tmp_path)


def test_a_folder_without_prompts_says_which_are_expected(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no prompts: expected a JSON file, or of VAU-R1's code the folder"):
        prompts.load_templates(tmp_path)


def test_every_verifiable_task_has_its_part_in_the_names() -> None:
    from vau_jax.tasks.published_prompts import TASK_OF_NAME

    assert {task for _, task in TASK_OF_NAME} == set(TASKS)
