"""Decodes and resizes the videos of a config once, into ArrayRecord shards that training and evaluation read.

    vau data cache --config=configs/X.py --workdir=FOLDER [--config.key=value]

Give FOLDER to them as --config.data.cache. Call it again to resume after a kill, to add videos, and to repair: records
of videos that changed, and damaged ones, are rebuilt. The config's frames a second, pixel budgets and model decide
what is stored; with others, frames are decoded from the videos, and counted (data/not_cached).
"""

from pathlib import Path

from ml_collections import ConfigDict

from vau_jax import cli
from vau_jax.common import progress
from vau_jax.common.files import InputError
from vau_jax.common.progress import Progress
from vau_jax.data import loading, pipeline
from vau_jax.data.processor import Processor
from vau_jax.data.video import frame_cache
from vau_jax.data.video.decode_worker import DecoderPool
from vau_jax.models import checkpoint, motion_prompt
from vau_jax.models.config import Motion, with_motion


def run(config: ConfigDict, workdir: str | Path) -> None:
    """Fills `workdir` with the videos of config.data, as config.model (or config.checkpoint) takes them."""
    source = config.get("model") or config.get("init_from") or config.get("checkpoint")
    if not isinstance(source, str) or not source:
        raise InputError("frames are resized for a model: set config.model, or config.checkpoint of an evaluation")
    processor = Processor(checkpoint.find_model(source).folder)
    if "motion" in config and config.motion.enabled:
        motion_prompt.check(config.motion)
        processor.config = with_motion(processor.config, Motion(config.motion.signed, config.motion.order))
    examples, audit = pipeline.load_examples(config.data)
    print(audit.table(), flush=True)
    sampling = processor.sampling(loading.video_options(config.data, processor.video_options))
    videos = list(dict.fromkeys(path for example in examples for path in example.media))
    shown = Progress("frames", len(videos), "video")
    pool = DecoderPool(config.data.workers, config.data.video_seconds)
    counts = frame_cache.build(workdir, videos, sampling, pool.read, config.data.workers, shown.show, pool.probe)
    print(f"frames: {', '.join(f'{n} {what}' for what, n in sorted(counts.items()))} ({workdir})", flush=True)


def summary(config: ConfigDict, workdir: Path) -> str:
    """The last lines of the program."""
    config_of = ("--config=CONFIG", "--workdir=RUN", f"--config.data.cache={workdir}")
    return progress.summary("frames: decoded", {"frames": workdir}, [("vau", "train", *config_of)])


if __name__ == "__main__":
    cli.main("data cache")
