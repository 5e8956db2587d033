"""GGUF files of every architecture: tiny models of transformers, written as llama.cpp's converter would.

The names come from `gguf.get_tensor_name_map`, which the converter uses; what it does to values is written out here.
"""

import functools
import json
import tempfile

import gguf as ggml
import numpy as np
import pytest
from gguf import quants

from lora_jax import errors, models, tree
from lora_jax.formats import gguf
from lora_jax.model import transformer

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
safetensors_numpy = pytest.importorskip("safetensors.numpy")

Q = ggml.GGMLQuantizationType
V = 97
TOKENS = np.random.default_rng(0).integers(3, V, (2, 24))
SMALL = dict(
  vocab_size=V,
  hidden_size=64,
  intermediate_size=96,
  num_hidden_layers=2,
  num_attention_heads=4,
  num_key_value_heads=2,
  max_position_embeddings=64,
  rms_norm_eps=1e-4,
)
WIDE = SMALL | dict(head_dim=32)
EXPERTS = dict(num_experts_per_tok=2)
GEMMA2 = WIDE | dict(query_pre_attn_scalar=32, sliding_window=5)
ENCODER = {k: v for k, v in SMALL.items() if k not in ("num_key_value_heads", "rms_norm_eps")} | dict(
  layer_norm_eps=1e-4
)
T5 = dict(
  vocab_size=V,
  d_model=64,
  d_kv=16,
  d_ff=96,
  num_layers=2,
  num_decoder_layers=3,
  num_heads=4,
  decoder_start_token_id=0,
  layer_norm_epsilon=1e-4,
)
LLAMA3 = dict(
  rope_type="llama3",
  factor=8.0,
  low_freq_factor=1.0,
  high_freq_factor=4.0,
  original_max_position_embeddings=8192,
  rope_theta=5e5,
)
LONG = dict(rope_type="longrope", short_factor=[1.0, 1.5, 2.0, 2.5, 3.0, 3.5], long_factor=[4.0] * 6, rope_theta=1e4)
GEMMA3_ROPE = dict(
  full_attention=dict(rope_type="linear", factor=8.0, rope_theta=1e6),
  sliding_attention=dict(rope_type="default", rope_theta=2e4),
)
# case -> (architecture in the file, class in transformers, config)
CASES = {
  "llama": ("llama", "LlamaForCausalLM", WIDE | dict(attention_bias=True, mlp_bias=True)),
  "llama3": ("llama", "LlamaForCausalLM", SMALL | dict(rope_parameters=LLAMA3, tie_word_embeddings=True)),
  "mistral": ("llama", "MistralForCausalLM", WIDE | dict(sliding_window=5)),
  "mixtral": ("llama", "MixtralForCausalLM", SMALL | EXPERTS | dict(num_local_experts=4)),
  "qwen2": ("qwen2", "Qwen2ForCausalLM", SMALL | dict(tie_word_embeddings=True)),
  "qwen2-yarn": (
    "qwen2",
    "Qwen2ForCausalLM",
    SMALL
    | dict(rope_parameters=dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16, rope_theta=1e6)),
  ),
  "qwen3": ("qwen3", "Qwen3ForCausalLM", WIDE | dict(rope_parameters=dict(rope_type="default", rope_theta=5e4))),
  "qwen3moe": (
    "qwen3moe",
    "Qwen3MoeForCausalLM",
    WIDE | EXPERTS | dict(num_experts=4, moe_intermediate_size=32, norm_topk_prob=True),
  ),
  "gemma": ("gemma", "GemmaForCausalLM", WIDE),
  "gemma2": ("gemma2", "Gemma2ForCausalLM", GEMMA2),
  "gemma3": ("gemma3", "Gemma3ForCausalLM", GEMMA2 | dict(num_hidden_layers=7, rope_parameters=GEMMA3_ROPE)),
  "phi3": ("phi3", "Phi3ForCausalLM", SMALL | dict(sliding_window=5, pad_token_id=0, tie_word_embeddings=True)),
  "phi3-long": (
    "phi3",
    "Phi3ForCausalLM",
    SMALL
    | dict(rope_parameters=LONG | dict(partial_rotary_factor=0.75), original_max_position_embeddings=32)
    | dict(pad_token_id=0),
  ),
  "gpt2": (
    "gpt2",
    "GPT2LMHeadModel",
    dict(vocab_size=V, n_embd=64, n_layer=2, n_head=4, n_positions=64, n_inner=96, layer_norm_epsilon=1e-4),
  ),
  "gptneox": ("gptneox", "GPTNeoXForCausalLM", ENCODER | dict(rotary_pct=0.25)),
  "gptneox-serial": ("gptneox", "GPTNeoXForCausalLM", ENCODER | dict(rotary_pct=1.0, use_parallel_residual=False)),
  "bert": ("bert", "BertModel", ENCODER),
  "distilbert": (
    "bert",
    "DistilBertModel",
    dict(vocab_size=V, dim=64, hidden_dim=96, n_layers=2, n_heads=4, max_position_embeddings=64),
  ),
  "t5": ("t5", "T5ForConditionalGeneration", T5 | dict(feed_forward_proj="relu", tie_word_embeddings=True)),
  "t5-gated": (
    "t5",
    "T5ForConditionalGeneration",
    T5 | dict(feed_forward_proj="gated-gelu", num_decoder_layers=2, tie_word_embeddings=False),
  ),
}
# Those that transformers does not read.
NOT_IN_TRANSFORMERS = ("mistral", "mixtral", "gemma", "gptneox", "gptneox-serial", "bert", "distilbert", "t5")


