"""It learns: a small decoder becomes a mediocre judge, then a good one by SPCT, within minutes on a laptop's CPU.

    python -m spct_jax.main --config=configs/quickstart.py --workdir=/tmp/quickstart
    python -m spct_jax.main --config=configs/quickstart.py:smoke --workdir=/tmp/smoke    # a minute or so, learns nothing

Nothing is downloaded: items, demonstrations and tokenizer are those of the practice world (`data/practice.py`), whose
truth is known. Stages, in the report: base (trained on a mediocre judge's demonstrations), rft, spct (after GRPO).

Choices after the colon:

    smoke         everything small
    seed=N        of the training; the held-out items stay the same
    size=NAME     small (0.1M parameters, the default), medium (0.8M), large (6M); the larger ones take hours on a CPU
    heldout=N     held-out pairs, 1000 by default; and an eighth as many items of one and of four responses
"""

from ml_collections import ConfigDict

from spct_jax import choices, pages

_WORLD = 'made:spct_jax.data.practice:'
_SHAPES = {  # width, heads, key/value heads, head size, feed-forward, blocks
    'small': (64, 8, 4, 16, 176, 2),
    'medium': (128, 8, 4, 16, 352, 4),
    'large': (256, 8, 4, 32, 704, 8),
}


def get_config(arg: str | None = None) -> ConfigDict:
  choice = choices.parse(arg, smoke=False, seed=0, size='small', heldout=1000)
  smoke, seed, size, heldout = choice['smoke'], choice['seed'], choice['size'], choice['heldout']
  if size not in _SHAPES:
    raise ValueError(f'size: got {size!r}; allowed: {", ".join(_SHAPES)}')
  if heldout < 8:
    raise ValueError(f'heldout: got {heldout}; allowed: 8 or more pairs')
  width, heads, kv_heads, head_dim, ffn, blocks = _SHAPES[size]
  if smoke:
    heldout = min(heldout, 16)

  config = ConfigDict()
  config.stage = 'pipeline'  # sft, sample, rft, grpo, meta_rm, evaluate, or pipeline: all of pipeline.stages
  config.seed = seed  # the one seed; folded with stage, visit, uid and sample
  config.strict = True  # an unusable item is an error: this world has none

  config.pipeline = ConfigDict()
  config.pipeline.stages = ('sft', 'sample', 'rft', 'grpo', 'meta_rm', 'evaluate')

  config.tokenizer = ConfigDict()
  config.tokenizer.path = 'package:spct_jax.data/files/practice/tokenizer'

  train = 'singles=4&pairs=16' if smoke else 'singles=600&pairs=1400&fours=400'
  config.data = ConfigDict()
  config.data.path = f'{_WORLD}preferences?split=train&seed={seed}&{train}'
  config.data.reader = 'plain'
  config.data.limit = 0  # items read at most; 0 = all
  config.data.heldout = 0.25  # without eval_path: the share of items kept from training
  eighth = heldout // 8
  config.data.eval_path = f'{_WORLD}preferences?split=heldout&singles={eighth}&pairs={heldout}&fours={eighth}'
  config.data.eval_reader = 'plain'
  config.data.eval_limit = 0
  few = 'singles=2&pairs=4' if smoke else 'singles=32&pairs=96'
  config.data.validation_path = f'{_WORLD}preferences?split=validation&{few}'
  config.data.validation_limit = 128
  general = 40 if smoke else 4000
  config.data.instructions = f'{_WORLD}general?split=train&rows={general}&seed={seed}'  # RFT's mix

  config.model = ConfigDict()
  config.model.path = ''  # a Hugging Face or PEFT folder, or WORKDIR:STAGE; empty: random weights of the shape below
  config.model.width = width  # D
  config.model.heads = heads  # H, query heads
  config.model.kv_heads = kv_heads  # M, key/value heads
  config.model.head_dim = head_dim  # hd
  config.model.ffn = ffn  # F
  lone = size == 'small'  # a loop over two blocks would cost a quarter of every step
  config.model.head_windows = (0,) * blocks if lone else ()  # blocks before the period; one window each, 0 = global
  config.model.period_windows = () if lone else (0,)  # the blocks of one period, which are looped over
  config.model.num_periods = 0 if lone else blocks
  config.model.remainder_windows = ()  # blocks after the last period
  config.model.rope_theta = 1000.0
  config.model.norm_eps = 1e-6
  config.model.qkv_bias = False
  config.model.qk_norm = True
  config.model.tied = True  # embedding and output matrix are one
  config.model.vocab_multiple = 128  # the vocabulary is padded to a multiple, so that any mesh divides it
  config.model.dtype = 'float32'  # of the computation; bfloat16 on accelerators
  config.model.param_dtype = 'float32'  # of the learner's parameters (the masters)
  config.model.sampler_dtype = 'float32'  # of the sampler's view of them
  config.model.sampler_weights = ''  # int8: the view's matrices in eight bits (models/int8.py); '': sampler_dtype
  config.model.sampler_cache = ''  # int8: the sampler's keys and values in eight bits; '': sampler_dtype
  config.model.remat = False  # recompute activations in the backward pass
  config.model.logits_chunk = 0  # positions whose logits training holds at once; 0 = all

  config.judge = ConfigDict()
  config.judge.template = 'package:spct_jax.data/files/practice/template'
  config.judge.given_principles = False  # put an item's own principles into the prompt (Eq 8)
  config.judge.reference_answer = False  # put an item's reference answer into the prompt
  config.judge.buckets = (50,) if smoke else (32, 50)  # prompt lengths in tokens; the last is the limit; each is compiled
  config.judge.max_new_tokens = 78  # T
  config.judge.chunk_prompts = 16 if smoke else 128  # distinct prompts (U) of one engine call
  config.judge.chunk_tasks = 32 if smoke else 512  # samples (Q) of one engine call
  config.judge.rows = 16 if smoke else 128  # rows (R) that decode together; finished rows are refilled

  # Microbatches of 8 rows, which a CPU's cache holds: a step takes about half as long.
  parts = lambda rows: rows // 8 if lone and not smoke else 1

  phases = 'words=1&facts=1&clean=2&habits=2&batch=8' if smoke else 'words=320&facts=160&clean=120&habits=280&batch=32'
  config.sft = pages.training(steps=6 if smoke else 880, batch=8 if smoke else 32, parts=parts(32), lr=8e-3, every=3 if smoke else 440)
  config.sft.schedule = 'cosine'
  config.sft.warmup_steps = 3 if smoke else 50
  config.sft.final_lr = 1e-3
  config.sft.b2 = 0.98
  config.sft.init = 'base'  # base: config.model; a stage that wrote a checkpoint; a folder; or WORKDIR:STAGE, as wherever a model is named
  config.sft.data = f'{_WORLD}demonstrations?seed={seed}&{phases}'
  config.sft.order = 'given'  # a curriculum: first the language, then judging
  config.sft.buckets = (128,) if smoke else (78, 94, 128)  # row lengths in tokens, prompt and answer

  config.sample = ConfigDict()
  config.sample.model = 'sft'
  config.sample.samples = 3  # N_RFT (paper 2.3)
  config.sample.hinted_samples = 1  # samples with the hint; 0 switches hinted sampling off
  config.sample.hinted_items = 'all'  # all, or unsolved: only where no plain sample was right
  config.sample.orders = 'shuffle'  # shuffle: an order per sample; balanced; fixed
  config.sample.temperature = 0.6  # sharper than it will be used: what is kept is then learnt at temperature 1
  config.sample.top_p = 1.0
  config.sample.top_k = 0  # 0 = off
  config.sample.min_p = 0.0

  rows = (128,) if smoke else (78, 128)  # row lengths in tokens, prompt and judgement
  config.rft = pages.training(steps=4 if smoke else 90, batch=8 if smoke else 64, parts=parts(64), lr=4e-3, every=2 if smoke else 90)
  config.rft.schedule = 'cosine'
  config.rft.warmup_steps = 2 if smoke else 10
  config.rft.b2 = 0.98
  config.rft.init = 'sft'
  config.rft.buckets = rows
  config.rft.general_fraction = 0.25  # share of general instruction rows in the mix (paper section 3: 0.852)
  config.rft.drop_too_easy = True  # drop an item's plain samples when all of them are right (paper 2.3)
  config.rft.keep_hint = False  # train hinted samples on the hinted prompt (the paper is silent: off)

  config.grpo = pages.training(steps=3 if smoke else 28, batch=4 if smoke else 32, parts=parts(4 * 32), lr=6e-4, every=1 if smoke else 28)
  config.grpo.schedule = 'cosine'
  config.grpo.warmup_steps = 1 if smoke else 10
  config.grpo.final_lr = 1e-4
  config.grpo.b2 = 0.98
  config.grpo.eps = 1e-6  # a batch without signal has a gradient of float noise, which a smaller eps would blow up to lr
  config.grpo.init = 'rft'  # the policy's start and the frozen reference
  config.grpo.reference = ''  # the frozen reference; empty: what the policy starts from (under adapters, these off)
  config.grpo.buckets = rows
  config.grpo.drop_too_easy = True  # leave out items that all plain samples of the sample stage get right (paper 2.5)
  config.grpo.group_by_length = True  # a step's prompts are of one bucket of judge.buckets, so that less is padding
  config.grpo.group = 4  # G, samples per prompt; grpo.batch counts prompts
  config.grpo.clip_eps = 0.2  # eps of the clipped surrogate
  config.grpo.kl_coef = 0.01  # beta; experiments/LOG.md has what others give
  config.grpo.advantage_eps = 1e-6  # added to the group's population standard deviation
  config.grpo.updates = 1  # optimizer steps per rollout (mu)
  config.grpo.old_logp = 'sampler'  # pi_old: the sampler's log-probabilities, or recomputed by the learner
  config.grpo.validate_every = 1 if smoke else 7  # steps between two judgements of the validation items; 0 = never
  config.grpo.validate_samples = 2 if smoke else 4  # samples per validation item, at the temperature of training
  config.grpo.temperature = 1.0
  config.grpo.top_p = 1.0
  config.grpo.top_k = 0
  config.grpo.min_p = 0.0
  config.grpo.replay_kept = 0  # tokens a truncated step draws from at most; log-probabilities are over them; 0 = off

  config.meta_rm = pages.training(steps=4 if smoke else 400, batch=8 if smoke else 64, parts=parts(64), lr=2e-3, every=2 if smoke else 200)
  config.meta_rm.schedule = 'cosine'
  config.meta_rm.warmup_steps = 2 if smoke else 20
  config.meta_rm.b2 = 0.98
  config.meta_rm.init = 'grpo'  # the backbone; the scalar head is new, unless this is a reward model
  config.meta_rm.buckets = rows
  config.meta_rm.group_by_length = True  # a step's trajectories are of one bucket, so that less is padding
  config.meta_rm.policy = 'grpo'  # whose trajectories are added to those of the sample stage
  config.meta_rm.samples = 3  # trajectories per item from the policy
  config.meta_rm.temperature = 1.0
  config.meta_rm.top_p = 1.0
  config.meta_rm.top_k = 0
  config.meta_rm.min_p = 0.0
  config.meta_rm.heldout = 0.1  # share of items whose trajectories measure ROC-AUC

  config.trackers = ConfigDict()  # what is counted in the judge's text, in GRPO and in the evaluation; '' = off
  config.trackers.principles = r'(?s)Specific Criteria:\s*(.*?)\s*(?:Analysis|Impression):'  # its group: the list of principles
  config.trackers.separator = r'\s*\b(?:must|nice|other)\s+'  # between two principles: the weight of the next
  config.trackers.samples = 8  # of an item, whose distinct sets of principles are counted; fewer if fewer are drawn
  config.trackers.patterns = ConfigDict()  # name -> regex: the share of judgements whose text it matches
  config.trackers.patterns.careless = r'Impression:'

  config.evaluate = ConfigDict()
  config.evaluate.models = ('sft', 'rft', 'grpo')  # rows of the report
  config.evaluate.names = ('base', 'rft', 'spct')  # what the report calls them
  config.evaluate.benchmark = 'practice'  # the name in the report
  config.evaluate.samples = 4 if smoke else 32  # the pool that votes are cut from
  config.evaluate.ks = (1, 2, 4) if smoke else (1, 2, 4, 8, 16, 32)
  config.evaluate.k_meta = 0  # samples that vote of k; 0: half of k, at least one (paper 2.7)
  config.evaluate.soft = True  # also guided voting with soft weights (a named departure)
  config.evaluate.soft_temperature = 0.5  # divides the meta reward before the sigmoid
  config.evaluate.expected = False  # also votes by expected scores: every score's exact probability, not the one drawn
  config.evaluate.greedy = True  # also one greedy judgement per item
  config.evaluate.orders = 'shuffle'
  config.evaluate.early = 'none'  # votes stop once decided: exact (the winner of the full vote), statistical; needs ks = (samples,)
  config.evaluate.early_alpha = 0.05  # statistical: the chance that an item gets another winner than with all votes
  config.evaluate.temperature = 1.0
  config.evaluate.top_p = 1.0
  config.evaluate.top_k = 0
  config.evaluate.min_p = 0.0
  config.evaluate.stop_strings = ()  # texts that end a judgement, which is cut before them
  config.evaluate.stop_at_scores = False  # a judgement ends with its `Scores:` line; what would follow is never drawn
  config.evaluate.constrain_scores = False  # only score lines that parse are drawn, within judge.max_new_tokens
  config.evaluate.single = 'binary'  # one response: 0 or 1 as in training, or the 1..10 'scale' (paper 4.2)
  config.evaluate.meta = 'meta_rm'  # meta_rm, a folder or WORKDIR:meta_rm, which guides votes; empty: plain votes only
  config.evaluate.meta_batch = 8 if smoke else 32  # trajectories per call of the meta-RM, and rows of instructions; small for the cache
  config.evaluate.instructions = f'{_WORLD}general?split=heldout&rows={16 if smoke else 400}'
  config.evaluate.show = 1  # items to print with each stage's judgement, beginning with what training changed

  config.cpu_devices = 2 if lone and not smoke else 0  # a CPU is so many devices of one thread each; 0 = one device of all threads
  config.mesh = pages.mesh(data=-1, fsdp=1, tensor=1)  # devices per axis; one may be -1: the rest
  config.sharding = pages.sharding()  # rules for the parameters, the sampler's view of them and its caches
  config.logging = pages.logging(keep=2, tensorboard=True)  # checkpoints kept per stage; curves for TensorBoard
  return config
