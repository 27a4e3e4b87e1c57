"""Where the model meets the mathematics: loss functions `(params, batch) -> (sum, count, aux)`.

Per-token log-probabilities are of the full vocabulary at the sampling temperature, float32:

    logp[q, t] = log softmax(logits[q, t] / temperature)[tokens[q, t + 1]]

in the frame of `batches`: position t predicts token t + 1, and the last position predicts nothing (its
entry is 0 and no mask shows it).

1. With `chunk` > 0 the logits are made `chunk` positions at a time and again in the backward pass, so that
   [Q, L, V] never exists; the numbers are the same.
2. Temperature 0 means 1, as in the sampler: a greedy choice has its log-probability at temperature 1.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from spct_jax import masked
from spct_jax import sharding
from spct_jax.algos import grpo
from spct_jax.algos import meta_rm
from spct_jax.algos import sft


def _columns(batch: dict, *names: str) -> list[jax.Array]:
  missing = [name for name in names if name not in batch]
  if missing:
    raise ValueError(
        f'the batch has no column {missing[0]!r}; this objective needs {", ".join(names)} and got'
        f' {", ".join(sorted(batch))}.'
    )
  return [batch[name] for name in names]


def _logp(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
  """(log-probability of targets [Q, C], log of the normaliser [Q, C]) of logits [Q, C, V]."""
  log_norm = jax.nn.logsumexp(logits, axis=-1)
  # A comparison with the vocabulary's indices, not a gather: a gather along a dimension that is split
  # over `tensor` would first collect all of it on every device.
  chosen = jnp.arange(logits.shape[-1])[None, None, :] == targets[:, :, None]
  return jnp.sum(jnp.where(chosen, logits, 0.0), axis=-1) - log_norm, log_norm


def _score(model: Any, params: Any, x: jax.Array, targets: jax.Array, temperature, entropy: bool):
  """(logp, entropy or zeros) of hidden states x [Q, C, D] and their next tokens [Q, C], float32."""
  logits = model.unembed(params, x).astype(jnp.float32)
  logits = logits / jnp.where(jnp.asarray(temperature) > 0, temperature, 1.0)
  logp, log_norm = _logp(logits, targets)
  if not entropy:
    return logp, jnp.zeros_like(logp)
  seen = jax.lax.stop_gradient(logits)
  return logp, jax.lax.stop_gradient(log_norm) - jnp.sum(jax.nn.softmax(seen, axis=-1) * seen, axis=-1)


def token_scores(
    model: Any, params: Any, batch: dict, *, temperature: Any, chunk: int, entropy: bool
) -> tuple[jax.Array, jax.Array]:
  """(logp, entropy), float32[Q, L] each; without `entropy` the second is zeros."""
  score = lambda x, targets: _score(model, params, x, targets, temperature, entropy)
  return _in_chunks(model, params, batch, score, chunk)


def _in_chunks(model: Any, params: Any, batch: dict, score: Callable, chunk: int) -> tuple:
  """`score(x [Q, C, D], next tokens [Q, C])`, a tuple of [Q, C], at all L positions; 0 at the last."""
  tokens, lengths = _columns(batch, 'tokens', 'lengths')
  x = model.hidden(params, tokens, lengths)
  targets = jnp.roll(tokens, -1, axis=1)  # the last target is the row's first token: zeroed below
  length = tokens.shape[1]
  if chunk <= 0 or chunk >= length:
    scores = score(x, targets)
  else:
    spare = -length % chunk

    def deal(leaf):
      leaf = jnp.pad(leaf, ((0, 0), (0, spare)) + ((0, 0),) * (leaf.ndim - 2))
      return jnp.moveaxis(leaf.reshape(leaf.shape[0], -1, chunk, *leaf.shape[2:]), 1, 0)

    def one(carry, part):
      # The parameters come in from outside the scan: as a carry they would be copied.
      return carry, score(*part)

    body = jax.checkpoint(one, prevent_cse=False)
    _, scores = jax.lax.scan(body, None, (deal(x), deal(targets)))
    scores = tuple(jnp.moveaxis(s, 0, 1).reshape(s.shape[1], -1)[:, :length] for s in scores)
  predicts = (jnp.arange(length) < length - 1)[None, :]
  return tuple(jnp.where(predicts, s, 0.0) for s in scores)


def _score_greedy(model: Any, params: Any, x: jax.Array, targets: jax.Array):
  """(logp, whether the next token is the likeliest one) of hidden states x [Q, C, D]."""
  logits = model.unembed(params, x).astype(jnp.float32)
  logp, _ = _logp(logits, targets)
  return logp, (jnp.argmax(logits, axis=-1) == targets).astype(jnp.float32)


def completion_scores(model: Any, mesh: Any, *, chunk: int = 0) -> Callable:
  """A jitted `(params, batch) -> (nll float32[Q], exact bool[Q])` of whole completions.

  nll is the sum over the completion's tokens. `exact` says that greedy decoding from the prompt would
  write this very completion, end-of-sequence token included: each of its tokens is the likeliest after
  those before it (the lowest id on ties, as in the sampler), so no position needs to be decoded.
  """
  def scores(params, batch):
    (token_mask,) = _columns(batch, 'token_mask')
    score = lambda x, targets: _score_greedy(model, params, x, targets)
    logp, best = _in_chunks(model, params, batch, score, chunk)
    return -jnp.sum(jnp.where(token_mask, logp, 0.0), axis=1), jnp.all((best > 0) | ~token_mask, axis=1)
  return jax.jit(scores, out_shardings=sharding.batch_rows(mesh))


def sft_objective(model: Any, *, chunk: int = 0) -> Callable:
  """Mean negative log-likelihood of the completion tokens."""
  def loss_fn(params, batch):
    (token_mask,) = _columns(batch, 'token_mask')
    logp, _ = token_scores(model, params, batch, temperature=1.0, chunk=chunk, entropy=False)
    total, count = sft.loss(logp, token_mask)
    return total, count, {}
  return loss_fn


def grpo_objective(
    model: Any, clip_eps: float, kl_coef: float, temperature: float, *, chunk: int = 0
) -> Callable:
  """GRPO. Beside the batch's tokens it needs advantage [Q], old_logp, ref_logp and sampler_logp [Q, L]."""
  def loss_fn(params, batch):
    token_mask, advantage, old_logp, ref_logp, sampler_logp = _columns(
        batch, 'token_mask', 'advantage', 'old_logp', 'ref_logp', 'sampler_logp'
    )
    logp, entropy = token_scores(
        model, params, batch, temperature=temperature, chunk=chunk, entropy=True
    )
    arrays = (logp, old_logp, ref_logp, advantage, token_mask)
    total, count = grpo.loss(*arrays, clip_eps=clip_eps, kl_coef=kl_coef)
    aux = dict(grpo.diagnostics(*arrays, clip_eps=clip_eps))
    tokens = masked.count(token_mask).astype(jnp.float32)
    gap = jnp.abs(jax.lax.stop_gradient(logp) - sampler_logp)
    aux['entropy'] = (masked.sum(entropy, token_mask), tokens)
    aux['logp_gap'] = (masked.sum(gap, token_mask), tokens)
    aux['logp_gap_max'] = (masked.max(gap, token_mask), tokens)
    return total, count, aux
  return loss_fn


