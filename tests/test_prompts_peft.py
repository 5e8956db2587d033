"""Soft prompts: parity with the peft library, and files both ways."""

import json

import einops
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import errors, methods, models
from lora_jax.formats import adapter, peft as peft_format
from lora_jax.methods import p_tuning, prefix_tuning, prompt_tuning
from lora_jax.model import prompts, transformer
from tests.test_families import SEEN, SMALL, SOURCE, TOKENS, jitted, pair
from tests.test_prefix import CONFIGS, base, first, some, unwrapped
from tests.test_prompts import KEY, SOFT, P, of_text

pytestmark = [
  pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
  pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning"),
]


@pytest.mark.parametrize("encoder", p_tuning.ENCODERS)
def test_the_encoder_is_that_of_peft(encoder):
  torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
  kw = dict(num_virtual_tokens=P, token_dim=32, num_transformer_submodules=1, encoder_hidden_size=6)
  kw |= dict(encoder_reparameterization_type=encoder.upper())
  theirs = peft.PromptEncoder(peft.PromptEncoderConfig(peft_type="P_TUNING", **kw))
  ours = p_tuning.init(KEY, base("llama"), length=P, encoder=encoder, hidden=6)[0]["prompt"]
  array = lambda x: jnp.asarray(x.detach().numpy())
  linear = [m for m in theirs.mlp_head if hasattr(m, "weight")]
  lstm = []
  if encoder == "lstm":
    raw = theirs.lstm_head.state_dict()
    gates = lambda x: einops.rearrange(x.numpy(), "(g h) c -> c g h", g=4)
    for i in range(2):
      ends = {"forward": f"l{i}", "backward": f"l{i}_reverse"}
      get = lambda kind, end: raw[f"{kind}_{end}"]
      bias = lambda end: (get("bias_ih", end) + get("bias_hh", end)).numpy().reshape(4, -1)
      cell = lambda e: {"input": gates(get("weight_ih", e)), "state": gates(get("weight_hh", e)), "bias": bias(e)}
      lstm.append(jax.tree.map(jnp.asarray, {side: cell(end) for side, end in ends.items()}))
  mlp = [{"kernel": array(m.weight).T, "bias": array(m.bias)} for m in linear]
  same = p_tuning.Encoder(array(theirs.embedding.weight), lstm, mlp)
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(a.shape, b.shape), ours, same)
  np.testing.assert_allclose(same(), theirs(torch.arange(P)).detach().numpy(), atol=1e-6)


def test_a_baked_encoder_computes_the_same():
  params, _ = p_tuning.init(KEY, base("llama"), length=P, encoder="lstm", placement="suffix")
  baked = prompts.bake(params)
  assert isinstance(baked["prompt"], prompt_tuning.Prompt) and prompts.of(baked) == prompts.of(params)
  np.testing.assert_allclose(baked["prompt"](), params["prompt"](), atol=1e-6)


CASES = "llama gemma opt-350m gpt2 mixtral t5 bert-classifier qwen2-classifier".split()
KINDS = {"t5": "SEQ_2_SEQ_LM", "bert-classifier": "SEQ_CLS", "qwen2-classifier": "SEQ_CLS"}


def logits(model, params):
  """Ours after the soft prompt that `params` asks for."""
  put = lambda x: np.concatenate([np.tile(SOFT, (2, 1)), x], axis=1) if "prompt" in params else x
  if not model.config.encoder_layers:
    return jitted(model.config, params, put(TOKENS))
  seen = np.pad(SEEN, [(0, 0), (P if "prompt" in params else 0, 0)], constant_values=True)
  encoded = transformer.encode(model.config, params, put(SOURCE), seen)
  return jitted(model.config, params, TOKENS, encoded=encoded, seen=seen)


def of_peft(theirs):
  """The logits of a peft model."""
  torch = pytest.importorskip("torch")

  if not theirs.config.is_encoder_decoder:
    return first(theirs)
  source, seen = torch.tensor(SOURCE), torch.tensor(SEEN).long()
  with torch.no_grad():
    return theirs(input_ids=source, attention_mask=seen, decoder_input_ids=torch.tensor(TOKENS))[0].numpy()


