"""From a `Config` to config.json: laws over random configs, and changed models as transformers computes them."""

import dataclasses
import json
import random
import re

import numpy as np
import pytest

from lora_jax import errors, families, models, tree
from lora_jax.families.config_json import rotation
from lora_jax.model import transformer
from tests import test_families

FAMILIES = families.names()
LINEAR = dict(rope_type="linear", factor=2.0)
LLAMA3 = dict(
  rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16
)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16)
LONG = dict(rope_type="longrope", short_factor=[1.0, 1.1], long_factor=[1.5, 4.0], original_max_position_embeddings=6)
BOTH = ("full_attention", "sliding_attention")
# Values of keys, in all spellings; what a family does not understand together is drawn again.
VALUES = {
  **dict.fromkeys("vocab_size hidden_size n_embd dim d_model".split(), [32, 64]),
  **dict.fromkeys("num_hidden_layers n_layer n_layers num_layers".split(), [2, 4]),
  **dict.fromkeys(
    "tie_word_embeddings attention_bias mlp_bias enable_bias do_layer_norm_before".split(), [True, False]
  ),
  **dict.fromkeys("_remove_final_layer_norm scale_attn_weights use_parallel_residual".split(), [True, False]),
  **dict.fromkeys("use_sliding_window norm_topk_prob is_gated_act scale_decoder_outputs".split(), [True, False]),
  **dict.fromkeys("rms_norm_eps layer_norm_eps layer_norm_epsilon".split(), [1e-5, 1e-3]),
  **dict.fromkeys("hidden_act hidden_activation activation_function activation".split(), ["gelu", "relu", "gelu_new"]),
  **dict.fromkeys("max_position_embeddings n_positions".split(), [64, 128]),
  **dict.fromkeys("sliding_window sliding_window_size".split(), [None, 5, 7]),
  **dict.fromkeys("sliding_window_pattern _sliding_window_pattern max_window_layers".split(), [1, 2, 3]),
  **dict.fromkeys("num_experts num_local_experts".split(), [5, 6]),
  **dict.fromkeys("rope_theta rotary_emb_base rope_local_base_freq".split(), [1e4, 3e5]),
  **dict.fromkeys("rotary_pct partial_rotary_factor".split(), [0.5, 0.75, 1.0]),
  **dict.fromkeys("attn_logit_softcapping final_logit_softcapping".split(), [None, 2.0]),
  "rope_scaling": [None, LINEAR, LLAMA3, YARN, LONG, dict(type="linear", factor=4.0)],
  "rope_parameters": [
    LINEAR | {"rope_theta": 3e4},
    LONG | {"partial_rotary_factor": 0.5},
    dict.fromkeys(BOTH),
    dict(zip(BOTH, (LLAMA3, {"rope_theta": 2e4}), strict=True)),
  ],
  "layer_types": [["full_attention", "sliding_attention"] * n for n in (1, 2)] + [["full_attention"] * 2],
  "num_key_value_heads": [1, 2, 4],
  "head_dim": [8, 16],
  "original_max_position_embeddings": [16, 32],
  "type_vocab_size": [1, 3],
  "word_embed_proj_dim": [None, 16, 32],
  "n_inner": [None, 48],
  "num_decoder_layers": [None, 3],
  "relative_attention_num_buckets": [8],
  "relative_attention_max_distance": [20],
  "moe_intermediate_size": [24],
  "num_experts_per_tok": [3],
  "query_pre_attn_scalar": [256, 20, 144],
  "id2label": [None, {str(i): f"kind {i}" for i in range(4)}],
  "num_labels": [1, 3],
  "feed_forward_proj": ["relu", "gated-gelu", "gated-silu", "gelu"],
  "dense_act_fn": ["relu", "gelu"],
  "pad_token_id": [None, 0, 3],
}
KEPT = dict(_name_or_path="a/b", eos_token_id=[1, 2], torch_dtype="bfloat16", initializer_range=0.1)


