"""A classifier on an encoder and on a decoder: trained by LoRA or alone, loaded by transformers and peft."""

import json

import jax
import numpy as np
import pytest
import tokenizers

from configs import common
from lora_jax import errors, models, tasks, tokenizer, tree
from lora_jax.batches import classification
from lora_jax.formats import peft
from lora_jax.model import transformer
from lora_jax.runs import experiment
from tests.test_usage import as_reported

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
WORDS = "a film good bad is was the not very great awful".split()
BERT = dict(
  model_type="bert",
  architectures=["BertForMaskedLM"],
  vocab_size=32,
  hidden_size=32,
  intermediate_size=48,
  num_hidden_layers=2,
  num_attention_heads=4,
  max_position_embeddings=40,
)
LLAMA = BERT | dict(model_type="llama", architectures=["LlamaForCausalLM"], num_key_value_heads=2, pad_token_id=0)
LABELS = [" negative", " positive"]


def word_tokenizer():
  """[CLS] a [SEP] b [SEP] over a few words."""
  special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
  backend = tokenizers.Tokenizer(
    tokenizers.models.WordLevel({w: i for i, w in enumerate(special + WORDS)}, unk_token="[UNK]")
  )
  backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  backend.add_special_tokens(special)
  backend.post_processor = tokenizers.processors.TemplateProcessing(
    single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
  )
  return tokenizer.Tokenizer(backend, pad_id=0)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
  """A directory with the models `bert` and `llama` and the splits of a task that a bag of words solves."""
  directory = tmp_path_factory.mktemp("files")
  for name, hf_config in {"bert": BERT, "llama": LLAMA}.items():
    family = models.families.get(name)
    config = models.dataclasses.replace(family.config(hf_config), dtype="float32")
    params = tree.map_named(
      lambda k, x: x if k.endswith(("scale", "bias")) else 10 * x, transformer.init(config, jax.random.key(0))
    )
    models.save(models.Model(name, config, params, word_tokenizer(), hf_config), directory / name)
  rng = np.random.default_rng(0)
  for split, n in {"train": 64, "test": 24}.items():
    rows = []
    for i in range(n):
      words = list(rng.choice(["a", "film", "is", "was", "the", "very"], rng.integers(3, 9)))
      words.insert(rng.integers(len(words)), ["bad", "good"][i % 2])
      rows.append({"prompt": " ".join(words), "response": LABELS[i % 2]})
    (directory / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
  return directory


def config(files, model="bert", **method):
  config = common.get_config().to_dict()
  config["model"] = {"name": str(files / model), "dtype": "float32"}
  config["method"] = {"name": "lora", "rank": 4, "targets": "all-linear"} | method
  config["task"] = {
    "name": "jsonl",
    "path": str(files / "train.jsonl"),
    "test_path": str(files / "test.jsonl"),
    "labels": LABELS,
  }
  config["objective"] = {"name": "classification"}
  config["data"] = {"batch_size": 16, "seq_len": 16}
  config["optim"] |= {"learning_rate": 3e-3}
  config["train"] |= {"steps": 80, "log_every": 20}
  config["eval"] |= {"examples": 24, "batch_size": 8, "seq_len": 16}
  config["mesh"]["data"] = 2
  return config


@pytest.mark.slow
@pytest.mark.parametrize("model", ["bert", "llama"])
def test_lora_and_a_classifier(files, tmp_path, model):
  """Trained together, and loaded by peft, as the report says, with the same outputs."""
  torch = pytest.importorskip("torch")
  pytest.importorskip("transformers"), pytest.importorskip("peft")
  summary = experiment.run(config(files, model), tmp_path)
  assert summary["eval"]["after"]["accuracy"] == 1.0
  base = models.load(str(files / model), dtype="float32", head="classification", n_labels=2)
  assert any(k.startswith("classifier/") for k in base.fresh)
  params = peft.load(base, tmp_path / "adapter")
  saved = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
  assert saved["task_type"] == "SEQ_CLS" and saved["modules_to_save"]
  tokens = np.array([[2, 6, 9, 7, 3]])
  x = transformer.hidden(base.config, params, tokens)[0]
  ours = transformer.classify(base.config, params, x)
  torch.manual_seed(0)
  adapted = as_reported(tmp_path).eval()
  with torch.no_grad():
    theirs = adapted(torch.tensor(tokens)).logits.numpy()
  if model == "bert":  # its pooler is fresh in both, and ours is saved
    assert "pooler.dense" in saved["modules_to_save"]
  np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_a_classifier_beside_a_frozen_encoder(files, tmp_path):
  """Nothing else changes; the whole model is written for transformers."""
  torch = pytest.importorskip("torch")
  pytest.importorskip("transformers")
  settings = config(files)
  settings["method"] = {"name": "full", "targets": "classifier/"}
  experiment.run(settings, tmp_path)
  before = tree.flatten(models.load(str(files / "bert"), dtype="float32", head="classification").params)
  after = models.load(str(tmp_path / "model"), dtype="float32")
  changed = {k for k, x in tree.flatten(after.params).items() if not np.array_equal(x, before[k])}
  assert changed == {"classifier/kernel", "classifier/bias", "pooler/kernel", "pooler/bias"} and not after.fresh
  ref = as_reported(tmp_path).eval()
  tokens = np.array([[2, 6, 9, 7, 3]])
  with torch.no_grad():
    theirs = ref(torch.tensor(tokens)).logits.numpy()
  x = transformer.hidden(after.config, after.params, tokens)[0]
  np.testing.assert_allclose(transformer.classify(after.config, after.params, x), theirs, atol=1e-5)


@pytest.mark.slow
def test_padding_does_not_change_a_classification(files):
  model = models.load(str(files / "bert"), dtype="float32", head="classification")
  task = tasks.get(**config(files)["task"])
  batch = classification.eval_batches(task, list(task.load("test")), model.tokenizer, batch_size=8, seq_len=16)[0]
  run = experiment.train.Forward(model.config).classify
  together = run(model.params, batch)
  for row, n in enumerate(batch["lengths"]):
    one = {k: v[row : row + 1, :n] if v.ndim == 2 else v[row : row + 1] for k, v in batch.items()}
    np.testing.assert_allclose(run(model.params, one)[0], together[row], atol=1e-5)


@pytest.mark.parametrize(
  "change, message",
  [
    (dict(objective={"name": "causal_lm"}), "does not train a model with the head 'mlm'"),
    (dict(task={"name": "jsonl"}), "labels"),
    (dict(data={"batch_size": 16, "seq_len": 16, "pack": True}), "pack"),
    (dict(model={"head": "clasification"}), "did you mean 'classification'"),
  ],
)
def test_bad_settings_are_refused(files, tmp_path, change, message):
  settings = config(files)
  for k, v in change.items():
    settings[k] = (settings[k] | v) if k == "model" else v
  if "task" in change:
    settings["task"]["path"] = str(files / "train.jsonl")
  with pytest.raises(errors.UserError, match=message):
    experiment.run(settings, tmp_path)
