"""Draws the diagrams of the READMEs as SVG, from the code where they show what it computes.

    python -m vau_jax.launch.diagrams [FOLDER]                 default: launch/diagrams
    python -m vau_jax.launch.diagrams --picture=EVALUATION     renews picture.png, of a demo's evaluation

`data.svg`: the way of a batch and of a completion; `packed.svg`: which tokens of a packed sequence see each other, as
the attention computes it; `mesh.svg`: how parameters and batches are split, by the rules of `vau_jax.common.sharding`.
"""

import argparse
from collections.abc import Sequence
from html import escape
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vau_jax.common import files, sharding
from vau_jax.common.files import InputError
from vau_jax.data.video.clips import VideoOptions
from vau_jax.data.video.decode_worker import DecoderPool
from vau_jax.eval import gallery, records
from vau_jax.models.attention import Layout, prefix_attention
from vau_jax.tasks import TASKS

FOLDER = Path(__file__).parent / "diagrams"
STYLE = """
  .page { fill: #ffffff } .box { fill: #f4f5f7; stroke: #57606a }
  text { fill: #1b1f24; font: 14px system-ui, sans-serif } .quiet { fill: #57606a; font-size: 12px }
  .strong { font-weight: 600 } .arrow { stroke: #57606a; fill: none; stroke-width: 1.5 } .head { fill: #57606a }
  .prompt { fill: #0072b2 } .own { fill: #d55e00 } .hidden { fill: #e6e8eb }
  @media (prefers-color-scheme: dark) {
    .page { fill: #0f1318 } .box { fill: #1a2028; stroke: #a0abb6 }
    text { fill: #e6edf3 } .quiet { fill: #a0abb6 } .arrow { stroke: #a0abb6 } .head { fill: #a0abb6 }
    .prompt { fill: #56b4e9 } .own { fill: #e69f00 } .hidden { fill: #2a323c }
  }
"""


def page(width: int, height: int, title: str, description: str, body: Sequence[str]) -> str:
    """A whole SVG with a name and a description for those who cannot see it."""
    head = '<marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" role="img" '
        'aria-labelledby="title desc">',
        f'<title id="title">{escape(title)}</title>',
        f'<desc id="desc">{escape(description)}</desc>',
        f"<style>{STYLE}</style>",
        f'<defs>{head}<path class="head" d="M0 0 8 4 0 8z"/></marker></defs>',
        f'<rect class="page" width="{width}" height="{height}"/>',
        *body,
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def box(x: float, y: float, width: float, title: str, *lines: str) -> str:
    """A box with a title and quiet lines below it; it is 30 pixels high, and 17 more for each line."""
    height = 30 + 17 * len(lines)
    texts = [f'<text class="strong" x="{x + 10}" y="{y + 20}">{escape(title)}</text>']
    texts += [
        f'<text class="quiet" x="{x + 10}" y="{y + 38 + 17 * number}">{escape(line)}</text>'
        for number, line in enumerate(lines)
    ]
    rect = f'<rect class="box" x="{x}" y="{y}" width="{width}" height="{height}" rx="6"/>'
    return f'<g class="boxed">{rect}{"".join(texts)}</g>'


def arrow(*points: tuple[float, float]) -> str:
    """A line through the points with a head at the last one."""
    path = "M" + " L".join(f"{x} {y}" for x, y in points)
    return f'<path class="arrow" d="{path}" marker-end="url(#head)"/>'


def text(x: float, y: float, words: str, kind: str = "quiet") -> str:
    """One line of text."""
    return f'<text class="{kind}" x="{x}" y="{y}">{escape(words)}</text>'


def data() -> str:
    """From files to updates, and from completions to rewards."""
    top, middle, bottom = 20, 150, 290
    body = [
        box(20, top, 170, "Files", "annotations, videos"),
        box(230, top, 170, "Examples", "vau_jax/datasets", "question, truth, media"),
        box(440, top, 190, "Prompt and frames", "vau_jax/tasks/prompts.py", "vau_jax/data/video"),
        box(670, top, 190, "Static batch", "vau_jax/data/pipeline.py", "vau_jax/data/processor.py"),
        box(670, middle, 190, "On the devices", "vau_jax/data/feed.py", "each host its own rows"),
        box(440, middle, 190, "SFT: completions", "vau_jax/train/sft.py", "weighted by section"),
        box(230, middle, 170, "Update", "vau_jax/train/update.py", "vau_jax/train/optim.py"),
        box(20, middle, 170, "Checkpoint", "vau_jax/models/", "checkpoint.py"),
        box(670, bottom, 190, "RFT: G completions", "vau_jax/rl/engine.py", "vau_jax/rl/sampling.py"),
        box(440, bottom, 190, "Text to arrays", "vau_jax/tasks/parsing.py", "strict and lenient"),
        box(230, bottom, 170, "Rewards", "vau_jax/tasks/rewards.py", "vau_jax/rl/grpo.py"),
        box(20, bottom, 170, "Evaluation, report", "vau_jax/eval/evaluate.py", "vau_jax/eval/report.py"),
        arrow((190, 50), (230, 50)),
        arrow((400, 50), (440, 50)),
        arrow((630, 50), (670, 50)),
        arrow((765, top + 64), (765, middle)),
        arrow((670, 182), (630, 182)),
        arrow((440, 182), (400, 182)),
        arrow((230, 182), (190, 182)),
        arrow((765, middle + 64), (765, bottom)),
        arrow((670, 322), (630, 322)),
        arrow((440, 322), (400, 322)),
        arrow((315, bottom), (315, middle + 64)),
        arrow((105, middle + 64), (105, bottom)),
        arrow((270, middle + 64), (270, 250), (720, 250), (720, bottom)),
        text(400, 243, "new weights sample the next completions"),
    ]
    description = (
        "Files become examples, prompts with frames, batches, and arrays on the devices. SFT updates on the right "
        "completions. RFT samples completions, parses and rewards them, and updates on their advantages; the new "
        "weights sample the next ones. Checkpoints are evaluated and reported."
    )
    return page(880, 374, "The way of a batch and of a completion", description, body)


