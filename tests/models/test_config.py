"""Model configs: hashable, JSON-able, and a clear refusal of what no decoder can be."""

import dataclasses
import json

import jax
import pytest

from spct_jax.models.config import BlockConfig, ModelConfig
from spct_jax.models.rope import LinearScaling, Llama3Scaling, YarnScaling
from spct_jax.models.transformer import Transformer

CONFIG = ModelConfig(
    vocab_size=17, width=16, heads=4, kv_heads=2, head_dim=4, ffn=24, vocab_multiple=8,
    head=(BlockConfig(),), period=(BlockConfig(window=3), BlockConfig(rope_theta=1e6)), num_periods=2,
    remainder=(BlockConfig(rope_scaling=Llama3Scaling(8.0, 1.0, 4.0, 64)),),
)


def test_json_round_trip_and_hash():
  again = ModelConfig.from_dict(json.loads(json.dumps(CONFIG.to_dict())))
  assert again == CONFIG and hash(again) == hash(CONFIG)
  assert hash(Transformer(again)) == hash(Transformer(CONFIG))
  assert again.num_layers == 6 and again.padded_vocab == 24
  assert [block.window for block in again.layers] == [None, 3, None, 3, None, None]


@pytest.mark.parametrize('scaling', [LinearScaling(2.0), YarnScaling(4.0, 32, mscale=0.7, truncate=False)])
def test_every_scaling_survives_json(scaling):
  config = dataclasses.replace(CONFIG, remainder=(BlockConfig(rope_scaling=scaling),), family='qwen3')
  fields = json.loads(json.dumps(config.to_dict()))
  again = ModelConfig.from_dict(fields)
  assert again == config and again.family == 'qwen3'
  fields['remainder'][0]['rope_scaling']['kind'] = 'dynamic'
  with pytest.raises(ValueError, match="rope_scaling kind: got 'dynamic'; allowed are linear, llama3, yarn"):
    ModelConfig.from_dict(fields)


def test_from_dict_takes_no_defaults():
  fields = CONFIG.to_dict()
  with pytest.raises(ValueError, match="missing fields \\['remat'\\]"):
    ModelConfig.from_dict({k: v for k, v in fields.items() if k != 'remat'})
  with pytest.raises(ValueError, match="unknown fields \\['depth'\\]"):
    ModelConfig.from_dict({**fields, 'depth': 3})
  with pytest.raises(ValueError, match='block of head'):
    ModelConfig.from_dict({**fields, 'head': [{'window': None}]})


@pytest.mark.parametrize(
    'change, message',
    [
        ({'kv_heads': 3}, 'kv_heads must divide heads'),
        ({'head_dim': 5}, 'even'),
        ({'width': 0}, 'width: got 0'),
        ({'vocab_multiple': 0}, 'vocab_multiple'),
        ({'num_periods': 0}, 'num_periods'),
        ({'period': ()}, 'num_periods'),
        ({'head': (), 'period': (), 'num_periods': 0, 'remainder': ()}, 'at least one block'),
        ({'dtype': 'float8'}, 'allowed are float32'),
        ({'head_kind': 'class'}, 'allowed are lm, scalar'),
        ({'norm_eps': 0.0}, 'norm_eps'),
        ({'activation': 'tanh'}, 'allowed are silu'),
        ({'attn_softcap': 0.0}, 'attn_softcap: got 0.0'),
        ({'logit_softcap': -1.0}, 'logit_softcap'),
        ({'query_scalar': 0}, 'query_scalar'),
    ],
)
def test_impossible_models_are_refused(change, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(CONFIG, **change)


def test_impossible_blocks_are_refused():
  with pytest.raises(ValueError, match='window: got 0'):
    BlockConfig(window=0)
  with pytest.raises(ValueError, match='rope_theta'):
    BlockConfig(rope_theta=-1.0)
  with pytest.raises(ValueError, match='rope_scaling'):
    Llama3Scaling(8.0, 4.0, 1.0, 64)


def test_num_params_counts_what_init_makes():
  model = Transformer(CONFIG)
  block = 2 * 16 + 16 * 16 + 2 * 16 * 8 + 16 * 16 + 3 * 16 * 24
  assert model.num_params == 6 * block + 16 + 2 * 24 * 16
  assert model.num_params == sum(leaf.size for leaf in jax.tree.leaves(model.init(jax.random.key(0))))
