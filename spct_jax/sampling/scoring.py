"""A pass that scores given texts and shares their prompts: rewards of whole rows, and masses of next tokens.

    scorer = Scorer(model=..., mesh=..., rows=32)
    scorer.rewards(params, prompts, suffixes, prompt_of)         the scalar head on [prompt; suffix]
    scorer.masses(params, prompts, branches, prompt_of, ...)     probabilities of sets of next tokens

A prompt goes through the layers once, at most so many tokens at a time, and its keys and values stay in a *slot*.
Rows, which are suffixes, go through the layers `rows` at a time, whatever their prompts are, and attend to their
slot and to themselves (`suffixes`). Of k trajectories of one prompt that costs P + k S tokens in place of k (P + S),
and no row's attention is larger than a block.

Prompts come in waves of as many as there are slots, sorted by length; the rows of a wave are sorted by length too and
then cut, so that rows that go together are about equally long. On a mesh prompts are dealt over the data axes, with
their rows. What a row gets depends on its prompt and its own tokens only, up to rounding.

1. Inference only. There is no gradient that one may use: results are numpy arrays, and the attention inside has no
   reverse mode. A merge of parts has a derivative of its own, which nothing here provides.
2. Shapes decide what is compiled: one program for each length of prompts, and one for each length of rows. Lengths
   go in steps of a half (32, 48, 64, 96, ...); the longest prompt and the number of slots are the same for all.
3. With latent attention the slots hold latents and the pass is the absorbed one, as in the engine.
"""

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np

from spct_jax import sharding
from spct_jax.models import blockwise, kv_cache
from spct_jax.models.transformer import Transformer
from spct_jax.sampling import dealing
from spct_jax.sampling import suffixes as attention

_PREFILL = 1024  # prompt tokens that go through the model at once, in each group
_HELD = 16384  # prompt tokens that slots hold, in each group, where rows do not ask for more
_SHORTEST = 32  # tokens of a prompt or row as a program takes them


@dataclasses.dataclass(frozen=True)
class Branch:
  """A row as `masses` takes it: `tokens` and for each of them the index of the one before it, -1 for the first.

  The first `main` tokens are a chain (0 after -1, 1 after 0, ...); the rest branch off it or off each other.
  """

  tokens: tuple[int, ...]
  before: tuple[int, ...]
  main: int

  def __post_init__(self):
    chain = tuple(range(-1, self.main - 1))
    early = all(0 <= before < at for at, before in enumerate(self.before) if at >= self.main)
    if not 1 <= self.main <= len(self.tokens) == len(self.before) or self.before[: self.main] != chain or not early:
      raise ValueError(
          f'branch: got {len(self.tokens)} tokens, {self.main} of them the chain, that follow {self.before}; allowed: '
          'a chain of at least one token, then tokens that follow an earlier one'
      )


@dataclasses.dataclass(frozen=True)
class Sets:
  """Sets of tokens: state w has for each class c < `classes` the tokens `ids[w, i]` with `of[w, i] == c`.

  int32[W, I] both; an entry whose class is `classes` or more is padding. A token may stand in several classes.
  """

  ids: np.ndarray
  of: np.ndarray
  classes: int


@dataclasses.dataclass(frozen=True)
class Settings:
  """What is compiled in; hashable."""

  model: Transformer
  mesh: jax.sharding.Mesh | None


