"""Training that starts from an adapter: it computes what the adapter does, alone and in a population."""

import copy
import dataclasses
import json

import jax
import numpy as np
import pytest

from lora_jax import errors, families, methods, models, sharding, tasks, tree
from lora_jax.formats import adapter
from lora_jax.model import prompts, transformer
from lora_jax.runs import build, config as config_lib, experiment, sweep, variants, warm_start
from lora_jax.training import train
from tests.test_experiment import compiled, config, files  # noqa: F401, fixtures

pytestmark = pytest.mark.filterwarnings("ignore:The default value of")

METHODS = {
  "lora": {"rank": 3, "alpha": 6.0, "targets": "q,v"},
  "lora_fa": {"rank": 2},
  "dora": {"rank": 2, "targets": "o"},
  "vera": {"rank": 4, "targets": "q,v"},
  "bitfit": {},
  "houlsby": {"size": 4},
  "prompt_tuning": {"length": 3},
}
METHOD = {"name": "lora", "rank": 2, "targets": "q,v"}
ROBERTA = dict(
  model_type="roberta",
  vocab_size=60,
  hidden_size=16,
  intermediate_size=24,
  num_hidden_layers=2,
  num_attention_heads=2,
  max_position_embeddings=40,
  type_vocab_size=1,
)
TOKENS = np.arange(24, dtype=np.int32).reshape(2, 12) + 60


def labelled(files, config, n):  # noqa: F811
  """The config of a classifier with n labels."""
  c = copy.deepcopy(config)
  labels = [f" {x}" for x in "abcdef"[:n]]
  for split in ("train", "validation", "test"):
    rows = [{"prompt": f"{i} of {split} {labels[i % n] * 3}", "response": labels[i % n]} for i in range(16)]
    path = files / f"{split}_{n}.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    c["task"]["path" if split == "train" else f"{split}_path"] = str(path)
  c["task"]["labels"] = labels
  c["objective"] = {"name": "classification"}
  c["data"] = {"batch_size": 8, "seq_len": 32}
  c["eval"] = {"examples": 8, "batch_size": 8, "seq_len": 32}
  c["train"] |= {"steps": 2, "checkpoint_every": 2}
  return c


def adapted(config):  # noqa: F811
  """(model, params, mask, method) of a config."""
  config = config_lib.resolve(config)
  task = tasks.get(**config.task)
  model = build.load(config, task, sharding.make_mesh(1))
  return model, *build.adapt(config, task, model)[:2], config.method


def moved(params, mask):
  """The tree with other values of what is trained."""
  shift = lambda k, x, m: x + 0.1 * jax.random.normal(tree.fold(jax.random.key(7), k), x.shape) if m else x
  return tree.map_named(shift, params, mask)


def write(config, directory):  # noqa: F811
  """An adapter of a config with random values; the states before the head that it gives."""
  model, params, mask, method = adapted(config)
  params = moved(params, mask)
  adapter.save(model, params, mask, method, directory)
  return states(model, params)


def states(model, params):
  """Before the head, of TOKENS."""
  soft = prompts.of(params)
  tokens = np.stack([prompts.insert(soft, row, False) for row in TOKENS])
  T = tokens.shape[1]
  row = np.arange(T, dtype=np.int32)[None].repeat(2, 0)
  batch = {"tokens": tokens, "positions": row, "segment_ids": np.ones_like(row), "lengths": np.full(2, T, np.int32)}
  return np.asarray(train.Forward(model.config)(params, batch | {"token_types": np.zeros_like(row)}))


@pytest.mark.parametrize("name", METHODS)
def test_it_starts_as_the_adapter_of_another_task(files, config, tmp_path, name):  # noqa: F811
  method = {"name": name, **METHODS[name]}
  first = labelled(files, config, 3) | {"method": method}
  want = write(first, tmp_path / "a")
  second = labelled(files, config, 2) | {"method": method}
  second["train"] = second["train"] | {"seed": 5, "init_from": str(tmp_path / "a")}
  model, params, mask, _ = adapted(second)
  np.testing.assert_allclose(states(model, params), want, rtol=1e-4, atol=1e-5)
  second["train"]["init_from"] = ""
  _, new, _, _ = adapted(second)
  assert np.abs(states(model, new) - want).max() > 1e-3
  flat, fresh = tree.flatten(params), tree.flatten(new)
  assert jax.tree.structure(params) == jax.tree.structure(new)
  assert {k: (x.shape, x.dtype) for k, x in flat.items()} == {k: (x.shape, x.dtype) for k, x in fresh.items()}
  np.testing.assert_array_equal(flat["classifier/kernel"], fresh["classifier/kernel"])


@pytest.mark.parametrize("outputs", [1, 2, 3])
def test_the_head_of_an_encoder_comes_whole_or_not(tmp_path, outputs):
  """RoBERTa's has a dense layer, whose shape is the same for all numbers of labels: MNLI's is of no use to STS-B."""

  def made(n, seed):
    c = dataclasses.replace(families.get("roberta").config(ROBERTA), dtype="float32", head="classification", n_labels=n)
    model = models.Model("tiny", c, transformer.init(c, jax.random.key(seed)), None, ROBERTA)
    params, mask = methods.init(jax.random.key(seed), model.params, METHOD)
    return model, *methods.train_also(params, mask, model.head_leaves)

  model, params, mask = made(3, 0)
  adapter.save(model, theirs := moved(params, mask), mask, METHOD, tmp_path)
  model, params, mask = made(outputs, 1)
  assert model.head_leaves == ("pooler/kernel", "pooler/bias", "classifier/kernel", "classifier/bias")
  found = tree.flatten(warm_start.start(model, params, mask, tmp_path))
  for k, trained in tree.flatten(mask).items():
    takes = trained and (outputs == 3 or k not in model.head_leaves)
    np.testing.assert_allclose(found[k], tree.flatten(theirs if takes else params)[k], rtol=1e-6, err_msg=k)


