"""Every family against transformers on tiny random configs, and the laws that hold for all of them.

A case is (class in transformers, config keywords). Logits within 1e-4, gradients with respect to the input embedding
within 1e-3, both float32; import -> export -> import is bit-exact and transformers loads what is exported.
"""

import copy
import functools
import json
import pathlib
import re
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import errors, families, models, tree
from lora_jax.model import transformer

SMALL = dict(
  vocab_size=97,
  hidden_size=32,
  intermediate_size=48,
  num_hidden_layers=3,
  num_attention_heads=4,
  num_key_value_heads=2,
  max_position_embeddings=64,
)
GEMMA2 = SMALL | dict(head_dim=16, query_pre_attn_scalar=20, sliding_window=5)
PHI3 = SMALL | dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
LONGROPE = dict(
  rope_type="longrope", partial_rotary_factor=0.75, short_factor=[1.0, 1.1, 1.3], long_factor=[1.5, 4.0, 9.0]
)
GPT2 = dict(vocab_size=97, n_embd=32, n_layer=3, n_head=4, n_positions=64, pad_token_id=0)
NEOX = {k: n for k, n in SMALL.items() if k != "num_key_value_heads"} | dict(rotary_pct=0.5, pad_token_id=0)
OPT = dict(
  vocab_size=97,
  hidden_size=32,
  ffn_dim=48,
  num_hidden_layers=3,
  num_attention_heads=4,
  max_position_embeddings=64,
  word_embed_proj_dim=32,
)
OPT_350M = OPT | dict(do_layer_norm_before=False, word_embed_proj_dim=16)
BERT = {k: n for k, n in SMALL.items() if k != "num_key_value_heads"}
DISTILBERT = dict(vocab_size=97, dim=32, hidden_dim=48, n_layers=3, n_heads=4, max_position_embeddings=64)
MIXTRAL = SMALL | dict(num_local_experts=5, num_experts_per_tok=2, pad_token_id=0)
QWEN3_MOE = SMALL | dict(head_dim=16, num_experts=5, num_experts_per_tok=3, moe_intermediate_size=24, pad_token_id=0)
T5 = dict(vocab_size=97, d_model=32, d_kv=16, d_ff=48, num_layers=2, num_decoder_layers=3, num_heads=4)
T5 |= dict(relative_attention_num_buckets=8, relative_attention_max_distance=20, decoder_start_token_id=0)
CASES = {
  "llama": ("LlamaForCausalLM", SMALL),
  "llama-bias": ("LlamaForCausalLM", SMALL | dict(attention_bias=True, mlp_bias=True)),
  "llama-yarn": (
    "LlamaForCausalLM",
    SMALL
    | dict(rope_parameters=dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16, rope_theta=1e4)),
  ),
  "llama-bare": ("LlamaModel", SMALL),
  "mistral-window": ("MistralForCausalLM", SMALL | dict(sliding_window=5)),
  "qwen2-window-yarn": (
    "Qwen2ForCausalLM",
    SMALL
    | dict(use_sliding_window=True, sliding_window=5, max_window_layers=1)
    | dict(rope_parameters=dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16, rope_theta=1e4)),
  ),
  "qwen2-mha-tied-layer-types": (
    "Qwen2ForCausalLM",
    SMALL
    | dict(num_key_value_heads=4, tie_word_embeddings=True, use_sliding_window=True, sliding_window=4)
    | dict(layer_types=["sliding_attention", "full_attention", "sliding_attention"]),
  ),
  "qwen2-classifier": ("Qwen2ForSequenceClassification", SMALL | dict(num_labels=3, pad_token_id=0)),
  "qwen3-window": (
    "Qwen3ForCausalLM",
    SMALL | dict(head_dim=16, use_sliding_window=True, sliding_window=5, max_window_layers=2),
  ),
  "qwen3-mha-tied-bias": (
    "Qwen3ForCausalLM",
    SMALL | dict(head_dim=8, num_key_value_heads=4, tie_word_embeddings=True, attention_bias=True),
  ),
  "gemma": ("GemmaForCausalLM", SMALL | dict(head_dim=16)),
  "gemma-mha-untied-bias": (
    "GemmaForCausalLM",
    SMALL | dict(head_dim=8, num_key_value_heads=4, tie_word_embeddings=False, attention_bias=True),
  ),
  "gemma2": ("Gemma2ForCausalLM", GEMMA2 | dict(attn_logit_softcapping=2.0, final_logit_softcapping=3.0)),
  "gemma2-mha-untied-no-caps": (
    "Gemma2ForCausalLM",
    GEMMA2
    | dict(num_key_value_heads=4, tie_word_embeddings=False)
    | dict(attn_logit_softcapping=None, final_logit_softcapping=None),
  ),
  "gemma3": ("Gemma3ForCausalLM", GEMMA2 | dict(num_hidden_layers=6)),
  "gemma3-mha-untied-linear": (
    "Gemma3ForCausalLM",
    GEMMA2
    | dict(num_key_value_heads=4, tie_word_embeddings=False, sliding_window_pattern=2, final_logit_softcapping=3.0)
    | dict(rope_parameters=dict(full_attention=dict(rope_type="linear", factor=8.0, rope_theta=1e5))),
  ),
  "gemma3-local-classifier": ("Gemma3TextForSequenceClassification", GEMMA2 | dict(num_labels=4)),
  "phi3-window": ("Phi3ForCausalLM", PHI3 | dict(sliding_window=5)),
  "phi3-mha-tied-short": (
    "Phi3ForCausalLM",
    PHI3
    | dict(num_key_value_heads=4, tie_word_embeddings=True)
    | dict(original_max_position_embeddings=32, rope_parameters=LONGROPE),
  ),
  "phi3-long": ("Phi3ForCausalLM", PHI3 | dict(original_max_position_embeddings=6, rope_parameters=LONGROPE)),
  "gpt2": ("GPT2LMHeadModel", GPT2),
  "gpt2-inner-untied": ("GPT2LMHeadModel", GPT2 | dict(n_inner=48, tie_word_embeddings=False)),
  "gpt2-unscaled-relu": ("GPT2LMHeadModel", GPT2 | dict(scale_attn_weights=False, activation_function="relu")),
  "gpt2-classifier": ("GPT2ForSequenceClassification", GPT2 | dict(num_labels=3)),
  "gpt2-bare": ("GPT2Model", GPT2),
  "neox": ("GPTNeoXForCausalLM", NEOX),
  "neox-serial-tied": ("GPTNeoXForCausalLM", NEOX | dict(use_parallel_residual=False, tie_word_embeddings=True)),
  "neox-plain": ("GPTNeoXForCausalLM", NEOX | dict(attention_bias=False, rotary_pct=1.0, hidden_act="gelu_fast")),
  "neox-linear": ("GPTNeoXForCausalLM", NEOX | dict(rope_scaling=dict(rope_type="linear", factor=2.0))),
  "neox-classifier": ("GPTNeoXForSequenceClassification", NEOX | dict(num_labels=3)),
  "neox-bare": ("GPTNeoXModel", NEOX),
  "opt": ("OPTForCausalLM", OPT),
  "opt-350m": ("OPTForCausalLM", OPT_350M),
  "opt-plain": ("OPTForCausalLM", OPT | dict(enable_bias=False, _remove_final_layer_norm=True)),
  "opt-untied": ("OPTForCausalLM", OPT_350M | dict(tie_word_embeddings=False, do_layer_norm_before=True)),
  "opt-classifier": ("OPTForSequenceClassification", OPT_350M | dict(num_labels=3)),
  "opt-bare": ("OPTModel", OPT_350M),
  "bert-mlm": ("BertForMaskedLM", BERT),
  "bert-mlm-relu": ("BertForMaskedLM", BERT | dict(hidden_act="relu", type_vocab_size=3, layer_norm_eps=1e-5)),
  "bert-classifier": ("BertForSequenceClassification", BERT | dict(num_labels=3)),
  "bert-bare": ("BertModel", BERT),
  "roberta-mlm": ("RobertaForMaskedLM", BERT),
  "roberta-classifier": ("RobertaForSequenceClassification", BERT | dict(num_labels=1, pad_token_id=0)),
  "roberta-bare": ("RobertaModel", BERT | dict(type_vocab_size=1)),
  "distilbert-mlm": ("DistilBertForMaskedLM", DISTILBERT),
  "distilbert-classifier": ("DistilBertForSequenceClassification", DISTILBERT | dict(activation="relu")),
  "distilbert-bare": ("DistilBertModel", DISTILBERT),
  "mixtral": ("MixtralForCausalLM", MIXTRAL),
  "mixtral-window-tied": (
    "MixtralForCausalLM",
    MIXTRAL | dict(sliding_window=5, tie_word_embeddings=True, head_dim=16),
  ),
  "mixtral-classifier": ("MixtralForSequenceClassification", MIXTRAL | dict(num_labels=3)),
  "mixtral-bare": ("MixtralModel", MIXTRAL),
  "qwen3_moe": ("Qwen3MoeForCausalLM", QWEN3_MOE),
  "qwen3_moe-window-topk-bias": (
    "Qwen3MoeForCausalLM",
    QWEN3_MOE
    | dict(norm_topk_prob=True, attention_bias=True, use_sliding_window=True, sliding_window=5)
    | dict(tie_word_embeddings=True),
  ),
  "t5": ("T5ForConditionalGeneration", T5 | dict(num_decoder_layers=2)),
  "t5-flan": ("T5ForConditionalGeneration", T5 | dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False)),
  "t5-bare": ("T5Model", T5 | dict(feed_forward_proj="gated-silu", layer_norm_epsilon=1e-2)),
  "mt5": ("MT5ForConditionalGeneration", T5 | dict(tie_word_embeddings=False)),
}
T = 24
TOKENS = np.random.default_rng(0).integers(3, 97, (2, T))
LM = [k for k, (name, _) in CASES.items() if name.endswith(("ForCausalLM", "LMHeadModel"))]
ENCODERS = [k for k, (name, _) in CASES.items() if name.startswith(("Bert", "Roberta", "DistilBert"))]
SEQ2SEQ = [k for k, (name, _) in CASES.items() if name.startswith(("T5", "MT5"))]
SOURCE = np.random.default_rng(2).integers(3, 97, (2, 19))
SEEN = np.arange(19) < np.array([[12], [19]])


