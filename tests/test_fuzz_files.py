"""Files of others, mutated: reading one gives what is in it or one message, never another exception, and soon."""

import contextlib
import json
import os
import time
import zipfile

import hypothesis
import jax
import pytest
from hypothesis import strategies as st

from lora_jax import errors, methods, models, patterns, tokenizer, tree
from lora_jax.formats import adapter, archive, gguf, hf, peft
from lora_jax.inference import generate
from lora_jax.runs import outcome
from lora_jax.tasks import jsonl
from lora_jax.tokenizer import templates
from lora_jax.training import metrics
from tests import summaries
from tests.mutations import damage, damage_tensors, damaged, dumps, mutated, program, rngs
from tests.tiny_files import MESSAGES, METADATA, TEMPLATE, llama, write, write_gguf

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", 0))  # of each test; 0 is as many as take seconds
SECONDS = 20  # of processor time that an input may take


@pytest.fixture(scope="module")
def root(tmp_path_factory):
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(patterns, "SECONDS", 0.5)
    yield tmp_path_factory.mktemp("fuzz")


@pytest.fixture(scope="module")
def model_dir(root):
  return llama(root / "llama")


@pytest.fixture(scope="module")
def model(model_dir):
  return models.load(str(model_dir), "float32")


@pytest.fixture(scope="module")
def adapters(root, model):
  """One in PEFT's format and one in ours."""
  kw = [{"name": "lora", "rank": 2, "targets": "q,v", "rank_pattern": {"v": 1}}]
  params, mask = methods.init(jax.random.key(0), model.params, kw)
  adapter.save(model, params, mask, kw, root / "peft")
  assert hf.read_json(root / "peft" / "adapter_config.json")["peft_type"] == "LORA"
  kw = [{"name": "lora", "rank": 2, "targets": r".*(q|v)/kernel", "alpha": 4.0}, {"name": "parallel", "size": 2}]
  params, mask = methods.init(jax.random.key(0), model.params, kw)
  adapter.save(model, params, mask, kw, root / "own")
  assert hf.read_json(root / "own" / "adapter_config.json")["peft_type"] == adapter.TYPE
  config = hf.read_json(root / "peft" / "adapter_config.json")
  more = {"exclude_modules": ["o_proj"], "layers_to_transform": [0], "layers_pattern": "layers", "bias": "none"}
  more |= {
    "modules_to_save": None,
    "alpha_pattern": {r".*\.v_proj": 4},
    "trainable_token_indices": None,
    "lora_bias": False,
  }
  write(root / "peft" / "adapter_config.json", config | more)
  adapter.load(model, root / "peft")
  return root


@contextlib.contextmanager
def ends(what):
  """The block, which reads `what`, ends soon, as it should or in a message of one line."""
  started = time.process_time()
  try:
    yield
  except errors.UserError as e:
    assert str(e) and "\n" not in str(e), what
  assert time.process_time() - started < SECONDS


def settings(n):
  return hypothesis.settings(
    max_examples=EXAMPLES or n, deadline=None, suppress_health_check=[*hypothesis.HealthCheck], database=None
  )


def fuzz(data, path, content, use):
  """Puts a mutation in the place of a file, reads it and puts the file back."""
  whole = path.read_bytes()
  try:
    path.write_bytes(data.draw(content(whole)))
    with ends(path.name):
      use()
  finally:
    path.write_bytes(whole)


as_tensors = lambda whole: rngs.map(lambda rng: damage_tensors(rng, whole))
as_json = lambda whole: mutated(json.loads(whole)).map(dumps)
NAMES = ["config.json", "generation_config.json", "model.safetensors.index.json", "model.safetensors"]


def load(directory):
  found = models.load(str(directory), "float32")
  if found.tokenizer is not None:
    assert found.tokenizer.end_ids is not None
  generate.start_id(found)
  jax.block_until_ready(found.params)


@pytest.mark.parametrize("name", NAMES)
@hypothesis.given(st.data())
@settings(60)
def test_model(model_dir, name, data):
  content = as_tensors if name.endswith("tensors") else as_json
  fuzz(data, model_dir / name, content, lambda: load(model_dir))


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"])
@hypothesis.given(st.data())
@settings(120)
def test_tokenizer(model_dir, name, data):
  fuzz(data, model_dir / name, as_json, lambda: read_tokenizer(tokenizer.from_directory(model_dir)))


def read_tokenizer(tok):
  ids = tok.encode("hi abc <s>", add_special_tokens=True)
  tok.decode(ids)
  list(tok.encode_offsets(["hi a", ""]))
  tok.encode_batch(["a", "hi"])
  assert tok.end_ids is not None
  tok.chat(MESSAGES, add_generation_prompt=True)


@hypothesis.given(rngs.map(program) | rngs.map(lambda rng: damage(rng, TEMPLATE.encode()).decode(errors="ignore")))
@settings(150)
def test_chat_template(source):
  with ends("chat template"):
    templates.render(source, {"messages": MESSAGES, "tools": [{"a": 1}], "bos_token": "<s>"}, "x")


