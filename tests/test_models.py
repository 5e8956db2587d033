"""Models against transformers: random tiny configs within 1e-4, and the import and export tables."""

import json

import jax
import numpy as np
import pytest

from lora_jax import errors, families, models, sharding, tree
from lora_jax.families.config_json import rotation
from lora_jax.families.reading import options
from lora_jax.formats import hf
from lora_jax.inference import decode
from lora_jax.model import transformer
from lora_jax.training import train

BASE = dict(
  vocab_size=97,
  hidden_size=32,
  intermediate_size=48,
  num_hidden_layers=3,
  num_attention_heads=4,
  num_key_value_heads=4,
  max_position_embeddings=128,
  attn_implementation="eager",
)
LLAMA3 = dict(
  rope_type="llama3",
  factor=8.0,
  low_freq_factor=1.0,
  high_freq_factor=4.0,
  original_max_position_embeddings=16,
  rope_theta=1000.0,
)
CONFIGS = {
  "untied": {},
  "tied": dict(tie_word_embeddings=True),
  "gqa": dict(num_key_value_heads=2),
  "head_dim": dict(head_dim=16, num_key_value_heads=1),
  "llama3_rope": dict(rope_parameters=LLAMA3, num_key_value_heads=2),
  "linear_rope": dict(rope_parameters=dict(rope_type="linear", factor=4.0, rope_theta=10000.0)),
}


def reference(directory, **overrides):
  """A random transformers model saved to `directory`."""
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  torch.manual_seed(0)
  model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**BASE | overrides)).eval()
  with torch.no_grad():
    for p in model.parameters():
      p.add_(0.1 * torch.randn_like(p))
  model.save_pretrained(directory)
  return model


def torch_logits(model, tokens):
  torch = pytest.importorskip("torch")

  with torch.no_grad():
    return model(torch.tensor(tokens)).logits.float().numpy()


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("scan", [True, False])
def test_logits_equal_transformers(tmp_path, name, scan):
  ref = reference(tmp_path, **CONFIGS[name])
  model = models.load(str(tmp_path), dtype="float32", scan=scan)
  tokens = np.random.default_rng(0).integers(0, 97, (2, 40))
  ours = models.apply(model.config, model.params, tokens)
  np.testing.assert_allclose(ours, torch_logits(ref, tokens), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["untied", "tied", "llama3_rope"])
def test_save_is_the_inverse_of_load(tmp_path, name):
  transformers = pytest.importorskip("transformers")
  ref = reference(tmp_path / "a", **CONFIGS[name])
  model = models.load(str(tmp_path / "a"), dtype="float32")
  models.save(model, tmp_path / "b")
  again = models.load(str(tmp_path / "b"), dtype="float32")
  jax.tree.map(np.testing.assert_array_equal, model.params, again.params)
  theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "b", dtype="float32").state_dict()
  assert theirs.keys() == ref.state_dict().keys()
  for k, x in ref.state_dict().items():
    np.testing.assert_array_equal(x.numpy(), theirs[k].numpy(), err_msg=k)


def test_sharded_safetensors(tmp_path, monkeypatch):
  reference(tmp_path / "a")
  model = models.load(str(tmp_path / "a"), dtype="float32")
  monkeypatch.setattr(models.hf, "SHARD_BYTES", 20_000)
  models.save(model, tmp_path / "b")
  assert len(list((tmp_path / "b").glob("model-*.safetensors"))) > 3
  again = models.load(str(tmp_path / "b"), dtype="float32")
  jax.tree.map(np.testing.assert_array_equal, model.params, again.params)


