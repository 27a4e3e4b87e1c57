"""From the config to the objects that stages work with: tokenizer, model, parameters, judge.

The items are in `datasets`, the sampler in `samplers`.

This is where a ConfigDict ends: everything below takes keyword arguments and small frozen settings.
"""

import dataclasses
import functools
import json
import pathlib
from typing import Any

import jax

from spct_jax import sharding
from spct_jax.data import stream
from spct_jax.judges import endings, grm, prompts
from spct_jax.models.config import BlockConfig, ModelConfig
from spct_jax.models.transformer import Transformer
from spct_jax.stages import named, processes
from spct_jax.stages.workdir import Workdir, content
from spct_jax.text import tokenizer as tokenizers
from spct_jax.train import checkpoint, lora, optim


def tokenizer(config: Any) -> tokenizers.Tokenizer:
  return tokenizers.load(config.tokenizer.path)


def setup_reads(config: Any) -> tuple[str, ...]:
  """The user's own tokenizer, templates and model shape; what the package carries goes by its version."""
  found = []
  if config.tokenizer.path not in tokenizers.BUILTIN:
    found.append(config.tokenizer.path)
  if config.judge.template not in prompts.builtin_templates():
    found.append(config.judge.template)
  shape = named.root(config, 'base', 'model.path')
  if shape.kind == 'folder':
    found.append(f'{shape.path}/config.json')
  return tuple(found)


def model(config: Any, tok: tokenizers.Tokenizer, *, name: str = 'base', head_kind: str = 'lm') -> Transformer:
  """The decoder that `name` stands for (`stages.named`), with a language or a scalar head."""
  links = named.chain(config, name)
  shape, fields = links[-1], config.model
  padded = config
  for link in links:
    if link.kind == 'stage':  # its checkpoint holds the padding rows of the vocabulary too
      padded = link.config
      if link.path and link.config.tokenizer.path:  # an import without one goes by its folder's, below
        _same_tokens(config, tok, link.config.tokenizer.path, f'{link.path}:{link.stage}')
  own = {
      'dtype': fields.dtype,
      'param_dtype': fields.param_dtype,
      'remat': fields.remat,
      'vocab_multiple': padded.model.vocab_multiple,
      'head_kind': head_kind,
  }
  if shape.kind == 'folder':
    from spct_jax.models import hf  # needs safetensors, which a random decoder does not
    settings = with_routers(dataclasses.replace(hf.read_config(shape.path), **own), shape.path)
    if tok.vocab_size > settings.vocab_size:
      raise ValueError(
          f'the tokenizer {config.tokenizer.path!r} has {tok.vocab_size} tokens, but the model in '
          f'{shape.path!r} embeds {settings.vocab_size}; give the tokenizer that belongs to the model'
      )
    if any((pathlib.Path(shape.path) / file).is_file() for file in tokenizers.FILES):
      _same_tokens_as_folder(config, tok, shape.path)
    return Transformer(settings)
  size = tok.vocab_size if shape.config is config else tokenizer(shape.config).vocab_size
  page = shape.config.model
  blocks = lambda windows: tuple(BlockConfig(window=window or None, rope_theta=page.rope_theta) for window in windows)
  return Transformer(ModelConfig(
      vocab_size=size,
      width=page.width,
      heads=page.heads,
      kv_heads=page.kv_heads,
      head_dim=page.head_dim,
      ffn=page.ffn,
      head=blocks(page.head_windows),
      period=blocks(page.period_windows),
      num_periods=page.num_periods,
      remainder=blocks(page.remainder_windows),
      tied=page.tied,
      norm_eps=page.norm_eps,
      qkv_bias=page.qkv_bias,
      qk_norm=page.qk_norm,
      **own,
  ))


def with_routers(settings: ModelConfig, folder: str) -> ModelConfig:
  """The decoder with the routers' own dtype, which the tensors say and config.json does not."""
  if settings.latent is None or not any(layer.experts for layer in settings.layers):
    return settings
  from spct_jax.models import hf, hf_experts
  with hf.Weights(folder) as weights:
    return hf_experts.with_routers(settings, weights.tensors)


def _same_tokens_as_folder(config, tok, folder):
  try:
    _tokens(folder)
  except ValueError as error:  # a tokenizer for other software, of which the user gives another form
    return processes.say(f'the tokenizer in {folder} is not compared with {config.tokenizer.path!r}: {error}')
  _same_tokens(config, tok, folder, folder)