@functools.cache
def pair(case):
  """(transformers model in eager attention, our model) of a case, both float32."""
  transformers = pytest.importorskip("transformers")
  torch = pytest.importorskip("torch")
  name, keywords = copy.deepcopy(CASES[case])  # transformers writes into the dicts
  cls = getattr(transformers, name)
  torch.manual_seed(0)
  ref = cls(cls.config_class(**keywords, attn_implementation="eager")).eval()
  if case in SEQ2SEQ and not keywords.get("tie_word_embeddings", True):  # transformers 5 ties unless both are in a file
    ref.lm_head.weight = torch.nn.Parameter(torch.randn_like(ref.shared.weight))
  with torch.no_grad():
    for p in ref.parameters():
      p.add_(0.1 * torch.randn_like(p))
  with tempfile.TemporaryDirectory() as directory:
    ref.save_pretrained(directory)
    return ref, models.load(directory, dtype="float32")


def run_reference(ref):
  """The first output of the transformers model; an encoder-decoder has SOURCE, padded, to look at."""
  torch = pytest.importorskip("torch")

  tokens = torch.tensor(TOKENS)
  if ref.config.is_encoder_decoder:
    return ref(input_ids=torch.tensor(SOURCE), attention_mask=torch.tensor(SEEN).long(), decoder_input_ids=tokens)[0]
  return ref(tokens)[0]


