"""The whole of SPCT with a small decoder, on any preference file: sample, reject, fine-tune, GRPO, meta-RM, vote, report.

    python -m spct_jax.main --config=configs/spct_small.py --workdir=/tmp/spct            # tens of minutes on 2 CPU cores
    python -m spct_jax.main --config=configs/spct_small.py:smoke --workdir=/tmp/smoke     # under a minute; published files, with their long texts, take 2 to 6

Choices after the colon:

    smoke              everything small: a few items, steps and tokens
    data=NAME          builtin (carried by the package), plain, hh_rlhf, gsm8k_single, gsm8k_list, judgebench
    path=FILE          the preference file, for every data but builtin (or --config.data.path=FILE)
    tokenizer=FOLDER   a Hugging Face tokenizer folder; the package's own small one by default
    seed=N

The decoder starts from random weights, so what it writes does not parse and no accuracy beats chance: this page
shows that the method runs, on your data, on your mesh. Expected: parse failure 100 %, every accuracy 0.
"""

from ml_collections import ConfigDict

from spct_jax import choices, pages


def get_config(arg: str | None = None) -> ConfigDict:
  choice = choices.parse(
      arg, smoke=False, data='builtin', path='', tokenizer='builtin:small', seed=0
  )
  if choice['data'] == 'builtin' and choice['path']:
    raise ValueError(f"path={choice['path']!r} needs data=NAME beside it: which format the file has")
  smoke = choice['smoke']
  long = choice['data'] != 'builtin'  # published texts are longer than those that the package carries
  prompt = ((1024, 3072) if smoke else (1024, 2048, 4096)) if long else ((256, 512) if smoke else (256, 512, 1024))
  answer = 16 if smoke else 96
  rows = (prompt[-2] + answer, prompt[-1] + answer)  # row lengths in training, prompt and answer
  if long:
    rows = (512, *rows)  # general instruction rows are short
  elif smoke:
    rows = rows[-1:]  # one length compiles once

  config = ConfigDict()
  config.stage = 'pipeline'  # sft, sample, rft, grpo, meta_rm, evaluate, or pipeline: all of pipeline.stages
  config.seed = choice['seed']  # the one seed; folded with stage, visit, uid and sample
  config.strict = False  # an unusable item is an error instead of a counted, named skip

  config.pipeline = ConfigDict()
  config.pipeline.stages = ('sft', 'sample', 'rft', 'grpo', 'meta_rm', 'evaluate')

  config.tokenizer = ConfigDict()
  config.tokenizer.path = choice['tokenizer']  # folder with tokenizer.json (or vocab and merges), builtin:small, or package:...

  config.data = ConfigDict()
  config.data.path = choice['path']  # JSONL or JSONL.gz; or tfds:..., made:..., package:... (data/sources.py)
  if choice['data'] == 'builtin':
    config.data.path = 'builtin:preferences'
  config.data.reader = 'auto' if choice['data'] == 'builtin' else choice['data']  # row format; auto: by its columns
  config.data.limit = (16 if long else 40) if smoke else 512  # items read at most; 0 = all
  config.data.heldout = 0.25  # share of items kept from training; evaluated if eval_path is empty
  config.data.eval_path = ''  # a file of its own for the evaluation
  config.data.eval_reader = 'auto'
  config.data.eval_limit = 6 if smoke else 128  # items evaluated at most; 0 = all
  config.data.validation_path = ''  # a file of items that only watch training; empty: taken from the training items
  config.data.validation_limit = 4 if smoke else 32  # validation items at most; 0 = none
  config.data.instructions = 'builtin:instructions'  # general instruction data, for sft and for RFT's mix

  config.model = ConfigDict()
  config.model.path = ''  # a Hugging Face or PEFT folder, or WORKDIR:STAGE; empty: random weights of the shape below
  config.model.width = 32 if smoke else 128  # D
  config.model.heads = 4  # H, query heads
  config.model.kv_heads = 2  # M, key/value heads
  config.model.head_dim = 8 if smoke else 32
  config.model.ffn = 64 if smoke else 384  # F
  config.model.head_windows = ()  # blocks before the period; one attention window each, 0 = global
  config.model.period_windows = (0,)  # the blocks of one period
  config.model.num_periods = 2 if smoke else 4
  config.model.remainder_windows = ()  # blocks after the last period
  config.model.rope_theta = 10_000.0
  config.model.norm_eps = 1e-6
  config.model.qkv_bias = False
  config.model.qk_norm = False
  config.model.tied = True  # embedding and output matrix are one
  config.model.vocab_multiple = 128  # the vocabulary is padded to a multiple, so that any mesh divides it
  config.model.dtype = 'float32'  # of the computation; bfloat16 on accelerators
  config.model.param_dtype = 'float32'  # of the learner's parameters (the masters)
  config.model.sampler_dtype = 'float32'  # of the sampler's view of them
  config.model.sampler_weights = ''  # int8: the view's matrices in eight bits (models/int8.py); '': sampler_dtype
  config.model.sampler_cache = ''  # int8: the sampler's keys and values in eight bits; '': sampler_dtype
  config.model.remat = long  # recompute activations in the backward pass
  config.model.logits_chunk = 256  # positions whose logits training holds at once; 0 = all

  config.judge = ConfigDict()
  config.judge.template = 'short'  # folder of prompt templates: short, grm (the released models' interface), package:..., or a path
  config.judge.given_principles = False  # put an item's own principles into the prompt (Eq 8)
  config.judge.reference_answer = False  # put an item's reference answer into the prompt
  config.judge.buckets = prompt  # prompt lengths in tokens; the last is the limit
  config.judge.max_new_tokens = answer  # T
  config.judge.chunk_prompts = 8 if smoke else 16  # distinct prompts (U) of one engine call
  config.judge.chunk_tasks = 24 if smoke else 64  # samples (Q) of one engine call
  config.judge.rows = 8 if smoke else 32  # rows (R) that decode together; finished rows are refilled

  config.sft = pages.training(steps=4 if smoke else 100, batch=8, parts=1, lr=1e-3, every=2 if smoke else 25)
  config.sft.init = 'base'  # base: config.model; a stage that wrote a checkpoint; a folder; or WORKDIR:STAGE, as wherever a model is named
  config.sft.data = ''  # rows to learn from, as data.instructions; empty: those
  config.sft.order = 'shuffle'  # shuffle: each epoch in an order of its own; given: as the source has them (a curriculum)
  config.sft.buckets = (256, 512)  # row lengths in tokens, prompt and answer

  config.sample = ConfigDict()
  config.sample.model = 'sft'
  config.sample.samples = 3  # N_RFT (paper 2.3)
  config.sample.hinted_samples = 1  # samples with the hint; 0 switches hinted sampling off
  config.sample.hinted_items = 'all'  # all, or unsolved: only where no plain sample was right
  config.sample.orders = 'shuffle'  # shuffle: an order per sample; balanced; fixed
  config.sample.temperature = 1.0
  config.sample.top_p = 1.0
  config.sample.top_k = 0  # 0 = off
  config.sample.min_p = 0.0

  config.rft = pages.training(steps=(2 if long else 4) if smoke else 100, batch=8, parts=1, lr=5e-4, every=2 if smoke else 25)
  config.rft.init = 'sft'
  config.rft.buckets = rows
  config.rft.general_fraction = 0.852  # share of general instruction rows in the mix (paper section 3)
  config.rft.drop_too_easy = True  # drop an item's plain samples when all of them are right (paper 2.3)
  config.rft.keep_hint = False  # train hinted samples on the hinted prompt (the paper is silent: off)

  config.grpo = pages.training(
      steps=2 if smoke else 40, batch=4, parts=2 if long else 1, lr=1e-4, every=1 if smoke else 10
  )
  config.grpo.eps = 1e-6  # a batch without signal has a gradient of float noise, which a smaller eps would blow up to lr
  config.grpo.init = 'rft'  # the policy's start and the frozen reference
  config.grpo.reference = ''  # the frozen reference; empty: what the policy starts from (under adapters, these off)
  config.grpo.buckets = rows
  config.grpo.drop_too_easy = True  # leave out items that all plain samples of the sample stage get right (paper 2.5)
  config.grpo.group_by_length = False  # a step's prompts are of one bucket of judge.buckets, so that less is padding
  config.grpo.group = 4  # G, samples per prompt; grpo.batch counts prompts
  config.grpo.clip_eps = 0.2  # eps of the clipped surrogate
  config.grpo.kl_coef = 0.08  # beta (paper: 0.08 for 27B, 0.002 for 16B)
  config.grpo.advantage_eps = 1e-6  # added to the group's population standard deviation
  config.grpo.updates = 1  # optimizer steps per rollout (mu)
  config.grpo.old_logp = 'sampler'  # pi_old: the sampler's log-probabilities, or recomputed by the learner
  config.grpo.validate_every = 1 if smoke else 10  # steps between two judgements of the validation items; 0 = never
  config.grpo.validate_samples = 2 if smoke else 4  # samples per validation item, at the temperature of training
  config.grpo.temperature = 1.0
  config.grpo.top_p = 1.0
  config.grpo.top_k = 0
  config.grpo.min_p = 0.0
  config.grpo.replay_kept = 0  # tokens a truncated step draws from at most; log-probabilities are over them; 0 = off

  config.meta_rm = pages.training(steps=(2 if long else 4) if smoke else 60, batch=8, parts=1, lr=5e-4, every=2 if smoke else 20)
  config.meta_rm.init = 'base'  # the backbone; the scalar head is new, unless this is a reward model
  config.meta_rm.buckets = rows
  config.meta_rm.group_by_length = False  # a step's trajectories are of one bucket, so that less is padding
  config.meta_rm.policy = 'grpo'  # whose trajectories are added to those of the sample stage
  config.meta_rm.samples = 3  # trajectories per item from the policy
  config.meta_rm.temperature = 1.0
  config.meta_rm.top_p = 1.0
  config.meta_rm.top_k = 0
  config.meta_rm.min_p = 0.0
  config.meta_rm.heldout = 0.1  # share of items whose trajectories measure ROC-AUC

  config.trackers = ConfigDict()  # what is counted in the judge's text, in GRPO and in the evaluation; '' = off
  # The one group is the list of principles, in what the templates short and grm ask for.
  config.trackers.principles = r'(?s)Specific Criteria:\s*(?:1[.)]\s*)?(.*?)\s*Analysis:'
  # Between two principles: a weight in brackets, then a comma, semicolon or line end, then a number.
  config.trackers.separator = r'(?:\s*\([^()]*\))?\s*(?:[,;\n]\s*(?:\d+[.)]\s*)?|$)'
  config.trackers.samples = 8  # of an item, whose distinct sets of principles are counted; fewer if fewer are drawn
  config.trackers.patterns = ConfigDict()  # name -> regex: the share of judgements whose text it matches
  config.trackers.patterns.format = r'(?s)Specific Criteria:.*Analysis:.*Scores:'  # all three parts, in order

  config.evaluate = ConfigDict()
  config.evaluate.models = ('sft', 'rft', 'grpo')  # rows of the report
  config.evaluate.names = ()  # what the report calls the models, one name each; (): their own names
  config.evaluate.benchmark = choice['data']  # the name in the report
  config.evaluate.samples = 4 if smoke else 32  # the pool that votes are cut from
  config.evaluate.ks = (1, 2, 4) if smoke else (1, 2, 4, 8, 16, 32)
  config.evaluate.k_meta = 0  # samples that vote of k; 0: half of k, at least one (paper 2.7)
  config.evaluate.soft = True  # also guided voting with soft weights (a named departure)
  config.evaluate.soft_temperature = 1.0  # divides the meta reward before the sigmoid
  config.evaluate.expected = False  # also votes by expected scores: every score's exact probability, not the one drawn
  config.evaluate.greedy = True  # also one greedy judgement per item
  config.evaluate.orders = 'shuffle'
  config.evaluate.early = 'none'  # votes stop once decided: exact (the winner of the full vote), statistical; needs ks = (samples,)
  config.evaluate.early_alpha = 0.05  # statistical: the chance that an item gets another winner than with all votes
  config.evaluate.temperature = 0.5  # paper section 3
  config.evaluate.top_p = 1.0
  config.evaluate.top_k = 0
  config.evaluate.min_p = 0.0
  config.evaluate.stop_strings = ()  # texts that end a judgement, which is cut before them
  config.evaluate.stop_at_scores = False  # a judgement ends with its `Scores:` line; what would follow is never drawn
  config.evaluate.constrain_scores = False  # only score lines that parse are drawn, within judge.max_new_tokens
  config.evaluate.single = 'scale'  # one response: the 1..10 scale at test time, or 'binary' as in training (paper 4.2)
  config.evaluate.meta = 'meta_rm'  # meta_rm, a folder or WORKDIR:meta_rm, which guides votes; empty: plain votes only
  config.evaluate.meta_batch = 16  # trajectories per call of the meta-RM, and rows of instructions per call
  config.evaluate.instructions = ''  # held-out general instruction data: what training costs elsewhere; '' = off
  config.evaluate.show = 1  # items to print with each stage's judgement, beginning with what training changed

  config.mesh = pages.mesh(data=-1, fsdp=1, tensor=1)  # devices per axis; one may be -1: the rest
  config.sharding = pages.sharding()  # rules for the parameters, the sampler's view of them and its caches
  config.logging = pages.logging(keep=2, tensorboard=True)  # checkpoints kept per stage; curves for TensorBoard
  return config