def agree(model, params, theirs):
  ours = logits(model, params)
  np.testing.assert_allclose(ours, of_peft(theirs), atol=1e-4, rtol=1e-4)
  if ours.ndim == 2 or model.config.encoder_layers:
    assert np.abs(ours - logits(model, model.params)).max() > 1e-2
  else:
    assert np.abs(ours[:, P:] - logits(model, model.params)).max() > 1e-2


@pytest.mark.parametrize("case", some(CASES, "llama gemma gpt2 t5 bert-classifier"))
def test_peft_loads_what_we_save(tmp_path, case):
  peft = pytest.importorskip("peft")
  ref, model = pair(case)
  params = of_text(model.params, [7, 8, 9], length=P)
  if case == "gpt2":
    params = p_tuning.init(KEY, model.params, length=P, encoder="lstm", hidden=6)[0]
  peft_format.save(model, params, tmp_path, ["prompt/table", *model.head_leaves])
  saved = json.loads((tmp_path / "adapter_config.json").read_text())
  assert saved["peft_type"] == ("P_TUNING" if case == "gpt2" else "PROMPT_TUNING")
  agree(model, params, peft.PeftModel.from_pretrained(unwrapped(ref), str(tmp_path)).eval())


@pytest.mark.parametrize("case", some(CASES, "llama gemma gpt2 t5 bert-classifier"))
def test_we_load_what_peft_saves(tmp_path, case):
  peft = pytest.importorskip("peft")
  torch = pytest.importorskip("torch")

  ref, model = pair(case)
  kind = peft.PromptEncoderConfig if case in ("gpt2", "bert-classifier") else peft.PromptTuningConfig
  width = 16 if case == "opt-350m" else None  # which peft takes from the layers, but is that of the table
  made = kind(task_type=KINDS.get(case, "CAUSAL_LM"), num_virtual_tokens=P, token_dim=width)
  torch.manual_seed(0)
  theirs = peft.get_peft_model(unwrapped(ref), made).eval()
  with torch.no_grad():
    for k, p in theirs.named_parameters():
      if "modules_to_save" in k:
        p.add_(torch.randn_like(p))
  theirs.save_pretrained(str(tmp_path))
  agree(model, peft_format.load(model, tmp_path), theirs)
  if KINDS.get(case) == "SEQ_CLS":
    assert peft_format.head(tmp_path) == {"head": "classification", "n_labels": 3}


@pytest.mark.parametrize(
  "edit, message",
  [
    (lambda t: t | {"base_model.x": t["prompt_embeddings"]}, r"tensors with no place in this model: \['x'\]"),
    (lambda t: t | {"x": t["prompt_embeddings"]}, r"keys without the prefix 'base_model.': \['x'\]"),
    (lambda t: {"base_model.x": t["prompt_embeddings"]}, r"no place in this model: .*'x'"),
    (lambda t: {"prompt_embeddings": t["prompt_embeddings"][:, 1:].copy()}, "expected"),
    (lambda t: {"prompt_embeddings": t["prompt_embeddings"][1:].copy()}, "expected"),
  ],
)
@pytest.mark.parametrize("method", [prompt_tuning, prefix_tuning])
def test_foreign_adapters_are_refused(tmp_path, method, edit, message):
  import safetensors.numpy

  model = models.Model("tiny", CONFIGS["llama"], base("llama"), None, SMALL | {"model_type": "llama"})
  peft_format.save(model, method.init(KEY, model.params, length=P)[0], tmp_path)
  path = tmp_path / "adapter_model.safetensors"
  safetensors.numpy.save_file(edit(safetensors.numpy.load_file(path)), path)
  with pytest.raises(errors.UserError, match=message):
    peft_format.load(model, tmp_path)


@pytest.mark.parametrize("name", ["prompt_tuning", "p_tuning"])
def test_what_peft_cannot_hold_is_saved_in_our_own_form(tmp_path, name):
  model = models.Model("tiny", CONFIGS["llama"], base("llama"), None, SMALL | {"model_type": "llama"})
  method = [{"name": name, "length": P, "placement": "suffix"}]
  params, mask = methods.init(KEY, model.params, method)
  adapter.save(model, params, mask, method, tmp_path)
  assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LORA_JAX"
  again = adapter.load(model, tmp_path)
  assert jax.tree.structure(again) == jax.tree.structure(params)
  jax.tree.map(np.testing.assert_array_equal, again, params)