def outputs(config, params, tokens, **kw):
  """Our counterpart of the first output of the transformers model: logits, or states of a bare model."""
  if config.encoder_layers:
    kw = dict(encoded=transformer.encode(config, params, SOURCE, SEEN), seen=SEEN) | kw
  x = transformer.hidden(config, params, tokens, **kw)[0]
  if config.head == "classification":
    return transformer.classify(config, params, x)
  return x if config.head == "none" else transformer.logits(config, params, x)


def firsts(cases):
  """The first case of each family."""
  return {k.partition("-")[0]: k for k in reversed(list(cases))}.values()


def each(cases):
  """A test of cases; beyond one of each family they are slow by their number alone."""
  quick = firsts(cases)
  return pytest.mark.parametrize("case", [k if k in quick else pytest.param(k, marks=pytest.mark.slow) for k in cases])


# Compiled once for each config and shape, as the functions of model/transformer.py make new closures in every call; and
# without LLVM's optimisations, as these tests compile more than they compute.
fast = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
jitted = fast(outputs, static_argnums=0)
hidden = fast(transformer.hidden, static_argnums=0)


@pytest.mark.parametrize("case", firsts({name: k for k, (name, _) in CASES.items()}.values()))
def test_outputs_of_unrolled_layers_equal_transformers(case):
  """One case of each family; the others differ in what scanning does not touch."""
  torch = pytest.importorskip("torch")

  ref, model = pair(case)
  with torch.no_grad():
    theirs = run_reference(ref).numpy()
  ours = jitted(transformer.dataclasses.replace(model.config, scan=False), model.params, TOKENS)
  np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=1e-4)


@each(CASES)
def test_outputs_and_embedding_gradients_equal_transformers(case):
  torch = pytest.importorskip("torch")

  ref, model = pair(case)
  y = run_reference(ref)
  weight = np.random.default_rng(1).standard_normal(y.shape).astype(np.float32) / y[..., 0].numel()
  ref.zero_grad()
  (y * torch.tensor(weight)).sum().backward()
  theirs = ref.get_input_embeddings().weight.grad.numpy()

  def loss(table):
    params = model.params | {"embed": model.params["embed"] | {"kernel": table}}
    y = outputs(model.config, params, TOKENS)
    return (y * weight).sum(), y

  ours, values = fast(jax.grad(loss, has_aux=True))(model.params["embed"]["kernel"])
  np.testing.assert_allclose(values, y.detach().numpy(), atol=1e-4, rtol=1e-4)
  assert np.abs(theirs).max() > 1e-3
  np.testing.assert_allclose(ours, theirs, atol=1e-3, rtol=1e-3)
  np.testing.assert_allclose(ours, theirs, atol=1e-3 * np.abs(theirs).max())


@pytest.mark.parametrize("case", CASES)
def test_export_is_the_inverse_of_import(tmp_path, case):
  ref, model = pair(case)
  models.save(model, tmp_path)
  again = models.load(str(tmp_path), dtype="float32")
  assert again.config == model.config
  jax.tree.map(np.testing.assert_array_equal, model.params, again.params)
  theirs = type(ref).from_pretrained(tmp_path, dtype="float32").state_dict()
  assert theirs.keys() == ref.state_dict().keys()
  for k, x in ref.state_dict().items():
    np.testing.assert_array_equal(x.numpy(), theirs[k].numpy(), err_msg=k)


# Those that differ in what a token sees or where it stands; biases, heads and activations do not matter to either.
PLACED = [k for k in LM if k in firsts(LM) or re.search("window|yarn|long|short|linear|layer-types|caps", k)]


@each(PLACED)
def test_packed_rows_equal_separate_rows(case):
  _, model = pair(case)
  a, b = TOKENS[0, :13], TOKENS[1, :9]

  def run(*rows):
    """Logits of sequences in one row of 26."""
    pad = lambda x: np.pad(np.concatenate(x), (0, 26 - sum(map(len, rows))))[None]
    positions, segments = [np.arange(len(r)) for r in rows], [np.full(len(r), i + 1) for i, r in enumerate(rows)]
    return jitted(model.config, model.params, pad(rows), positions=pad(positions), segment_ids=pad(segments))[0]

  together = run(a, b)
  np.testing.assert_allclose(together[:13], run(a)[:13], atol=2e-5)
  np.testing.assert_allclose(together[13:22], run(b)[:9], atol=2e-5)


@each(PLACED)
def test_padding_and_cache_change_nothing(case):
  """Prompts of two lengths, padded on the right, then one token at a time, against the full forward."""
  _, model = pair(case)
  config, params = model.config, model.params
  full = np.asarray(jitted(config, params, TOKENS))
  lengths = np.array([7, 12])
  prompt = np.where(np.arange(12) < lengths[:, None], TOKENS[:, :12], 0)
  x, cache = hidden(config, params, prompt, cache=transformer.init_cache(config, 2, T))
  ours = transformer.logits(config, params, x)
  for row, n in enumerate(lengths):
    np.testing.assert_allclose(ours[row, :n], full[row, :n], atol=2e-5)
  for i in range(10):
    at = (lengths + i)[:, None]
    x, cache = hidden(config, params, np.take_along_axis(TOKENS, at, 1), positions=jnp.asarray(at), cache=cache)
    ours = transformer.logits(config, params, x)[:, 0]
    np.testing.assert_allclose(ours, np.take_along_axis(full, at[..., None], 1)[:, 0], atol=2e-5)


@each(ENCODERS)
def test_padding_and_token_types_of_encoders(case):
  """Rows of two lengths padded on the right, of two token types: equal to transformers, and to the rows alone."""
  torch = pytest.importorskip("torch")

  ref, model = pair(case)
  lengths, padding = np.array([9, 16]), ref.config.pad_token_id
  seen = (np.arange(16) < lengths[:, None]).astype(np.int32)
  tokens = np.where(seen, TOKENS[:, :16], padding)
  types = np.where(np.arange(16) >= 5, min(1, model.config.n_types - 1), 0) * seen if model.config.n_types else None
  rows = {} if types is None else {"token_types": types}
  theirs = {"input_ids": tokens, "attention_mask": seen} | ({} if types is None else {"token_type_ids": types})
  with torch.no_grad():
    theirs = ref(**{k: torch.tensor(x) for k, x in theirs.items()})[0].numpy()
  run = functools.partial(jitted, model.config, model.params)
  ours = run(tokens, segment_ids=seen, **rows)
  for i, n in enumerate(lengths):
    alone = run(tokens[i : i + 1, :n], **{k: x[i : i + 1, :n] for k, x in rows.items()})[0]
    at = i if model.config.head == "classification" else (i, slice(n))
    np.testing.assert_allclose(ours[at], theirs[at], atol=1e-4, rtol=1e-4)
    np.testing.assert_allclose(ours[at], alone, atol=2e-5)
  if model.config.n_types > 1:
    assert np.abs(ours - run(tokens, segment_ids=seen)).max() > 1e-2