def meta_rm_objective(model: Any) -> Callable:
  """Binary cross-entropy of the scalar head against target [Q] (the trajectory was right)."""
  def loss_fn(params, batch):
    target, row_mask, tokens, lengths = _columns(batch, 'target', 'row_mask', 'tokens', 'lengths')
    target = target.astype(bool)
    logit = model.apply({'params': params}, tokens, lengths=lengths)
    total, count = meta_rm.loss(logit, target, row_mask)
    seen = jax.lax.stop_gradient(logit)
    rows = masked.count(row_mask).astype(jnp.float32)
    aux = {
        'accuracy': (masked.sum(((seen > 0) == target).astype(jnp.float32), row_mask), rows),
        'target_rate': (masked.sum(target.astype(jnp.float32), row_mask), rows),
    }
    return total, count, aux
  return loss_fn


def token_logp(model: Any, mesh: Any, *, chunk: int = 0) -> Callable:
  """A jitted `(params, batch, temperature) -> logp float32[Q, L]` for old and reference policies.

  The rows stay on their devices, ready to be put into the batch that the update step takes.
  """
  def logp(params, batch, temperature):
    return token_scores(model, params, batch, temperature=temperature, chunk=chunk, entropy=False)[0]
  return jax.jit(logp, out_shardings=sharding.batch_rows(mesh))
