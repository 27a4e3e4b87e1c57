"""Attention of whole rows over the caches of their prompts, and over themselves: one softmax, visited in blocks.

    row r, token i     sees  the first held[r] keys of slot[r],  and of its own row what comes before i on its path

A row is a chain, or a *tree*: a chain with branches, each of which sees the chain up to where it leaves it and its
own tokens (`Tree`), so that many continuations of one text are one row. Of the row  a b c  with x y after b, and z
after c:

              a b c x y z
        b     1 1 . . . .
        c     1 1 1 . . .        limit 3, no ancestors
        y     1 1 . 1 1 .        limit 2, ancestors x and y
        z     1 1 1 . . 1        limit 3, ancestor z

For a block of queries (one row's, or several short rows') the blocks of the prompts' keys are visited and then those
of the row's own keys, with one running softmax over both: with the largest score t, the mass l = sum exp(s - t) and
the value a = sum exp(s - t) v so far, all float32, a further part (t2, l2, a2) is taken in by

    t' = max(t, t2)     l' = exp(t - t') l + exp(t2 - t') l2     a' = exp(t - t') a + exp(t2 - t') a2

which is the merge of `shared` in a row. So no array of all queries by all keys exists, and no copy of a cache. Rows
come sorted by slot: a block then meets few slots, its part of a prompt is one product of matrices, and a prompt is
read once for all queries of the block. A block that straddles slots visits each of them for all of its queries, which
costs at most one block of queries more a prompt.

Inference only: there is no derivative in reverse mode, and asking for one is an error of JAX (the number of blocks is
not known when it is traced).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from spct_jax.models import attention
from spct_jax.models.blockwise import BLOCK


class Tree(NamedTuple):
  """Of own tokens, token i sees those before `limit[G, R, S]` and its `ancestors[G, R, S, A]` (-1: none), which
  include itself where it is on a branch. Both stand before it or are it."""

  limit: jax.Array
  ancestors: jax.Array


class Rows(NamedTuple):
  """R rows of S tokens in each of G groups. Rows are sorted by `slot[G, R]`, an index within the group.

  `held[G, R]` tokens of the slot are seen; `positions[G, R, S]` are those of the model. `tree` None: chains.
  """

  slot: jax.Array
  held: jax.Array
  positions: jax.Array
  tree: Tree | None


def attend(
    q: Float[Array, 'N S H d'],
    own: tuple[Float[Array, 'N S M d'], Float[Array, 'N S M e']],
    prompt: tuple[Float[Array, 'Z M P d'], Float[Array, 'Z M P e']],
    rows: Rows,
    scale: float,
    window: int | None = None,
    softcap: int | float | None = None,
    block: int = BLOCK,
) -> Float[Array, 'N S H e']:
  """N = G * R rows and Z slots of all groups, one group after the other; P up to `block`, or a multiple of it.

  Scale, window and soft-cap as in `blockwise.causal`.
  """
  (N, S, H, d), (Z, M, P, _), e = q.shape, prompt[0].shape, own[1].shape[-1]
  G, R = rows.slot.shape
  parts, width, size = _cut(R, S, block)  # blocks are `width` rows, of each `size` tokens: one of its `parts`
  step = min(block, P)
  if P % step:
    raise ValueError(f'prompt: got slots of {P} positions; allowed: at most {block}, or a multiple of it')
  q = q.reshape(G, R, S, M, H // M, d)
  keys, values = (x.astype(q.dtype).reshape(G, R, S, M, -1).transpose(0, 3, 1, 2, 4) for x in own)  # [G, M, R, S, .]
  slots = [x.astype(q.dtype).reshape(G, Z // G, M, P, -1) for x in prompt]
  # What a block visits, over all groups, so that they go in step.
  first, last = rows.slot[:, ::width], rows.slot[:, width - 1 :: width]  # [G, blocks of rows]
  visited = (last - first).max(axis=0) + 1
  longest = rows.held.reshape(G, -1, width).max(axis=(0, 2))
  earliest = rows.positions.reshape(G, R // width, width, parts, size).min(axis=(0, 2, 4))

  def take(x, slot, j):
    """[G, M, step, .]: block j of the keys of a slot of each group."""
    one = lambda x, slot: jax.lax.dynamic_slice(x, (slot, 0, j * step, 0), (1, M, step, x.shape[-1]))[0]
    if G == 1:  # a slice stays a slice; mapped over groups it is a gather
      return one(x[0], slot[0])[None]
    return jax.vmap(one)(x, slot)

  def queries(index):
    i, p = index // parts, index % parts
    of_rows = lambda x: jax.lax.dynamic_slice_in_dim(x, i * width, width, axis=1)
    of_part = lambda x: jax.lax.dynamic_slice_in_dim(of_rows(x), p * size, size, axis=2)
    query = of_part(q).transpose(0, 3, 1, 4, 2, 5)  # [G, M, width, g, size, d]
    slot, held, positions = of_rows(rows.slot), of_rows(rows.held), of_part(rows.positions)
    near = lambda key: True if window is None else positions[..., None] - key < window

    def absorb(carry, scores, seen, weigh):
      top, mass, value = carry
      # -inf against a finite start: exp(s - t) is 0 also where a query sees nothing of a block.
      seen = seen[:, None, :, None]  # [G, 1, width, 1, size, keys]
      scores = jnp.where(seen, attention.capped(scores * scale, softcap), -jnp.inf)
      best = jnp.maximum(top, scores.max(axis=-1))
      weights, kept = jnp.exp(scores - best[..., None]), jnp.exp(top - best)
      return best, kept * mass + weights.sum(axis=-1), kept[..., None] * value + weigh(weights.astype(q.dtype))

    def of_slot(u, carry):
      here = jnp.minimum(first[:, i] + u, last[:, i])  # [G]
      mine = (slot == here[:, None]) & (u <= last[:, i] - first[:, i])[:, None]

      def prompt_keys(j, carry):
        index = j * step + jnp.arange(step)[None, None, None, :]
        seen = mine[:, :, None, None] & (index < held[:, :, None, None]) & near(index)
        seen = jnp.broadcast_to(seen, (G, width, size, step))
        scores = jnp.einsum(
            'GMwgqd,GMkd->GMwgqk', query, take(slots[0], here, j), preferred_element_type=jnp.float32
        )
        weigh = lambda weights: jnp.einsum(
            'GMwgqk,GMke->GMwgqe', weights, take(slots[1], here, j), preferred_element_type=jnp.float32
        )
        return absorb(carry, scores, seen, weigh)

      start = 0 if window is None else jnp.maximum(earliest[i, p] - window + 1, 0) // step
      return jax.lax.fori_loop(start, -(-longest[i] // step), prompt_keys, carry)

    def own_keys(j, carry):
      of_keys = lambda x: jax.lax.dynamic_slice_in_dim(
          jax.lax.dynamic_slice_in_dim(x, i * width, width, axis=2), j * size, size, axis=3
      )
      index = j * size + jnp.arange(size)[None, None, None, :]
      if rows.tree is None:
        seen = index <= (p * size + jnp.arange(size))[None, None, :, None]
      else:
        limit, ancestors = of_part(rows.tree.limit), of_part(rows.tree.ancestors)
        seen = (index < limit[..., None]) | (ancestors[..., None, :] == index[..., None]).any(axis=-1)
      if window is not None:
        at = jax.lax.dynamic_slice_in_dim(of_rows(rows.positions), j * size, size, axis=2)[:, :, None, :]
        seen = seen & near(at)
      seen = jnp.broadcast_to(seen, (G, width, size, size))
      scores = jnp.einsum('GMwgqd,GMwkd->GMwgqk', query, of_keys(keys), preferred_element_type=jnp.float32)
      weigh = lambda weights: jnp.einsum(
          'GMwgqk,GMwke->GMwgqe', weights, of_keys(values), preferred_element_type=jnp.float32
      )
      return absorb(carry, scores, seen, weigh)

    shape = query.shape[:-1]
    carry = (
        jnp.full(shape, jnp.finfo(jnp.float32).min), jnp.zeros(shape, jnp.float32), jnp.zeros((*shape, e), jnp.float32)
    )
    carry = jax.lax.fori_loop(0, visited[i], of_slot, carry)
    _, mass, value = jax.lax.fori_loop(0, p + 1, own_keys, carry)
    out = (value / mass[..., None]).astype(q.dtype)
    return out.transpose(0, 2, 4, 1, 3, 5)  # [G, width, size, M, g, e]

  out = jax.lax.map(queries, jnp.arange(R // width * parts, dtype=jnp.int32))
  out = out.reshape(R // width, parts, G, width, size, H, e).transpose(2, 0, 3, 1, 4, 5, 6)
  return out.reshape(N, S, H, e)


def _cut(R: int, S: int, block: int) -> tuple[int, int, int]:
  """(parts of a row, rows of a block, tokens of a part): about `block` queries in each block."""
  parts = next(n for n in range(-(-S // block), S + 1) if S % n == 0)
  width = 1
  if parts == 1:
    width = max(n for n in range(1, R + 1) if R % n == 0 and (n == 1 or n * S <= block))
  return parts, width, S // parts