def keys_of(family):
  return [k for o in family.TABLE.options for k in o.keys]


def drawn(name, rng):
  """A config.json of a family and what it means."""
  family = families.get(name)
  keys = sorted(VALUES.keys() & set(keys_of(family)))
  for _ in range(1000):
    hf = test_families.small(name) | KEPT
    hf |= {k: rng.choice(VALUES[k]) for k in rng.sample(keys, rng.randint(0, len(keys) // 2))}
    hf["architectures"] = [rng.choice(sorted(family.ARCHITECTURES.values()))]
    try:
      return hf, family.config(hf)
    except errors.UserError:
      pass
  raise AssertionError(f"no valid config of {name}")


@pytest.mark.parametrize("name", FAMILIES)
def test_laws(name):
  """Of any two config.jsons of a family: what is written is read back, over nothing, itself and the other."""
  family, rng = families.get(name), random.Random(name)
  for _ in range(150):
    (hf, config), (other, changed) = drawn(name, rng), drawn(name, rng)
    assert family.config(json.loads(json.dumps(family.hf_config(config)))) == config
    assert family.hf_config(config, hf) == hf
    over = family.hf_config(changed, hf)
    assert family.config(over) == changed, (hf, other)
    assert {k: over[k] for k in KEPT} == KEPT


def test_every_key_is_drawn():
  drawn_never = {"label2id", "_num_labels", "n_ctx", "num_attention_heads", "intermediate_size", "n_head", "n_heads"}
  drawn_never |= {"ffn_dim", "hidden_dim", "d_kv", "d_ff", "num_heads"}
  assert {k for name in FAMILIES for k in keys_of(families.get(name))} == VALUES.keys() | drawn_never


CASES = {case: ({"architectures": [name]} | keys) for case, (name, keys) in test_families.CASES.items()}
CLASSES = {c: name for name in FAMILIES for c in families.get(name).ARCHITECTURES.values()}


@pytest.mark.parametrize("case", CASES)
def test_configs_of_all_cases_come_back(case):
  family = families.get(CLASSES[CASES[case]["architectures"][0]])
  config = family.config(CASES[case])
  assert family.config(family.hf_config(config)) == config


@pytest.mark.parametrize("spelling", test_families.SPELLINGS)
def test_spellings_of_the_hub_stay(spelling):
  """Of an unchanged model; of a changed one only what is spelled differently."""
  hf = test_families.sized(test_families.SPELLINGS[spelling][0])
  family = families.get(hf["model_type"])
  config = family.config(hf)
  same = hf | {"architectures": [next(iter(family.ARCHITECTURES.values()))]}
  assert family.hf_config(config, hf) == same
  larger = dataclasses.replace(config, vocab_size=120)
  assert family.hf_config(larger, hf) == same | {"vocab_size": 120}
  assert family.config(family.hf_config(config)) == config


# Values that some family cannot have, by field.
STRANGE = dict(
  vocab_size=[50, 0, 2.5, None],
  d_model=[64, 30],
  n_layers=[5, 0],
  n_heads=[2, 0, 3],
  n_kv_heads=[1, 3],
  head_dim=[16, 5],
  d_ff=[96, -1],
  norm_eps=[1e-7, 0.0],
  activation=["relu", "gelu", "gelu_new", "none"],
  rope_theta=[5e3, 0.0],
  rope_scaling=[tuple(sorted(LINEAR.items())), (("rope_type", "linear"),), (("rope_type", "ntk"),)],
  max_seq_len=[99, 0],
  tied=[True, False],
  norm=["rms", "layer"],
  norm_plus_one=[True, False],
  norm_order=["pre", "post", "sandwich"],
  final_norm=[True, False],
  parallel=[True, False],
  gated=[True, False],
  fused=[True, False],
  attn_bias=["none", "qkv", "all"],
  mlp_bias=[True, False],
  head_bias=[True, False],
  qk_norm=[True, False],
  attn_scale=[None, 0.3, 1.0, -0.5],
  attn_softcap=[None, 20.0],
  logit_softcap=[None, 20.0],
  window=[None, 3],
  local=[(), (True,), (True, False, True, False), (False, True, True)],
  causal=[True, False],
  position=["rope", "learned", "relative", "none"],
  rope_dim=[None, 4, 99],
  local_rope_theta=[None, 2e4],
  position_offset=[0, 1, 2],
  relative_buckets=[16],
  relative_furthest=[99],
  n_types=[0, 3],
  embed_norm=[True, False],
  embed_scale=[None, 2.0],
  embed_dim=[None, 16],
  n_experts=[0, 3],
  experts_per_token=[1],
  norm_topk=[True, False],
  encoder_layers=[0, 2],
  head=["lm", "mlm", "classification", "none"],
  head_scale=[None, 0.1],
  n_labels=[1, 2, 7],
  pooler=["", "relu", "tanh"],
  pool=["first", "last"],
)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_change_is_said_or_refused(name):
  """Of any field to any value: it comes back, or the error says that it would not."""
  family, said = families.get(name), set()
  base = family.config(test_families.small(name))
  for field, values in STRANGE.items():
    for x in values:
      config = dataclasses.replace(base, **{field: x})
      try:
        hf = family.hf_config(config)
      except errors.UserError as e:
        assert re.search(r"cannot express \w+=|unknown activation 'none'", str(e)) and "\n" not in str(e)
        continue
      again = dataclasses.replace(family.config(hf), **{f: getattr(config, f) for f in family.TABLE._unsaid(config)})
      assert again == config
      said |= {field} if config != base else set()
  assert {"vocab_size", "d_ff", "head"} <= said


@pytest.mark.parametrize(
  "name, change, message",
  [
    ("gpt2", dict(position="rope"), r"a gpt2 model cannot express position='rope' \(only 'learned'\)$"),
    (
      "llama",
      dict(position="learned", qk_norm=True),
      r"cannot express qk_norm=True .*, position='learned' \(only 'rope'\)$",
    ),
    ("llama", dict(attn_bias="qkv"), r"attn_bias='qkv' \(only 'none'\)$"),
    ("llama", dict(n_experts=4), r"n_experts=4 \(only 0\)$"),
    ("mistral", dict(window=5, local=(True, False, True)), r"local=\(True, False, True\) \(only \(\)\)$"),
    ("mixtral", dict(n_experts=0), r"n_experts=0; .*num_local_experts is 0, expected a positive whole number$"),
    ("gemma", dict(activation="gelu"), r"activation='gelu' \(only 'gelu_pytorch_tanh'\)$"),
    ("gemma", dict(d_model=64), r"embed_scale=5.65\S+ \(only 8.0\)$"),
    ("gemma2", dict(n_layers=5), r"cannot express window=.*, local=.*; config.json has 3 layer_types for 5 layers$"),
    ("gemma2", dict(attn_scale=None), r"attn_scale=None; .*query_pre_attn_scalar is None"),
    ("gemma2", dict(attn_scale=0.3), r"attn_scale=0.3 \(only 0.3015\d+\)$"),
    ("gpt2", dict(head_dim=16), r"head_dim=16 \(only 8\)$"),
    ("opt", dict(mlp_bias=False), r"attn_bias='all' \(only 'none'\)$"),
    ("opt", dict(norm_order="sandwich"), r"norm_order='sandwich' \(only 'post'\)"),
    ("bert", dict(pooler=""), r"pooler='' \(only 'tanh'\)$"),
    ("roberta", dict(activation="relu"), r"activation='relu' \(only 'gelu'\)$"),
    ("distilbert", dict(norm_eps=1e-5), r"norm_eps=1e-05 \(only 1e-12\)$"),
    ("t5", dict(head_scale=0.5), r"head_scale=0.5 \(only 0.125\)$"),
    ("t5", dict(head="classification"), r"head='classification' \(only 'lm'\)$"),
    ("llama", dict(activation="gelus"), r"unknown activation 'gelus'; did you mean 'gelu'"),
  ],
)
def test_what_a_family_cannot_say(tmp_path, name, change, message):
  family = families.get(name)
  hf = test_families.small(name) | {"architectures": [*family.ARCHITECTURES.values()][:1]}
  if name == "bert":
    hf["architectures"] = ["BertForSequenceClassification"]
  config = dataclasses.replace(family.config(hf), **change)
  model = models.Model(name, config, {}, None, hf)
  with pytest.raises(errors.UserError, match=message):
    models.save(model, tmp_path / "a")
  assert not (tmp_path / "a").exists()


# What is changed beside layers, vocabulary and experts, which every model has fewer or more of.
rope = lambda **scaling: dict(rope_scaling=tuple(sorted(scaling.items())))
ROPE = dict(rope_theta=5e3, **rope(**LINEAR)), rope(**YARN)
LONGROPE = rope(
  rope_type="longrope", original_max_position_embeddings=6, factor=4.0, short_factor=(1.0, 1.3), long_factor=(1.5, 4.0)
)
CHANGES = {  # case: (of the smaller model, of the larger)
  "llama-bias": (ROPE[0], rope(**LLAMA3)),
  "mistral-window": (ROPE[0] | dict(window=7), dict(window=None, max_seq_len=32)),
  "qwen2-window-yarn": (dict(rope_scaling=None), dict(window=4)),
  "qwen3-window": (dict(window=None, local=()), ROPE[1]),
  "gemma": (ROPE[0] | dict(activation="relu"), ROPE[1] | dict(norm_eps=1e-3)),
  "gemma2": (ROPE[0] | dict(attn_softcap=None, logit_softcap=5.0), ROPE[1] | dict(attn_scale=0.25)),
  "gemma3": (ROPE[0] | dict(local_rope_theta=3e3), dict(window=3, activation="gelu", logit_softcap=3.0)),
  "phi3-window": (ROPE[0] | dict(rope_dim=4, rope_scaling=None), LONGROPE | dict(rope_dim=4, window=None)),
  "gpt2": (dict(attn_scale=1.0), dict(activation="relu", norm_eps=1e-3)),
  "neox": (ROPE[0] | dict(parallel=False), dict(rope_dim=6, rope_theta=5e3)),
  "opt-350m": (dict(activation="gelu"), dict(activation="gelu")),
  "bert-mlm": (dict(activation="relu"), dict(norm_eps=1e-3)),
  "roberta-mlm": (dict(norm_eps=1e-3), dict()),
  "distilbert-mlm": (dict(activation="relu"), dict()),
  "mixtral": (ROPE[0] | dict(experts_per_token=1), ROPE[1] | dict(window=5)),
  "qwen3_moe": (ROPE[0] | dict(norm_topk=True), ROPE[1] | dict(window=5, experts_per_token=2)),
  "t5": (dict(relative_furthest=30), dict(activation="gelu_new", norm_eps=1e-3)),
  "t5-flan": (dict(activation="gelu"), dict(activation="silu")),
  "mt5": (dict(activation="relu"), dict(activation="gelu_new")),
}


def test_every_family_is_changed():
  assert {CLASSES[CASES[k]["architectures"][0]] for k in CHANGES} == set(FAMILIES)


def rebuilt(model, layers, encoder, vocab, experts, **fields):
  """A model of the named layers, rows of the vocabulary and experts of another, in that order, and other fields."""
  at = np.asarray

  def leaf(name, x):
    x = np.asarray(x)
    x = x[at(layers)] if name.startswith("layers/") else x[at(encoder)] if name.startswith("encoder/layers/") else x
    if re.search("moe/(gate|up|down)/", name):
      return x[:, at(experts)]
    if name.startswith("layers/moe/router/") or name == "head/kernel":
      return x[..., at(experts if "moe" in name else vocab)]
    return x[at(vocab)] if name in ("embed/kernel", "head/bias") else x

  c = model.config
  sizes = dict(n_layers=len(layers), vocab_size=len(vocab), local=tuple(c.local[i] for i in layers if c.local))
  sizes |= {"n_experts": len(experts)} if c.n_experts else {}
  sizes |= {"encoder_layers": len(encoder)} if c.encoder_layers else {}
  return dataclasses.replace(
    model, params=tree.map_named(leaf, model.params), config=dataclasses.replace(c, **(sizes | fields))
  )


def ours(config, params, tokens):
  kw = dict(encoded=transformer.encode(config, params, tokens[:, :9])) if config.encoder_layers else {}
  x = transformer.hidden(config, params, tokens, **kw)[0]
  if config.head == "classification":
    return transformer.classify(config, params, x)
  return x if config.head == "none" else transformer.logits(config, params, x)


jitted = test_families.fast(ours, static_argnums=0)
TOKENS = np.random.default_rng(3).integers(3, 70, (2, 24))


def assert_equal_to_transformers(model, directory, cls):
  """What is saved there, as a class of transformers computes it, as we load it, and the model."""
  torch = pytest.importorskip("torch")
  ref = cls.from_pretrained(directory, dtype="float32", attn_implementation="eager").eval()
  tokens = torch.tensor(TOKENS)
  with torch.no_grad():
    seq2seq = ref.config.is_encoder_decoder
    theirs = ref(input_ids=tokens[:, :9], decoder_input_ids=tokens)[0] if seq2seq else ref(tokens)[0]
  again = models.load(str(directory), dtype="float32")
  assert again.config == model.config
  values = jitted(model.config, model.params, TOKENS)
  np.testing.assert_allclose(values, theirs.numpy(), atol=1e-4, rtol=1e-4)
  return values


@pytest.mark.parametrize("case", CHANGES)
def test_a_smaller_model(tmp_path, case):
  """Fewer layers, tokens and experts, and other choices; config.json is written from the Config alone."""
  ref, model = test_families.pair(case)
  changed = rebuilt(model, [2, 0] if model.config.n_layers > 2 else [1], [1], range(70), [4, 0, 2], **CHANGES[case][0])
  padding = {k: v for k, v in model.hf_config.items() if k == "pad_token_id"}
  models.hf.save(tmp_path, padding | changed.family.hf_config(changed.config), models.export(changed))
  assert_equal_to_transformers(changed, tmp_path, type(ref))


@pytest.mark.parametrize("case", CHANGES)
def test_a_larger_model(tmp_path, case):
  """More layers, tokens and experts, and other choices; over the config.json that the model came with."""
  ref, model = test_families.pair(case)
  layers = [0, 1, *range(model.config.n_layers), 0]
  vocab, experts = [*range(97), 5, 6, 7], [0, 1, 2, 3, 4, 1, 0]
  changed = rebuilt(model, layers, [1, 0, 1], vocab, experts, **CHANGES[case][1])
  models.save(changed, tmp_path)
  values = assert_equal_to_transformers(changed, tmp_path, type(ref))
  assert np.abs(values[..., :97] - jitted(model.config, model.params, TOKENS)).max() > 1e-2
  written = models.hf.read_json(tmp_path / "config.json")
  described = {*keys_of(model.family), "architectures", "dtype", "torch_dtype"}
  assert {k: v for k, v in written.items() if k not in described} == {
    k: v for k, v in model.hf_config.items() if k not in described
  }


@pytest.mark.parametrize("case", test_families.CASES)
def test_an_unchanged_model_keeps_its_config(tmp_path, case):
  model = test_families.pair(case)[1]
  models.save(model, tmp_path)
  written = models.hf.read_json(tmp_path / "config.json")
  assert written == {k: v for k, v in model.hf_config.items() if k != "dtype"} | {"torch_dtype": "float32"}


@pytest.mark.parametrize("case", ["bert-classifier", "qwen2-classifier", "gpt2-classifier"])
def test_labels(tmp_path, case):
  """Their texts stay with their number; another number has none."""
  ref, model = test_families.pair(case)
  texts = {"0": "bad", "1": "so so", "2": "good"}
  model = dataclasses.replace(model, hf_config=model.hf_config | {"id2label": texts})
  models.save(model, tmp_path / "a")
  assert models.hf.read_json(tmp_path / "a" / "config.json")["id2label"] == texts
  kernel = np.asarray(model.params["classifier"]["kernel"])
  classifier = {k: np.asarray(x)[..., [0, 1, 2, 1, 0]] for k, x in model.params["classifier"].items()}
  params, config = model.params | {"classifier": classifier}, dataclasses.replace(model.config, n_labels=5)
  assert kernel.shape[1] == 3
  changed = dataclasses.replace(model, params=params, config=config)
  models.save(changed, tmp_path / "b")
  written = models.hf.read_json(tmp_path / "b" / "config.json")
  assert written["id2label"] == {str(i): f"LABEL_{i}" for i in range(5)}
  assert written["label2id"] == {f"LABEL_{i}": i for i in range(5)}
  assert_equal_to_transformers(changed, tmp_path / "b", type(ref))


TIED = ["gemma", "gpt2", "opt", "bert-mlm", "distilbert-mlm", "t5", "llama", "neox", "mixtral", "t5-flan", "mt5"]


@pytest.mark.parametrize("case", TIED)
def test_a_head_that_becomes_tied_or_its_own(tmp_path, case):
  ref, model = test_families.pair(case)
  head = dict(model.params.get("head", {}))
  if model.config.tied:
    head["kernel"] = np.flip(np.asarray(model.params["embed"]["kernel"]), 0).T
  else:
    head.pop("kernel")
  params = {k: x for k, x in model.params.items() if k != "head"} | ({"head": head} if head else {})
  changed = dataclasses.replace(
    model, params=params, config=dataclasses.replace(model.config, tied=not model.config.tied)
  )
  models.save(changed, tmp_path)
  assert_equal_to_transformers(changed, tmp_path, type(ref))


@pytest.mark.parametrize("case", ["t5", "t5-flan"])
def test_the_scale_before_the_head(tmp_path, case):
  """On and off, tied or not."""
  ref, model = test_families.pair(case)
  scale = None if model.config.head_scale else model.config.d_model**-0.5
  changed = dataclasses.replace(model, config=dataclasses.replace(model.config, head_scale=scale))
  models.save(changed, tmp_path)
  assert_equal_to_transformers(changed, tmp_path, type(ref))


def test_another_head(tmp_path):
  """A language model loaded as a classifier is saved as one, and is one in transformers."""
  transformers = pytest.importorskip("transformers")
  models.save(test_families.pair("llama")[1], tmp_path / "a")
  model = models.load(str(tmp_path / "a"), dtype="float32", head="classification", n_labels=4)
  model = dataclasses.replace(model, hf_config=model.hf_config | {"pad_token_id": 0})
  models.save(model, tmp_path / "b")
  assert_equal_to_transformers(model, tmp_path / "b", transformers.LlamaForSequenceClassification)


def test_parts_of_a_head():
  """A size that is rounded down from a part of a head is the one that the part was made from."""
  sizes = [(r, n) for n in range(2, 130) for r in range(2, n + 1, 2)]
  assert any(int(r / n * n) != r for r, n in sizes)
  assert [(int(rotation.part(r, n) * n), n) for r, n in sizes] == sizes


def test_aliases_are_replaced():
  """By the class that has what a model has."""
  family = families.get("bert")
  hf = test_families.small("bert") | {"architectures": ["BertForPreTraining"]}
  assert family.hf_config(family.config(hf), hf)["architectures"] == ["BertForMaskedLM"]
