"""Folders between `transformers` and us: the same names, dtypes and bytes both ways, and what stands beside them."""

import json

import numpy as np
import pytest

from spct_jax.models import hf, hf_files
from spct_jax.testing import families
from spct_jax.text import tokenizer as tokenizers

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')


def raw(folder):
  """name -> (dtype, shape, bytes) of a folder's tensors."""
  with hf_files.Weights(folder) as weights:
    return {name: (t.dtype, t.shape, weights.whole(t).tobytes()) for name, t in weights.tensors.items()}


# Mutation seen to fail: values rounded through float16 on the way out.
@pytest.mark.parametrize('family', ['llama', 'gemma2', 'mixtral', 'deepseek_v2'])
@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_a_folder_of_theirs_comes_out_as_they_wrote_it(tmp_path, family, dtype):
  fields = families.config(family, 1)
  settings = transformers.AutoConfig.for_model(**fields)
  model = transformers.AutoModelForCausalLM.from_config(settings, dtype=getattr(torch, dtype))
  model.save_pretrained(tmp_path / 'theirs', max_shard_size='8KB')
  assert len(list((tmp_path / 'theirs').glob('*.safetensors'))) > 1
  ours, params = hf.load(tmp_path / 'theirs', dtype=dtype)
  hf.save(tmp_path / 'ours', ours, params, shard_bytes=9_000, source=tmp_path / 'theirs')
  assert raw(tmp_path / 'ours') == raw(tmp_path / 'theirs')
  again, info = transformers.AutoModelForCausalLM.from_pretrained(
      tmp_path / 'ours', output_loading_info=True, dtype='auto'
  )
  assert not info['missing_keys'] and not info['unexpected_keys'] and not info['mismatched_keys']
  want, got = model.state_dict(), again.state_dict()
  assert want.keys() == got.keys()
  assert all(want[name].dtype == got[name].dtype and torch.equal(want[name], got[name]) for name in want)
  assert again.config.to_diff_dict() == transformers.AutoConfig.from_pretrained(tmp_path / 'theirs').to_diff_dict() | {
      key: value for key, value in again.config.to_diff_dict().items()
      if key in ('_name_or_path', 'transformers_version')
  }  # fmt: skip


def test_tokenizer_template_and_generation_settings_load_there(tmp_path):
  tok = tokenizers.load('builtin:small')
  fields = {**families.config('llama', 2), 'vocab_size': tok.vocab_size}
  model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**fields))
  model.save_pretrained(tmp_path / 'a')
  hf.save(tmp_path / 'b', *hf.load(tmp_path / 'a'), tok)
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / 'b')
  turns = [{'role': 'user', 'content': 'Hello <|eos|>'}]
  assert theirs.apply_chat_template(turns, tokenize=False) == tok.hf.apply_chat_template(turns, tokenize=False)
  settings = transformers.GenerationConfig.from_pretrained(tmp_path / 'b')
  found = (settings.eos_token_id, settings.pad_token_id, settings.bos_token_id)
  assert found == (list(tok.eos_ids), tok.pad_id, tok.bos_id)
  model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'b')
  ids = theirs.apply_chat_template(turns, return_tensors='pt', add_generation_prompt=True, return_dict=False)
  assert model.generate(ids, max_new_tokens=3, do_sample=False).shape[1] <= ids.shape[1] + 3
  assert json.loads((tmp_path / 'b' / 'config.json').read_text())['pad_token_id'] == tok.pad_id


@pytest.mark.parametrize('room', [2, 0])
def test_a_row_that_ends_as_answers_do_is_scored_there_as_here(tmp_path, room):
  """The tokenizer has one special token: the end is its pad token too, and the model may have room for another."""
  import tokenizers as backends
  alphabet = sorted(backends.pre_tokenizers.ByteLevel.alphabet())
  backend = backends.Tokenizer(backends.models.BPE({token: i for i, token in enumerate(alphabet)}, []))
  backend.add_special_tokens(['<end>'])
  tok = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token='<end>', pad_token='<end>')
  fields = {**families.config('llama', 2, head_kind='scalar'), 'vocab_size': 257 + room}
  model = transformers.AutoModelForSequenceClassification.from_config(transformers.AutoConfig.for_model(**fields))
  model.save_pretrained(tmp_path / 'a')
  ours, params = hf.load(tmp_path / 'a')
  hf.save(tmp_path / 'b', ours, params, tok)
  theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / 'b').eval()
  rows = [[5, 6, 7, 256], [5, 9, 256]]
  score = lambda row: float(np.ravel(ours.apply({'params': params}, np.asarray([row])))[0])
  want = [score(row) for row in rows]
  with torch.no_grad():
    alone = [float(theirs(torch.tensor([row])).logits[0, 0]) for row in rows]
    np.testing.assert_allclose(alone, want, atol=1e-5)
    if room:
      there = transformers.AutoTokenizer.from_pretrained(tmp_path / 'b')
      batch = there.pad({'input_ids': rows}, return_tensors='pt')
      np.testing.assert_allclose(theirs(**batch).logits[:, 0].numpy(), want, atol=1e-5)
    else:
      with pytest.raises(ValueError, match='no padding token is defined'):
        theirs(torch.tensor([rows[0], rows[0]]))


def test_a_tied_file_with_the_output_matrix_is_read_as_they_read_it(tmp_path):
  """Equal: tied. The table missing: the output matrix stands in. Different: they untie, and we refuse."""
  import safetensors.torch
  fields = {**families.config('llama', 3), 'tie_word_embeddings': True}
  model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**fields))
  model.save_pretrained(tmp_path)
  file, table, output = tmp_path / 'model.safetensors', 'model.embed_tokens.weight', 'lm_head.weight'
  tensors = safetensors.torch.load_file(file)
  want = tensors[table].numpy()
  same, other = tensors[table].clone(), tensors[table] + 1
  for change, allowed in (({output: same}, True), ({output: same, table: None}, True), ({output: other}, False)):
    written = {name: value for name, value in {**tensors, **change}.items() if value is not None}
    safetensors.torch.save_file(written, file, metadata={'format': 'pt'})
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    tied = torch.equal(theirs.lm_head.weight, theirs.model.embed_tokens.weight)
    assert tied == allowed
    if allowed:
      np.testing.assert_array_equal(hf.load(tmp_path)[1]['embed']['table'], want)
      np.testing.assert_array_equal(theirs.lm_head.weight.detach().numpy(), want)
    else:
      with pytest.raises(ValueError, match='lm_head.weight differs from model.embed_tokens.weight'):
        hf.load(tmp_path)