def test_a_head_of_the_same_shape_comes_along(files, config, tmp_path):  # noqa: F811
  c = labelled(files, config, 2)
  write(c, tmp_path / "a")
  model, params, mask, _ = adapted(c)
  c["train"]["init_from"] = str(tmp_path / "a")
  found = adapted(c)[1]
  want = moved(params, mask)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-6), found, want)


def test_matrices_that_the_adapter_lacks_start_new(files, config, tmp_path):  # noqa: F811
  want = write(config, tmp_path / "a")
  c = copy.deepcopy(config)
  c["method"]["targets"] = "q,k,v,o"
  c["train"]["init_from"] = str(tmp_path / "a")
  model, params, _, _ = adapted(c)
  np.testing.assert_allclose(states(model, params), want, rtol=1e-4, atol=1e-5)


def test_an_adapter_of_a_language_model_starts_a_classifier(files, config, tmp_path):  # noqa: F811
  want = write(config, tmp_path / "a")
  c = labelled(files, config, 2)
  c["train"]["init_from"] = str(tmp_path / "a")
  model, params, _, _ = adapted(c)
  np.testing.assert_allclose(states(model, params), want, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_an_adapter_of_peft(files, config, tmp_path):  # noqa: F811
  """Written by the library itself, with a head of three labels."""
  torch, peft, transformers = map(pytest.importorskip, ("torch", "peft", "transformers"))
  torch.manual_seed(0)
  base = transformers.AutoModelForSequenceClassification.from_pretrained(files / "model", num_labels=3)
  how = dict(r=3, lora_alpha=6, target_modules=["q_proj", "v_proj"], task_type="SEQ_CLS", init_lora_weights=False)
  theirs = peft.get_peft_model(base, peft.LoraConfig(**how)).eval()
  theirs.save_pretrained(tmp_path / "a")
  c = labelled(files, config, 2) | {"method": {"name": "lora", **METHODS["lora"]}}
  c["train"]["init_from"] = str(tmp_path / "a")
  model, params, _, _ = adapted(c)
  with torch.no_grad():
    want = theirs.base_model.model.model(torch.from_numpy(TOKENS).long()).last_hidden_state.numpy()
  np.testing.assert_allclose(states(model, params), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
  "method, message",
  [
    ({"rank": 2}, r"q/kernel/a is \(2, 32, 4\), here \(2, 32, 2\)"),
    ({"alpha": 3.0}, r"scale is \[4.0\], here \[0.75\]"),
    ({"targets": "q"}, r"layers/attn/v/kernel/a, which is not trained here"),
    ({"name": "ia3"}, "which is not trained here"),
    ({"name": "dora", "rank": 4, "targets": "q,v"}, "must be that of the adapter"),
  ],
)
def test_other_methods_are_refused(files, config, tmp_path, method, message):  # noqa: F811
  write(config, tmp_path / "a")
  c = copy.deepcopy(config)
  c["method"] = method if "name" in method else c["method"] | method
  c["train"]["init_from"] = str(tmp_path / "a")
  with pytest.raises(errors.UserError, match=message):
    adapted(c)


def test_what_is_no_adapter_or_has_none_is_refused(files, config, tmp_path):  # noqa: F811
  c = copy.deepcopy(config)
  c["train"]["init_from"] = str(tmp_path / "none")
  with pytest.raises(errors.UserError, match=r"init_from='.*none': no adapter_config\.json"):
    adapted(c)
  model = adapted(labelled(files, config, 3))[0]
  head = tree.map_named(lambda k, _: k in model.head_leaves, model.params)
  adapter.save(model, model.params, head, {"name": "full"}, tmp_path)
  second = labelled(files, config, 2)
  second["train"]["init_from"] = str(tmp_path)
  with pytest.raises(errors.UserError, match="nothing that is trained here"):
    adapted(second)


@pytest.mark.slow
def test_members_are_runs_of_their_own(files, config, tmp_path):  # noqa: F811
  """One program, two seeds, one of two adapters each."""
  for i in range(2):
    c = labelled(files, config, 3)
    c["train"]["seed"] = i
    write(c, tmp_path / f"a{i}")
  c = labelled(files, config, 2)
  del c["method"]["dropout"]
  c["sweep"] = {
    "list": {n: {"train": {"seed": i, "init_from": str(tmp_path / f"a{i % 2}")}} for i, n in enumerate("xyz")}
  }
  summary = sweep.run(c, tmp_path / "s")
  assert summary["groups"] == [["x", "y", "z"]]
  for name, (_, own) in variants.members(c).items():
    alone = experiment.run(own, tmp_path / name)
    (m,) = [m for m in summary["members"] if m["name"] == name]
    for k in ("loss_first", "loss_last"):
      assert m["train"][k] == pytest.approx(alone["train"][k], rel=1e-5)