def _same_tokens(config, tok, path, model_):
  """A model of another tokenizer would read other words than were written, and nobody would notice."""
  if path == config.tokenizer.path:
    return
  theirs = _tokens(str(path))
  ours = _tokens(str(config.tokenizer.path))
  other = [index for index in sorted(ours.keys() & theirs.keys()) if ours[index] != theirs[index]]
  if other:
    index = other[0]
    raise ValueError(
        f'the model {model_!r} has another tokenizer than {config.tokenizer.path!r}: {len(other)} ids stand for other '
        f'tokens, the first is {index} ({theirs[index]!r} there, {ours[index]!r} here); set tokenizer.path to the one '
        'that belongs to the model'
    )


@functools.lru_cache(maxsize=8)
def _tokens(path: str) -> dict[int, str]:
  return {index: token for token, index in tokenizers.load(path).hf.get_vocab().items()}


def lora_settings(config: Any, stage: str) -> lora.Settings | None:
  """The adapters that a training stage learns in the place of all parameters; None where it learns these."""
  rank = named.lora_rank(config, stage)
  if not rank:
    return None
  fields = config[stage].lora
  try:
    return lora.Settings(rank, fields.alpha, tuple(fields.targets), fields.rslora)
  except ValueError as error:
    raise ValueError(f'{stage}.{error}') from None


def learner(config: Any, stage: str, decoder: Transformer) -> Transformer | lora.Adapted:
  """What a training stage trains: the decoder, or adapters on it."""
  settings = lora_settings(config, stage)
  if settings is None:
    return decoder
  try:
    lora.adapted(decoder, settings)
  except ValueError as error:
    raise ValueError(f'{stage}.{error}') from None
  return lora.Adapted(decoder, settings)


def adapters_key(config: Any, stage: str) -> jax.Array:
  """What a stage's adapters start from."""
  return jax.random.key(stream.stage_seed(config.seed, f'{stage}/lora'))


def with_head(decoder: Transformer, head_kind: str) -> Transformer:
  return Transformer(dataclasses.replace(decoder.config, head_kind=head_kind))


def stage_names(config: Any) -> tuple[str, ...]:
  """What results, report and figures call the evaluated models: `evaluate.names`, or their own names."""
  return tuple(config.evaluate.names) or tuple(map(named.label, config.evaluate.models))


def rules(pairs: Any) -> sharding.Rules:
  """Rules as a field of `config.sharding` holds them, perhaps as lists."""
  return tuple((pattern, tuple(spec)) for pattern, spec in pairs)


def params(config: Any, name: str, decoder: Transformer, workdir: Workdir, mesh: Any) -> Any:
  """Parameters of the model called `name` (`stages.named`), sharded for the learner; adapters are merged.

  A decoder with a scalar head takes its backbone from a language model and a fresh head.
  """
  return _params(config, named.chain(config, name), decoder, workdir, mesh)


def _params(config, links, decoder, workdir, mesh):
  first, *below = links
  layout = sharding.tree_shardings(decoder.abstract_params(), rules(config.sharding.rules), mesh)
  if first.kind == 'random':
    return jax.jit(decoder.init, out_shardings=layout)(jax.random.key(first.config.seed))
  key = jax.random.key(config.seed)
  if first.kind == 'folder':
    from spct_jax.models import hf
    _, imported = hf.load(
        first.path,
        dtype=config.model.param_dtype,
        mesh=mesh,
        rules=rules(config.sharding.rules),
        vocab_multiple=decoder.config.vocab_multiple,
        leave=('unembed',) if decoder.config.head_kind == 'scalar' else (),
    )
    if decoder.config.head_kind == 'lm' or 'reward' in imported:
      return imported
    # The rest of a fresh model is never made: the compiler drops what nobody asks for.
    head = jax.jit(lambda key: decoder.init(key)['reward'], out_shardings=layout['reward'])
    return imported | {'reward': head(key)}
  if not named.is_adapters(first):
    return checkpoint.load_params(_finished(first, workdir), decoder, layout, key=key)
  adapted, learnt = _adapters(config, links, decoder, workdir, mesh)
  base = _params(config, below, decoder, workdir, mesh)
  # The base is given up: on top of the merged parameters there is never a whole second copy.
  merge = jax.jit(lora.merge, static_argnums=2, out_shardings=layout, donate_argnums=0)
  return merge(base, learnt, adapted.settings)