@pytest.mark.parametrize("case", ["mixtral", "mixtral-bare", "qwen3_moe"])
def test_experts_of_a_layer_in_one_tensor(tmp_path, case):
  """The other layout that transformers writes."""
  ref, model = pair(case)
  ref.save_pretrained(tmp_path, save_original_format=False)
  again = models.load(str(tmp_path), dtype="float32")
  jax.tree.map(np.testing.assert_array_equal, model.params, again.params)


@each(SEQ2SEQ)
def test_cache_and_padding_of_encoder_decoders(case):
  """Prompts of two lengths, then one token at a time; the encoder runs once, and its padding is seen by nobody."""
  _, model = pair(case)
  config, params = model.config, model.params
  encode = fast(transformer.encode, static_argnums=0)
  encoded = encode(config, params, SOURCE, SEEN)
  full = np.asarray(hidden(config, params, TOKENS, encoded=encoded, seen=SEEN)[0])
  for i, n in enumerate(SEEN.sum(1)):
    alone = encode(config, params, SOURCE[i : i + 1, :n])
    x = hidden(config, params, TOKENS[i : i + 1], encoded=alone)[0]
    np.testing.assert_allclose(x[0], full[i], atol=2e-5)
  lengths = np.array([7, 12])
  prompt = np.where(np.arange(12) < lengths[:, None], TOKENS[:, :12], 0)
  cache = transformer.init_cache(config, 2, T, SOURCE.shape[1])
  x, cache = hidden(config, params, prompt, cache=cache, encoded=encoded, seen=SEEN)
  for row, n in enumerate(lengths):
    np.testing.assert_allclose(x[row, :n], full[row, :n], atol=2e-5)
  for i in range(10):
    at = (lengths + i)[:, None]
    x, cache = hidden(config, params, np.take_along_axis(TOKENS, at, 1), positions=jnp.asarray(at), cache=cache)
    np.testing.assert_allclose(x[:, 0], np.take_along_axis(full, at[..., None], 1)[:, 0], atol=2e-5)


@pytest.mark.parametrize("case", [k for k in ENCODERS if "distil" not in k and k.endswith("bare")])
def test_pooled_state_equals_transformers(case):
  torch = pytest.importorskip("torch")

  ref, model = pair(case)
  with torch.no_grad():
    theirs = ref(torch.tensor(TOKENS)).pooler_output.numpy()
  ours = transformer.pool(model.config, model.params, jitted(model.config, model.params, TOKENS))
  np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=1e-4)


def legacy(name):
  return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")


# case, names in the file, further tensors in it, further keys of config.json
HUB = {
  "gpt2": (
    lambda k: k.removeprefix("transformer."),
    ["h.0.attn.bias", "h.0.attn.masked_bias"],
    dict(n_ctx=64, _num_labels=1, n_special=0, predict_special_tokens=True, output_past=True),
  ),
  "neox": (
    lambda k: k,
    [f"gpt_neox.layers.1.attention.{k}" for k in ("bias", "masked_bias", "rotary_emb.inv_freq")],
    dict(rotary_pct=0.5, rotary_emb_base=10_000, rope_parameters=None, hidden_dropout=0.0),
  ),
  "opt": (
    lambda k: k.removeprefix("model."),
    [],
    dict(word_embed_proj_dim=None, prefix="</s>", activation_dropout=0.0),
  ),
  "bert-mlm": (
    legacy,
    ["bert.pooler.dense.weight", "bert.pooler.dense.bias", "bert.embeddings.position_ids"]
    + ["cls.seq_relationship.weight", "cls.seq_relationship.bias"],
    dict(architectures=["BertForPreTraining"], pooler_type="first_token_transform", directionality="bidi"),
  ),
  "bert-bare": (lambda k: "bert." + legacy(k), ["cls.predictions.bias"], dict(gradient_checkpointing=False)),
  "roberta-mlm": (
    lambda k: k,
    ["roberta.pooler.dense.weight", "roberta.pooler.dense.bias"],
    dict(architectures=None, position_embedding_type="absolute"),
  ),
  "distilbert-mlm": (lambda k: k, [], dict(tie_weights_=True, sinusoidal_pos_embds=False)),
}
# Further names of a leaf.
COPIES = {
  "gpt2": {"lm_head.weight": "embed/kernel"},
  "opt": {"lm_head.weight": "embed/kernel"},
  "bert-mlm": {"cls.predictions.decoder.bias": "head/bias"},
  "roberta-mlm": {"lm_head.decoder.weight": "embed/kernel", "lm_head.decoder.bias": "head/bias"},
  "distilbert-mlm": {"vocab_projector.weight": "embed/kernel"},
}


@pytest.mark.parametrize("case", HUB)
def test_files_as_the_hub_has_them(tmp_path, case):
  """Older names, buffers, tied copies, and parts that the architecture does not use."""
  import safetensors.numpy

  _, model = pair(case)
  names, further, keys = HUB[case]
  tensors = {names(k): np.ascontiguousarray(x) for k, x in models.export(model)}
  table = {k.path: names(k.hf) for k in model.keys}
  copies = {k: tensors[table[path]] for k, path in COPIES.get(case, {}).items()}
  tensors |= {k: np.zeros(3, np.float32) for k in further} | copies
  safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
  keys = {"architectures": [CASES[case][0]], "model_type": model.hf_config["model_type"]} | keys
  config = {k: v for k, v in (model.hf_config | keys).items() if v is not None}
  (tmp_path / "config.json").write_text(json.dumps(config))
  again = models.load(str(tmp_path), dtype="float32")
  assert again.config == model.config
  jax.tree.map(np.testing.assert_array_equal, model.params, again.params)