def visible(prompt: int, generations: int, length: int) -> np.ndarray:
    """bool [S, S] with S = P + G C: whether query i attends to key j in a packed sequence, as the attention has it.

    Queries and keys are zero, so that all visible keys have the same weight, and values are unit vectors, so that a
    weight above zero shows which.
    """
    size = prompt + generations * length
    zero = jnp.zeros((1, size, 1, size))
    values = jnp.eye(size)[None, :, None, :]
    starts = jnp.repeat(jnp.arange(generations) * length, length)[None]
    layout = Layout(starts, length, fixed=True)
    weights = prefix_attention(zero, zero, values, jnp.ones((1, prompt), bool), layout, "jnp")
    return np.asarray(weights)[0, :, 0, :] > 0


def packed(prompt: int = 8, generations: int = 3, length: int = 4) -> str:
    """Who sees whom in a packed sequence, and what repeating the prompt would cost."""
    seen = visible(prompt, generations, length)
    size, left, top, cell = len(seen), 190, 60, 17
    names = ["prompt", *(f"completion {number + 1}" for number in range(generations))]
    starts = [0, *(prompt + number * length for number in range(generations))]
    body = [text(left, 22, "keys", "strong"), text(20, 52, "queries", "strong")]
    for name, start in zip(names, starts, strict=True):
        body.append(text(left + start * cell, 50, name if start == 0 else name.replace("completion", "c.")))
        body.append(text(20, top + start * cell + 15, name))
    for i in range(size):
        for j in range(size):
            kind = "hidden" if not seen[i, j] else "prompt" if j < prompt else "own"
            body.append(f'<rect class="{kind}" x="{left + j * cell}" y="{top + i * cell}" width="15" height="15"/>')
    right = left + size * cell + 30
    repeated = generations * (prompt + length)
    body += [
        text(right, 80, "One prompt and its completions", "strong"),
        text(right, 100, "are one sequence of P + G C tokens:"),
        text(right, 117, f"here {prompt} + {generations} x {length} = {size}."),
        text(right, 134, f"Repeated prompts have G (P + C) = {repeated}."),
        f'<rect class="prompt" x="{right}" y="160" width="15" height="15"/>',
        text(right + 24, 173, "the prompt, computed once"),
        f'<rect class="own" x="{right}" y="184" width="15" height="15"/>',
        text(right + 24, 197, "a completion's own tokens before"),
        f'<rect class="hidden" x="{right}" y="208" width="15" height="15"/>',
        text(right + 24, 221, "not seen"),
        text(right, 255, "Sampling reads the same prompt's cache"),
        text(right, 272, "for all completions; the gradient goes"),
        text(right, 289, "into the prompt once."),
    ]
    description = "The prompt's tokens see those before them. A completion's tokens see the whole prompt and their own."
    return page(880, top + size * cell + 20, "The packed sequence of a prompt and its completions", description, body)


SHOWN = (  # parameters of the diagram: what they are, a name, and a shape that any small mesh divides
    ("attention, in", "decoder/layers/q_proj/kernel", (2, 8, 8)),
    ("attention, out", "decoder/layers/o_proj/kernel", (2, 8, 8)),
    ("feed-forward, in", "decoder/layers/mlp/up_proj/kernel", (2, 8, 8)),
    ("feed-forward, out", "decoder/layers/mlp/down_proj/kernel", (2, 8, 8)),
    ("embedding", "embed_tokens/embedding", (8, 8)),
    ("output head", "lm_head", (8, 8)),
    ("vision, in", "visual/blocks/attn/qkv/kernel", (2, 8, 8)),
    ("norms, biases", "decoder/layers/input_layernorm/weight", (2, 8)),
)


