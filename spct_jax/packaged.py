"""Files that a Python package carries, under a name that holds wherever the package is installed.

    package:MODULE/folder/file      such as package:spct_jax.data/files/preferences.jsonl

MODULE is an importable package, dots and all; behind it comes a file or folder inside its folder.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.resources
import os
import pathlib

PREFIX = 'package:'


def locate(name: str | os.PathLike[str]) -> pathlib.Path:
  """The carried file or folder of a 'package:' name, which must be there; any other name is a path."""
  name = os.fspath(name)
  return resolve(name) if name.startswith(PREFIX) else pathlib.Path(name)


def resolve(name: str) -> pathlib.Path:
  """The file or folder of a 'package:' name; ValueError if there is none."""
  module, _, inside = name.removeprefix(PREFIX).partition('/')
  parts = pathlib.PurePosixPath(inside).parts
  if not name.startswith(PREFIX) or not module or not parts or inside[0] == '/' or '..' in parts:
    raise ValueError(
      f'{name!r}: expected {PREFIX}MODULE/folder/..., an importable package and a path inside it,'
      f' such as {PREFIX}spct_jax.data/files/preferences.jsonl'
    )
  found = _folder(name, module)
  for part in parts:
    there = sorted(entry.name for entry in found.iterdir()) if found.is_dir() else []
    if part not in there:
      listed = ', '.join(there) or 'none'
      close = difflib.get_close_matches(part, there, n=1)
      raise ValueError(
        f'{name!r}: {found} holds no {part!r}'
        + (f': did you mean {close[0]!r}?' if close else f'; it holds: {listed}')
      )
    found = found / part
  return found


def _folder(name: str, module: str) -> pathlib.Path:
  try:
    package = importlib.import_module(module)
  # A relative name is a TypeError, an empty part a ValueError.
  except (ImportError, TypeError, ValueError) as error:
    raise ValueError(
      f'{name!r}: cannot import {module!r} ({error}); install the package, or correct its name'
    ) from error
  if not hasattr(package, '__path__'):
    raise ValueError(
      f'{name!r}: {module!r} is a module and no package, so it carries no files; name its package'
    )
  folder = importlib.resources.files(package)
  if not isinstance(folder, pathlib.Path):
    raise ValueError(
      f'{name!r}: {module!r} lies in an archive or in several folders; install it as one plain'
      ' folder with an __init__.py'
    )
  return folder
