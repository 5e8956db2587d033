"""Reading files: what is no file, no text or not JSON is one message, at once."""

import os
import socket
import stat

import hypothesis
import pytest
from hypothesis import strategies as st

from lora_jax import errors, files, patterns
from lora_jax.formats import archive, gguf, hf
from lora_jax.tasks import jsonl
from lora_jax.training import metrics

READERS = {
  "json": hf.read_json,
  "text": files.read,
  "tensors": lambda path: hf.Tensors([path]),
  "gguf": gguf.open,
  "zip": lambda path: archive.unpack(path, "x"),
  "jsonl": jsonl.read,
  "metrics": metrics.read_metrics,
}


@pytest.mark.parametrize("reader", READERS)
def test_what_is_no_file_is_refused_at_once(tmp_path, reader):
  path = tmp_path / "x"
  refused = lambda match: pytest.raises(
    errors.UserError, match=rf"^cannot read {path}: it is {match}, expected a file$"
  )
  path.mkdir()
  with refused("a directory"):
    READERS[reader](path)
  path.rmdir()
  os.mkfifo(path)
  with refused("a named pipe"):
    READERS[reader](path)
  path.unlink()
  with socket.socket(socket.AF_UNIX) as s:
    s.bind(str(path))
    with refused("a socket"):
      READERS[reader](path)
  path.unlink()
  path.symlink_to("/dev/zero")
  assert stat.S_ISCHR(path.stat().st_mode)
  with refused("a device"):
    READERS[reader](path)


def test_large_texts_are_not_read(tmp_path):
  with (tmp_path / "config.json").open("wb") as f:
    f.truncate(10**11)
  with pytest.raises(errors.UserError, match="100,000,000,000 bytes, expected at most"):
    hf.read_json(tmp_path / "config.json")


@pytest.mark.parametrize(
  ("text", "match"),
  [
    ("[" * 10**5 + "]" * 10**5, "nested too deeply"),
    ('{"a": ' * 10**5, "nested too deeply"),
    ("[" + "9" * 5000 + "]", "4300 digits"),
    (r'["\ud800"]', "surrogates"),
    (r'{"\udfff": 1}', "surrogates"),
    ("[1,", "line 1"),
  ],
)
def test_json_that_cannot_be_worked_with(text, match):
  with pytest.raises(errors.UserError, match=f"^x.json: not JSON: .*{match}"):
    files.parse_json(text, "x.json")
  with pytest.raises(errors.UserError, match=match):
    files.parse_json(text.encode(), "x.json")


@hypothesis.given(st.binary(max_size=60) | st.text(max_size=60))
def test_json_is_a_value_or_a_message(content):
  try:
    files.parse_json(content, "x")
  except errors.UserError as e:
    assert str(e).startswith("x: not JSON") and "\n" not in str(e)


def test_regexes_that_do_not_end(monkeypatch):
  monkeypatch.setattr(patterns, "SECONDS", 0.5)
  names = [f"model.layers.{i}.self_attn.q_proj" for i in range(40)]
  patterns.check(["q_proj", r".*\.(q|v)_proj$", r"^(?!.*visual).*(?:q_proj|v_proj).*$"], names, "x")
  for p in ("(.*)*(.*)*(.*)*x", "(.*.*.*.*.*.*.*.*)x", r"(\w+\.?)+x"):
    with pytest.raises(errors.UserError, match="^x: the regular expression '.*' takes more than 0.5 seconds"):
      patterns.check(["q_proj", p], names, "x")
  for p in ("(", "a{99999999999}", "(" * 5000 + ")" * 5000, "[z-a]", "(?P<1>a)"):
    with pytest.raises(errors.UserError, match="^x: .* is not a regular expression"):
      patterns.check([p], names, "x")


@pytest.mark.parametrize(
  "line", ['{"step": "1"}', '{"step": true}', '{"step": 1, "a": "b"}', "[1]", '{"a": 1}', "[" * 9999]
)
def test_metrics_are_numbers(tmp_path, line):
  path = tmp_path / "metrics.jsonl"
  path.write_text(f'{{"step": 1, "a": null}}\n{line}\n{{"step": 2, "a": 1}}\n')
  with pytest.raises(errors.UserError, match="metrics.jsonl:2: "):
    metrics.read_metrics(path)
