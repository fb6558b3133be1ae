"""Every field of every config, once, with its default. The other configs change what differs."""

from ml_collections import ConfigDict

from vau_jax.tasks import TASKS, prompts


def get_config() -> ConfigDict:
    """The defaults: VAU-R1's settings where the papers state them."""
    c = ConfigDict()
    c.format = 2  # of these fields: a run of an earlier format resumes with the defaults of what it lacks
    c.stage = "sft"  # sft: learn given completions; rft: GRPO on sampled ones
    c.model = ""  # Hugging Face folder: config, tokenizer, safetensors
    c.init_from = ""  # folder or earlier run (its last step now, for good) that the weights come from; empty: model
    c.seed = 0  # of data order, augmentation and sampling
    c.steps = 1000  # updates
    c.batch_size = 8  # prompts an update, over all devices
    c.micro_batches = 1  # parts of a batch that are computed one after the other: less memory, the same result
    c.skip_nonfinite = False  # leave out an update whose loss or gradient is not a number; else the run stops there
    c.log_every = 1  # steps between lines of metrics.jsonl
    c.wandb = ""  # project of Weights & Biases that the metrics go to as well; empty: none
    c.profile_steps = (0, 0)  # the first and the last step of a trace for XProf, in workdir/profile; 0: none
    c.dtype = "bfloat16"  # of activations: float32 or bfloat16
    c.param_dtype = "float32"  # of parameters and optimiser: bfloat16 would lose updates of lr 1e-6
    c.remat = True  # compute activations again in the backward pass instead of keeping them
    c.unroll = 1  # layers in one round of the scan: more is faster for small models, and slower to compile

    c.attention = "auto"  # of prompts: jnp, xla, cudnn (GPU), splash (TPU); auto: the best of them here

    c.lora = ConfigDict()  # low-rank adapters: they alone are trained, and saved in checkpoints
    c.lora.rank = 0  # 0: none, all parameters are trained
    c.lora.alpha = 32.0  # the adapters' output is times alpha / rank
    c.lora.dropout = 0.0  # of the adapters' input, in training; sft only
    c.lora.targets = (r"decoder/layers/.*_proj",)  # linear layers that get them (regexes on names)
    c.lora.rank_stabilised = False  # alpha / sqrt(rank) instead

    c.motion = ConfigDict()  # Video Motion Prompts (arXiv 2407.03179) in front of the vision tower
    c.motion.enabled = False  # a model that has one keeps it all the same
    c.motion.start = "identity"  # values to begin from: identity, or published ones: mpii, hmdb51, ucf_crime
    c.motion.signed = True  # differences with their sign, or their size alone
    c.motion.order = "rgb"  # of the grey weights; bgr: as the published code has them
    c.motion.weight = 0.0  # lambda: times the variation of the attention over time, added to the loss
    c.motion.lr_scale = 10.0  # learning rate of its two numbers, times optim.lr
    c.motion.weight_decay = 0.0  # theirs

    c.mesh = ConfigDict()  # devices along each axis; -1 takes all that are left
    c.mesh.data = 1  # copies of the model
    c.mesh.fsdp = -1  # parameters and examples split
    c.mesh.tensor = 1  # heads and hidden units split

    c.data = ConfigDict()
    c.data.dataset = "vau_bench"  # format of data.csv: vau_bench, vau_bench_tfds, array_record, video_qa
    c.data.split = "train"  # of a TFDS dataset; files are splits of their own
    c.data.csv = ""  # annotations: CSV or JSONL with VAU-Bench's columns
    c.data.videos = ""  # folder with the video files that the annotations name
    c.data.reflection = ""  # JSONL of reflection records; empty: reasoning from the annotations
    c.data.source = "auto"  # rules for times: msad, ucf, ecva, or auto by file name
    c.data.protocol = "clean"  # clean: dirt mended; paper: as the published denominators
    c.data.tasks = ("qa", "grounding", "classification")  # what is asked of each video; also: description
    c.data.task_weights = ConfigDict({task: 1.0 for task in TASKS})  # share in the mix
    c.data.style = "think"  # completions: direct (not in rft), think, two_pass (think, draft, think again), reflection
    c.data.wording = "full"  # prompts: full says the grammar, short asks only
    c.data.templates = ""  # JSON with prompts in your words, see data_prep/README.md
    c.data.max_examples = 0  # use only the first so many (video, task) pairs; 0: all
    c.data.fps = 2.0  # frames a second of video
    c.data.min_frames = 4  # of a video, however short
    c.data.max_frames = 768  # of a video, however long
    c.data.budget = "vau_r1"  # pixels: vau_r1 (3584 tokens a video), model (the model folder's); numbers below go first
    c.data.min_pixels = 0  # a frame; 0: the budget's
    c.data.max_pixels = 0  # a frame; 0: the budget's
    c.data.total_pixels = 0  # all frames of a video, by pairs; 0: the budget's
    c.data.cache = ""  # folder that data_prep/cache_frames.py filled; empty: decode every time
    c.data.augment = False  # random flip, shift, colour and cuts
    c.data.section_weights = ConfigDict(prompts.SECTION_WEIGHTS)  # of completions in the SFT loss, the end token's 1
    c.data.shuffle_options = True  # order of the four options drawn anew each time
    c.data.max_completion_tokens = 1024  # longer completions are cut
    c.data.bucket = (256, 1024, 16, 64, 16, 64)  # least padded sizes: tokens, patches, windows, size, frames, size
    c.data.length_window = 8  # batches among which examples are sorted, to batch those of similar length; 1: none
    c.data.workers = 2  # processes that decode videos
    c.data.video_seconds = 120.0  # to decode one video; longer is a failure

    c.data.difficulty = ConfigDict()  # rft: harder or easier prompts by the running accuracy of a task and class
    c.data.difficulty.enabled = False  # every prompt as it is
    c.data.difficulty.easy = 0.8  # above this mean score frames get noise, or some are dropped
    c.data.difficulty.hard = 0.2  # below it the prompt gets a line of the annotation
    c.data.difficulty.memory = 10  # groups that the running accuracy remembers
    c.data.difficulty.noise = 16.0  # standard deviation, of 255 grey levels
    c.data.difficulty.drop = 0.25  # share of frames that are replaced by the one before

    c.optim = ConfigDict()  # AdamW
    c.optim.lr = 2e-5  # highest learning rate
    c.optim.schedule = "linear"  # after the warm-up: constant, linear or cosine
    c.optim.warmup_steps = 0  # from 0 up to lr
    c.optim.final_lr = 0.0  # end of the schedule, as a share of lr
    c.optim.b1 = 0.9  # decay of the mean of gradients
    c.optim.b2 = 0.999  # decay of the mean of their squares
    c.optim.eps = 1e-8  # added to that mean's root: a step of a gradient much smaller than this is in proportion to it
    c.optim.weight_decay = 0.0  # decoupled, times the learning rate
    c.optim.no_decay = (r".*(norm\d?|layernorm)/weight", r".*/bias")  # names without weight decay (regexes)
    c.optim.freeze = ()  # regexes on parameter names; VAU-R1 trains everything
    c.optim.clip_norm = 1.0  # most norm of the gradient of all parameters

    c.rollout = ConfigDict()  # rft only
    c.rollout.num_generations = 4  # completions a prompt (G)
    c.rollout.temperature = 1.0  # of sampling and scoring alike; at least 0.01
    c.rollout.top_p = 1.0  # mass of the likeliest tokens kept; below 1 what is sampled is no longer what is scored
    c.rollout.top_k = 0  # number of the likeliest tokens kept, likewise; 0: all
    c.rollout.min_new_tokens = 0  # no completion ends before; end tokens are left out as by top_p
    c.rollout.max_draws = 1  # above 1, groups with equal rewards are replaced, in so many draws of a batch at most
    c.rollout.reward_workers = 4  # processes that call user_rewards
    c.rollout.reward_seconds = 60.0  # for one number; longer is a failure of that completion

    c.rewards = ConfigDict()  # weights; 0: off
    c.rewards.format = 1.0  # the grammar is kept, every value can be read, and none contradicts another
    c.rewards.accuracy = 1.0  # of the final answer
    c.rewards.tiou = 0.0  # temporal IoU of the final interval, grounding
    c.rewards.reflection = 0.0  # its form, and its effect from draft to final answer
    c.rewards.judge = 0.0  # marks of config.judge, descriptions
    c.user_rewards = ()  # your own: (("package.module:function", weight), ...), see vau_jax/rl/user_rewards.py

    c.grpo = ConfigDict()
    c.grpo.loss_type = "grpo"  # grpo, bnpo, dr_grpo, dapo, gspo, cispo, reg_grpo (DeepVideo-R1's regression)
    c.grpo.iterations = 1  # updates from one rollout
    c.grpo.scale = "group"  # advantages divided by the std of: group, batch, none
    c.grpo.per_reward = False  # normalise each reward by itself before they are added (GDPO)
    c.grpo.beta = 0.04  # weight of the KL term; 0: no reference policy is kept
    c.grpo.kl = "k3"  # k1, k2, k3
    c.grpo.kl_in = "loss"  # or reward: beta times the completion's KL is taken off it
    c.grpo.reference_every = 0  # steps after which the reference follows the policy; 0: it stays where RFT began
    c.grpo.reference_mix = 1.0  # share of the policy in the new reference
    c.grpo.epsilon_low = 0.2  # the ratio is clipped below 1 - this
    c.grpo.epsilon_high = 0.2  # and above 1 + this; for cispo the cap itself
    c.grpo.delta = 0.0  # most ratio in the unclipped branch (dual clip); 0: none
    c.grpo.entropy_bonus = 0.0  # times the mean entropy of tokens, taken off the loss
    c.grpo.importance = "auto"  # tokens weighed by policy / sampler: always, never, auto (top_p, top_k, min_new_tokens)
    c.grpo.importance_cap = 2.0  # most of that weight
    c.grpo.mask_truncated = False  # leave completions without an end token out of the loss (they stay in the baseline)
    c.grpo.overlong_buffer = 0  # tokens before the limit in which a penalty grows from 0 to 1 (DAPO); 0: none
    c.grpo.regression_eps = 1.0  # reg_grpo: least spread of the log-ratios

    c.checkpoint = ConfigDict()
    c.checkpoint.every = 100  # steps between checkpoints; the last step is always one
    c.checkpoint.keep = 2  # the newest so many, and steps that other runs began with
    c.checkpoint.best = "auto"  # and the best by the mean of this metric since the one before; auto: reward, or -loss

    c.judge = endpoint()  # marks descriptions, where rewards.judge has a weight
    c.judge.temperature = 0.0  # the same marks each time

    return c.lock()  # a misspelt field in another config fails and names the nearest


def endpoint() -> ConfigDict:
    """The fields of a model behind an OpenAI-compatible chat endpoint."""
    c = ConfigDict()
    c.url = ""  # such as http://localhost:8000/v1, without user, password or query: configs are kept with runs
    c.model = ""  # its name there
    c.key_variable = "OPENAI_API_KEY"  # environment variable that holds the key
    c.concurrency = 8  # questions at once
    c.seconds = 120.0  # for a response, from connecting to its last byte
    c.retries = 6  # with growing pauses, after rate limits, server errors, timeouts; 1 + retries times seconds is all
    c.temperature = 0.7  # of its sampling; 0: the likeliest
    c.max_tokens = 1024  # of an answer
    c.json_mode = True  # ask for JSON by response_format; some servers do not know it
    c.price_prompt = 0.0  # of a million tokens
    c.price_completion = 0.0  # likewise, in the same currency
    return c
