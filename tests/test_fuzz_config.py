"""Whatever stands in a config, a sweep or a table is a config or a UserError of one line, soon."""

import contextlib
import dataclasses

import hypothesis
import hypothesis.strategies as st
import pytest

from lora_jax import errors, methods, tasks
from lora_jax.results import table_layout
from lora_jax.runs import config as config_lib, config_file, sweep, variants
from tests.test_config import BASE, NEEDED

pytestmark = pytest.mark.slow

numbers = st.integers() | st.floats() | st.sampled_from([0, -1, 1, 2**31, 2**32, 2**63, 10**30])
words = st.sampled_from(
  ["lora", "ia3", "q,v", "all-linear", "layers/.*", "(", "[", "None", "True", "1e3", "nan", "cosine"]
)
leaves = st.none() | st.booleans() | numbers | words | st.text(max_size=8) | st.binary(max_size=3)
maps = lambda keys, values, n=3: st.dictionaries(keys, values, max_size=n)
some = st.sampled_from
anything = st.recursive(leaves, lambda x: st.lists(x, max_size=3) | maps(st.text(max_size=4) | words, x))
named = {"method": methods.names(), "task": tasks.names(), "objective": ["causal_lm", "classification"]}


def keys(section, name=""):
  if section in config_lib.FIELDS:
    return sorted(config_lib.FIELDS[section])
  return ["name", *config_lib.named_fields(section, name)]


@st.composite
def changes(draw, values=anything):
  """(section, {key: value}) of keys that there are, mostly."""
  section = draw(st.sampled_from(config_lib.SECTIONS))
  name = draw(st.sampled_from(named[section])) if section in named else ""
  key = st.sampled_from(keys(section, name)) | st.text(max_size=5)
  own = {"name": name} | NEEDED.get(name, {}) if name else BASE.get(section, {})
  return section, own | draw(st.dictionaries(key, values, min_size=1, max_size=3))


@contextlib.contextmanager
def one_line():
  try:
    yield
  except errors.UserError as e:
    assert "\n" not in str(e) and len(str(e)) < 5000


@hypothesis.settings(max_examples=1000)
@hypothesis.given(changes(), changes())
def test_configs(a, b):
  with one_line():
    found = config_lib.resolve(BASE | dict([a, b]))
    assert config_lib.resolve(found.to_dict()) == found


@hypothesis.settings(max_examples=500)
@hypothesis.given(st.dictionaries(st.sampled_from([*config_lib.SECTIONS, "sweep", "tabel"]), anything, max_size=4))
def test_sections(given):
  with one_line():
    config_lib.resolve(BASE | given)


paths = some([f"{s}.{k}" for s in config_lib.FIELDS for k in keys(s)]) | st.text(max_size=12)


@hypothesis.settings(max_examples=1000)
@hypothesis.given(maps(paths, st.text() | words), some(methods.names()))
def test_the_command_line(texts, method):
  with one_line():
    config_lib.resolve(config_file.change(BASE, texts | {"method.name": method}))


short = st.lists(leaves, max_size=3) | anything
sections = maps(
  some([*config_lib.SECTIONS, "n", "x"]), maps(some(["rank", "seed", "name", "x"]), short, 2) | anything, 2
)
parts = maps(some(["product", "zip", "list", "max_members", "memory_gib", "x"]), sections | anything)
drawn = maps(some(["uniform", "log_uniform", "choice", "x"]), short, 2)
draws = maps(some(["n", "seed", "optim", "train"]), drawn | maps(some(["learning_rate", "seed"]), drawn) | anything)


@hypothesis.settings(max_examples=1000)
@hypothesis.given(parts, draws)
def test_sweeps(parts, random):
  hypothesis.assume(not isinstance(random.get("n"), int) or random["n"] < 100)
  with one_line():
    found = variants.members(BASE | {"sweep": parts | ({"random": random} if random else {})})
    sweep.groups({name: c for name, (_, c) in found.items()})


LAYOUT = [f.name for f in dataclasses.fields(table_layout.Layout)] + ["metric", "y"]
entries = some(["method.rank", "train.seed", "accuracy", {"p": {"r": {"c": 1}}}, (("1", "one"),)])


@hypothesis.settings(max_examples=1000)
@hypothesis.given(maps(some(LAYOUT), anything | entries, 4))
def test_tables(table):
  given = BASE | {"sweep": {"product": {"method": {"rank": (1, 2)}}}}
  rows = [{"name": n, "overrides": o} for n, (o, _) in variants.members(given).items()]
  with one_line():
    table_layout.of({"config": given, "table": table, "members": rows})