@pytest.mark.parametrize(
  "case, keys, message",
  [
    ("gpt2", dict(scale_attn_by_inverse_layer_idx=True, add_cross_attention=True), "add_cross_attention.*scale_attn"),
    ("gpt2", dict(activation_function="gelus"), "did you mean 'gelu'"),
    ("neox", dict(is_decoder=True), "is_decoder"),
    ("opt", dict(layer_norm_elementwise_affine=False), "layer_norm_elementwise_affine"),
    ("bert-mlm", dict(position_embedding_type="relative_key"), "relative_key.*only 'absolute'"),
    ("bert-mlm", dict(is_decoder=True, pruned_heads={"0": [1]}), "is_decoder=True .*pruned_heads"),
    ("bert-mlm", dict(architectures=["BertForQuestionAnswering"]), "architecture of a bert model"),
    ("roberta-mlm", dict(hidden_act="relu"), "hidden_act"),
    ("distilbert-mlm", dict(dim=None), "lacks dim"),
  ],
)
def test_configs_of_what_is_not_supported(case, keys, message):
  model = pair(case)[1]
  with pytest.raises(errors.UserError, match=message):
    model.family.config(model.hf_config | keys)


def test_every_family_has_a_case():
  tested = {pair(k)[1].hf_config["model_type"] for k in CASES}
  assert tested == set(families.names())


def test_every_leaf_has_a_row():
  """A row that no config uses, or a leaf without one, is a slip in a family's table."""
  used = {}
  for case in CASES:
    model = pair(case)[1]
    used.setdefault(model.hf_config["model_type"], set()).update(tree.names(model.params))
  for name, leaves in used.items():
    assert leaves <= {k.path for k in families.get(name).KEYS}


@pytest.mark.parametrize("case", ["qwen2-classifier", "gemma3-local-classifier"])
def test_a_decoder_classifies_by_the_last_token(case):
  """transformers finds it by the padding token, we by the length."""
  torch = pytest.importorskip("torch")

  ref, model = pair(case)
  lengths = np.array([7, 15])
  tokens = np.where(np.arange(T) < lengths[:, None], TOKENS, ref.config.pad_token_id)
  with torch.no_grad():
    theirs = ref(torch.tensor(tokens))[0].numpy()
  x = hidden(model.config, model.params, tokens)[0]
  ours = transformer.classify(model.config, model.params, x, lengths)
  np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=1e-4)


# What config.json files on the hub say, in the spellings of the releases, and what they mean.
SIZES = dict(vocab_size=97, hidden_size=64, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4)
T5_SIZES = dict(vocab_size=97, d_model=64, d_kv=16, d_ff=48, num_layers=4, num_heads=4, is_encoder_decoder=True)
SPELLINGS = {
  "Qwen2.5-0.5B": (
    dict(model_type="qwen2", use_sliding_window=False, sliding_window=32768, max_window_layers=2, use_mrope=False),
    dict(window=None, local=(), attn_bias="qkv", max_seq_len=32768, head_dim=16),
  ),
  "Qwen2.5-7B-Instruct, long": (
    dict(model_type="qwen2", rope_scaling=dict(factor=4.0, original_max_position_embeddings=32768, type="yarn")),
    dict(rope_scaling=(("factor", 4.0), ("original_max_position_embeddings", 32768), ("rope_type", "yarn"))),
  ),
  "Qwen3-0.6B": (
    dict(model_type="qwen3", attention_bias=False, sliding_window=None, max_window_layers=4, rope_scaling=None),
    dict(window=None, qk_norm=True, attn_bias="none", head_dim=128),
  ),
  "gemma-2b": (
    dict(model_type="gemma", hidden_act="gelu", hidden_activation=None, rope_scaling=None),
    dict(activation="gelu_pytorch_tanh", tied=True, head_dim=256, embed_scale=8.0, norm_plus_one=True),
  ),
  "gemma-2-2b": (
    dict(model_type="gemma2", hidden_act="gelu_pytorch_tanh", cache_implementation="hybrid", sliding_window_size=512),
    dict(window=512, local=(True, False) * 2, attn_softcap=50.0, logit_softcap=30.0, attn_scale=1 / 16),
  ),
  "gemma-3-1b-it": (
    dict(model_type="gemma3_text", rope_local_base_freq=1e4, rope_theta=1e6, sliding_window=512)
    | dict(sliding_window_pattern=3, rope_scaling=dict(factor=8.0, rope_type="linear"), attn_logit_softcapping=None),
    dict(window=512, local=(True, True, False, True), rope_theta=1e6, local_rope_theta=1e4, logit_softcap=None)
    | dict(rope_scaling=(("factor", 8.0), ("rope_type", "linear"))),
  ),
  "gemma-3-270m": (
    dict(model_type="gemma3_text", _sliding_window_pattern=6, use_bidirectional_attention=False),
    dict(window=4096, local=(True,) * 4, rope_theta=1e6, rope_scaling=None, local_rope_theta=1e4, tied=True),
  ),
  "Phi-3-mini-128k": (
    dict(model_type="phi3", max_position_embeddings=131072, embd_pdrop=0.0, resid_pdrop=0.0, sliding_window=262144)
    | dict(rope_scaling=dict(type="su", long_factor=[2.0] * 8, short_factor=[1.0] * 8)),
    dict(fused=True, tied=False, norm_eps=1e-5, rope_dim=16, n_kv_heads=4)
    | dict(
      rope_scaling=(
        ("factor", 32.0),
        ("long_factor", (2.0,) * 8),
        ("original_max_position_embeddings", 4096),
        ("rope_type", "longrope"),
        ("short_factor", (1.0,) * 8),
      )
    ),
  ),
  "Phi-4-mini": (
    dict(model_type="phi3", partial_rotary_factor=0.75, tie_word_embeddings=True, full_attn_mod=1, interpolate_factor=1)
    | dict(lm_head_bias=False, mlp_bias=False, attention_bias=False, auto_map={}),
    dict(rope_dim=12, tied=True, rope_scaling=None),
  ),
  "Mixtral-8x7B": (
    dict(model_type="mixtral", num_local_experts=8, output_router_logits=False, router_aux_loss_coef=0.02)
    | dict(sliding_window=None, rope_theta=1e6),
    dict(n_experts=8, experts_per_token=2, norm_topk=True, window=None, norm_eps=1e-5, n_kv_heads=8),
  ),
  "Qwen3-30B-A3B": (
    dict(model_type="qwen3_moe", num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768, head_dim=128)
    | dict(norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[], output_router_logits=False)
    | dict(router_aux_loss_coef=0.001, use_sliding_window=False, sliding_window=None, max_window_layers=48),
    dict(n_experts=128, experts_per_token=8, d_ff=768, norm_topk=True, window=None, qk_norm=True, head_dim=128),
  ),
  "t5-3b": (
    dict(model_type="t5", **T5_SIZES, n_positions=512, output_past=True, task_specific_params={}),
    dict(activation="relu", gated=False, tied=True, head_scale=1 / 8, n_layers=4, encoder_layers=4, head_dim=16),
  ),
  "flan-t5-small": (
    dict(model_type="t5", **T5_SIZES, num_decoder_layers=6, feed_forward_proj="gated-gelu", dense_act_fn="gelu_new")
    | dict(is_gated_act=True, tie_word_embeddings=False, relative_attention_max_distance=128),
    dict(activation="gelu_new", gated=True, tied=False, head_scale=None, n_layers=6, encoder_layers=4),
  ),
  "flan-t5-small, written by transformers 5": (
    dict(model_type="t5", **T5_SIZES, feed_forward_proj="gated-gelu", tie_word_embeddings=True)
    | dict(scale_decoder_outputs=False, classifier_dropout=0.0, is_decoder=False),
    dict(activation="gelu_new", gated=True, tied=False, head_scale=None),
  ),
  "mt5-small": (
    dict(model_type="mt5", **T5_SIZES, num_decoder_layers=4, tie_word_embeddings=False, tokenizer_class="T5Tokenizer"),
    dict(activation="gelu_new", gated=True, tied=False, head_scale=None, relative_buckets=32, norm_eps=1e-6),
  ),
}


