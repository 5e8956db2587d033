"""Files of others, mutated: reading one gives what is in it or one message, never another exception, and soon."""

import collections
import contextlib
import json
import os
import time
import zipfile

import gguf as ggml
import hypothesis
import jax
import numpy as np
import pytest
import tokenizers
from hypothesis import strategies as st

from lora_jax import errors, generate, methods, metrics, models, sweep, templates, tokenizer, tree
from lora_jax.formats import adapter, archive, gguf, hf, peft
from lora_jax.tasks import jsonl
from tests import summaries
from tests.mutations import damage, damage_tensors, damaged, dumps, mutated, program, rngs

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", 0))  # of each test, for more than what the suite tries
SECONDS = 20  # of processor time that an input may take
ENDED = collections.Counter()

TEMPLATE = (
  "{% for m in messages %}{{ '<|' + m.role + '|>' + m['content'] | trim }}{% endfor %}{% if tools %}{{ tools|tojson }}"
  "{% endif %}{% if add_generation_prompt %}{{ bos_token }}{% endif %}"
)
MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "a b"}]
CONFIG = {
  **{"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 8, "hidden_size": 8},
  **{"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4, "rms_norm_eps": 1e-5},
  **{"intermediate_size": 8, "hidden_act": "silu", "max_position_embeddings": 64, "tie_word_embeddings": True},
  **{"rope_theta": 10000.0, "rope_scaling": {"rope_type": "linear", "factor": 2.0}, "attention_bias": False},
  **{"bos_token_id": 0, "eos_token_id": 1, "id2label": {"0": "a", "1": "b"}, "torch_dtype": "float32"},
}


def llama(directory):
  """A tiny Llama with all the files that one can have."""
  d, f, v, kv = 8, 8, 8, 4
  shapes = {"embed_tokens": (v, d), "norm": (d,)}
  p = "layers.0."
  shapes |= {p + "input_layernorm": (d,), p + "post_attention_layernorm": (d,)}
  shapes |= {p + f"self_attn.{k}_proj": s for k, s in {"q": (d, d), "k": (kv, d), "v": (kv, d), "o": (d, d)}.items()}
  shapes |= {p + f"mlp.{k}_proj": (f, d) if k != "down" else (d, f) for k in ("gate", "up", "down")}
  rng = np.random.default_rng(0)
  tensors = {f"model.{k}.weight": rng.standard_normal(s, np.float32) for k, s in shapes.items()}
  directory.mkdir()
  hf.save_tensors(directory / "model.safetensors", tensors)
  write(directory / "model.safetensors.index.json", {"weight_map": dict.fromkeys(tensors, "model.safetensors")})
  write(directory / "config.json", CONFIG)
  write(directory / "generation_config.json", {"eos_token_id": [1, 2], "bos_token_id": 0, "max_length": 20})
  vocab = {t: i for i, t in enumerate(["<s>", "</s>", "a", "b", "h", "i", "\u0120", "<|user|>"])}
  backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[("h", "i")] if "hi" in vocab else []))
  backend.normalizer = tokenizers.normalizers.Replace(tokenizers.Regex("c+"), "a")
  cut = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"\p{L}+|\s"), "isolated")
  byte = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([cut, byte])
  backend.decoder = tokenizers.decoders.ByteLevel()
  backend.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
  backend.add_special_tokens(["<s>", "</s>"])
  backend.save(str(directory / "tokenizer.json"))
  write(directory / "special_tokens_map.json", {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}})
  more = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 10**30, "pad_token": None}
  write(directory / "tokenizer_config.json", {"bos_token": "<s>", "chat_template": TEMPLATE, **more})
  return directory


def write(path, value):
  path.write_text(json.dumps(value))


METADATA = {
  **{"general.architecture": "llama", "llama.block_count": 1, "llama.context_length": 64, "llama.embedding_length": 8},
  **{"llama.feed_forward_length": 8, "llama.attention.head_count": 2, "llama.attention.head_count_kv": 1},
  **{"llama.attention.layer_norm_rms_epsilon": 1e-5, "llama.rope.freq_base": 10000.0, "llama.rope.dimension_count": 4},
  **{"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0, "general.alignment": 32},
  **{"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.bos_token_id": 0},
  **{"tokenizer.ggml.tokens": ["<s>", "</s>", "h", "i", "hi", "a", "b", "c"], "tokenizer.ggml.merges": ["h i"]},
  **{"tokenizer.ggml.token_type": [3, 3, 1, 1, 1, 1, 1, 4], "tokenizer.ggml.scores": [0.0] * 8},
  **{"tokenizer.ggml.eos_token_id": 1, "tokenizer.chat_template": TEMPLATE, "tokenizer.ggml.add_bos_token": True},
}


def write_gguf(path, metadata):
  """A GGUF file of these fields, of whatever types they are; False where the format has no place for one."""
  w = ggml.GGUFWriter(path, "llama")
  kinds = {bool: w.add_bool, float: w.add_float64, str: w.add_string, list: w.add_array}
  try:
    for k, v in metadata.items():
      if k != "general.architecture":
        integer = w.add_uint32 if isinstance(v, int) and 0 <= v < 2**32 else w.add_int64
        kinds.get(type(v), integer)(k, v)
    if (name := metadata.get("general.architecture")) != "llama":
      del w.kv_data[0]["general.architecture"]
      kinds.get(type(name), w.add_int64)("general.architecture", name)
    for k, s in {"token_embd": (8, 8), "output_norm": (8,), "blk.0.attn_norm": (8,), "blk.0.ffn_norm": (8,)}.items():
      w.add_tensor(f"{k}.weight", np.ones(s, np.float32))
    for k, s in {"attn_q": (8, 8), "attn_k": (4, 8), "attn_v": (4, 8), "attn_output": (8, 8)}.items():
      w.add_tensor(f"blk.0.{k}.weight", np.ones(s, np.float32))
    for k in ("gate", "up", "down"):
      w.add_tensor(f"blk.0.ffn_{k}.weight", np.ones((8, 8), np.float32))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
  except Exception:
    return False
  finally:
    w.close()
  return True


@pytest.fixture(scope="module")
def root(tmp_path_factory):
  return tmp_path_factory.mktemp("fuzz")


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
  """The block ends soon, as it should or in a message of one line."""
  started = time.process_time()
  try:
    yield
    ENDED[what, "accepted"] += 1
  except errors.UserError as e:
    assert str(e) and "\n" not in str(e)
    ENDED[what, "message"] += 1
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
  sweep.join([where], root / "joined")
  return where


@pytest.mark.parametrize("name", ["config.json", "members/a/summary.json", "seconds/0-of-1.json"])
@hypothesis.given(st.data())
@settings(12)
def test_results(run, root, name, data):
  fuzz(data, run / name, as_json, lambda: sweep.join([run], root / "joined"))
