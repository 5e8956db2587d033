"""methods/tokens.py: trained rows of the embedding against the table that holds them and against peft."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import errors, methods, models, tree, weights
from lora_jax.formats import adapter, peft as peft_format
from lora_jax.methods import tokens
from lora_jax.model import transformer
from tests import test_families
from tests.noise import moved
from tests.pairwise import covering
from tests.test_families import jitted as outputs

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

CONFIG = transformer.Config(50, 16, 2, 4, 2, 4, 24, dtype="float32", tied=True)
KEY = jax.random.key(0)
TOKENS = np.random.default_rng(0).integers(0, 50, (2, 12))
TOKENS[0, :4] = (7, 3, 49, 7)
IDS = [49, 3, 7]


def trained(params, ids=IDS, **kw):
  """(params with rows that training has moved, mask)."""
  params, mask = tokens.init(KEY, params, ids=ids, **kw)
  return moved(params, mask, 0.3), mask


@pytest.fixture(scope="module")
def base():
  return transformer.init(CONFIG, KEY)


def test_the_table_with_other_rows(base):
  """Lookup, product with a tied head and dense table are those of an array with the rows in it."""
  params, mask = trained(base)
  node = params["embed"]["kernel"]
  table = base["embed"]["kernel"].at[jnp.array(sorted(IDS))].set(node.rows)
  np.testing.assert_array_equal(node.ids, sorted(IDS))
  np.testing.assert_array_equal(node.dense(), table)
  np.testing.assert_array_equal(weights.take(node, jnp.asarray(TOKENS)), weights.take(table, jnp.asarray(TOKENS)))
  by_hand = base | {"embed": {"kernel": table}}
  ours = outputs(CONFIG, params, TOKENS)
  np.testing.assert_allclose(ours, outputs(CONFIG, by_hand, TOKENS), atol=1e-5)
  np.testing.assert_array_equal(weights.merge(params)["embed"]["kernel"], table)
  np.testing.assert_array_equal(weights.merge(jax.tree.map(np.asarray, params))["embed"]["kernel"], table)
  assert weights.strip(params)["embed"]["kernel"] is base["embed"]["kernel"]
  assert np.abs(ours - outputs(CONFIG, base, TOKENS))[..., IDS].max() > 1e-2
  assert methods.size(params, mask) == 3 * 16


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_are_those_of_the_rows_of_the_whole_table(base, dtype):
  """Through lookup and tied head; the number of trained values is that of the rows."""
  cast = jax.tree.map(lambda x: x.astype(dtype), base)
  params, mask = tokens.init(KEY, cast, ids=IDS)
  x = jax.random.normal(KEY, (2, 3, 16)).astype(dtype)

  def loss(table):
    z = (weights.take(table, TOKENS).astype(jnp.float32) ** 3).sum()
    return z + (weights.dot("BTD,VD->BTV", x, table, jnp.float32) ** 2).sum()

  node = params["embed"]["kernel"]
  got = jax.grad(lambda rows: loss(node.replace(rows=rows)))(node.rows)
  whole = jax.grad(loss)(cast["embed"]["kernel"].astype(dtype))
  assert got.dtype == jnp.float32 and got.shape == (3, 16)
  # Both uses' gradients partly cancel, so the smallest are bounded by the rounding of what they are sums of.
  close = {"rtol": 1e-6, "atol": 1e-7} if dtype == "float32" else {"rtol": 0.05}
  np.testing.assert_allclose(got, np.asarray(whole, np.float32)[sorted(IDS)], **close)


def test_defaults_and_mistakes(base):
  params, mask = tokens.init(KEY, base)
  np.testing.assert_array_equal(params["embed"]["kernel"].ids, [46, 47, 48, 49])
  assert [k for k, m in tree.flatten(mask).items() if m] == ["embed/kernel/rows"]
  bad = {"50": [50], "-1": [3, -1], "True": [True], "each only once": [3, 3], "at least one": [], "'a'": ["a"]}
  for said, ids in bad.items():
    with pytest.raises(errors.UserError, match=f"config.method.ids: .*{said}"):
      tokens.init(KEY, base, ids=ids)
  with pytest.raises(errors.UserError, match="give ids"):
    tokens.init(KEY, base, tokens="<new>")


def test_texts_become_ids():
  class Tokenizer:
    def encode_batch(self, texts):
      return [{"<a>": [7], "<b>": [3]}.get(t, [1, 2]) for t in texts]

  assert tokens.prepare({"tokens": ["<a>", "<b>"], "ids": [9, 3]}, Tokenizer()) == {"ids": [3, 7, 9]}
  assert methods.prepare({"name": "tokens", "tokens": "<a>"}, Tokenizer()) == [{"name": "tokens", "ids": [7]}]
  assert tokens.prepare({"ids": [1]}, Tokenizer()) == {"ids": [1]} and tokens.prepare({"tokens": "<a>"}, None)["tokens"]
  with pytest.raises(errors.UserError, match="'two words' is 2 tokens"):
    tokens.prepare({"tokens": ["<a>", "two words"]}, Tokenizer())


SMALL = test_families.SMALL
FAMILIES = {
  "llama": ("LlamaForCausalLM", SMALL),
  "llama-tied": ("LlamaForCausalLM", SMALL | dict(tie_word_embeddings=True)),
  "gemma": ("GemmaForCausalLM", SMALL | dict(head_dim=16)),
  "gpt2": ("GPT2LMHeadModel", test_families.GPT2),
  "bert": ("BertForMaskedLM", test_families.BERT),
  "t5": ("T5ForConditionalGeneration", test_families.T5),
}
WAYS = ("to peft", "from peft")
ROWS = covering(itertools.product(FAMILIES, (False, True), WAYS))  # a family, whether LoRA is beside, a way


def every(way):
  """The families and whether LoRA is beside; all but one family are slow, as two libraries compile and load each."""
  mark = lambda name: () if name == "llama-tied" else pytest.mark.slow
  rows = [pytest.param(name, lora, marks=mark(name)) for name, lora, w in ROWS if w == way]
  return pytest.mark.parametrize("name, lora", rows)


def load(directory, name):
  """(transformers model, ours) of a family, random."""
  torch = pytest.importorskip("torch")
  pytest.importorskip("peft")
  cls, config = FAMILIES[name]
  cls = getattr(pytest.importorskip("transformers"), cls)
  torch.manual_seed(0)
  ref = cls(cls.config_class(**config)).eval()
  with torch.no_grad():
    for p in ref.parameters():
      p.add_(0.05 * torch.randn_like(p))
    if name == "bert":  # of which PEFT 0.21 leaves out the bias of the tied head
      ref.cls.predictions.bias.zero_()
  ref.save_pretrained(directory)
  return ref, models.load(str(directory), dtype="float32")


def first_output(name, model):
  torch = pytest.importorskip("torch")

  with torch.no_grad():
    x = dict(input_ids=torch.tensor(TOKENS))
    if name == "t5":
      seen = torch.tensor(test_families.SEEN)
      x = dict(input_ids=torch.tensor(test_families.SOURCE), attention_mask=seen, decoder_input_ids=x["input_ids"])
    return model(**x)[0].numpy()


@every("to peft")
def test_peft_loads_what_we_save(tmp_path, name, lora):
  peft = pytest.importorskip("peft")

  ref, model = load(tmp_path / "base", name)
  method = [{"name": "tokens", "ids": IDS}, {"name": "lora", "targets": "all-linear"}][: 1 + lora]
  params, mask = methods.init(KEY, model.params, method)
  params = moved(params, mask)
  adapter.save(model, params, mask, method, tmp_path / "adapter")
  theirs = peft.PeftModel.from_pretrained(ref, str(tmp_path / "adapter")).eval()
  ours = outputs(model.config, params, TOKENS)
  np.testing.assert_allclose(ours, first_output(name, theirs), atol=1e-4, rtol=1e-4)
  assert np.abs(ours - outputs(model.config, model.params, TOKENS)).max() > 1e-2
  again = adapter.load(model, tmp_path / "adapter")
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), again, params)
  config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
  assert config["peft_type"] == ("LORA" if lora else "TRAINABLE_TOKENS")


@every("from peft")
def test_we_load_what_peft_saves(tmp_path, name, lora):
  peft = pytest.importorskip("peft")
  torch = pytest.importorskip("torch")

  ref, model = load(tmp_path / "base", name)
  config = peft.TrainableTokensConfig(token_indices=IDS)
  if lora:
    config = peft.LoraConfig(target_modules="all-linear", trainable_token_indices=IDS, fan_in_fan_out=name == "gpt2")
  theirs = peft.get_peft_model(ref, config).eval()
  with torch.no_grad():
    for k, p in theirs.named_parameters():
      if "lora_B" in k or "trainable_tokens_delta" in k:
        p.add_(0.3 * torch.randn_like(p))
  theirs.save_pretrained(str(tmp_path / "adapter"))
  params = peft_format.load(model, tmp_path / "adapter")
  ours = outputs(model.config, params, TOKENS)
  np.testing.assert_allclose(ours, first_output(name, theirs), atol=1e-4, rtol=1e-4)
  assert np.abs(ours - outputs(model.config, model.params, TOKENS)).max() > 1e-2
  assert np.array_equal(params["embed"]["kernel"].ids, sorted(IDS))


def test_foreign_rows_are_refused(base, tmp_path):
  import safetensors.numpy

  model = models.Model("tiny", CONFIG, base, None, {"model_type": "llama"})
  method = [{"name": "tokens", "ids": IDS}, {"name": "lora"}]
  params, mask = methods.init(KEY, base, method)
  adapter.save(model, params, mask, method, tmp_path)
  path, config = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
  good, said = safetensors.numpy.load_file(path), json.loads(config.read_text())
  name = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"

  def refused(message, tensors=good, **changes):
    safetensors.numpy.save_file(tensors, path)
    config.write_text(json.dumps(said | changes))
    with pytest.raises(errors.UserError, match=message):
      peft_format.load(model, tmp_path)

  refused("is None, expected", {k: x for k, x in good.items() if k != name})
  refused(r"is \(2, 16\), expected \(3, 16\)", good | {name: good[name][:2].copy()})
  refused(r"ids of tokens from 0 to 49, not \[50\]", trainable_token_indices=[3, 7, 50])
  refused("lm_head.*; only rows of model.embed_tokens", trainable_token_indices={"lm_head": IDS})
  refused("embed_tokens.token_adapter", trainable_token_indices=None)
  both = [{"name": "lora", "targets": "embed"}, {"name": "tokens"}]
  params, mask = methods.init(KEY, base, both)
  with pytest.raises(peft_format.NoForm):
    peft_format.save(model, params, tmp_path, method=both)
  adapter.save(model, moved(params, mask, 0.3), mask, both, tmp_path)
  jax.tree.map(np.testing.assert_array_equal, adapter.load(model, tmp_path), moved(params, mask, 0.3))
