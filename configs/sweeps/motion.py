"""What a motion prompt is worth, on the demo's videos: without, trained from near the identity, and with the two
numbers published for UCF-Crime kept as they are; by cameras that shake and by cameras that are still. SFT alone."""

from vau_jax.configs.sweeps import Trials, over, product

PROGRAM = "vau_jax.launch.demo"
CONFIG = "configs/demo.py"


def get_hyper() -> Trials:
    same = [{"stages": ("sft",)}]
    cameras = [
        {"camera_shake": True, "shared": "{sweep}/shaking"},
        {"camera_shake": False, "shared": "{sweep}/still"},
    ]
    prompts = [
        {"motion.enabled": False},
        {"motion.enabled": True},
        {"motion.enabled": True, "motion.start": "ucf_crime", "motion.lr_scale": 0.0},
    ]
    return product(same, over("seed", range(3)), cameras, prompts)