def mesh() -> str:
    """A mesh of 2 x 2 x 2 devices, and along which of its axes each kind of array is split."""
    shape = {"data": 2, "fsdp": 2, "tensor": 2}
    devices = sharding.abstract_mesh(shape, 8)
    body = [text(20, 28, "mesh: data 2, fsdp 2, tensor 2", "strong")]
    for copy in range(2):
        for part in range(2):
            x, y = 20 + 190 * copy, 44 + 66 * part
            body.append(box(x, y, 170, f"data {copy}, fsdp {part}", "tensor 0     tensor 1"))
    body += [
        text(20, 190, "data: copies of the model, other examples"),
        text(20, 207, "fsdp: other examples too; parameters split, gathered to compute"),
        text(20, 224, "tensor: heads and hidden units are split; the same examples"),
        text(470, 28, "array", "strong"),
        text(620, 28, "split along", "strong"),
        text(470, 52, "batch"),
        text(620, 52, f"examples over {' and '.join(sharding.EXAMPLES)}"),
    ]
    for number, (title, name, size) in enumerate(SHOWN):
        spec = sharding.param_spec(name, size, devices)
        y = 74 + 20 * number
        body += [text(470, y, title), text(620, y, _told(spec))]
    body.append(text(470, 74 + 20 * len(SHOWN), "optimiser state"))
    body.append(text(620, 74 + 20 * len(SHOWN), "as its parameter"))
    description = "Eight devices along three axes, and for each kind of array the axes along which it is split."
    return page(880, 262, "The mesh of devices", description, body)


def _told(spec: jax.sharding.PartitionSpec) -> str:
    """`rows over fsdp, columns over tensor` of a matrix, whose leading axis over layers is left out."""
    axes = tuple(spec)[-2:]
    parts = [f"{what} over {axis}" for what, axis in zip(("rows", "columns"), axes, strict=False) if axis]
    return ", ".join(parts) or "nothing: whole on each device"


# --- The picture at the top of the README ---

WIDTH, FRAMES = 860, 8
INK, QUIET, COLOURS = "#1b1f24", "#57606a", {"true": "#1a7f37", "predicted": "#0969da", "draft": "#9a6700"}


def picture(evaluation: Path) -> Image.Image:
    """Frames of a clip whose anomaly was found, the true interval and the model's, and what the model wrote. Of the
    evaluation's grounding examples the first that reflection corrected. Raises InputError where there is none."""
    fitting = [r for r in records.load(evaluation) if r.draft_scores and r.scores[0] == 1 > r.draft_scores[0] > 0]
    fitting = [r for r in fitting if TASKS[r.task].timed]
    if not fitting:
        raise InputError(f"{evaluation} has no example whose interval reflection corrected")
    record = fitting[0]
    result = files.read_json(evaluation / "metrics.json")
    options = VideoOptions(nframes=FRAMES, min_pixels=32 * 32, max_pixels=128 * 128)
    frames = DecoderPool(1).read(gallery.video_of(result, record), options, 2, 1).frames
    height = round(WIDTH / FRAMES * frames.shape[1] / frames.shape[2])
    sections = [part for part in gallery.sections(record.completions[0]) if part[0] in ("think", "reflect", "revise")]
    image = Image.new("RGB", (WIDTH, height + 110 + 24 * len(sections)), "white")
    for number, frame in enumerate(frames):
        small = Image.fromarray(frame).resize((WIDTH // FRAMES - 2, height), Image.Resampling.NEAREST)
        image.paste(small, (number * WIDTH // FRAMES, 0))
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(15)
    for number, (kind, told) in enumerate(TASKS[record.task].bars(record)):
        bar, y = gallery.bar(kind, told, record.duration), height + 12 + 26 * number
        left, scale = 90, (WIDTH - 90) / 100
        draw.text((0, y), kind, QUIET, font)
        draw.rectangle((left, y, WIDTH, y + 18), "#eef0f2")
        for start, width in bar.spans:
            draw.rectangle((left + scale * start, y, left + scale * (start + width), y + 18), COLOURS[kind])
        draw.text((left + scale * bar.spans[0][0] + 6, y), bar.text, "white", font)
    for number, (tag, words) in enumerate(sections):
        y = height + 98 + 24 * number
        draw.text((0, y), tag, QUIET, font)
        draw.text((90, y), words, INK, font)
    return image


def write(folder: Path) -> None:
    """Writes all diagrams."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in (("data", data), ("packed", packed), ("mesh", mesh)):
        files.write_text(folder / f"{name}.svg", draw())


def main() -> None:
    """Draws what the command line names."""
    parser = argparse.ArgumentParser(description="the diagrams of the READMEs")
    parser.add_argument("folder", nargs="?", type=Path, default=FOLDER)
    parser.add_argument("--picture", type=Path, metavar="EVALUATION", help="renew the picture of an answer alone")
    args = parser.parse_args()
    if args.picture:
        picture(args.picture).save(args.folder / "picture.png", optimize=True)
    else:
        write(args.folder)


if __name__ == "__main__":
    files.exit_on_input_error(main)
