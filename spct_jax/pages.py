"""What the pages of numbers in `configs/` share: whole sections, each a ConfigDict with all its fields.

A page gives the numbers that are its own and may set any other field afterwards.
"""

from ml_collections import ConfigDict


def training(*, steps: int, batch: int, parts: int, lr: float, every: int) -> ConfigDict:
  """The fields that every training stage has."""
  stage = ConfigDict()
  stage.steps = steps
  stage.batch = batch  # rows per step, over all devices
  stage.microbatches = parts  # the batch is cut into these; the result does not change
  stage.lr = lr  # peak
  stage.schedule = 'constant'  # after the warm-up: constant, cosine, linear
  stage.warmup_steps = 2
  stage.final_lr = 0.0  # where cosine and linear end
  stage.b1 = 0.9
  stage.b2 = 0.95
  stage.eps = 1e-8
  stage.weight_decay = 0.0  # not on norms and biases
  stage.clip_norm = 1.0  # of the global gradient; 0 = off
  stage.checkpoint_every = every  # steps
  stage.lora = ConfigDict()  # low-rank adapters on a frozen model, in the place of its parameters (train/lora.py)
  stage.lora.rank = 0  # 0 = off: every parameter is trained
  stage.lora.alpha = 16.0  # the adapters are scaled by alpha / rank
  stage.lora.rslora = False  # by alpha / sqrt(rank) instead
  stage.lora.targets = ('q', 'k', 'v', 'o', 'gate', 'up', 'down')  # projections; an unknown one lists the model's own
  return stage


def mesh(*, data: int, fsdp: int, tensor: int) -> ConfigDict:
  """Devices per axis; one may be -1: the rest."""
  section = ConfigDict()
  section.data = data  # copies of the parameters
  section.fsdp = fsdp  # parameters, gradients and optimizer state cut over these
  section.tensor = tensor  # heads, feed-forward and vocabulary cut over these
  return section


def sharding() -> ConfigDict:
  """Rules (regex on the path, axes per dimension), of which the first match wins."""
  section = ConfigDict()
  section.rules = _rules()  # of parameters, gradients and optimizer state
  section.sampler_rules = _sampler_rules()  # of the sampler's view of the parameters
  section.cache_rules = _cache_rules()  # of the sampler's caches, [rows, M, positions, hd]
  return section


def logging(*, keep: int, tensorboard: bool) -> ConfigDict:
  """What a run leaves besides its results."""
  section = ConfigDict()
  section.keep = keep  # checkpoints kept per stage
  section.tensorboard = tensorboard  # write the curves for it
  return section


def _rules() -> tuple:
  """Fully sharded over fsdp, heads / feed-forward / vocabulary over tensor. D over fsdp everywhere."""
  return (
      (r'embed/table$', ('tensor', 'fsdp')),  # [V, D]
      (r'unembed/kernel$', ('fsdp', 'tensor')),  # [D, V]
      (r'/(q|k|v)/kernel$', ('fsdp', 'tensor', None)),  # [D, H, hd]
      (r'/(q|k|v)/bias$', ('tensor', None)),  # [H, hd]
      (r'/(q|kv)_down/kernel$', ('fsdp', None)),  # [D, rank], latent attention
      (r'/(q|kv)_up/kernel$', ('fsdp', 'tensor', None)),  # [rank, H, hd]
      (r'/(q|kv)_down/bias$', (None,)),
      (r'/o/kernel$', ('tensor', None, 'fsdp')),  # [H, hd, D]
      (r'/experts/(gate|up)/kernel$', (None, 'fsdp', 'tensor')),  # [E, D, F], the experts whole
      (r'/experts/down/kernel$', (None, 'tensor', 'fsdp')),  # [E, F, D]
      (r'/router/kernel$', ('fsdp', None)),  # [D, E]
      (r'/(gate|up)/kernel$', ('fsdp', 'tensor')),  # [D, F]
      (r'/(gate|up)/bias$', ('tensor',)),  # [F]
      (r'/down/kernel$', ('tensor', 'fsdp')),  # [F, D]
      (r'/experts/(gate|up)/lora_a$', (None, 'fsdp', None)),  # [E, D, r]
      (r'/experts/(gate|up)/lora_b$', (None, None, 'tensor')),  # [E, r, F]
      (r'/experts/down/lora_a$', (None, 'tensor', None)),  # [E, F, r]
      (r'/experts/down/lora_b$', (None, None, 'fsdp')),  # [E, r, D]
      (r'/(q|kv)_(down|up)/lora_a$', ('fsdp', None)),  # [D, r], [rank, r]
      (r'/(q|kv)_down/lora_b$', (None, None)),  # [r, rank]
      (r'/(q|kv)_up/lora_b$', (None, 'tensor', None)),  # [r, H, hd]
      (r'/(q|k|v|gate|up)/lora_a$', ('fsdp', None)),  # [D, r]
      (r'/(q|k|v)/lora_b$', (None, 'tensor', None)),  # [r, H, hd]
      (r'/(gate|up)/lora_b$', (None, 'tensor')),  # [r, F]
      (r'/o/lora_a$', ('tensor', None, None)),  # [H, hd, r]
      (r'/down/lora_a$', ('tensor', None)),  # [F, r]
      (r'/(o|down)/lora_b$', (None, 'fsdp')),  # [r, D]
      (r'reward/kernel$', ('fsdp', None)),  # [D, 1]
      (r'/(o|down)/bias$', (None,)),  # [D]
      (r'scale$', (None,)),  # norms
  )


def _sampler_rules() -> tuple:
  """Tensor-parallel only: decoding would gather what is cut over fsdp at every token."""
  keep = lambda axis: axis if axis == 'tensor' else None
  return tuple((pattern, tuple(map(keep, spec))) for pattern, spec in _rules())


def _cache_rules() -> tuple:
  """Prompt slots and rows over data and fsdp, key/value heads over tensor."""
  return (
      (r'/(k|v)$', (('data', 'fsdp'), 'tensor', None, None)),
      (r'/latent$', (('data', 'fsdp'), None, None, None)),  # one for all heads
  )
