"""A model from one form into another: Hugging Face folders in and out, and what a model needs. Seconds to minutes.

    python -m spct_jax.main --config=configs/convert.py:do=inspect --config.model=FOLDER
    python -m spct_jax.main --config=configs/convert.py:do=inspect --config.model=FOLDER --config.convert.mesh.fsdp=64
    python -m spct_jax.main --config=configs/convert.py:do=export --config.model=WORKDIR:grpo --config.convert.to=judge
    python -m spct_jax.main --config=configs/convert.py:do=import --config.model=FOLDER --workdir=/tmp/imported
    python -m spct_jax.main --config=configs/convert.py:smoke --workdir=/tmp/smoke    # exports random weights

The model is a Hugging Face folder, a PEFT folder (merged into its base), or what a stage of a workdir trained
(WORKDIR:sft, :rft, :grpo, :meta_rm; a meta-RM becomes a sequence classifier with one label). inspect prints parameters,
bytes and memory per device without reading a tensor. export writes a folder that transformers and serving engines load;
it appears whole or not at all, and replaces nothing but a model. import writes the checkpoint WORKDIR:convert, which
then stands wherever a model does. Only import needs a workdir.

Choices after the colon:

    do=WAY       inspect (the default), export, import
    smoke        a small random decoder, exported
"""

from ml_collections import ConfigDict

from spct_jax import choices, pages


def get_config(arg: str | None = None) -> ConfigDict:
  choice = choices.parse(arg, smoke=False, do='inspect')
  smoke = choice['smoke']

  config = ConfigDict()
  config.stage = 'convert'
  config.seed = 0  # of random weights, where no model is given
  config.strict = False

  config.convert = ConfigDict()
  config.convert.do = 'export' if smoke else choice['do']  # inspect, export, import
  config.convert.to = ''  # export: the folder to write; empty: WORKDIR/export
  config.convert.dtype = ''  # of the tensors: float32, bfloat16, float16; empty: the model's own
  config.convert.shard_bytes = 5_000_000_000  # a file holds at most so much, or one tensor
  config.convert.adapters = 'merge'  # of a stage trained with LoRA: merge them into the base, or peft: by themselves
  config.convert.json = ''  # inspect: also write the table to this file
  config.convert.mesh = pages.mesh(data=0, fsdp=0, tensor=0)  # inspect: plan for this mesh; all 0: the one there is

  config.tokenizer = ConfigDict()
  config.tokenizer.path = 'builtin:small' if smoke else ''  # empty: the model's own

  config.model = ConfigDict()
  config.model.path = ''  # the model; empty: random weights of the shape below
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
  config.model.vocab_multiple = 128  # the vocabulary is padded in memory, so that any mesh divides it; not in the file
  config.model.dtype = 'float32'
  config.model.param_dtype = 'float32'  # of random weights
  config.model.sampler_dtype = 'float32'
  config.model.remat = False

  config.mesh = pages.mesh(data=1, fsdp=-1, tensor=1)  # where the model is held while it is converted
  config.sharding = pages.sharding()
  config.logging = pages.logging(keep=1, tensorboard=False)
  return config
