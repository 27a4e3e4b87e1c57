"""Prompts, tasks and engines that the engine's tests share; equal shapes, so that they compile once."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spct_jax.models.config import BlockConfig, Experts, Latent, ModelConfig
from spct_jax.models.transformer import Transformer
from spct_jax.sampling import trunks
from spct_jax.sampling.engine import Engine
from spct_jax.testing import tiny
from spct_jax.types import PromptBatch, Tasks

EOS = (3, 17, 40)


@pytest.fixture(autouse=True)
def short_prompts_are_cut_too(monkeypatch):
  monkeypatch.setattr(trunks, 'LEAST', 1)


def make_prompts(vocabulary: int, lengths=(8, 1, 5, 2, 7), P: int = 8, seed: int = 0) -> PromptBatch:
  U = len(lengths)
  tokens = np.random.default_rng(seed).integers(0, vocabulary, (U, P)).astype(np.int32)
  return PromptBatch(tokens=tokens, length=np.array(lengths, np.int32), row_mask=np.ones(U, bool))


def make_tasks(prompt, sample, settings=((1.0, 1.0, 0, 0.0),), visit: int = 0) -> Tasks:
  """`settings` (temperature, top_p, top_k, min_p) are dealt over the tasks in turn."""
  prompt, sample = np.asarray(prompt, np.int32), np.asarray(sample, np.int32)
  Q = len(prompt)
  column = lambda i, dtype: np.array([settings[q % len(settings)][i] for q in range(Q)], dtype)
  return Tasks(
      prompt=prompt,
      uid=np.stack([prompt + 100, prompt * 7], axis=1).astype(np.uint32),
      visit=np.full(Q, visit, np.int32),
      sample=sample,
      temperature=column(0, np.float32),
      top_p=column(1, np.float32),
      top_k=column(2, np.int32),
      min_p=column(3, np.float32),
      row_mask=np.ones(Q, bool),
  )


def truncated(logits, temperature, top_p, top_k, min_p):
  """Probabilities of one row after truncation: float64, by sorting, ties together."""
  logits = np.asarray(logits, np.float64)
  weight = np.exp((logits - logits.max()) / temperature)
  keep = np.ones(len(logits), bool)
  if 0 < top_k < len(logits):
    keep &= logits >= np.sort(logits)[-top_k]
  if top_p < 1:
    left = np.where(keep, weight, 0) / weight[keep].sum()
    descending = np.argsort(-logits, kind='stable')
    first = np.searchsorted(-logits[descending], -logits, 'left')  # ties share what lies above the first
    above = np.concatenate([[0.0], np.cumsum(left[descending])])[first]
    keep &= above < top_p
  keep &= weight >= min_p
  weight = np.where(keep, weight, 0)
  return weight / weight.sum()


def kept(logits, setting, cap):
  """(ids of the likeliest `cap` of what truncation keeps, the lowest ids on ties; how many it keeps; p among them)."""
  p = truncated(logits, *setting)
  order = [v for v in np.lexsort((np.arange(len(p)), -logits.astype(np.float64))) if p[v] > 0]
  ids = order[:cap]
  return ids, len(order), {v: p[v] / p[ids].sum() for v in ids}


def make_engine(
    model, rows: int, T: int = 6, eos_ids=EOS, mesh=None, seed: int = 0, stage: str = 'sample', kept: int = 0
) -> Engine:
  return Engine(
      model=model, mesh=mesh, cache_rules=tiny.RULES, rows=rows, max_new_tokens=T, eos_ids=eos_ids, seed=seed,
      stage=stage, kept=kept,
  )


def make_learner_logits(model, params):
  """Uncached logits [Q, T, V] under which each generated token was drawn."""
  apply = jax.jit(model.apply)

  def learner_logits(rollouts, prompts, tasks):
    Q, T = rollouts.tokens.shape
    held = prompts.length[tasks.prompt]
    whole = np.zeros((Q, prompts.tokens.shape[1] + T), np.int32)
    for q in range(Q):
      whole[q, : held[q]] = prompts.tokens[tasks.prompt[q], : held[q]]
      whole[q, held[q] : held[q] + T] = rollouts.tokens[q]
    lengths = held + rollouts.token_mask.sum(axis=1)
    logits = apply({'params': params}, jnp.asarray(whole), lengths=jnp.asarray(lengths, jnp.int32))
    return np.asarray(logits)[np.arange(Q)[:, None], held[:, None] - 1 + np.arange(T)[None, :]]

  return learner_logits


def rig_of(config, **extra):
  model = Transformer(config)
  params = jax.jit(model.init)(jax.random.key(0))
  return types.SimpleNamespace(
      model=model, params=params, prompts=make_prompts(61), engine=make_engine, make_tasks=make_tasks,
      make_prompts=make_prompts, learner_logits=make_learner_logits(model, params), eos=EOS, **extra,
  )


@pytest.fixture(scope='session')
def rig():
  """A windowed head layer and a period of global ones: enough for how the engine runs, quick to compile."""
  config = dataclasses.replace(tiny.model_config(), head=(tiny.LOCAL,), period=(tiny.GLOBAL,), remainder=())
  return rig_of(config, tasks=make_tasks(np.arange(20) % 5, np.arange(20) // 5))


@pytest.fixture(scope='session')
def full():
  """The model in which nothing is missing, and its rollouts: mixed settings, greedy ones among them.

  Twenty tasks on three rows, nine of them of one prompt: most run on refilled rows, and the ring wraps.
  """
  prompt = np.repeat(np.arange(5), (9, 2, 4, 2, 3))
  tasks = make_tasks(prompt, np.arange(20), ((0.0, 1.0, 0, 0.0), (0.8, 0.9, 12, 0.01), (1.3, 1.0, 9, 0.05)))
  rig = rig_of(tiny.model_config(), tasks=tasks)
  rig.rollouts = make_engine(rig.model, rows=3).generate(rig.params, rig.prompts, tasks)
  return rig


@pytest.fixture(scope='session')
def oracle():
  return truncated


@pytest.fixture(scope='session')
def make_learner():
  return make_learner_logits


@pytest.fixture(scope='session')
def kept_oracle():
  return kept


@pytest.fixture(scope='session')
def make_rig():
  return rig_of


@pytest.fixture(scope='session')
def latent():
  """Latent attention and experts, as in DeepSeek-V2; every size divides by two."""
  sparse = BlockConfig(experts=Experts(count=8, top_k=3, ffn=6, shared_ffn=8, groups=4, top_groups=2))
  config = ModelConfig(
      vocab_size=61, vocab_multiple=8, width=16, heads=4, kv_heads=4, head_dim=10, ffn=12,
      period=(sparse,), num_periods=2, latent=Latent(rank=8, nope=6, rope=4, value=4, q_rank=6),
  )
  return rig_of(config, tasks=make_tasks(np.arange(20) % 5, np.arange(20) // 5))
