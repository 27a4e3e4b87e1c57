"""Plain float64 numpy readings of equations that several tests compare with."""

import jax
import numpy as np


def numpy_choose(logits, experts):
  """[(expert, weight), ...] of one token."""
  p = np.exp(logits - logits.max())
  p = p / p.sum()
  size = experts.count // experts.groups
  best = sorted(range(experts.groups), key=lambda g: (-max(p[g * size : (g + 1) * size]), g))[: experts.top_groups]
  allowed = [e for e in range(experts.count) if e // size in best]
  chosen = sorted(allowed, key=lambda e: (-p[e], e))[: experts.top_k]
  total = sum(p[e] for e in chosen) if experts.renormalise else 1.0
  return [(e, p[e] / total * experts.scale) for e in chosen]


def numpy_mlp(x, gate, up, down):
  hidden = x @ gate
  return (hidden / (1 + np.exp(-hidden)) * (x @ up)) @ down


def numpy_moe(params, x, experts):
  params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
  leaves = lambda part: [params[part][name]['kernel'] for name in ('gate', 'up', 'down')]
  out = np.zeros(x.shape)
  for i, token in enumerate(np.asarray(x, np.float64)):
    for e, weight in numpy_choose(token @ params['router']['kernel'], experts):
      out[i] += weight * numpy_mlp(token, *(leaf[e] for leaf in leaves('experts')))
    if experts.shared_ffn:
      out[i] += numpy_mlp(token, *leaves('shared'))
  return out