def metadata(config, arch):
  """(fields, factor tensors) that the converter makes of a config."""
  rope = config.get("rope_parameters") or {}
  rope = rope.get("full_attention", rope)
  find = lambda *ks: next((config[k] for k in ks if config.get(k) is not None), None)
  d, heads = (
    find("hidden_size", "n_embd", "d_model", "dim"),
    find("num_attention_heads", "n_head", "num_heads", "n_heads"),
  )
  head_dim = config.get("head_dim") or d // heads
  rms = arch not in ("gpt2", "gptneox", "bert")
  eps = find("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon") or 1e-12
  fields = {
    "block_count": find("num_hidden_layers", "n_layer", "num_layers", "n_layers"),
    "context_length": find("max_position_embeddings", "n_positions") or 512,
    "embedding_length": d,
    "feed_forward_length": find("intermediate_size", "n_inner", "d_ff", "hidden_dim"),
    "attention.head_count": heads,
    f"attention.layer_norm_{'rms_' if rms else ''}epsilon": eps,
    "attention.head_count_kv": config.get("num_key_value_heads"),
    "attention.key_length": config.get("head_dim"),
    "attention.value_length": config.get("head_dim"),
    "rope.freq_base": rope.get("rope_theta") if rms and arch != "gemma" else None,
    "rope.scaling.type": rope.get("rope_type") if rope.get("rope_type") in ("linear", "yarn") else None,
    "rope.scaling.factor": rope.get("factor") if rope.get("rope_type") in ("linear", "yarn") else None,
    "rope.scaling.original_context_length": 16 if rope.get("rope_type") == "yarn" else None,
    "expert_count": find("num_local_experts", "num_experts"),
    "expert_used_count": config.get("num_experts_per_tok"),
    "attn_logit_softcapping": config.get("attn_logit_softcapping"),
    "final_logit_softcapping": config.get("final_logit_softcapping"),
    "attention.sliding_window": config.get("sliding_window"),
  }
  factors = {}
  if arch == "llama":
    fields |= {"vocab_size": V, "rope.dimension_count": head_dim}
  if rope.get("rope_type") == "llama3":
    frequency = 5e5 ** (-np.arange(head_dim // 2) / (head_dim // 2))
    smooth = np.clip((8192 * frequency / (2 * np.pi) - 1) / 3, 0, 1)
    factors["rope_freqs.weight"] = 1 / ((1 - smooth) / 8 + smooth)
  if arch == "qwen3moe":
    fields["expert_feed_forward_length"] = config["moe_intermediate_size"]
  if arch == "gemma3":
    fields["rope.freq_base_swa"] = config["rope_parameters"]["sliding_attention"]["rope_theta"]
  if arch == "phi3":
    original = config["original_max_position_embeddings"]
    fields["rope.scaling.original_context_length"] = original
    fields["rope.dimension_count"] = int(rope.get("partial_rotary_factor", 1) * d) // heads
    if "long_factor" in rope:
      scale = config["max_position_embeddings"] / original
      fields["rope.scaling.attn_factor"] = float(np.sqrt(1 + np.log(scale) / np.log(original)))
      factors = {f"rope_factors_{k}.weight": np.array(rope[f"{k}_factor"]) for k in ("long", "short")}
  if arch == "gptneox":
    fields["rope.dimension_count"] = int(rope["partial_rotary_factor"] * head_dim)
    fields["use_parallel_residual"] = config["use_parallel_residual"]
  if arch == "bert":
    fields |= {"attention.causal": False, "pooling_type": 1}
  if arch == "t5":
    fields |= {"attention.key_length": 16, "attention.value_length": 16, "decoder_start_token_id": 0}
    fields |= {"decoder_block_count": config["num_decoder_layers"], "attention.layer_norm_epsilon": eps}
    fields["attention.relative_buckets_count"] = config["relative_attention_num_buckets"]
  return {f"{arch}.{k}": v for k, v in fields.items() if v is not None}, factors


def permute(x, heads):
  return x.reshape(heads, 2, x.shape[0] // heads // 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)


def converted(state, config, arch):
  """{name in the file: array} of {Hugging Face name: array}."""
  heads, kv = config.get("num_attention_heads"), config.get("num_key_value_heads")
  names = ggml.get_tensor_name_map(next(k for k, v in ggml.MODEL_ARCH_NAMES.items() if v == arch), 8)
  stacks, out = {}, {}
  for k, x in state.items():
    if k.startswith(("pooler.", "encoder.embed_tokens", "decoder.embed_tokens")) or k.endswith(".attn.bias"):
      continue
    if arch == "llama" and ".q_proj." in k:
      x = permute(x, heads)
    if arch == "llama" and ".k_proj." in k:
      x = permute(x, kv)
    if arch.startswith("gemma") and k.endswith("norm.weight"):
      x = x + 1
    if k.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight")):
      x = x.T
    if ".query_key_value." in k:
      x = np.concatenate([p.reshape(-1, *x.shape[1:]) for p in x.reshape(heads, 3, -1, *x.shape[1:]).swapaxes(0, 1)])
    if ".experts." in k:
      before, _, after = k.partition(".experts.")
      expert, _, rest = after.partition(".")
      before = before.replace("model.layers", "layers").replace("block_sparse_moe", "feed_forward")
      before = before.replace("layers", "model.layers") if "mlp" in before else before
      stacks.setdefault(f"{before}.experts.{rest}", {})[int(expert)] = x
      continue
    out[k] = x
  out |= {k: np.stack([xs[i] for i in range(len(xs))]) for k, xs in stacks.items()}
  return {names.get_name(k, try_suffixes=(".weight", ".bias")): np.ascontiguousarray(x) for k, x in out.items()}


def write(path, arch, fields, tensors, kind=Q.F32):
  w = ggml.GGUFWriter(path, arch)
  tokens = ["t", "0", "t0", *(chr(65 + i // 26) + chr(97 + i % 26) for i in range(V - 3))]
  fields = fields | {
    "general.name": "tiny",
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "default",
    "tokenizer.ggml.tokens": tokens,
    "tokenizer.ggml.token_type": [1] * V,
    "tokenizer.ggml.merges": ["t 0"],
    "tokenizer.ggml.padding_token_id": 0,
  }
  add = {bool: w.add_bool, int: w.add_uint32, float: w.add_float32, str: w.add_string, list: w.add_array}
  for k, v in fields.items():
    add[type(v)](k, v)
  for k, x in tensors.items():
    to = kind if x.ndim > 1 and "rel_b" not in k else Q.F32
    w.add_tensor(k, quants.quantize(x.astype(np.float32), to), raw_dtype=to)
  w.write_header_to_file()
  w.write_kv_data_to_file()
  w.write_tensors_to_file()
  w.close()
  return str(path)


@functools.cache
def source(case):
  """(model of transformers, its config.json, its tensors on disk) of a case."""
  arch, name, keywords = CASES[case]
  cls = getattr(transformers, name)
  torch.manual_seed(0)
  ref = cls(cls.config_class(**keywords, attn_implementation="eager")).eval()
  if case == "t5-gated":  # transformers ties what it does not load
    ref.lm_head.weight = torch.nn.Parameter(torch.randn(V, 64))
  with torch.no_grad():
    for p in ref.parameters():
      p.add_(0.1 * torch.randn_like(p))
  with tempfile.TemporaryDirectory() as directory:
    ref.save_pretrained(directory)
    with open(f"{directory}/config.json") as f:
      config = json.load(f)
    return ref, config, safetensors_numpy.load_file(f"{directory}/model.safetensors")


def file(case, path, kind=Q.F32, more=None, extra=None):
  """A case's file, with other fields (None leaves one out) and tensors."""
  arch = CASES[case][0]
  _, config, state = source(case)
  fields, factors = metadata(config, arch)
  fields = {k: v for k, v in (fields | {f"{arch}.{k}": v for k, v in (more or {}).items()}).items() if v is not None}
  return write(path, arch, fields, converted(state, config, arch) | factors | (extra or {}), kind)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", [Q.F32, Q.F16, Q.Q8_0], ids=lambda k: k.name)
def test_tensors(case, kind, tmp_path):
  """Names, shapes and layouts; a value is rounded by at most half a step of its format."""
  _, config, state = source(case)
  got = gguf.open(file(case, tmp_path / "x.gguf", kind))
  want = {k: x for k, x in state.items() if not k.startswith("pooler.") and not k.endswith("embed_tokens.weight")}
  want |= {k: x for k, x in state.items() if k == "model.embed_tokens.weight"}
  assert set(got.names()) == set(want)
  step = {Q.F32: 1e-6, Q.F16: 2.0**-11, Q.Q8_0: 0.5 / 127 + 2.0**-11}[kind]
  for k, x in want.items():
    assert got.shape(k) == x.shape, k
    np.testing.assert_allclose(got.read(k), x, atol=1.02 * step * np.abs(x).max() + 1e-6, rtol=0, err_msg=k)


SLOW = ("llama3", "mixtral", "qwen2-yarn", "qwen3moe", "gemma3", "phi3-long", "gptneox-serial")


@pytest.mark.parametrize("case", [pytest.param(k, marks=pytest.mark.slow) if k in SLOW else k for k in CASES])
def test_model(case, tmp_path):
  """The config and parameters of Hugging Face's files, the logits of transformers, and what it makes of a saved one."""
  ref = source(case)[0]
  ref.save_pretrained(tmp_path / "theirs")
  theirs = models.load(str(tmp_path / "theirs"), dtype="float32")
  ours = models.load(file(case, tmp_path / "x.gguf"), dtype="float32")
  assert dict(vars(ours.config)) == dict(vars(theirs.config)) | {"pooler": ours.config.pooler}
  want = {k: v for k, v in tree.flatten(theirs.params).items() if not k.startswith("pooler/")}
  got = tree.flatten(ours.params)
  assert got.keys() == want.keys()
  for k, x in want.items():
    np.testing.assert_allclose(got[k], x, atol=1e-6, err_msg=k)
  if ours.config.encoder_layers:
    return
  models.save(ours, tmp_path / "saved")
  again = type(ref).from_pretrained(tmp_path / "saved", attn_implementation="eager", dtype=torch.float32).eval()
  with torch.no_grad():
    expected, saved = (m(torch.tensor(TOKENS))[0].numpy() for m in (ref, again))
  np.testing.assert_allclose(saved, expected, atol=1e-4, rtol=1e-4)
  x = transformer.hidden(ours.config, ours.params, TOKENS)[0]
  x = x if ours.config.head == "none" else transformer.logits(ours.config, ours.params, x)
  np.testing.assert_allclose(x, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("case", [k for k in CASES if k not in NOT_IN_TRANSFORMERS])
def test_tensors_equal_those_of_transformers(case, tmp_path):
  """transformers' own reader on the same quantised file."""
  path, ref = file(case, tmp_path / "x.gguf", Q.Q8_0), source(case)[0]
  # It does not find out the whole config of every architecture.
  model = type(ref).from_pretrained(tmp_path, gguf_file="x.gguf", config=ref.config, dtype=torch.float32)
  theirs = {k: x.numpy() for k, x in model.state_dict().items()}
  ours = gguf.open(path)
  for k in ours.names():
    before, _, after = k.partition(".experts.")
    if after:
      expert, part, _ = after.split(".")
      both = theirs[f"{before}.experts.{'down_proj' if part == 'down_proj' else 'gate_up_proj'}"][int(expert)]
      want = {"down_proj": both, "gate_proj": both[:32], "up_proj": both[32:]}[part]
    else:
      want = theirs[k]
    np.testing.assert_allclose(ours.read(k), want, atol=1e-6, err_msg=k)


def config(case, path, **kw):
  return gguf.open(file(case, path / "x.gguf", **kw)).config


def test_what_a_file_may_leave_out(tmp_path):
  window = lambda c: [k == "sliding_attention" for k in c["layer_types"]]
  assert window(config("gemma2", tmp_path)) == [True, False]
  assert window(config("gemma3", tmp_path)) == [True] * 5 + [False, True]
  assert not any(window(config("gemma3", tmp_path, more={"attention.sliding_window": None})))
  pattern = [False, True]
  assert window(config("gemma2", tmp_path, more={"attention.sliding_window_pattern": pattern})) == pattern
  assert window(config("gemma2", tmp_path, more={"attention.sliding_window_pattern": 1})) == [False, False]
  assert config("gemma2", tmp_path, more={"block_count": 46})["query_pre_attn_scalar"] == 64 // 4
  assert config("gemma3", tmp_path, more={"rope.freq_base_swa": None})["rope_local_base_freq"] == 10000.0
  assert "sliding_window" not in config("phi3", tmp_path, more={"attention.sliding_window": 0})
  assert config("mistral", tmp_path, more={"attention.sliding_window": 0})["model_type"] == "llama"
  assert (
    config("phi3-long", tmp_path, more={"rope.scaling.attn_factor": 1.5})["rope_scaling"]["attention_factor"] == 1.5
  )
  assert config("t5", tmp_path, extra={"dec.blk.0.cross_attn_rel_b.weight": np.ones((32, 4))})["d_ff"] == 96
  factors = {"rope_freqs.weight": np.linspace(1, 2, 8)}
  assert config("llama3", tmp_path, extra=factors)["rope_scaling"]["rope_type"] == "factors"


ONE = np.ones((2, 64))
REFUSED = [
  ("qwen2", dict(more={"attention.causal": False}), "qwen2.attention.causal is False"),
  ("bert", dict(more={"attention.causal": True}), "bert.attention.causal is True"),
  (
    "qwen3moe",
    dict(more={"expert_used_count": None, "expert_count": 0}),
    "qwen3moe.expert_count, qwen3moe.expert_used",
  ),
  ("qwen3moe", dict(more={"expert_shared_count": 1}), "not understood: qwen3moe.expert_shared_count"),
  ("qwen3moe", dict(extra={"blk.0.ffn_up_shexp.weight": ONE}), "not understood: blk.0.ffn_up_shexp.weight"),
  ("qwen3moe", dict(extra={"blk.0.ffn_up_exps.weight": ONE}), "not understood: blk.0.ffn_up_exps.weight"),
  ("gemma2", dict(more={"attention.sliding_window_pattern": [True]}), "sliding_window_pattern is .True.; expected"),
  ("gemma2", dict(more={"attn_logit_softcapping": "50"}), "one positive number in metadata gemma2.attn_logit_soft"),
  ("phi3", dict(more={"rope.dimension_count": 32}), "phi3.rope.dimension_count is 32, more than"),
  ("gptneox", dict(more={"rope.dimension_count": 32}), "gptneox.rope.dimension_count is 32, more than"),
  ("gptneox", dict(more={"attention.head_count": 3}), "blk.0.attn_qkv.bias has 192 rows, expected 189"),
  ("gpt2", dict(more={"attention.head_count_kv": 2}), "gpt2.attention.head_count_kv is 2"),
  ("distilbert", dict(more={"attention.layer_norm_epsilon": 1e-5}), "1e-05; DistilBERT's is 1e-12"),
  ("t5", dict(more={"attention.value_length": 8}), "t5.attention.value_length is 8, expected 16"),
  ("llama3", dict(more={"rope.scaling.type": "yarn"}), "yarn, and the file has rope_freqs.weight"),
  ("llama", dict(extra={"blk.0.attn_qkv.weight": ONE}), "not understood: blk.0.attn_qkv.weight"),
]


@pytest.mark.parametrize("case, changes, message", REFUSED)
def test_what_is_refused(case, changes, message, tmp_path):
  with pytest.raises(errors.UserError, match=message) as e:
    config(case, tmp_path, **changes)
  assert "\n" not in str(e.value) and "x.gguf" in str(e.value)
