"""Annotating new videos by a model behind an endpoint, in VAU-Bench's format."""

from ml_collections import ConfigDict

from vau_jax.configs import base


def get_config() -> ConfigDict:
    c = ConfigDict()
    c.seed = 0  # of the options' order
    c.videos = ""  # folder of the videos, and those below it
    c.classes = ""  # CSV with the columns video and class, of classes that are known; empty: none is
    c.rounds = 3  # times that a video is asked for, with what was wrong before
    c.video_seconds = 120.0  # time limit to decode one video
    c.annotator = base.endpoint()
    c.annotator.frames = 16  # pictures of a video that the model sees
    c.annotator.max_tokens = 2048
    return c