def test_large_tensors_are_read_in_pieces(tmp_path, monkeypatch):
  """To the same parameters, on one device and spread over eight."""
  reference(tmp_path, num_key_value_heads=2)
  whole = models.load(str(tmp_path), dtype="float32").params
  seen = []
  pieces = models._pieces
  monkeypatch.setattr(models, "_pieces", lambda *a: [seen.append(p[1].nbytes) or p for p in pieces(*a)])
  monkeypatch.setattr(models, "PIECE_BYTES", 1000)
  place = sharding.Placer(sharding.make_mesh(data=2, fsdp=2, tensor=2))
  for kw in ({}, {"sharding": place}):
    jax.tree.map(np.testing.assert_array_equal, whole, models.load(str(tmp_path), dtype="float32", **kw).params)
  assert len(seen) > 2 * 3 * 9 and sorted(seen)[len(seen) // 2] <= 1000


def test_bfloat16_is_close(tmp_path):
  ref = reference(tmp_path)
  model = models.load(str(tmp_path), dtype="bfloat16")
  assert model.params["layers"]["attn"]["q"]["kernel"].dtype == "bfloat16"
  tokens = np.arange(30)[None]
  ours, theirs = models.apply(model.config, model.params, tokens), torch_logits(ref, tokens)
  assert np.abs(ours - theirs).max() < 0.05 * np.abs(theirs).max()


def edit(path, fn):
  config = json.loads(path.read_text())
  path.write_text(json.dumps(fn(config)))


@pytest.mark.parametrize(
  "change, message",
  [
    (dict(model_type="lama"), "did you mean 'llama'"),
    (dict(attention_bias=True), "q_proj.bias"),
    (dict(sliding_windows=7), "sliding_windows"),
    (dict(hidden_act="swoosh"), "swoosh"),
    (dict(num_hidden_layers=4), "layers.3"),
    (dict(num_hidden_layers=2), "unexpected tensors"),
    (dict(intermediate_size=50), "shape"),
    (dict(num_attention_heads=3, num_key_value_heads=3, head_dim=7), "shape"),
    (dict(rope_parameters=dict(rope_type="dynamic")), "dynamic"),
  ],
)
def test_bad_config_is_refused(tmp_path, change, message):
  reference(tmp_path)
  edit(tmp_path / "config.json", lambda c: c | change)
  with pytest.raises(errors.UserError, match=message):
    models.load(str(tmp_path))


def test_bad_files_are_refused(tmp_path):
  reference(tmp_path)
  weights = tmp_path / "model.safetensors"
  data = weights.read_bytes()
  for size in (0, 5, 300, len(data) // 2, len(data) - 1):
    weights.write_bytes(data[:size])
    with pytest.raises(errors.UserError, match="model.safetensors"):
      models.load(str(tmp_path))
  weights.write_bytes(b"PK\x03\x04" + b"x" * 1000)
  with pytest.raises(errors.UserError, match="model.safetensors"):
    models.load(str(tmp_path))
  weights.unlink()
  with pytest.raises(errors.UserError, match="no model.safetensors"):
    models.load(str(tmp_path))
  (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../evil"}}')
  with pytest.raises(errors.UserError, match="evil"):
    models.load(str(tmp_path))
  (tmp_path / "config.json").write_text("{")
  with pytest.raises(errors.UserError, match="config.json"):
    models.load(str(tmp_path))


@pytest.mark.parametrize(("value", "dtype"), [(np.nan, "bfloat16"), (-np.inf, "float32"), (1e30, "float16")])
def test_weights_that_are_not_finite_are_refused(tmp_path, value, dtype):
  """By the name of the tensor; what the dtype has no number for is none."""
  reference(tmp_path)
  tensors = hf.Tensors([tmp_path / "model.safetensors"])
  tensors = {k: np.array(tensors.read(k)) for k in tensors.names()}
  name = "model.layers.1.mlp.down_proj.weight"
  tensors[name].flat[7] = value
  hf.save_tensors(tmp_path / "model.safetensors", tensors)
  with pytest.raises(errors.UserError, match=f"{name} has values that are not finite, as {dtype}"):
    models.load(str(tmp_path), dtype)


@pytest.mark.parametrize("name", families.names())
def test_numbers_of_a_config_that_are_not_finite_are_refused(name):
  """Whatever a family reads as a number."""
  numbers = [k for keys, what, _ in options.RULES for k in keys.split() if "number" in what]
  for k in numbers:
    for x in (float("nan"), float("inf"), -float("inf"), 1e400, 10**400):
      with pytest.raises(errors.UserError, match=f"{k} is "):
        families.get(name).config({"model_type": name, k: x})
  for k in ("rope_theta", "factor"):
    with pytest.raises(errors.UserError, match=f"{k} is nan"):
      rotation.read({"model_type": name}, {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4} | {k: float("nan")})


def test_unknown_names():
  with pytest.raises(errors.UserError, match="did you mean 'smollm2-135m'"):
    models.load("smollm2-135")
  with pytest.raises(errors.UserError, match="hub"):
    models.load("hf:org/absent")
  with pytest.raises(errors.UserError, match="bfloat16"):
    models.load("smollm2-135m", dtype="bf16")
  with pytest.raises(errors.UserError, match="scan"):
    models.load("smollm2-135m", scn=True)


CONFIG = transformer.Config(50, 16, 2, 4, 2, 4, 24, dtype="float32")


@pytest.mark.slow
def test_causality():
  """No logit depends on a later token."""
  params = transformer.init(CONFIG, jax.random.key(0))
  tokens = jax.random.randint(jax.random.key(1), (1, 10), 0, 50)
  a = models.apply(CONFIG, params, tokens)
  b = models.apply(CONFIG, params, tokens.at[:, 6].add(1) % 50)
  np.testing.assert_array_equal(a[:, :6], b[:, :6])
  assert np.abs(a[:, 6:] - b[:, 6:]).max() > 0


@pytest.mark.slow
def test_packed_rows_equal_separate_rows():
  params = transformer.init(CONFIG, jax.random.key(0))
  a, b = (jax.random.randint(jax.random.key(i), (1, n), 0, 50) for i, n in ((1, 7), (2, 5)))
  packed = jax.numpy.concatenate([a, b], axis=1)
  positions = jax.numpy.r_[:7, :5][None]
  segments = jax.numpy.r_[[1] * 7, [2] * 5][None]
  together = models.apply(CONFIG, params, packed, positions=positions, segment_ids=segments)
  np.testing.assert_allclose(together[:, :7], models.apply(CONFIG, params, a), atol=1e-6)
  np.testing.assert_allclose(together[:, 7:], models.apply(CONFIG, params, b), atol=1e-6)


@pytest.mark.slow
def test_cache_equals_full_forward():
  params = transformer.init(CONFIG, jax.random.key(0))
  tokens = jax.random.randint(jax.random.key(1), (2, 10), 0, 50)
  full = models.apply(CONFIG, params, tokens)
  cache = transformer.init_cache(CONFIG, 2, 12)
  x, cache = transformer.hidden(CONFIG, params, tokens[:, :6], cache=cache)
  steps = [x]
  for t in range(6, 10):
    x, cache = transformer.hidden(
      CONFIG, params, tokens[:, t : t + 1], positions=jax.numpy.full((2, 1), t), cache=cache
    )
    steps.append(x)
  ours = transformer.logits(CONFIG, params, jax.numpy.concatenate(steps, axis=1))
  np.testing.assert_allclose(ours, full, atol=1e-6)


def test_initial_values_depend_on_names_alone():
  a = tree.flatten(transformer.init(CONFIG, jax.random.key(0)))
  b = tree.flatten(transformer.init(CONFIG, jax.random.key(0))["layers"]["attn"])
  assert set(b) == {"q/kernel", "k/kernel", "v/kernel", "o/kernel"}
  np.testing.assert_array_equal(a["layers/attn/q/kernel"], b["q/kernel"])


def test_our_own_tree_is_saved_and_loaded(tmp_path):
  """On another mesh, in another dtype; a head that it was not saved with is refused."""
  reference(tmp_path / "a", num_key_value_heads=2, rope_parameters=LLAMA3)
  model = models.load(str(tmp_path / "a"), dtype="float32")
  models.save(model, tmp_path / "b", form="orbax")
  place = sharding.Placer(sharding.make_mesh(data=2, fsdp=2, tensor=2))
  again = models.load(str(tmp_path / "b"), dtype="float32", sharding=place)
  assert again.config == model.config
  assert again.params["layers"]["mlp"]["up"]["kernel"].sharding.spec == jax.P(None, "fsdp", "tensor")
  jax.tree.map(np.testing.assert_array_equal, model.params, again.params)
  half = models.load(str(tmp_path / "b"), dtype="bfloat16").params["layers"]
  assert half["mlp"]["up"]["kernel"].dtype == "bfloat16" and half["mlp_norm"]["scale"].dtype == "float32"
  models.save(again, tmp_path / "c")
  exported = models.load(str(tmp_path / "c"), dtype="float32")
  jax.tree.map(np.testing.assert_array_equal, model.params, exported.params)
  with pytest.raises(errors.UserError, match="head 'lm'"):
    models.load(str(tmp_path / "b"), head="classification")


def test_a_head_that_is_not_the_embedding_is_kept(tmp_path):
  """Though the config ties them."""
  ref = reference(tmp_path / "a")
  edit(tmp_path / "a" / "config.json", lambda c: c | dict(tie_word_embeddings=True))
  model = models.load(str(tmp_path / "a"), dtype="float32")
  tokens = np.arange(30)[None]
  np.testing.assert_allclose(models.apply(model.config, model.params, tokens), torch_logits(ref, tokens), atol=1e-4)
  models.save(model, tmp_path / "b")
  assert not json.loads((tmp_path / "b" / "config.json").read_text())["tie_word_embeddings"]


@pytest.mark.parametrize(
  "change, message",
  [
    (lambda c: c | dict(d_modl=32), "lora_jax.json.d_modl; did you mean 'd_model'"),
    (lambda c: {k: v for k, v in c.items() if k != "n_heads"}, "lora_jax.json needs n_heads"),
  ],
)
def test_a_damaged_config_of_our_own_is_refused(tmp_path, change, message):
  reference(tmp_path / "a")
  models.save(models.load(str(tmp_path / "a")), tmp_path / "b", form="orbax")
  edit(tmp_path / "b" / "lora_jax.json", change)
  with pytest.raises(errors.UserError, match=message):
    models.load(str(tmp_path / "b"))


def test_export_keeps_the_dtype(tmp_path):
  """All in bfloat16, norms too, which are float32 in the tree."""
  reference(tmp_path / "a")
  models.save(models.load(str(tmp_path / "a"), dtype="bfloat16"), tmp_path / "b")
  tensors = models.hf.open(tmp_path / "b")[1]
  assert {tensors.read(n).dtype for n in tensors.names()} == {np.dtype("bfloat16")}


def test_a_save_replaces_the_one_before(tmp_path, monkeypatch):
  """Though that had more shards; one that fails leaves it as it was."""
  reference(tmp_path / "a")
  model = models.load(str(tmp_path / "a"), dtype="float32")
  with monkeypatch.context() as patch:
    patch.setattr(models.hf, "SHARD_BYTES", 20_000)
    models.save(model, tmp_path / "b")
  half = models.dataclasses.replace(model, params=jax.tree.map(lambda x: x / 2, model.params))
  before = sorted(p.name for p in (tmp_path / "b").iterdir())
  with monkeypatch.context() as patch:
    patch.setattr(models.hf, "SHARD_BYTES", 20_000)
    patch.setattr(models, "export", lambda model: ((str(n), np.zeros(9000 // (3 - n))) for n in range(4)))
    with pytest.raises(ZeroDivisionError):
      models.save(half, tmp_path / "b")
  assert sorted(p.name for p in (tmp_path / "b").iterdir()) == before
  models.save(half, tmp_path / "b")
  jax.tree.map(np.testing.assert_array_equal, models.load(str(tmp_path / "b"), dtype="float32").params, half.params)
  assert len(list((tmp_path / "b").glob("*.safetensors*"))) == 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_stored_dtype_is_kept(tmp_path, dtype):
  """dtype=None, in both forms; and the forward runs in it."""
  reference(tmp_path / "a")
  models.save(models.load(str(tmp_path / "a"), dtype=dtype), tmp_path / "b")
  model = models.load(str(tmp_path / "b"), dtype=None)
  assert model.config.dtype == dtype
  models.save(model, tmp_path / "c", form="orbax")
  again = models.load(str(tmp_path / "c"), dtype=None)
  assert again.config == model.config
  jax.tree.map(np.testing.assert_array_equal, again.params, model.params)
  exact = models.load(str(tmp_path / "a"), dtype="float32")
  tokens = np.arange(30)[None]
  ours = models.apply(model.config, model.params, tokens)
  assert np.abs(ours - models.apply(exact.config, exact.params, tokens)).max() < 0.1


def test_more_tokens_than_learned_positions_are_refused():
  config = models.dataclasses.replace(CONFIG, position="learned", max_seq_len=8)
  params = transformer.init(config, jax.random.key(0))
  assert models.apply(config, params, np.arange(8)[None]).shape == (1, 8, 50)
  with pytest.raises(errors.UserError, match="9 tokens are more than the 8 positions"):
    models.apply(config, params, np.arange(9)[None])


@pytest.mark.slow
def test_padding_does_not_switch_longrope():
  """18 tokens padded to 32, where long sequences begin at 20: prefill, and a training batch."""
  scaling = dict(rope_type="longrope", short_factor=(1.0, 1.5), long_factor=(3.0, 9.0), factor=4.0)
  scaling |= dict(original_max_position_embeddings=20)
  config = models.dataclasses.replace(CONFIG, rope_scaling=tuple(sorted(scaling.items())))
  params = jax.tree.map(lambda x: 10 * x, transformer.init(config, jax.random.key(0)))
  tokens = np.arange(18)[None]
  padded = np.pad(tokens, [(0, 0), (0, 14)])
  alone = models.apply(config, params, tokens)
  last, _ = decode.prefill(config, params, padded, np.array([18]), 40)
  np.testing.assert_allclose(last, alone[:, -1], atol=1e-4)
  batch = {"tokens": padded, "segment_ids": (np.arange(32) < 18).astype(np.int32)[None]}
  forward = train.Forward(config)
  np.testing.assert_allclose(forward.logits(params, forward(params, batch))[:, :18], alone, atol=1e-4)
  assert np.abs(models.apply(config, params, padded)[:, :18] - alone).max() > 1e-2
