"""Prompts that begin alike: how they are cut and dealt, and that results are those of whole prompts."""

import dataclasses
import re

import jax
import numpy as np
import pytest

from spct_jax import pages, sharding
from spct_jax.models.config import BlockConfig, Experts, Latent
from spct_jax.sampling import engine as engine_module
from spct_jax.sampling import loop, slots, trunks
from spct_jax.testing import tiny
from spct_jax.types import PromptBatch

pytestmark = pytest.mark.usefixtures('compiled_quickly')

# Shared tokens and the rests of the prompts of each item. The windows of the models (4) are shorter than most of these
# branches, than the answers (6), and longer than one branch: they end in the answer, in the branch and in the trunk.
ITEMS = ((9, (2, 6, 1, 4)), (0, (1,)), (7, (3, 3)), (0, (14,)))
COUNTS = (4, 1, 3, 2, 3, 2, 1, 4)  # tasks of each prompt


def item_prompts(items=ITEMS, P=16, vocabulary=61, seed=3):
  draw = np.random.default_rng(seed).integers
  rows = []
  for shared, rests in items:
    head = draw(0, vocabulary, shared)
    rows += [np.r_[head, draw(0, vocabulary, rest)] for rest in rests]
  tokens = np.zeros((len(rows), P), np.int32)
  for row, ids in zip(tokens, rows):
    row[: len(ids)] = ids
  return PromptBatch(tokens, np.array(list(map(len, rows)), np.int32), np.ones(len(rows), bool))


def item_tasks(make_tasks, items=ITEMS, counts=COUNTS, settings=((0.0, 1.0, 0, 0.0), (0.8, 0.9, 12, 0.01))):
  """Tasks named by their items, as the judge's are."""
  prompt = np.repeat(np.arange(len(counts)), counts)
  item = np.repeat(np.arange(len(items)), [len(rests) for _, rests in items])[prompt]
  tasks = make_tasks(prompt, np.arange(len(prompt)), settings)
  return dataclasses.replace(tasks, uid=np.stack([item + 5, item], axis=1).astype(np.uint32))


def logp_of_learner(rig, rollouts, prompts, tasks):
  temperature = np.where(tasks.temperature == 0, 1.0, tasks.temperature)
  logits = rig.learner_logits(rollouts, prompts, tasks) / temperature[:, None, None]
  logp = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), rollouts.tokens[..., None], -1)[..., 0]
  return logits.argmax(-1), np.where(rollouts.token_mask, logp, 0.0)


def assert_same(got, want, atol=2e-5):
  np.testing.assert_array_equal(got.tokens, want.tokens)
  np.testing.assert_array_equal(got.token_mask, want.token_mask)
  np.testing.assert_allclose(got.logp, want.logp, atol=atol)


def choose(prompts, tasks, rows=3):
  cut, sizes = engine_module._choose(prompts, tasks, 1, rows, 6, True)
  assert cut is not None and sizes.trunk_slots
  return cut


@pytest.fixture(scope='module')
def whole(rig):
  """Items, and what the engine gives without trunks."""
  prompts, tasks = item_prompts(), item_tasks(rig.make_tasks)
  engine = dataclasses.replace(rig.engine(rig.model, rows=3), share_trunks=False)
  return prompts, tasks, engine.generate(rig.params, prompts, tasks)


# --- on the host


def test_an_item_is_cut_behind_what_its_prompts_share(rig):
  prompts, tasks = item_prompts(), item_tasks(rig.make_tasks)
  by_size = {cut.size: cut for cut in trunks.cuts(prompts, tasks)}
  # The first item shares 9 tokens and its longest prompt has 15; of 12 and 4 it would keep 6 behind the trunk.
  assert by_size[8].trunk.tolist() == [0, 0, 0, 0, 1, 2, 2, 3] and by_size[8].length.tolist() == [8, 0, 7, 8]
  assert by_size[12].trunk.tolist() == [0, 1, 2, 3, 4, 5, 5, 6] and by_size[12].length[5] == 7
  # A long one of real sizes; slots of more than a block are whole blocks.
  items = ((600, (300, 310)),)
  long = trunks.cuts(item_prompts(items, P=1000), item_tasks(rig.make_tasks, items, (1, 1)))
  assert [(cut.size, cut.rest, cut.length.tolist()) for cut in long] == [(384, 616, [384]), (640, 360, [600])]
  # The same prompt twice keeps its last token for the branch; what has no task is left out.
  same = PromptBatch(np.ones((3, 16), np.int32), np.array([9, 9, 3], np.int32), np.ones(3, bool))
  cut = trunks.cuts(same, item_tasks(rig.make_tasks, ((0, (1, 1, 1)),), (2, 2, 0)))[-1]
  assert cut.length.tolist() == [8] and cut.trunk.tolist() == [0, 0, -1]


