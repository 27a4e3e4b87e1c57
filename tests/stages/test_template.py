"""What framed a run's prompts stands in its workdir."""

import tokenizers as hf_tokenizers
import transformers

from spct_jax.testing import scripted
from spct_jax.text import tokenizer as tokenizers


def script(info):
  return scripted.verdict(info, tuple(range(1, len(info.order) + 1)))


# Mutation seen to fail: the record left out.
def test_the_template_is_recorded_with_every_run(config, run, tmp_path, capsys):
  config.pipeline.stages = ('sample',)
  path = run(script)
  assert (path / 'chat_template.jinja').read_text() == tokenizers.load(config.tokenizer.path).chat_template

  backend = hf_tokenizers.Tokenizer(hf_tokenizers.models.BPE(
      vocab={piece: at for at, piece in enumerate([*sorted(hf_tokenizers.pre_tokenizers.ByteLevel.alphabet()), '<end>'])},
      merges=[],
  ))  # fmt: skip
  backend.pre_tokenizer = hf_tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  backend.decoder = hf_tokenizers.decoders.ByteLevel()
  transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token='<end>').save_pretrained(tmp_path / 'bytes')
  config.tokenizer.path = str(tmp_path / 'bytes')
  config.judge.buckets, config.judge.max_new_tokens = (2048,), 256
  path = run(script, folder='plain')
  assert "'\\n\\nAssistant:\\n'" in (path / 'chat_template.jinja').read_text()
  assert 'the tokenizer has none; prompts are framed by plain lines' in capsys.readouterr().out
