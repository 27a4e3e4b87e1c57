"""Where the model meets the mathematics: loss functions `(params, batch) -> (sum, count, aux)`.

Per-token log-probabilities are of the full vocabulary at the sampling temperature, float32:

    logp[q, t] = log softmax(logits[q, t] / temperature)[tokens[q, t + 1]]

in the frame of `batches`: position t predicts token t + 1, and the last position predicts nothing (its
entry is 0 and no mask shows it).

1. With `chunk` > 0 the logits are made `chunk` positions at a time and again in the backward pass, so that
   [Q, L, V] never exists; the numbers are the same.
2. Where the sampler truncated (top-p, top-k, min-p) and recorded the set S[q, t] that it drew from, `kept_ids` of the
   batch, the log-probability may be over that set (`replay`):

       logp[q, t] = log softmax(logits[q, t] / temperature, over S[q, t])[tokens[q, t + 1]]

   The sampler draws from pi_old(. | S), so only the ratio pi(. | S) / pi_old(. | S) has the mean 1 under it, and
   turns an expectation under the sampler into one under pi(. | S). The ratio over the full vocabulary is off by the
   factor pi(S) / pi_old(S). k3 against the reference is unbiased for the same reason only
   over S: it then is KL(pi(. | S) || reference(. | S)), the divergence of what is sampled; over the full vocabulary
   its mean has the extra term r - 1 - log r, r = reference(S) / pi(S), whose gradient pulls mass into or out of S.
   What no term sees is the mass outside S, so that is logged (`kept_mass`).
3. Temperature 0 means 1, as in the sampler: a greedy choice has its log-probability at temperature 1.
"""

import functools
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


def _chosen(logits: jax.Array, targets: jax.Array) -> jax.Array:
  """The logits of targets [Q, C] among logits [Q, C, V]."""
  # A comparison with the vocabulary's indices, not a gather: a gather along a dimension that is split
  # over `tensor` would first collect all of it on every device.
  chosen = jnp.arange(logits.shape[-1])[None, None, :] == targets[:, :, None]
  return jnp.sum(jnp.where(chosen, logits, 0.0), axis=-1)