def read_gguf(path):
  found = gguf.open(path)
  for k in found.names():
    assert found.read(k).shape == found.shape(k)
  read_tokenizer(tokenizer.from_gguf(found.metadata, str(path)))
  models.families.get(found.config["model_type"]).config(found.config)


@hypothesis.given(st.data())
@settings(200)
def test_gguf_bytes(root, data):
  path = root / "x.gguf"
  assert write_gguf(path, METADATA)
  fuzz(data, path, lambda whole: damaged(whole, 2500), lambda: read_gguf(path))


@hypothesis.given(mutated(METADATA))
@settings(150)
def test_gguf_metadata(root, metadata):
  path = root / "y.gguf"
  if isinstance(metadata, dict) and write_gguf(path, metadata):
    with ends("gguf metadata"):
      read_gguf(path)


@pytest.mark.parametrize("kind", ["peft", "own"])
@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
@hypothesis.given(st.data())
@settings(50)
def test_adapter(model, adapters, kind, name, data):
  content = as_tensors if name.endswith("tensors") else as_json

  def use():
    peft.head(adapters / kind)
    jax.block_until_ready(tree.flatten(adapter.load(model, adapters / kind)))

  fuzz(data, adapters / kind / name, content, use)


LINES = [
  {"prompt": "a", "response": "b"},
  {"messages": MESSAGES, "tools": '[{"type": "function"}]', "chat_template_kwargs": {"x": 1}, "documents": [{"a": 1}]},
  {"messages": [MESSAGES[0], {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}], "weight": 0.5}]},
]


@hypothesis.given(
  st.sampled_from(LINES).flatmap(mutated).map(dumps) | st.sampled_from(LINES).map(dumps).flatmap(damaged)
)
@settings(300)
def test_jsonl(root, line):
  path = root / "a.jsonl"
  path.write_bytes(dumps(LINES[0]) + b"\n" + line + b"\n")
  with ends("jsonl"):
    for example in jsonl.read(path):
      jsonl.format(example)
    jsonl.load("train", path=str(path), validation_path=str(path), test_path=str(path))


ROW = {"step": 1, "train/loss": 2.0, "train/seconds": None}


@hypothesis.given(mutated(ROW).map(dumps) | damaged(dumps(ROW)))
@settings(200)
def test_metrics(root, line):
  path = root / "metrics.jsonl"
  path.write_bytes(line + b"\n" + dumps(ROW) + b"\n")
  with ends("metrics.jsonl"):
    [row for row in metrics.read_metrics(path) if row["step"] <= 3]


@pytest.fixture(scope="module")
def zipped(root, model_dir):
  with zipfile.ZipFile(root / "m.zip", "w", zipfile.ZIP_DEFLATED) as f:
    for p in sorted(model_dir.iterdir()):
      f.write(p, p.name)
  return root / "m.zip"


@hypothesis.given(st.data())
@settings(100)
def test_archive(root, zipped, data):
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("LORA_JAX_CACHE", str(root / "cache"))
    fuzz(data, zipped, damaged, lambda: archive.unpack(zipped, "m"))


@pytest.fixture(scope="module")
def run(root):
  """A sweep of two members that is finished."""
  where = root / "sweep"
  config = {"model": {"name": "tiny"}, "task": {"name": "rotten_tomatoes"}, "train": {"steps": 3}}
  config |= {
    "data": {"batch_size": 2, "seq_len": 8},
    "method": {"name": "lora", "rank": 2},
    "sweep": {"list": {"a": {}, "b": {"method": {"rank": 4}}}},
  }
  metrics.write_json(where / "config.json", config)
  more = {"method": "lora", "wall_seconds": 1.0, "versions": {"jax": "1"}, "group": "1", "peak_memory_bytes": 10}
  more |= {"devices": "1 cpu", "dtype": "float32", "population": 2}
  for name in "ab":
    found = summaries.member(name, {}, {"accuracy": 0.5, "label_loss": 1.0}) | more
    found["train"] |= {"tokens_per_second": 10.0, "compile_seconds": 1.0, "step_seconds": 0.1}
    kept = {k: v for k, v in found.items() if k not in ("name", "overrides", "losses")}
    metrics.write_json(where / "members" / name / "summary.json", kept)
    (where / "members" / name / "metrics.jsonl").write_text('{"step": 1, "train/loss": 2.0}\n')
  metrics.write_json(where / "seconds" / "0-of-1.json", {"seconds": 3.5})
  outcome.join([where], root / "joined")
  return where


@pytest.mark.parametrize("name", ["config.json", "members/a/summary.json", "seconds/0-of-1.json"])
@hypothesis.given(st.data())
@settings(12)
def test_results(run, root, name, data):
  fuzz(data, run / name, as_json, lambda: outcome.join([run], root / "joined"))
