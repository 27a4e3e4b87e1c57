"""The words after the colon of a config: `configs/x.py:smoke,data=hh_rlhf,seed=3`.

Each choice moves several fields of a page, so a page names its choices and their defaults in one call;
the type of the default is the type of the choice.
"""


def parse(arg: str | None, **defaults: bool | int | float | str) -> dict[str, bool | int | float | str]:
  """Reads 'smoke,seed=3' against the defaults.

  Raises:
    ValueError: an unknown name, or a value that is not of the default's type.
  """
  chosen = dict(defaults)
  for word in filter(None, (w.strip() for w in (arg or '').split(','))):
    name, equals, value = word.partition('=')
    if name not in defaults:
      raise ValueError(
          f'unknown choice {name!r} in {arg!r}; this config knows: '
          + ', '.join(f'{k} (default {v!r})' for k, v in defaults.items())
      )
    kind = type(defaults[name])
    if kind is bool:
      if equals and value.lower() not in ('true', 'false', '1', '0'):
        raise ValueError(f'choice {name}: got {value!r}; allowed: {name}, {name}=true or {name}=false')
      chosen[name] = not equals or value.lower() in ('true', '1')
      continue
    if not equals:
      raise ValueError(f'choice {name!r} needs a value: {name}={defaults[name]!r}')
    try:
      chosen[name] = kind(value)
    except ValueError:
      raise ValueError(f'choice {name}: got {value!r}; allowed: a value of type {kind.__name__}') from None
  return chosen