def _score(
    model: Any, params: Any, x: jax.Array, targets: jax.Array, kept_ids=None, *, temperature: Any, entropy: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """`kept_scores` of hidden states x [Q, C, D] and their next tokens [Q, C]; without kept_ids `token_scores`."""
  logits = model.unembed(params, x).astype(jnp.float32)
  logits = logits / jnp.where(jnp.asarray(temperature) > 0, temperature, 1.0)
  log_norm = jax.nn.logsumexp(logits, axis=-1)
  log_kept = log_norm if kept_ids is None else _log_kept(logits, kept_ids, log_norm)
  logp = _chosen(logits, targets) - log_kept
  mass = jax.lax.stop_gradient(jnp.exp(log_kept - log_norm))
  if not entropy:
    return logp, jnp.zeros_like(logp), mass
  seen = jax.lax.stop_gradient(logits)
  return logp, jax.lax.stop_gradient(log_norm) - jnp.sum(jax.nn.softmax(seen, axis=-1) * seen, axis=-1), mass


def _log_kept(logits: jax.Array, kept_ids: jax.Array, log_norm: jax.Array) -> jax.Array:
  """Log of the normaliser over kept_ids [Q, C, K] (-1 = none), [Q, C]; over the vocabulary where there is none."""
  real = kept_ids >= 0
  some = jnp.any(real, axis=-1)
  kept = jnp.take_along_axis(logits, jnp.maximum(kept_ids, 0), axis=-1)
  # A row of -inf alone would have a gradient of NaN, whatever stands behind it.
  kept = jnp.where(real, kept, jnp.where(some, -jnp.inf, 0.0)[:, :, None])
  return jnp.where(some, jax.nn.logsumexp(kept, axis=-1), log_norm)


def token_scores(
    model: Any, params: Any, batch: dict, *, temperature: Any, chunk: int, entropy: bool
) -> tuple[jax.Array, jax.Array]:
  """(logp, entropy), float32[Q, L] each; without `entropy` the second is zeros."""
  score = functools.partial(_score, model, params, temperature=temperature, entropy=entropy)
  return _in_chunks(model, params, batch, score, chunk)[:2]


def kept_scores(
    model: Any, params: Any, batch: dict, *, temperature: Any, chunk: int, entropy: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """(logp, entropy, mass), float32[Q, L] each: `token_scores` with logp over the batch's kept_ids [Q, L, K].

  `mass` is what they hold of the full vocabulary, of which the entropy is too. A position without any is over the
  full vocabulary, and its mass 1.
  """
  (kept_ids,) = _columns(batch, 'kept_ids')
  score = functools.partial(_score, model, params, temperature=temperature, entropy=entropy)
  return _in_chunks(model, params, batch, score, chunk, kept_ids)


def _in_chunks(model: Any, params: Any, batch: dict, score: Callable, chunk: int, *given: jax.Array) -> tuple:
  """`score(x [Q, C, D], next tokens [Q, C], *given [Q, C, ...])`, [Q, C] each, at all L positions; 0 at the last."""
  tokens, lengths = _columns(batch, 'tokens', 'lengths')
  x = model.hidden(params, tokens, lengths)
  targets = jnp.roll(tokens, -1, axis=1)  # the last target is the row's first token: zeroed below
  length = tokens.shape[1]
  if chunk <= 0 or chunk >= length:
    scores = score(x, targets, *given)
  else:
    spare = -length % chunk

    def deal(leaf):
      leaf = jnp.pad(leaf, ((0, 0), (0, spare)) + ((0, 0),) * (leaf.ndim - 2))
      return jnp.moveaxis(leaf.reshape(leaf.shape[0], -1, chunk, *leaf.shape[2:]), 1, 0)

    def one(carry, part):
      # The parameters come in from outside the scan: as a carry they would be copied.
      return carry, score(*part)

    body = jax.checkpoint(one, prevent_cse=False)
    _, scores = jax.lax.scan(body, None, tuple(map(deal, (x, targets, *given))))
    scores = tuple(jnp.moveaxis(s, 0, 1).reshape(s.shape[1], -1)[:, :length] for s in scores)
  predicts = (jnp.arange(length) < length - 1)[None, :]
  return tuple(jnp.where(predicts, s, 0.0) for s in scores)


def _score_greedy(model: Any, params: Any, x: jax.Array, targets: jax.Array):
  """(logp, whether the next token is the likeliest one) of hidden states x [Q, C, D]."""
  logits = model.unembed(params, x).astype(jnp.float32)
  logp = _chosen(logits, targets) - jax.nn.logsumexp(logits, axis=-1)
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
    model: Any, clip_eps: float, kl_coef: float, temperature: float, *, chunk: int = 0, replay: bool = False
) -> Callable:
  """GRPO. Beside the batch's tokens it needs advantage [Q], old_logp, ref_logp and sampler_logp [Q, L].

  With `replay` also kept_ids [Q, L, K], and all three log-probabilities must be over them: those of `token_logp`
  with `replay`, and the sampler's as `batches.pad` lays them out.
  """
  def loss_fn(params, batch):
    token_mask, advantage, old_logp, ref_logp, sampler_logp = _columns(
        batch, 'token_mask', 'advantage', 'old_logp', 'ref_logp', 'sampler_logp'
    )
    scores = kept_scores if replay else token_scores
    logp, entropy, *mass = scores(model, params, batch, temperature=temperature, chunk=chunk, entropy=True)
    arrays = (logp, old_logp, ref_logp, advantage, token_mask)
    total, count = grpo.loss(*arrays, clip_eps=clip_eps, kl_coef=kl_coef)
    aux = dict(grpo.diagnostics(*arrays, clip_eps=clip_eps))
    tokens = masked.count(token_mask).astype(jnp.float32)
    gap = jnp.abs(jax.lax.stop_gradient(logp) - sampler_logp)
    aux['entropy'] = (masked.sum(entropy, token_mask), tokens)
    aux['logp_gap'] = (masked.sum(gap, token_mask), tokens)
    aux['logp_gap_max'] = (masked.max(gap, token_mask), tokens)
    if replay:
      aux['kept_mass'] = (masked.sum(mass[0], token_mask), tokens)
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


def token_logp(model: Any, mesh: Any, *, chunk: int = 0, replay: bool = False) -> Callable:
  """A jitted `(params, batch, temperature) -> logp float32[Q, L]` for old and reference policies.

  The rows stay on their devices, ready to be put into the batch that the update step takes. With `replay` it is over
  the batch's kept_ids.
  """
  def logp(params, batch, temperature):
    scores = kept_scores if replay else token_scores
    return scores(model, params, batch, temperature=temperature, chunk=chunk, entropy=False)[0]
  return jax.jit(logp, out_shardings=sharding.batch_rows(mesh))