@dataclasses.dataclass(frozen=True)
class Scorer:
  """How to score with a model: `rows` go through it at once, over all devices. `mesh` None is one device."""

  model: Transformer
  mesh: jax.sharding.Mesh | None
  rows: int

  def __post_init__(self):
    if self.rows < 1:
      raise ValueError(f'rows: got {self.rows}; the scorer needs at least 1.')

  def rewards(
      self,
      params: dict,
      prompts: Sequence[Sequence[int]],
      suffixes: Sequence[Sequence[int]],
      prompt_of: Sequence[int],
      on_rows: Callable[[int], None] | None = None,
  ) -> np.ndarray:
    """float32[Q]: the scalar head at the last token of each suffix, read after its prompt.

    A prompt may be empty, a suffix not. `on_rows(number)` is told how many rows are done, again and again.
    """
    self._check('scalar', prompts, suffixes, prompt_of)
    out = np.zeros(len(suffixes), np.float32)
    lengths = [len(suffix) for suffix in suffixes]
    for index, given, S in self._passes(params, prompts, lengths, prompt_of):
      tokens, real = _filled(index, S, lambda q: suffixes[q])
      ends = np.where(index >= 0, real, 1).astype(np.int32)
      found = _rewards(*given, *dealing.put((tokens, ends), self.mesh))
      out[index[index >= 0]] = sharding.to_host(found).reshape(index.shape)[index >= 0]
      if on_rows is not None:
        on_rows(int((index >= 0).sum()))
    return out

  def masses(
      self,
      params: dict,
      prompts: Sequence[Sequence[int]],
      branches: Sequence[Branch],
      prompt_of: Sequence[int],
      places: Sequence[Sequence[tuple[int, int]]],
      sets: Sets,
      temperature: float,
      on_rows: Callable[[int], None] | None = None,
  ) -> list[np.ndarray]:
    """For each row float32[its places, C]: the probability that the next token is of class c.

    A place is (index of the token behind which it is asked, state of `sets`). Probabilities are those of the full
    vocabulary at `temperature`, float32; 0 means 1, as in log-probabilities of greedy samples.
    """
    self._check('lm', prompts, [branch.tokens for branch in branches], prompt_of)
    lengths = [len(branch.tokens) for branch in branches]
    number = dealing.step(max(map(len, places), default=1))
    depth = max((_depth(branch) for branch in branches), default=0)
    tree = [_tree(branch, depth) for branch in branches]
    table = _padded_sets(sets)
    out = [np.zeros((len(asked), sets.classes), np.float32) for asked in places]
    for index, given, S in self._passes(params, prompts, lengths, prompt_of):
      tokens, real = _filled(index, S, lambda q: branches[q].tokens)
      shape = (*index.shape, S)
      # Padding goes on as a chain, which always sees itself.
      limit, offset = np.broadcast_to(np.arange(1, S + 1), shape).copy(), np.broadcast_to(np.arange(S), shape).copy()
      ancestors = np.full((*shape, depth), -1)
      where, state = np.zeros((*index.shape, number), np.int32), np.zeros((*index.shape, number), np.int32)
      for place in np.argwhere(index >= 0):
        g, r = place
        q, L = index[g, r], real[g, r]
        limit[g, r, :L], ancestors[g, r, :L], offset[g, r, :L] = tree[q]
        if len(places[q]):
          where[g, r, : len(places[q])], state[g, r, : len(places[q])] = np.asarray(places[q]).T
      host = tokens, limit.astype(np.int32), ancestors.astype(np.int32), offset.astype(np.int32), where, state
      heat = np.float32(temperature if temperature > 0 else 1.0)
      found = sharding.to_host(_masses(*given, *dealing.put(host, self.mesh), *table, heat, sets.classes))
      found = found.reshape(*index.shape, number, sets.classes)
      for place in np.argwhere(index >= 0):
        q = index[tuple(place)]
        out[q] = found[tuple(place)][: len(places[q])]
      if on_rows is not None:
        on_rows(int((index >= 0).sum()))
    return out

  def _check(self, head, prompts, suffixes, prompt_of):
    if self.model.config.head_kind != head:
      raise ValueError(f'model: got a {self.model.config.head_kind!r} head; this needs head_kind {head}.')
    if len(suffixes) != len(prompt_of):
      raise ValueError(f'prompt_of: got {len(prompt_of)} for {len(suffixes)} rows; needs one prompt for each.')
    wrong = [u for u in prompt_of if not 0 <= u < len(prompts)]
    if wrong:
      raise ValueError(f'prompt_of: got {wrong[0]}; allowed: 0 to {len(prompts) - 1}, the index of a prompt.')
    if not all(len(suffix) for suffix in suffixes):
      raise ValueError('suffixes: got an empty one; needs at least 1 token, where its score is read.')
    size = self.model.config.vocab_size
    for ids in (*prompts, *suffixes):
      if len(ids) and not 0 <= min(ids) <= max(ids) < size:
        raise ValueError(f'tokens: got the ids {min(ids)} to {max(ids)}; allowed: 0 to {size - 1}, those of the model.')

  def _passes(self, params, prompts, lengths, prompt_of) -> Iterator[tuple]:
    """Prefills and gives, pass by pass: index int[G, R] of rows (-1: padding), what a program takes first, S."""
    if not lengths:
      return
    settings = Settings(self.model, self.mesh)
    G = 1 if self.mesh is None else sharding.data_ways(self.mesh)
    sizes, of = np.asarray([len(prompt) for prompt in prompts]), np.asarray(prompt_of)
    size, waves = _plan(sizes.tolist(), lengths, prompt_of, self.rows, G)
    cache = _empty(settings, G * size.slots, size.longest)
    for wave in waves:
      for place, chosen, P in wave.fills:
        tokens = np.zeros((*chosen.shape, P), np.int32)
        for g, b in np.argwhere(chosen >= 0):
          ids = prompts[chosen[g, b]]
          tokens[g, b, : len(ids)] = ids
        cache = _prefill(settings, params, cache, *dealing.put((tokens, place.astype(np.int32)), self.mesh))
      for index, slot, S in wave.passes:
        held = np.where(index >= 0, sizes[of[np.maximum(index, 0)]], 0)
        seats = dealing.put((slot.astype(np.int32), held.astype(np.int32)), self.mesh)
        yield index, (settings, params, cache, *seats), S


