"""Building reflection records: who answers first, who reflects, and what is kept. Fields of `data` are in base.py."""

from ml_collections import ConfigDict

from vau_jax.configs import base


def get_config() -> ConfigDict:
    train = base.get_config()
    c = ConfigDict()
    c.seed = 0
    c.data = train.data
    c.data.style = "think"  # of the student's first answer
    c.mesh = train.mesh  # devices of a student of ours, of each host
    c.compilation_cache = train.compilation_cache
    c.dry_run = 0  # print so many of the teacher's prompts and stop

    c.student = base.endpoint()  # answers first; neither url nor checkpoint: drafts by rule from the annotation
    c.student.checkpoint = ""  # run or model folder, which goes before url
    c.student.samples = 4  # answers of each question
    c.student.temperature = 1.0
    c.student.json_mode = False
    c.student.frames = 16  # pictures of the video that a student behind url sees
    c.student.batch_size = 8
    c.student.dtype = train.dtype

    c.teacher = base.endpoint()  # writes reflection and revision; url empty: by rule from the annotation
    c.teacher.frames = 0  # pictures of the video that the teacher sees; 0: text alone

    c.keep = ConfigDict()
    c.keep.tiou = 0.5  # a grounding draft is right from this temporal IoU on
    c.keep.words = (5, 150)  # least and most of reflection, and of revision
    c.keep.likeness = 0.8  # share of a text's five-word runs that an earlier one has: from here on a duplicate
    c.keep.wrong_share = 0.7  # of drafts that are wrong, among the records (SRPO, arXiv 2506.01713: about 70%)
    c.keep.most = 0  # records; 0: as many as the mix allows
    return c
