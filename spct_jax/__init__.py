"""Self-Principled Critique Tuning in JAX: generalist generative reward models.

    from spct_jax import RewardModel
    verdict = RewardModel.load('my_judge').score('What is 2 + 2?', ['4', '5'], k=8)

`RewardModel` is handed on lazily, so that importing a light submodule never imports JAX.
"""

__all__ = ('RewardModel',)


def __getattr__(name: str):
  if name == 'RewardModel':
    from spct_jax.api import RewardModel
    return RewardModel
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
