"""Every field of every config, once, with its default. The other configs change what differs."""

from ml_collections import ConfigDict, FieldReference

from vau_jax.tasks import TASKS, prompts


def get_config() -> ConfigDict:
    """The defaults: VAU-R1's settings where the papers state them."""
    c = ConfigDict()
    c.format = 3  # version of these fields; runs of an earlier one resume with the defaults of what they lack
    c.stage = "sft"  # sft: learn the right completions; rft: GRPO on sampled completions
    c.model = ""  # Hugging Face folder: config, tokenizer, safetensors
    c.init_from = ""  # model folder or earlier run (its last checkpoint at this moment) to start from; empty: model
    c.seed = 0  # seed of data order, augmentation and sampling
    c.steps = 1000  # number of updates; in rft of rollouts, each for one update or several
    c.epochs = 0.0  # passes over the examples, which set steps; 0: steps as given
    c.batch_size = 8  # prompts per update, over all devices; in rft see also rollout.batch_size
    c.micro_batches = FieldReference(1, object)  # gradient accumulation: parts of a batch; auto: as few as fit
    c.skip_nonfinite = False  # skip an update whose loss or gradient is not finite; False: stop the run
    c.log_every = 1  # steps between lines of metrics.jsonl
    c.compilation_cache = "auto"  # folder of compiled programs; auto: .compilation_cache beside workdir; empty: none
    c.wandb = ""  # Weights & Biases project to log to; empty: none
    c.compile_ahead = True  # compile the programs of planned shapes before the first step, several at once
    c.profile_steps = (0, 0)  # first and last step of an XProf trace in workdir/profile; 0: none
    c.dtype = "bfloat16"  # dtype of activations: float32 or bfloat16
    c.param_dtype = "float32"  # dtype of parameters and optimiser state; bfloat16 would lose updates at lr 1e-6
    c.remat = True  # rematerialise activations in the backward pass instead of storing them
    c.unroll = 1  # layers per iteration of the scan: more is faster for small models, and slower to compile

    c.attention = "auto"  # attention of the decoder: jnp, xla, cudnn (GPU), splash (TPU), auto: the best available

    c.lora = ConfigDict()  # low-rank adapters: only they are trained and saved in checkpoints
    c.lora.rank = 0  # rank; 0: no adapters, all parameters are trained
    c.lora.alpha = 32.0  # the adapters' output is scaled by alpha / rank
    c.lora.dropout = 0.0  # dropout of the adapters' input in training; sft only
    c.lora.targets = (r"decoder/layers/.*_proj",)  # linear layers that get adapters (regexes on names)
    c.lora.rank_stabilised = False  # scale by alpha / sqrt(rank) instead

    c.motion = ConfigDict()  # Video Motion Prompts (arXiv 2407.03179) in the vision tower
    c.motion.enabled = False  # add one; a model that has one keeps it in any case
    c.motion.start = "identity"  # initial values: identity, or published ones: mpii, hmdb51, ucf_crime
    c.motion.signed = True  # signed frame differences; False: their absolute values
    c.motion.order = "rgb"  # channel order of the grey weights; bgr: as in the published code
    c.motion.weight = 0.0  # lambda: weight of the attention's temporal variation in the loss
    c.motion.lr_scale = 10.0  # learning rate of its two parameters, as a multiple of optim.lr
    c.motion.weight_decay = 0.0  # weight decay of its two parameters

    c.mesh = ConfigDict()  # devices along each axis; -1: all remaining devices
    c.mesh.data = 1  # data parallelism: copies of the model
    c.mesh.fsdp = -1  # fully sharded data parallelism: parameters and examples are split
    c.mesh.tensor = 1  # tensor parallelism: heads and hidden units are split

    c.data = ConfigDict()
    c.data.dataset = "vau_bench"  # format of data.csv: vau_bench, vau_bench_tfds, array_record, video_qa
    c.data.split = "train"  # split of a TFDS dataset; other formats have one file per split
    c.data.csv = ""  # annotation file; its format is data.dataset
    c.data.videos = ""  # folder of the video files that the annotations name, or one that `vau data join` wrote
    c.data.reflection = ""  # JSONL of reflection records; empty: reasoning from the annotations
    c.data.sources = ()  # use only the videos of these data sets: msad, ucf, ecva; (): all
    c.data.time_rules = "auto"  # rules for times in VAU-Bench's tables: msad, ucf, ecva, or auto by file name
    c.data.protocol = "clean"  # clean: annotation errors corrected or excluded; paper: the published denominators
    c.data.tasks = ("qa", "grounding", "classification")  # tasks asked of each video; also: description
    c.data.task_weights = ConfigDict({task: 1.0 for task in TASKS})  # sampling weight of each task
    c.data.style = "think"  # completion format: direct (not in rft), think, two_pass (no reflection), reflection
    c.data.wording = "full"  # prompts: full explains the answer format, short is the question only
    c.data.templates = ""  # prompts: a JSON file, or a folder of VAU-R1's code; see data_prep/README.md
    c.data.share = 1.0  # use only this share of the examples, whatever their order; a larger one contains it
    c.data.max_examples = 0  # use only the first examples; 0: all
    c.data.fps = 2.0  # video frames sampled per second
    c.data.min_frames = 4  # minimum number of frames per video
    c.data.max_frames = 768  # maximum number of frames per video
    c.data.budget = "vau_r1"  # pixel limits: vau_r1 (3584 tokens a video), vau_r1_qa, vau_r1_eval, or model: its own
    c.data.min_pixels = 0  # minimum pixels per frame, in place of the budget's; 0: the budget's
    c.data.max_pixels = 0  # maximum pixels per frame; 0: the budget's
    c.data.total_pixels = 0  # maximum pixels of all frames of a video, by pairs; 0: the budget's
    c.data.cache = ""  # frame cache filled by `vau data cache`; empty: decode videos every time
    c.data.augment = False  # random flip, shift and colour change
    c.data.section_weights = ConfigDict(prompts.SECTION_WEIGHTS)  # in the SFT loss; the end token has weight 1
    c.data.shuffle_options = True  # shuffle the options of a question anew each time
    c.data.max_completion_tokens = 1024  # maximum completion length; longer targets are truncated
    c.data.completion_shares = (0.125, 0.25, 0.375, 0.5, 0.75)  # what completions are packed into, of G x the longest
    c.data.bucket = (256, 1024, 0, 0, 0, 0)  # minimum padding: tokens, patches, windows, size, frames, size
    c.data.shapes = 4  # padded prompt shapes, planned where the table of videos has their sizes; 0: rounded by batch
    c.data.length_window = 128  # sort examples by length within this many batches, to reduce padding; 1: no sorting
    c.data.workers = 2  # decoder processes
    c.data.video_seconds = 120.0  # time limit to decode one video; a timeout is a failed video

    c.data.difficulty = ConfigDict()  # rft: prompts adapted to the running accuracy of their task and class
    c.data.difficulty.enabled = False  # adapt prompts
    c.data.difficulty.easy = 0.8  # above this mean score frames get noise, or some are dropped
    c.data.difficulty.hard = 0.2  # below this mean score the prompt gets a hint from the annotation
    c.data.difficulty.memory = 10  # groups in the running mean
    c.data.difficulty.noise = 16.0  # standard deviation of the noise, in grey levels of 255
    c.data.difficulty.drop = 0.25  # share of frames that are replaced by the previous one

    c.optim = ConfigDict()  # AdamW
    c.optim.lr = 2e-5  # peak learning rate
    c.optim.schedule = "linear"  # after the warm-up: constant, linear or cosine
    c.optim.warmup_steps = 0  # steps of linear warm-up from 0
    c.optim.final_lr = 0.0  # learning rate at the end of the schedule, as a share of lr
    c.optim.b1 = 0.9  # decay of the first moment
    c.optim.b2 = 0.999  # decay of the second moment
    c.optim.eps = 1e-8  # added to the second moment's root; much smaller gradients move in proportion to their size
    c.optim.weight_decay = 0.0  # decoupled weight decay, times the learning rate
    c.optim.no_decay = (r".*(norm\d?|layernorm)/weight", r".*/bias")  # names without weight decay (regexes)
    c.optim.freeze = ()  # parameters that are not trained (regexes on names); VAU-R1 trains everything
    c.optim.clip_norm = 1.0  # gradient-clipping norm: maximum global norm of the gradient

    c.rollout = ConfigDict()  # rft only
    c.rollout.batch_size = 0  # prompts sampled at once, for several updates of batch_size prompts each; 0: batch_size
    c.rollout.num_generations = 4  # completions per prompt (G)
    c.rollout.annotated = False  # the last of a prompt's G completions is not sampled, but the annotated one
    c.rollout.temperature = 1.0  # temperature of sampling and scoring; at least 0.01
    c.rollout.top_p = 1.0  # nucleus sampling; below 1 the sampling distribution differs from the scored one
    c.rollout.top_k = 0  # top-k sampling, likewise; 0: off
    c.rollout.min_new_tokens = 0  # minimum completion length; until then end tokens are masked
    c.rollout.max_draws = 1  # dynamic sampling: replaces groups with equal rewards, in at most this many draws
    c.rollout.reward_workers = 4  # processes that call user_rewards
    c.rollout.reward_seconds = 60.0  # time limit of one reward call; a timeout fails that completion

    c.rewards = ConfigDict()  # reward weights; 0: off
    c.rewards.gate = "form"  # form: nothing without the grammar; none: each reward by itself, answers read leniently
    c.rewards.format = 1.0  # the strict grammar is kept, every value can be read, and none contradicts another
    c.rewards.accuracy = 1.0  # the final answer is right
    c.rewards.tiou = 0.0  # temporal IoU of the final interval, grounding
    c.rewards.reflection = 0.0  # format of the reflection, and its effect from draft to final answer
    c.rewards.judge = 0.0  # marks of config.judge for descriptions
    c.user_rewards = ()  # your own: (("package.module:function", weight), ...), see vau_jax/rl/user_rewards.py

    c.grpo = ConfigDict()
    c.grpo.loss_type = "grpo"  # grpo, bnpo, dr_grpo, dapo, gspo, cispo, reg_grpo (DeepVideo-R1's regression)
    c.grpo.iterations = 1  # updates per rollout
    c.grpo.scale = "group"  # standard deviation that advantages are divided by: group, batch, none
    c.grpo.per_reward = False  # normalise each reward separately before they are added (GDPO)
    c.grpo.beta = 0.04  # weight of the KL term; 0: no reference policy
    c.grpo.kl = "k3"  # KL estimator: k1, k2, k3
    c.grpo.kl_in = "loss"  # KL as part of the loss or of the reward
    c.grpo.reference_every = 0  # steps between updates of the reference policy; 0: it stays fixed
    c.grpo.reference_mix = 1.0  # share of the policy in the updated reference
    c.grpo.epsilon_low = 0.2  # lower clipping of the ratio: 1 - epsilon_low
    c.grpo.epsilon_high = 0.2  # upper clipping of the ratio: 1 + epsilon_high; for cispo the cap itself
    c.grpo.delta = 0.0  # maximum ratio in the unclipped branch (dual clip); 0: none
    c.grpo.entropy_bonus = 0.0  # weight of the mean token entropy, subtracted from the loss
    c.grpo.importance = "auto"  # weight tokens by policy / sampler: always, never, auto (if top_p, top_k filter)
    c.grpo.importance_cap = 2.0  # maximum of that weight
    c.grpo.mask_truncated = False  # leave truncated completions out of the loss (they stay in the baseline)
    c.grpo.overlong_buffer = 0  # tokens before the limit over which a penalty grows from 0 to 1 (DAPO); 0: none
    c.grpo.regression_eps = 1.0  # reg_grpo: minimum spread of the log-ratios

    c.checkpoint = ConfigDict()
    c.checkpoint.every = 100  # steps between checkpoints; the last step is always saved
    c.checkpoint.keep = 2  # number of newest checkpoints to keep, besides those that other runs started from
    c.checkpoint.best = "auto"  # metric of the best checkpoint, kept too; auto: eval/score, else reward or -loss

    c.eval = ConfigDict()  # evaluation of the run's model while it trains, asked as in training
    c.eval.csv = ""  # annotation file of held-out examples; empty: no evaluation
    c.eval.videos = ""  # folder of their videos; empty: data.videos
    c.eval.split = ""  # split of a TFDS dataset; empty: data.split
    c.eval.tasks = ()  # tasks asked; (): those of data.tasks
    c.eval.max_examples = 64  # at most so many examples, spread over the file; 0: all
    c.eval.every = 100  # steps between evaluations; the last step is evaluated too
    c.eval.share = 0.1  # of the run's time: an evaluation that would take more is left out; 1: none is
    c.eval.patience = 0  # the run stops after so many evaluations without improvement; 0: it does not

    c.judge = endpoint()  # judge model for descriptions, used where rewards.judge has a weight
    c.judge.temperature = 0.0  # 0: the same marks each time

    return c.lock()  # a misspelt field in another config fails and names the nearest


def endpoint() -> ConfigDict:
    """The fields of a model behind an OpenAI-compatible chat endpoint."""
    c = ConfigDict()
    c.url = ""  # such as http://localhost:8000/v1, without user, password or query: configs are saved with runs
    c.model = ""  # name of the model at the endpoint
    c.key_variable = "OPENAI_API_KEY"  # environment variable that holds the API key
    c.concurrency = 8  # concurrent requests
    c.seconds = 120.0  # time limit of a response, from connecting to its last byte
    c.retries = 6  # retries with exponential backoff after rate limits, server errors and timeouts
    c.temperature = 0.7  # sampling temperature; 0: greedy
    c.max_tokens = 1024  # maximum length of an answer
    c.json_mode = True  # request JSON by response_format; some servers do not support it
    c.price_prompt = 0.0  # price of a million prompt tokens
    c.price_completion = 0.0  # price of a million completion tokens, in the same currency
    return c