def test_single_orders_and_next_to_nothing_in_common_are_left_whole(rig):
  for items, counts in ((((15, (1,)), (15, (1,))), (3, 3)), (((1, (9, 9)), (0, (7, 7))), (2, 2, 2, 2))):
    prompts, tasks = item_prompts(items), item_tasks(rig.make_tasks, items, counts)
    assert trunks.cuts(prompts, tasks) == []
    cut, sizes = engine_module._choose(prompts, tasks, 1, 3, 6, True)
    assert cut is None and sizes == engine_module._choose(prompts, tasks, 1, 3, 6, False)[1]


# Seen to fail when a branch begins one token late, when a trunk's prompts are not side by side, and when a trunk in two
# groups is left out of one.
@pytest.mark.parametrize('G', [1, 3, 8])
@pytest.mark.parametrize('seed', range(4))
def test_trunk_and_branch_are_the_prompt_and_groups_share_the_work(rig, G, seed):
  draw = np.random.default_rng(seed)
  items = tuple((int(draw.integers(0, 20)), tuple(draw.integers(1, 9, draw.integers(1, 7)).tolist())) for _ in range(9))
  counts = draw.integers(0, 5, sum(len(rests) for _, rests in items)).tolist()
  counts[0] = 2
  prompts, tasks = item_prompts(items, P=32, seed=seed), item_tasks(rig.make_tasks, items, counts)
  for cut in trunks.cuts(prompts, tasks):
    dealt, host, queue = engine_module._deal(prompts, tasks, np.full(len(tasks.prompt), 6), G, cut)
    assert np.array_equal(np.sort(dealt[dealt >= 0]), np.arange(len(tasks.prompt)))
    assert np.array_equal(queue.count, (dealt >= 0).sum(axis=1)) and np.array_equal(host.count, (host.number > 0).sum(1))
    load, share = queue.count, -(-len(tasks.prompt) // G)
    assert load.max() - load.min() <= share + max(counts)
    assert host.trunks.count.sum() <= len(cut.length) + G
    for g in range(G):
      assert (np.diff(host.trunk[g, : host.count[g]]) >= 0).all()
      for u in range(host.count[g]):
        v = host.trunk[g, u]
        assert u < host.trunks.end[g, v] and v < host.trunks.count[g] and (v == 0 or u >= host.trunks.end[g, v - 1])
        both = np.r_[host.trunks.tokens[g, v, : host.trunks.length[g, v]], host.tokens[g, u, : host.length[g, u]]]
        for q in dealt[g, host.first[g, u] : host.first[g, u] + host.number[g, u]]:
          p = tasks.prompt[q]
          np.testing.assert_array_equal(both, prompts.tokens[p, : prompts.length[p]])


# --- results


# Seen to fail when a branch's positions do not begin behind its trunk, when windows count from the branch, and when the
# trunk's part has the mask of another trunk.
def test_tokens_are_the_uncached_argmax_and_those_of_whole_prompts(rig, whole):
  prompts, tasks, want = whole
  choose(prompts, tasks)
  got = rig.engine(rig.model, rows=3).generate(rig.params, prompts, tasks)
  assert_same(got, want)
  best, logp = logp_of_learner(rig, got, prompts, tasks)
  mask = got.token_mask & (tasks.temperature == 0)[:, None]
  assert mask.sum() > 30
  np.testing.assert_array_equal(got.tokens[mask], best[mask])
  np.testing.assert_allclose(got.logp, logp, atol=1e-5)


# Seen to fail when a prompt's tokens see each other unrounded, as those of a branch cannot see their trunk (other tokens).
def test_a_cache_in_eight_bits_does_not_show_where_prompts_are_cut(rig, whole):
  prompts, tasks, _ = whole
  choose(prompts, tasks)
  engine = dataclasses.replace(rig.engine(rig.model, rows=3), cache_dtype='int8')
  want = dataclasses.replace(engine, share_trunks=False).generate(rig.params, prompts, tasks)
  assert_same(engine.generate(rig.params, prompts, tasks), want, atol=1e-4)


# Seen to fail when a trunk leaves while branches of it wait, when prompts are filled before their trunk is there, and
# when a trunk seats more rows than it has seats.
@pytest.mark.parametrize(
    'count, width, batch, of_trunks', [(2, 2, 1, (1, 2, 1)), (3, 2, 2, (2, 3, 2))]
)
def test_scarce_slots_and_seats_of_trunks_change_nothing(rig, whole, monkeypatch, count, width, batch, of_trunks):
  prompts, tasks, want = whole
  chosen = choose(prompts, tasks), loop.Sizes(4, count, width, batch, *of_trunks)
  monkeypatch.setattr(engine_module, '_choose', lambda *_: chosen)
  engine = rig.engine(rig.model, rows=4)
  dealt, given, state = engine._begin(rig.params, prompts, tasks, None)
  seats = []
  for _ in range(200):
    state, done = loop.advance(*given, state, np.int32(1))
    at = np.asarray(slots.trunk_slots(given[1], given[4], state))[0]
    rows = at[np.asarray(state.slot)[0][np.asarray(state.slot)[0] < count]]
    seats.append(np.bincount(rows, minlength=of_trunks[0]).max())
    if int(done) == 20:
      break
  assert int(done) == 20 and max(seats) <= of_trunks[1]
  # Each trunk was loaded once, and nothing is held any more.
  assert int(state.trunks.head[0]) == len(chosen[0].length) == 4
  assert (np.asarray(state.prompt) == 8).all() and (np.asarray(state.trunks.trunk) == 8).all()
  assert_same(engine._rollouts(tasks, dealt, state), want)


# Seen to fail when the rows of all groups sit at the trunk slots of the first.
def test_eight_devices_give_the_tokens_of_one(rig, whole, monkeypatch):
  prompts, tasks, want = whole
  mesh = sharding.make_mesh(dict(data=2, fsdp=2, tensor=2))
  params = jax.device_put(rig.params, sharding.tree_shardings(rig.params, tiny.RULES, mesh))
  chosen = choose(prompts, tasks), loop.Sizes(2, 2, 2, 1, 1, 2, 1)
  monkeypatch.setattr(engine_module, '_choose', lambda *_: chosen)
  engine = rig.engine(rig.model, rows=8, mesh=mesh)
  _, given, state = engine._begin(params, prompts, tasks, None)
  assert (given[4].trunks.count > 0).all()  # every group has trunks
  promised = jax.tree.leaves(engine.cache_shardings(8, 16)['prompt'])
  for leaf, where in zip(jax.tree.leaves(state.trunks.cache), promised, strict=True):
    assert leaf.sharding.is_equivalent_to(where, leaf.ndim) and leaf.addressable_shards[0].data.size * 8 == leaf.size
  assert_same(engine.generate(params, prompts, tasks), want, atol=1e-4)


def kinds():
  base = dataclasses.replace(tiny.model_config(), head=(tiny.LOCAL,), period=(tiny.GLOBAL,), remainder=())
  yield 'capped', dataclasses.replace(base, attn_softcap=0.7, query_scalar=2.5, logit_softcap=3.0)
  sparse = BlockConfig(experts=Experts(count=8, top_k=3, ffn=6, shared_ffn=8, groups=4, top_groups=2))
  latent = Latent(rank=8, nope=6, rope=4, value=4, q_rank=6)
  yield 'latent', dataclasses.replace(base, head=(), period=(sparse,), kv_heads=8, latent=latent, head_dim=10)


# Seen to fail when the soft-cap is left out of the trunk's part, or out of a branch's prefill.
@pytest.mark.parametrize('name, config', list(kinds()), ids=lambda x: x if isinstance(x, str) else '')
def test_soft_caps_latent_attention_and_experts(make_rig, name, config):
  rig = make_rig(config)
  prompts, tasks = item_prompts(), item_tasks(rig.make_tasks)
  choose(prompts, tasks)
  got = rig.engine(rig.model, rows=3).generate(rig.params, prompts, tasks)
  _, logp = logp_of_learner(rig, got, prompts, tasks)
  np.testing.assert_allclose(got.logp, logp, atol=1e-5)


# --- the compiled program


# Seen to fail when rows take their trunks in place of trunks their rows' queries.
def test_no_row_and_no_branch_gets_a_copy_of_a_trunk(rig, monkeypatch):
  items, rows = ((384, (90, 90, 90)), (384, (90, 90, 90))), 24
  prompts, tasks = item_prompts(items, P=512), item_tasks(rig.make_tasks, items, (4,) * 6)
  cut = next(cut for cut in trunks.cuts(prompts, tasks) if cut.size == 384)
  sizes = loop.Sizes(rows, 6, 4, 3, 2, 12, 1)
  monkeypatch.setattr(engine_module, '_choose', lambda *_: (cut, sizes))
  _, given, state = rig.engine(rig.model, rows=rows, T=3)._begin(rig.params, prompts, tasks, None)
  jax.config.update('jax_disable_most_optimizations', False)
  text = loop.advance.lower(*given, state, np.int32(1)).compile().as_text()
  jax.config.update('jax_disable_most_optimizations', True)
  assert 'f32[2,2,384,8]' in text and 'f32[6,2,128,8]' in text
  assert not re.search(r'f32\[(24|6|3),(2,384|384,2),8\]', text)
  assert not re.search(r'= f32\[(2,2,384|6,2,128),8\]\S* (copy|gather)\(', text)
