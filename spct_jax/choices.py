"""The words after the colon of a config: `configs/x.py:smoke,data=hh_rlhf,seed=3`.

Each choice moves several fields of a page, so a page names its choices and their defaults in one call;
the type of the default is the type of the choice. The name of an existing file may hold commas.
"""

import os


def parse(arg: str | None, **defaults: bool | int | float | str) -> dict[str, bool | int | float | str]:
  """Reads 'smoke,seed=3' against the defaults.

  Raises:
    ValueError: an unknown name, or a value that is not of the default's type.
  """
  chosen = dict(defaults)
  for word in _words(arg or ''):
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


def _words(arg: str) -> list[str]:
  """Cut at the commas, except inside a value that, commas and all, is a file."""
  pieces = arg.split(',')
  words = []
  while pieces:
    size = 1
    if '=' in pieces[0]:
      values = {n: ','.join(pieces[:n]).partition('=')[2] for n in range(len(pieces), 1, -1)}
      size = next((n for n, value in values.items() if os.path.exists(os.path.expanduser(value))), 1)
    words.append(','.join(pieces[:size]).strip())
    pieces = pieces[size:]
  return [word for word in words if word]