def adapters(
    config: Any, links: tuple[named.Model, ...], decoder: Transformer, workdir: Workdir | None, mesh: Any
) -> tuple[lora.Adapted, Any, named.Model]:
  """(adapted model, adapters, what they are on) of a chain of names that begins with adapters.

  Adapters upon adapters are put together as one (`lora.concatenate`).
  """
  parts = []
  while named.is_adapters(links[0]):
    parts.append(_adapters(config, links, decoder, workdir, mesh))
    links = links[1:]
  return *lora.concatenate(parts), links[0]


def _adapters(config, links, decoder, workdir, mesh):
  """The adapters of the first of the links."""
  first, *below = links
  if found := named.stand_in(first, below[0]):
    processes.say(found)
  if first.kind == 'adapter':
    from spct_jax.train import peft
    kind = peft.read_config(first.path).head_kind
    return peft.load(first.path, with_head(decoder, kind), mesh, rules(config.sharding.rules))
  folder = _finished(first, workdir)
  processes.as_writer_says(lambda: _check_base(folder.parent / 'DONE.json', below), what=f'the base of {first.stage}')
  model_ = with_head(decoder, 'scalar' if first.stage == 'meta_rm' else 'lm')
  adapted = lora.Adapted(model_, lora_settings(first.config, first.stage))
  layout = sharding.tree_shardings(adapted.abstract_params(), rules(config.sharding.rules), mesh)
  return adapted, checkpoint.load_params(folder, adapted, layout, key=jax.random.key(config.seed))


def _finished(link, workdir):
  """The checkpoints of a finished stage."""
  folder = named.checkpoint(link, None if workdir is None else workdir.path)
  done = folder.parent / 'DONE.json'
  if not processes.as_writer_says(done.exists, what=f'looking for {done}'):
    raise ValueError(
        f'model {link.stage!r}: {folder} holds no finished training; run --config.stage={link.stage} on this workdir '
        'first'
    )
  return folder


def _check_base(done, below):
  """The folders that adapters were trained on must hold what they held then."""
  recorded = json.loads(done.read_text(encoding='utf-8'))['fingerprint']['inputs'].values()
  for model_ in below:
    if model_.kind == 'stage' and not named.is_adapters(model_):
      break
    if model_.kind in ('folder', 'adapter') and content(model_.path) not in recorded:
      raise ValueError(
          f'{done.parent}: its adapters were trained on the model in {model_.path}, which has changed since; restore '
          'the folder, or train again'
      )
  return True


def optim_settings(stage: Any) -> optim.OptimSettings:
  """The optimizer fields that every training stage has on its config page."""
  schedule = stage.schedule
  if schedule == 'constant' and stage.warmup_steps:
    schedule = 'warmup_constant'
  return optim.OptimSettings(
      schedule=schedule,
      learning_rate=stage.lr,
      warmup_steps=stage.warmup_steps,
      total_steps=max(stage.steps * (stage.updates if 'updates' in stage else 1), 1),
      end_fraction=stage.final_lr / stage.lr if stage.lr else 0.0,
      b1=stage.b1,
      b2=stage.b2,
      eps=stage.eps,
      weight_decay=stage.weight_decay,
      clip_norm=stage.clip_norm,
  )


def judge_endings(config: Any) -> endings.Endings:
  """Where the judgements of an evaluation end; those that are trained on end as the model ends them."""
  fields = config.evaluate
  try:
    return endings.Endings(tuple(fields.stop_strings), fields.stop_at_scores, fields.constrain_scores)
  except ValueError as error:
    raise ValueError(f'evaluate.{error}') from None


def judge_settings(
    config: Any, section: Any, *, orders: str, single: str, ends: endings.Endings = endings.NONE
) -> grm.Settings:
  """How a stage prompts and samples: the judge's page and the stage's own sampling fields."""
  fields = config.judge
  return grm.Settings(
      template=prompts.load_template(fields.template),
      orders=orders,
      single=single,
      given_principles=fields.given_principles,
      reference_answer=fields.reference_answer,
      buckets=tuple(fields.buckets),
      chunk_prompts=fields.chunk_prompts,
      chunk_tasks=fields.chunk_tasks,
      temperature=section.temperature,
      top_p=section.top_p,
      top_k=section.top_k,
      min_p=section.min_p,
      seed=config.seed,
      ends=ends,
  )
