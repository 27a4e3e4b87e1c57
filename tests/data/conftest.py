"""Files to read, written by each test into its own folder."""

import json

import pytest


@pytest.fixture
def write(tmp_path):
  """write(name, rows or text) -> path."""

  def make(name, rows):
    path = tmp_path / name
    text = rows if isinstance(rows, str) else ''.join(json.dumps(row) + '\n' for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding='utf-8', newline='')
    return path

  return make
