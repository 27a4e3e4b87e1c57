"""Our adapters against PEFT: logits, rewards and gradients, and folders in both directions."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spct_jax.models import hf
from spct_jax.train import lora, peft as folders

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')
peft = pytest.importorskip('peft')

MODULES = {name: f'{name}_proj' for name in ('q', 'k', 'v', 'o', 'gate', 'up', 'down')}
LATENT = {'q_up': 'q_b_proj', 'kv_down': 'kv_a_proj_with_mqa', 'kv_up': 'kv_b_proj', 'o': 'o_proj'}
MODULES |= LATENT
CASES = [
    ('Llama', 'lm', ('q', 'k', 'v', 'o', 'gate', 'up', 'down'), 3, 7, False),
    ('Gemma2', 'lm', ('q', 'v', 'o', 'up'), 2, 4, False),
    ('DeepseekV2', 'lm', tuple(LATENT), 2, 5, False),
    ('Qwen2', 'lm', ('q', 'o', 'down'), 5, 3, True),
    ('Llama', 'scalar', ('k', 'v', 'o', 'up'), 2, 16, False),
]


def theirs(family, head_kind, targets, rank, alpha, rslora, folder):
  """(PEFT's model around a tiny random one, the folder of the base)."""
  torch.manual_seed(0)
  latent = dict(
      head_dim=4, num_key_value_heads=6, kv_lora_rank=8, q_lora_rank=6, qk_rope_head_dim=4, qk_nope_head_dim=6,
      v_head_dim=4, n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1, moe_intermediate_size=12,
      first_k_dense_replace=1, topk_method='greedy', norm_topk_prob=False,
  )
  config = getattr(transformers, f'{family}Config')(**dict(
      vocab_size=61, hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=6,
      num_key_value_heads=3, head_dim=8, num_labels=1, pad_token_id=0, tie_word_embeddings=False,
  ) | (latent if family == 'DeepseekV2' else {}))
  kind = {'lm': 'ForCausalLM', 'scalar': 'ForSequenceClassification'}[head_kind]
  base = getattr(transformers, family + kind)(config).eval()
  base.save_pretrained(folder)
  model = peft.get_peft_model(base, peft.LoraConfig(
      r=rank, lora_alpha=alpha, use_rslora=rslora, target_modules=[MODULES[t] for t in targets],
      task_type=folders.TASKS[head_kind], lora_dropout=0.25,
  )).eval()
  for name, value in model.named_parameters():
    if 'lora_B' in name or 'score' in name:
      torch.nn.init.normal_(value, std=0.3)
  return model


def close(ours, others, tolerance=1e-4):
  others = np.asarray(others.detach() if hasattr(others, 'detach') else others)
  assert ours.shape == others.shape
  assert np.abs(np.asarray(ours) - others).max() <= tolerance * np.abs(others).max()


def mean_logp(logits, tokens):
  logp = jax.nn.log_softmax(logits[:, :-1], axis=-1)
  return jnp.mean(jnp.take_along_axis(logp, tokens[:, 1:, None], axis=2))


@pytest.mark.parametrize('family, head_kind, targets, rank, alpha, rslora', CASES)
def test_logits_gradients_and_folders(family, head_kind, targets, rank, alpha, rslora, tmp_path):
  model = theirs(family, head_kind, targets, rank, alpha, rslora, tmp_path / 'base')
  model.save_pretrained(tmp_path / 'adapter')
  decoder, base = hf.load(tmp_path / 'base')
  adapted, adapters = folders.load(tmp_path / 'adapter', decoder)
  assert adapted.settings == lora.Settings(rank, alpha, adapted.settings.targets, rslora)
  found = set(lora.adapted(decoder, adapted.settings))
  assert found == set(lora.adapted(decoder, dataclasses.replace(adapted.settings, targets=targets)))

  tokens = np.random.default_rng(0).integers(1, 61, (2, 12))
  out = lambda adapters: adapted.apply({'params': {'frozen': base, 'adapters': adapters}}, tokens)
  said = model(input_ids=torch.as_tensor(tokens)).logits
  if head_kind == 'lm':
    objective = lambda adapters: mean_logp(out(adapters), tokens)
    logp = torch.log_softmax(said[:, :-1], -1)
    torch.mean(torch.gather(logp, 2, torch.as_tensor(tokens)[:, 1:, None])).backward()
  else:
    objective = lambda adapters: jnp.sum(out(adapters))
    said = said[:, 0]
    said.sum().backward()
  close(jax.jit(out)(adapters), said)
  merged = jax.jit(lora.merge, static_argnums=2)(base, adapters, adapted.settings)
  close(decoder.apply({'params': merged}, tokens), said)

  # Gradients, in the layout of the file.
  gradients = jax.jit(jax.grad(objective))(adapters)
  folders.save(tmp_path / 'gradients', adapted, gradients, tmp_path / 'base')
  ours = folders.safetensors.numpy.load_file(tmp_path / 'gradients' / folders.WEIGHTS)
  named = {
      name.replace('.default', '').replace('modules_to_save.', ''): value.grad
      for name, value in model.named_parameters() if value.requires_grad
  }
  assert set(named) == set(ours)
  for name, value in named.items():
    close(ours[name], value)

  # Bit for bit: their file -> ours -> a file; and ours, read by PEFT, computes the same.
  folders.save(tmp_path / 'again', adapted, adapters, tmp_path / 'base')
  read = lambda name: folders.safetensors.numpy.load_file(tmp_path / name / folders.WEIGHTS)
  first, second = read('adapter'), read('again')
  assert set(first) == set(second)
  for name in first:
    np.testing.assert_array_equal(first[name], second[name])
  kind = transformers.AutoModelForCausalLM if head_kind == 'lm' else transformers.AutoModelForSequenceClassification
  again = peft.PeftModel.from_pretrained(kind.from_pretrained(tmp_path / 'base'), tmp_path / 'again')
  logits = again(input_ids=torch.as_tensor(tokens)).logits
  assert torch.equal(logits if head_kind == 'lm' else logits[:, 0], said)
  other, back = folders.load(tmp_path / 'again', decoder)
  assert other == adapted
  jax.tree.map(np.testing.assert_array_equal, back, adapters)