def sized(given):
  return given if given["model_type"].endswith("t5") else SIZES | given


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings_of_the_hub(name):
  given, expected = SPELLINGS[name]
  config = families.get(given["model_type"]).config(sized(given))
  assert {k: getattr(config, k) for k in expected} == expected


@pytest.mark.parametrize(
  "given, message",
  [
    (dict(model_type="qwen2", layer_types=["full_attention"] * 3 + ["sliding_atention"]), "mean 'sliding_attention'"),
    (dict(model_type="qwen2", layer_types=["full_attention"] * 3), "3 layer_types for 4 layers"),
    (dict(model_type="qwen2", use_mrope=True, is_causal=False), "is_causal=False .*use_mrope=True"),
    (
      dict(model_type="llama", hidden_size="64", num_hidden_layers=4.0),
      "num_hidden_layers is 4.0, .*hidden_size is '64'",
    ),
    (
      dict(model_type="llama", num_attention_heads=True, vocab_size=-1),
      "vocab_size is -1.*num_attention_heads is True",
    ),
    (dict(model_type="llama", num_hidden_layers=10**9), "num_hidden_layers is 1000000000, .*to 10000"),
    (dict(model_type="llama", rms_norm_eps=10**400, rope_theta="1e4"), "rms_norm_eps is 10.*rope_theta is '1e4'"),
    (dict(model_type="llama", max_position_embeddings=None), "max_position_embeddings is None"),
    (dict(model_type="llama", tie_word_embeddings="false", id2label=["a"]), "tie_word.*'false'.*id2label"),
    (dict(model_type="llama", hidden_act=["silu"]), "hidden_act is .*, expected a string"),
    (dict(model_type="llama", rope_scaling="linear"), "rope_scaling is 'linear', expected an object"),
    (dict(model_type="llama", rope_scaling=dict(type="linear", factor="2")), "factor is '2'"),
    (dict(model_type="llama", rope_scaling=dict(type="linear", factor=None)), "needs 'factor'"),
    (dict(model_type="llama", rope_scaling=dict(type=["linear"])), "type of rotation is"),
    (
      dict(model_type="llama", rope_parameters=dict(rope_type="linear", factor=2.0, mrope_section=[8], beta_fast=32)),
      "'linear': mrope_section=.* .unknown.; beta_fast=32 .unknown",
    ),
    (dict(model_type="llama", rope_parameters=dict(partial_rotary_factor=0.5)), "partial_rotary_factor=0.5"),
    (
      dict(model_type="llama", rope_scaling=dict(type="longrope", short_factor=[1.0], long_factor=2.0)),
      "1 values.*list",
    ),
    (dict(model_type="gemma2", query_pre_attn_scalar="256", sliding_window=0), "sliding_window is 0.*query_pre"),
    (dict(model_type="gemma3_text", rope_parameters=dict(rope_type="linear", factor=2.0)), "an object each for full"),
    (
      dict(model_type="gemma3_text", rope_parameters=dict(sliding_attention=dict(rope_theta="1"), full_attention=None)),
      "rope_theta is '1'",
    ),
    (dict(model_type="gpt_neox", rotary_pct=1.5), "rotates 1.5 of a head"),
    (dict(model_type="phi3", rope_parameters=dict(partial_rotary_factor="1")), "rotates '1' of a head"),
    (dict(model_type="roberta", pad_token_id="1"), "pad_token_id is '1'"),
    (dict(model_type="gemma2", use_bidirectional_attention=True), "use_bidirectional_attention=True"),
    (dict(model_type="gemma3_text", attn_logit_softcapping=50.0), "attn_logit_softcapping=50"),
    (
      dict(model_type="gemma3_text", rope_parameters=dict(sliding_attention=dict(rope_type="linear", factor=2.0))),
      "local layers",
    ),
    (dict(model_type="phi3", lm_head_bias=True), "lm_head_bias=True"),
    (dict(model_type="phi3", rope_scaling=dict(type="longrope", long_factor=[1.0] * 8)), "'short_factor'"),
    (
      dict(model_type="phi3", rope_scaling=dict(type="longrope", long_factor=[1.0] * 9, short_factor=[1.0] * 8)),
      "9 values in long_factor for 8",
    ),
    (
      dict(model_type="qwen3_moe", decoder_sparse_step=2, mlp_only_layers=[0], shared_expert_intermediate_size=8),
      "decoder_sparse_step=2 .*mlp_only_layers=.*shared_expert_intermediate_size",
    ),
    (dict(model_type="t5", **T5_SIZES | dict(is_encoder_decoder=False)), "is_encoder_decoder=False"),
    (dict(model_type="t5", **T5_SIZES, feed_forward_proj="gated-gelu_mew"), "did you mean 'gelu_new'"),
    (dict(model_type="mt5", **T5_SIZES | dict(d_kv=None)), "lacks d_kv"),
  ],
)
def test_what_is_not_understood_is_refused(given, message):
  with pytest.raises(errors.UserError, match=message):
    families.get(given["model_type"]).config(sized(given))