def _filled(index, S, row_of):
  """(tokens int32[G, R, S], their number int[G, R]); padding is token 0."""
  tokens, real = np.zeros((*index.shape, S), np.int32), np.zeros(index.shape, int)
  for g, r in np.argwhere(index >= 0):
    row = row_of(index[g, r])
    tokens[g, r, : len(row)], real[g, r] = row, len(row)
  return tokens, real


# --- what goes where


@dataclasses.dataclass(frozen=True)
class _Size:
  """Of all waves of a run: slots of each group, and positions of a slot."""

  slots: int
  longest: int


@dataclasses.dataclass(frozen=True)
class _Wave:
  """`fills`: (place [G, B], the slot, or `slots` for none; prompt [G, B], -1 for none; P).

  `passes`: (row [G, R], -1 for none; slot [G, R], ascending; S).
  """

  fills: list[tuple[np.ndarray, np.ndarray, int]]
  passes: list[tuple[np.ndarray, np.ndarray, int]]


def _tokens(length: int) -> int:
  """How many tokens a program takes for a prompt or row of so many."""
  return dealing.step(max(length, _SHORTEST))


def _plan(held: list[int], lengths: list[int], prompt_of: Sequence[int], rows: int, G: int):
  """-> _Size, list of _Wave. Depends on these numbers alone, so every process makes the same."""
  rows_of = {}
  for q, u in enumerate(prompt_of):
    rows_of.setdefault(int(u), []).append(q)
  order = sorted(rows_of, key=lambda u: (_tokens(held[u]), u))
  block = blockwise.BLOCK
  longest = _tokens(max(held[u] for u in order))
  longest = longest if longest <= block else -(-longest // block) * block
  R = -(-rows // G)
  wanted = max(-(-R * len(order) // len(lengths)), _HELD // longest, 1)
  slots = dealing.step(min(wanted, -(-len(order) // G)))
  waves = []
  for start in range(0, len(order), slots * G):
    here = order[start : start + slots * G]
    dealt = [[] for _ in range(G)]
    for rank, u in enumerate(sorted(here, key=lambda u: -len(rows_of[u]))):
      dealt[dealing.to_and_fro(rank, G)[1]].append(u)
    for mine in dealt:
      mine.sort(key=lambda u: (-held[u], u))
    waves.append((dealt, max(sum(len(rows_of[u]) for u in mine) for mine in dealt)))
  R = min(R, dealing.step(max(most for _, most in waves)))
  size = _Size(slots, longest)
  return size, [_wave(dealt, held, lengths, rows_of, R, size) for dealt, _ in waves]


def _wave(dealt, held, lengths, rows_of, R, size):
  G, fills, passes, start = len(dealt), [], [], 0
  while start < max(map(len, dealt)):
    P = max(_tokens(held[mine[start]]) for mine in dealt if start < len(mine))
    B = max(1, min(size.slots, _PREFILL // P))
    chosen = np.full((G, B), -1)
    for g, mine in enumerate(dealt):
      part = mine[start : start + B]
      chosen[g, : len(part)] = part
    place = np.where(chosen >= 0, start + np.arange(B)[None, :], size.slots)
    fills.append((place, chosen, min(P, size.longest)))
    start += B
  queues = []
  for mine in dealt:
    queue = [(_tokens(lengths[q]), slot, q) for slot, u in enumerate(mine) for q in rows_of[u]]
    queues.append(sorted(queue, key=lambda row: (-row[0], *row[1:])))
  for start in range(0, max(map(len, queues)), R):
    index, slots, S = np.full((G, R), -1), np.zeros((G, R), int), _SHORTEST
    for g, queue in enumerate(queues):
      part = sorted(queue[start : start + R], key=lambda row: row[1:])
      S = max([S, *(length for length, _, _ in part)])
      for r, (_, slot, q) in enumerate(part):
        index[g, r], slots[g, r] = q, slot
      slots[g, len(part):] = part[-1][1] if part else 0  # padding is of the last slot, so that none is visited for it
    passes.append((index, slots, S))
  return _Wave(fills, passes)


# --- rows that branch


def _depth(branch: Branch) -> int:
  """The most tokens that any branch has, one upon the other."""
  depth = [0] * len(branch.tokens)
  for at in range(branch.main, len(branch.tokens)):
    depth[at] = depth[branch.before[at]] + 1
  return max(depth)


def _tree(branch: Branch, depth: int):
  """(limit [L], ancestors [L, depth], offset [L]) of `attention.Tree`, and how far a token is behind the first."""
  L, main = len(branch.tokens), branch.main
  limit, offset, ancestors = np.arange(1, L + 1), np.arange(L), np.full((L, depth), -1)
  for at in range(branch.main, len(branch.tokens)):
    before = branch.before[at]
    limit[at], offset[at] = limit[before], offset[before] + 1
    if before >= main:
      ancestors[at] = ancestors[before]
    ancestors[at, np.argmax(ancestors[at] < 0)] = at
  return limit, ancestors, offset


def _padded_sets(sets: Sets):
  """(ids, of) with both axes in steps, so that few programs arise."""
  W, I = sets.ids.shape
  shape = dealing.step(max(W, 1)), dealing.step(max(I, 1))
  ids, of = np.zeros(shape, np.int32), np.full(shape, sets.classes, np.int32)
  ids[:W, :I], of[:W, :I] = sets.ids, sets.of
  return ids, of


# --- on the device


def _by_rows(settings, x, axis=0):
  """`axis` (rows or slots of all groups) over the data axes of the mesh; the others as they come."""
  if settings.mesh is None:
    return x
  spec = [PartitionSpec.UNCONSTRAINED] * x.ndim
  spec[axis] = sharding.DATA_AXES
  return jax.lax.with_sharding_constraint(x, NamedSharding(settings.mesh, PartitionSpec(*spec)))


def _place_cache(settings, cache):
  return {
      group: jax.tree.map(lambda leaf, axis=int(group == 'period'): _by_rows(settings, leaf, axis), layers)
      for group, layers in cache.items()
  }


@functools.partial(jax.jit, static_argnames=('settings', 'slots', 'length'))
def _empty(settings: Settings, slots: int, length: int) -> dict:
  return _place_cache(settings, kv_cache.init(settings.model.config, slots, length))


@functools.partial(jax.jit, static_argnames='settings', donate_argnames='cache')
def _prefill(settings: Settings, params: dict, cache: dict, tokens: jax.Array, place: jax.Array) -> dict:
  """The cache with the keys and values of tokens[G, B, P] in the slots place[G, B]. What padding writes is unseen."""
  model, (G, B, P) = settings.model, tokens.shape
  longest = jax.tree.leaves(cache)[0].shape[-2]
  flat = _by_rows(settings, tokens.reshape(G * B, P))
  positions = jnp.broadcast_to(jnp.arange(P, dtype=jnp.int32)[None, :], flat.shape)

  def attend(ref, q, k, v, cache):
    out = blockwise.causal(q, k, v, model.config.score_scale(ref.config), ref.config.window, model.config.attn_softcap)
    whole = lambda x: jnp.pad(x, ((0, 0), (0, longest - P), (0, 0), (0, 0))).reshape(G, B, longest, *x.shape[2:])
    return out, kv_cache.write_rows(cache, ref, whole(k), whole(v), place)

  x = _by_rows(settings, model.embed(params, flat))
  return _place_cache(settings, model.run_layers(params, x, positions, attend, cache)[1])


def _hidden(settings, params, cache, slot, held, tokens, offset, tree):
  """The residual stream [G * R, S, D] of tokens[G, R, S] behind their prompts; `offset` is from the first of a row."""
  model, (G, R, S) = settings.model, tokens.shape
  positions = held[:, :, None] + offset
  rows = attention.Rows(slot, held, positions, tree)
  flat = lambda x: _by_rows(settings, x.reshape(G * R, S))

  def attend(ref, q, k, v, carried):
    prompt, scale = kv_cache.read(cache, ref), model.config.score_scale(ref.config)
    return attention.attend(q, (k, v), prompt, rows, scale, ref.config.window, model.config.attn_softcap), carried

  x = _by_rows(settings, model.embed(params, flat(tokens)))
  return model.run_layers(params, x, flat(positions), attend, ())[0]


@functools.partial(jax.jit, static_argnames='settings')
def _rewards(settings: Settings, params: dict, cache: dict, slot, held, tokens, ends) -> jax.Array:
  """float32[G * R]; `ends[G, R]` tokens of each row are real."""
  offset = jnp.arange(tokens.shape[-1], dtype=jnp.int32)[None, None, :]
  x = _hidden(settings, params, cache, slot, held, tokens, offset, None)
  return _by_rows(settings, settings.model.rewards(params, x, ends.reshape(-1)))


@functools.partial(jax.jit, static_argnames=('settings', 'classes'))
def _masses(
    settings: Settings, params: dict, cache: dict, slot, held, tokens, limit, ancestors, offset, where, state, ids, of,
    temperature, classes: int,
) -> jax.Array:
  """float32[G * R, n, classes]: of the n places of each row, the probability of each class of next tokens."""
  model, N = settings.model, where.shape[0] * where.shape[1]
  x = _hidden(settings, params, cache, slot, held, tokens, offset, attention.Tree(limit, ancestors))
  where, state = where.reshape(N, -1), state.reshape(N, -1)

  def one(place):
    where, state = place  # [N]
    at = jnp.take_along_axis(x, where[:, None, None], axis=1)
    logits = model.unembed(params, at)[:, 0] / temperature
    chosen = jnp.take_along_axis(logits, ids[state], axis=1)  # [N, I]
    share = jnp.exp(chosen - jax.nn.logsumexp(logits, axis=-1, keepdims=True))
    mine = of[state][:, :, None] == jnp.arange(classes)[None, None, :]
    return jnp.where(mine, share[:, :, None], 0.0).sum(axis=1)

  out = jax.lax.map(one, (where.T, state.T))  # place by place: logits of all of them at once would be large
  return _by_rows(settings, out.swapaxes(0, 1))
