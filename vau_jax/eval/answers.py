"""Who answers the questions of an evaluation: a model of ours, or one behind an endpoint. Both see the same prompts,
the options in the same order, and their texts become the same records.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from vau_jax.common import processes, sharding
from vau_jax.common.chat import Chat, Message, frames_content
from vau_jax.common.files import InputError
from vau_jax.data import loading, pipeline
from vau_jax.data.loading import Loaded
from vau_jax.data.pipeline import HostBatch
from vau_jax.data.video import clips
from vau_jax.data.video.decode_worker import DecoderPool
from vau_jax.data.video.decoders import VideoError
from vau_jax.eval import records
from vau_jax.rl import sampling
from vau_jax.tasks import TASKS, prompts
from vau_jax.tasks.example import Example
from vau_jax.tasks.record import Record
from vau_jax.vlm import VideoLM

BETWEEN = "\n\n"  # the texts of two turns


def two_turns(example: Example, config: ConfigDict) -> bool:
    """Whether an example is asked as VAU-Eval is published: for a description, then for an analysis."""
    return config.description_turns == 2 and TASKS[example.task].judged


# --- A model of ours ----------------------------------------------------------------------------------------------


def by_model(examples: list[Example], vlm: VideoLM, config: ConfigDict) -> Iterator[Record]:
    """Decodes in padded batches, greedily at temperature 0."""
    templates = prompts.load_templates(config.data.templates)
    groups = [[e for e in examples if two_turns(e, config) == two] for two in (False, True)]
    for two, group in zip((False, True), groups, strict=True):
        if not group:
            continue
        loader = loading.make_loader(vlm.processor, config.data, False, config.blind, templates.turns[0] * two)
        for host in pipeline.eval_batches(pipeline.Prompts(group, loader), config.batch_size, config.seed):
            texts = _decoded(host, vlm, config)
            if two:
                more = _decoded(_second(host, texts, vlm, templates.turns[1], config), vlm, config)
                texts = [
                    [BETWEEN.join(both) for both in zip(*pair, strict=True)] for pair in zip(texts, more, strict=True)
                ]
            for item, completions in zip(host.examples, texts, strict=True):
                yield records.of_loaded(item, completions, config.data.style)


def _decoded(host: HostBatch, vlm: VideoLM, config: ConfigDict) -> list[list[str]]:
    """config.samples texts for each prompt."""
    out = sampling.sample(
        vlm.variables,
        jax.device_put(host.batch, sharding.examples(vlm.model.mesh)),
        pipeline.sampling_keys(host.examples, config.seed),
        config.temperature or 1.0,
        model=vlm.model,
        num_generations=config.samples,
        max_new_tokens=config.data.max_completion_tokens,
        end_tokens=vlm.processor.end_tokens,
        greedy=config.temperature == 0,
        repetition_penalty=config.repetition_penalty or vlm.processor.repetition_penalty,
    )
    return vlm.processor.decode_completions(np.asarray(out.tokens), np.asarray(out.mask))


def _second(host: HostBatch, texts: list[list[str]], vlm: VideoLM, question: str, config: ConfigDict) -> HostBatch:
    """The prompts of the second turn, after the first texts."""

    def continued(item: Loaded, first: str) -> Loaded:
        turns = [*item.messages, {"role": "assistant", "content": first}, {"role": "user", "content": question}]
        prompt = vlm.processor.chat_text(turns)
        return replace(item, prompt=prompt, encoded=vlm.processor.encode_text(prompt, list(item.visuals)))

    items = [continued(item, first) for item, (first, *_) in zip(host.examples, texts, strict=True)]
    return pipeline.Collator(vlm.processor, config.data)(items)


# --- A model behind an endpoint -----------------------------------------------------------------------------------


def by_endpoint(examples: list[Example], config: ConfigDict, workdir: Path) -> Iterator[Record]:
    """Answers of the model behind config.endpoint, which sees endpoint.frames pictures of a video. Texts are kept in
    endpoint.jsonl, so that none is paid for twice. Raises InputError after the last where some got no answer."""
    chat = Chat(config.endpoint, processes.own_lines(workdir / "endpoint.jsonl"))
    templates, style = prompts.load_templates(config.data.templates), config.data.style
    pool = DecoderPool(config.data.workers, config.data.video_seconds)
    asked: list[_Asked] = []
    failed: list[Record] = []
    unanswered: list[str] = []

    def first() -> Iterator[list[Message]]:
        for given in examples:
            rng = loading.rng_of(given, config.seed)
            example = loading.in_order(given, rng, config.data.shuffle_options)
            try:
                one = _asked(example, config, templates, pool)
            except VideoError as error:
                failed.append(records.make(example, [""], style, failure=str(error)))
                continue
            asked.append(one)
            yield one.messages

    def answered(questions: Iterator[list[Message]], of: Sequence[_Asked]) -> Iterator[tuple[_Asked, str]]:
        for number, reply in chat.ask_all(questions):
            if reply.error:
                unanswered.append(f"{of[number].example.id}: {reply.error}")
            else:
                yield of[number], reply.text

    begun: list[tuple[_Asked, str]] = []
    for one, text in answered(first(), asked):
        if two_turns(one.example, config):
            begun.append((one, text))
        else:
            yield one.record(text, style)
    yield from failed
    pool.close()
    following = (one.continued(text, templates.turns[1]) for one, text in begun)
    earlier = {one.example.id: text for one, text in begun}
    for one, text in answered(following, [one for one, _ in begun]):
        yield one.record(earlier[one.example.id] + BETWEEN + text, style)
    if unanswered:
        raise InputError(
            f"{config.endpoint.url} left {len(unanswered)} of {len(examples)} questions unanswered, such as "
            f"{unanswered[0]}: the same command asks these again"
        )


@dataclass(frozen=True)
class _Asked:
    """A question as an endpoint gets it."""

    example: Example  # with its options in the order shown
    messages: list[Message]
    text: str
    seconds: float  # length of the video

    def continued(self, answer: str, question: str) -> list[Message]:
        """The messages of a second turn."""
        return [*self.messages, {"role": "assistant", "content": answer}, {"role": "user", "content": question}]

    def record(self, text: str, style: str) -> Record:
        return records.make(self.example, [text], style, self.text, None, self.seconds)


def _asked(example: Example, config: ConfigDict, templates: prompts.Templates, pool: DecoderPool) -> _Asked:
    """Raises VideoError."""
    if two_turns(example, config):
        text = templates.turns[0]
    else:
        text = prompts.question(example, config.data.style, config.data.wording, templates)
    options = clips.VideoOptions(nframes=config.endpoint.frames, min_pixels=64 * 64, max_pixels=512 * 512)
    read = [pool.read(path, options, factor=2, multiple=1) for path in example.media]
    shown: list[Message] = []
    for clip in read:
        frames = np.full_like(clip.frames, loading.GREY) if config.blind else clip.frames
        times = ", ".join(f"{time:.1f}" for time in clip.times)
        shown += [*frames_content(frames), {"type": "text", "text": f"These are frames of a video, at {times} s."}]
    said = [{"type": "text", "text": text}]
    content = said + shown if templates.text_first else shown + said
    return _Asked(example, [{"role": "user", "content": content}], text, sum(clip.duration for clip in read))