# What transformers 4 wrote in every config.json that it saved, and older releases in those with defaults.
WRITTEN_BY_4 = dict(
  **dict.fromkeys(("add_cross_attention is_decoder is_encoder_decoder tie_encoder_decoder").split(), False),
  **dict.fromkeys("do_sample early_stopping output_scores return_dict_in_generate torchscript".split(), False),
  **dict.fromkeys("remove_invalid_values use_bfloat16 tf_legacy_loss output_attentions".split(), False),
  **dict.fromkeys("bad_words_ids forced_bos_token_id forced_eos_token_id suppress_tokens".split()),
  **dict.fromkeys("begin_suppress_tokens exponential_decay_length_penalty cross_attention_hidden_size".split()),
  **dict.fromkeys("tokenizer_class prefix problem_type finetuning_task sep_token_id bos_token_id".split()),
  **dict.fromkeys("length_penalty repetition_penalty temperature top_p typical_p".split(), 1.0),
  **dict.fromkeys("min_length no_repeat_ngram_size encoder_no_repeat_ngram_size chunk_size_feed_forward".split(), 0),
  **dict.fromkeys("num_beams num_beam_groups num_return_sequences".split(), 1),
  **dict(pruned_heads={}, max_length=20, top_k=50, diversity_penalty=0.0, eos_token_ids=2, max_sequence_length=64),
)


@pytest.mark.parametrize("case", ["llama", "gpt2", "neox", "opt", "bert-mlm", "roberta-mlm", "distilbert-mlm", "t5"])
def test_configs_with_all_defaults_of_transformers(case):
  """Of the installed release and of those that wrote how to generate into config.json."""
  transformers = pytest.importorskip("transformers")
  model = pair(case)[1]
  further = transformers.PretrainedConfig().to_dict() | WRITTEN_BY_4
  assert model.family.config(further | model.hf_config) == model.family.config(model.hf_config)


def small(name):
  """A config.json of a family."""
  sizes = {"gpt2": GPT2, "opt": OPT, "gpt_neox": NEOX, "distilbert": DISTILBERT, "t5": T5_SIZES, "mt5": T5_SIZES}
  return {"model_type": name} | (BERT if "bert" in name and name not in sizes else sizes.get(name, SMALL))


@pytest.mark.parametrize("name", families.names())
def test_options_that_are_off_are_accepted(name):
  """Null, false or empty; not where a key's absence means something else, and no number."""
  config = families.get(name).config
  given = small(name)
  off = {"a_config": None, "use_b": False, "c_layers": [], "d_map": {}, "e_kind": ""}
  assert config(given | off) == config(given)
  for k, v in {"use_b": True, "f_scale": 0, "c_layers": [1], "is_causal": False}.items():
    with pytest.raises(errors.UserError, match=f"{k}="):
      config(given | {k: v})
  assert not config(given | {"tie_word_embeddings": None}).tied or name == "t5"  # transformers 4 takes null so


@pytest.mark.parametrize(
  "given, message",
  [
    (dict(model_type="opt", layer_norm_elementwise_affine=None), "layer_norm_elementwise_affine=None"),
    (dict(model_type="qwen2", is_causal=None), "is_causal=None"),
  ],
)
def test_null_is_not_always_the_default(given, message):
  """transformers 4 takes it for false."""
  with pytest.raises(errors.UserError, match=message):
    families.get(given["model_type"]).config(small(given["model_type"]) | given)


@pytest.mark.parametrize("name", families.names())
def test_what_transformers_reads_of_a_config_is_known(name):
  """So that a key which is not has no effect there."""
  transformers = pytest.importorskip("transformers")
  folder = name.removesuffix("_text")
  source = pathlib.Path(transformers.__file__).parent / "models" / folder / f"modeling_{folder}.py"
  text = source.read_text(encoding="utf-8")
  read = set(re.findall(r"config\.(\w+)", text)) | set(re.findall(r'getattr\((?:self\.)?config, "(\w+)"', text))
  of_others = {  # images, and heads that are not supported
    *"get_text_config image_token_id mm_tokens_per_image text_config vision_config".split(),
    *"hidden_dropout summary_last_dropout".split(),
  }
  unknown = []
  for k in read - of_others:
    with pytest.raises(errors.UserError) as e:
      families.get(name).config({"model_type": name, k: object()})
    unknown += [k] if re.search(rf"\b{k}=.*\(unknown\)", str(e.value)) else []
  assert not unknown


@pytest.mark.parametrize("model_type, message", [("gemma3", "only .*gemma3_text"), (["llama"], "expected a string")])
def test_model_types_that_are_none(model_type, message):
  with pytest.raises(errors.UserError, match=message):
    families.get(model_type)


@pytest.mark.parametrize("case", ["bert-mlm", "roberta-mlm", "distilbert-mlm", "t5"])
def test_a_head_that_is_not_the_embedding(tmp_path, case):
  """Though the config ties them: saved and loaded bit-exactly, and computed as transformers does, scaled in T5."""
  import safetensors.numpy

  torch = pytest.importorskip("torch")

  ref, model = pair(case)
  table = {k.path: k.hf for k in model.family.KEYS}
  tensors = dict(models.export(model))
  head = np.flip(tensors[table["embed/kernel"]], 0)
  tensors[table["head/kernel"]] = head
  models.hf.save(tmp_path / "a", model.hf_config, tensors.items())
  first = models.load(str(tmp_path / "a"), dtype="float32")
  assert not first.config.tied and first.config.head_scale == model.config.head_scale
  models.save(first, tmp_path / "b")
  again = models.load(str(tmp_path / "b"), dtype="float32")
  assert again.config == first.config
  jax.tree.map(np.testing.assert_array_equal, first.params, again.params)
  np.testing.assert_array_equal(again.params["head"]["kernel"], head.T)
  theirs = type(ref).from_pretrained(tmp_path / "b", dtype="float32", attn_implementation="eager").eval()
  with torch.no_grad():
    logits = run_reference(theirs).numpy()
  np.testing.assert_allclose(jitted(again.config, again.params, TOKENS), logits, atol=1e-4, rtol=1e-4)
  if bias := {"bert-mlm": "cls.predictions.decoder.bias", "roberta-mlm": "lm_head.decoder.bias"}.get(case):
    tensors = safetensors.numpy.load_file(tmp_path / "b" / "model.safetensors")
    safetensors.numpy.save_file(tensors | {bias: tensors[bias] + 1}, tmp_path / "b" / "model.safetensors")
    other = models.load(str(tmp_path / "b"), dtype="float32")  # what transformers would add to the logits
    np.testing.assert_array_equal(other.params["head"]["bias"], again.params["head"]["bias"] + 1)


# Every family with a head, as one table and as two: (case, whether they are one).
TIES = [
  *((k, True) for k in "llama mistral-window qwen2-window-yarn qwen3-window gemma gemma2 gemma3 phi3-window".split()),
  *((k, True) for k in "gpt2 neox opt mixtral qwen3_moe bert-mlm roberta-mlm distilbert-mlm t5 t5-flan mt5".split()),
  *((k, False) for k in "llama gpt2 neox opt bert-mlm roberta-mlm distilbert-mlm t5-flan mt5".split()),
]


def tie_case(case, tied):
  """(transformers model, {name: tensor} of its whole state, sets of names of what is one tensor)."""
  import torch
  import transformers

  name, keywords = copy.deepcopy(CASES[case])
  cls = getattr(transformers, name)
  if case not in SEQ2SEQ:
    keywords["tie_word_embeddings"] = tied
  torch.manual_seed(0)
  ref = cls(cls.config_class(**keywords, attn_implementation="eager")).eval()
  if case in SEQ2SEQ and not tied:
    ref.lm_head.weight = torch.nn.Parameter(torch.randn_like(ref.shared.weight))
  with torch.no_grad():
    for p in ref.parameters():
      p.add_(0.1 * torch.randn_like(p))
  state = ref.state_dict()
  groups = {}
  for k, x in state.items():
    groups.setdefault(x.data_ptr(), []).append(k)
  return ref, state, [g for g in groups.values() if len(g) > 1]


@pytest.mark.parametrize("case, tied", TIES)
def test_any_name_of_a_shared_tensor_is_read(tmp_path, case, tied):
  """Writers that drop shared tensors keep any one of their names, or all."""
  torch = pytest.importorskip("torch")
  from safetensors.torch import save_file

  ref, state, groups = tie_case(case, tied)
  ref.config.save_pretrained(tmp_path)
  with torch.no_grad():
    theirs = run_reference(ref).numpy()

  def check(dropped):
    tensors = {k: x.clone() for k, x in state.items() if k not in dropped}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with torch.no_grad():
      again = type(ref).from_pretrained(tmp_path, attn_implementation="eager").eval()
      np.testing.assert_array_equal(run_reference(again).numpy(), theirs)  # transformers reads it
    model = models.load(str(tmp_path), dtype="float32")
    assert model.config.tied == tied
    np.testing.assert_allclose(jitted(model.config, model.params, TOKENS), theirs, atol=1e-4, rtol=1e-4)

  assert groups or not tied
  check(())
  for group in groups:
    for kept in group:
      check(set(group) - {kept})


@pytest.mark.parametrize("case", ["t5", "mt5"])
def test_two_tables_for_one_are_refused(tmp_path, case):
  """transformers embeds the encoder's text with a table of its own then."""
  pytest.importorskip("torch")
  from safetensors.torch import save_file

  ref, state, _ = tie_case(case, True)
  ref.config.save_pretrained(tmp_path)
  state = {k: x.clone() for k, x in state.items()}
  state["encoder.embed_tokens.weight"] += 1
  save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
  with pytest.raises(errors.UserError, match=r"shared.weight \(97, 32\) and encoder.embed_tokens.weight .*differ"):
    models.load(str(tmp_path))


@pytest.mark.parametrize("name", families.names())
def test_classes_exist_in_transformers(name):
  transformers = pytest.importorskip("transformers")
  for cls in families.get(name).ARCHITECTURES.values():
    assert getattr(transformers, cls).config_class.model_type == name


def test_the_example_of_a_family_is_the_file():
  root = pathlib.Path(__file__).parents[1]
  text = (root / "lora_jax" / "families" / "mistral.py").read_text(encoding="utf-8")
  assert text in (root / "CONTRIBUTING.md").read_text(encoding="utf-8")
