"""Encoder-decoders end to end: batches, loss, scores and adapters, against full forwards, transformers and peft."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

from configs import common
from lora_jax import errors, families, models, tasks, tokenizer as tokenizer_lib, tree
from lora_jax.batches import encoder_decoder
from lora_jax.formats import peft
from lora_jax.inference import evaluate, generate
from lora_jax.model import transformer
from lora_jax.runs import build, config as config_lib, experiment
from lora_jax.training import objectives, train
from tests import terms, test_experiment
from tests.test_usage import as_reported

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
compiled = test_experiment.compiled
WORDS = "a film is was the very good bad positive negative".split()
LABELS = ["negative", "very positive"]
HF_CONFIG = dict(
  model_type="t5",
  architectures=["T5ForConditionalGeneration"],
  is_encoder_decoder=True,
  vocab_size=40,
  d_model=32,
  d_kv=8,
  d_ff=48,
  num_layers=2,
  num_decoder_layers=2,
  num_heads=4,
  feed_forward_proj="gated-gelu",
  relative_attention_num_buckets=8,
  relative_attention_max_distance=20,
  tie_word_embeddings=False,
  decoder_start_token_id=0,
  pad_token_id=0,
  eos_token_id=1,
)
START, END, STEPS = 0, 1, 90
TASK = tasks.get("jsonl", path="x", labels=LABELS)


def unigram():
  """A tokenizer of T5's kind: pieces begin with a mark for the blank, and </s> ends a text."""
  pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *[("\u2581" + w, -2.0) for w in WORDS]]
  pieces += [(c, -9.0) for c in "\u2581abcdefghijklmnop"]
  backend = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=2))
  split = tokenizers.pre_tokenizers
  backend.pre_tokenizer = split.Sequence([split.WhitespaceSplit(), split.Metaspace()])
  backend.decoder = tokenizers.decoders.Metaspace()
  backend.add_special_tokens(["<pad>", "</s>", "<unk>"])
  backend.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", END)])
  return tokenizer_lib.Tokenizer(backend, eos_id=END, pad_id=0)


def rows(n, seed=0):
  """Prompts of 4 to 12 words of which one is good or bad, and what that means."""
  rng = np.random.default_rng(seed)
  for i in range(n):
    words = list(rng.choice(["a", "film", "is", "was", "the"], rng.integers(3, 12)))
    words.insert(rng.integers(len(words)), ["bad", "good"][i % 2])
    yield {"prompt": " ".join(words), "response": LABELS[i % 2]}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
  """A directory with a random `model` and the splits of a task."""
  directory = tmp_path_factory.mktemp("files")
  config = dataclasses.replace(families.get("t5").config(HF_CONFIG), dtype="float32")
  params = jax.jit(transformer.init, static_argnums=0)(config, jax.random.key(0))
  params = tree.map_named(lambda k, x: x if k.endswith("scale") else 6 * x, params)
  models.save(models.Model("tiny", config, params, unigram(), HF_CONFIG), directory / "model")
  for seed, (split, n) in enumerate({"train": 64, "test": 24}.items()):
    (directory / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows(n, seed)))
  return directory


@pytest.fixture(scope="module")
def model(files):
  return models.load(str(files / "model"), dtype="float32")


@pytest.fixture(scope="module")
def reference(files):
  pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  return transformers.T5ForConditionalGeneration.from_pretrained(files / "model", attn_implementation="eager").eval()


def config(files, **values):
  c = common.get_config().to_dict()
  c["model"] = {"name": str(files / "model"), "dtype": "float32"}
  c["method"] |= {"rank": 4, "targets": "q,v", "dropout": 0.1}
  c["task"] = {"name": "jsonl", "labels": LABELS} | {
    k: str(files / f"{s}.jsonl") for k, s in (("path", "train"), ("test_path", "test"))
  }
  c["data"] |= {"batch_size": 16, "seq_len": 16, "eos": True}
  c["optim"] |= {"learning_rate": 1e-2}
  c["train"] |= {"steps": STEPS, "seed": 1, "checkpoint_every": 30, "log_every": 30}
  c["mesh"] = {"data": 2, "fsdp": 1, "tensor": 1}
  c["eval"] = {"examples": 24, "every": 0, "batch_size": 12, "seq_len": 16, "max_new_tokens": 5}
  return test_experiment.changed(c, **values)


@pytest.fixture(scope="module")
def done(files, tmp_path_factory):
  """(directory, summary) of a run."""
  workdir = tmp_path_factory.mktemp("runs") / "done"
  return workdir, experiment.run(config(files), workdir)


def iterator(n=20, **kw):
  kw = dict(start=START, batch_size=4, seq_len=64, eos=True) | kw
  return encoder_decoder.train_iterator(TASK, list(rows(n)), unigram(), **kw)


def torch_batch(batch):
  """What transformers takes for the same batch."""
  torch = pytest.importorskip("torch")
  given = dict(input_ids=batch["inputs"], attention_mask=batch["input_segments"])
  given["labels"] = np.where(batch["weights"] > 0, batch["targets"], -100)
  return {k: torch.tensor(v.astype(np.int64)) for k, v in given.items()}


@pytest.mark.parametrize("seq_len", [4, 7, 64])
def test_texts_are_encoded_as_by_transformers(tmp_path, seq_len):
  """Also without tokenizer_config.json; a long prompt loses its end, but not </s>."""
  transformers = pytest.importorskip("transformers")
  unigram().save(tmp_path / "whole")
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "whole")
  (tmp_path / "bare").mkdir()
  (tmp_path / "bare" / "tokenizer.json").write_text((tmp_path / "whole" / "tokenizer.json").read_text())
  (tmp_path / "bare" / "config.json").write_text(json.dumps(HF_CONFIG))
  ours = tokenizer_lib.from_directory(tmp_path / "bare")
  assert (ours.eos_id, ours.pad_id, ours.bos_id) == (END, 0, None)
  formatted = [TASK.format(e) for e in rows(12)]
  encoded, truncated = encoder_decoder.encode_all(ours, formatted, seq_len, 8, START)
  full = [theirs(f.prompt).input_ids for f in formatted]
  for f, row in zip(formatted, encoded, strict=True):
    assert row["inputs"].tolist() == theirs(f.prompt, truncation=True, max_length=seq_len).input_ids
    assert row["targets"].tolist() == theirs(text_target=f.response).input_ids
    assert row["tokens"].tolist() == [START, *row["targets"][:-1]] and row["weights"].tolist() == [1.0] * len(
      row["targets"]
    )
  assert truncated == sum(len(x) > seq_len for x in full)


def test_long_responses_lose_their_end():
  formatted = [tasks.Formatted("a film", r) for r in ("very good", "good", "very very good </s> bad")]
  tok = unigram()
  very, good = tok.encode("very good")
  encoded, truncated = encoder_decoder.encode_all(tok, formatted, 16, 2, START)
  assert [e["targets"].tolist() for e in encoded] == [[very, good], [good, END], [very, very]] and truncated == 2
  encoded, truncated = encoder_decoder.encode_all(tok, formatted[:2], 16, 9, START, eos=False)
  assert [e["targets"].tolist() for e in encoded] == [[very, good], [good]] and truncated == 0
  assert encoder_decoder.encode_all(tok, formatted[2:], 16, 9, START)[0][0]["targets"].tolist() == [
    *[very, very, good, END],
    *[*tok.encode("bad"), END],
  ]


def test_the_end_is_learned_after_free_text_but_not_after_a_label():
  tok, example = unigram(), {"prompt": "a film", "response": LABELS[0]}
  label = tok.encode(LABELS[0])
  for labels, eos, learned in ((LABELS, None, label), (LABELS, True, [*label, END]), (None, None, [*label, END])):
    task = tasks.get("jsonl", path="x", labels=labels)
    batch = next(encoder_decoder.train_iterator(task, [example], tok, start=START, batch_size=1, seq_len=16, eos=eos))
    assert batch["targets"][batch["weights"] > 0].tolist() == learned


def test_a_conversation():
  tok = dataclasses.replace(unigram(), chat_template=test_experiment.CHAT)
  turns = [("user", "a film"), ("assistant", "good"), ("user", "bad film"), ("assistant", "negative")]
  chat = tasks.Chat(tuple({"role": r, "content": c} for r, c in turns))
  asked = tok.chat(chat.messages[:-1], add_generation_prompt=True)
  assert encoder_decoder.texts(tok, chat) == (asked, "negative</s>")
  (row,), _ = encoder_decoder.encode_all(tok, [chat], 64, 8, START)
  assert row["targets"].tolist() == [*tok.encode("negative"), END] and row["inputs"].tolist() == [
    *tok.encode(asked),
    END,
  ]
  half = dataclasses.replace(chat, messages=(*chat.messages[:-1], chat.messages[-1] | {"weight": 0.5}))
  (row,), _ = encoder_decoder.encode_all(tok, [half], 64, 8, START)
  assert row["weights"].tolist() == [0.5] * len(row["targets"])
  task = dataclasses.replace(TASK, format=lambda e: chat)
  (batch,) = encoder_decoder.eval_batches(task, [{}], tok, batch_size=1, seq_len=64)
  labels = [ids[:n].tolist() for ids, n in zip(batch["labels"][0], batch["label_lengths"][0], strict=True)]
  assert labels == [tok.encode(label) for label in LABELS], "texts of their own, without an end"
  with pytest.raises(errors.UserError, match="no chat template"):
    encoder_decoder.texts(unigram(), chat)


def test_batches():
  it = iterator(seq_len=100, target_len=30)
  seen = []
  for _ in range(5):
    batch = next(it)
    assert batch["inputs"].shape == (4, 32) and batch["tokens"].shape == (4, encoder_decoder.LEAST)
    names = {"inputs", "input_segments", "tokens", "targets", "weights", "segment_ids", "positions"}
    assert batch.keys() == names and all(v.dtype == np.int32 for k, v in batch.items() if k != "weights")
    for i in range(4):
      n, m = batch["input_segments"][i].sum(), int(batch["weights"][i].sum())
      assert batch["inputs"][i, n - 1] == END and (batch["inputs"][i, n:] == 0).all()
      assert batch["tokens"][i, 0] == START and (batch["tokens"][i, 1:m] == batch["targets"][i, : m - 1]).all()
      assert batch["targets"][i, m - 1] == END and (batch["targets"][i, m:] == 0).all()
      seen.append(tuple(batch["inputs"][i, : n - 1]))
  want = [tuple(unigram().encode(r["prompt"])) for r in rows(20)]
  assert sorted(seen) == sorted(want)
  assert next(iterator(seq_len=9))["inputs"].shape == (4, 9)


def test_shares_and_state():
  whole, shares = iterator(), [iterator(process_index=i, process_count=2) for i in range(2)]
  for step in range(7):
    if step == 3:
      state = json.loads(json.dumps(whole.get_state()))
    batch, parts = next(whole), [next(s) for s in shares]
    jax.tree.map(lambda x, *p: np.testing.assert_array_equal(x, np.concatenate(p)), batch, *parts)
  again = iterator()
  again.set_state(state)
  for _ in range(4):
    last = next(again)
  jax.tree.map(np.testing.assert_array_equal, last, batch)


def loss_of(model, batch):
  sums = jax.jit(functools.partial(terms.sums, train.Forward(model.config)))(model.params, batch)
  return float(sums[0] / sums[1]), float(sums[2]["accuracy"] / sums[1])


@pytest.mark.slow
def test_loss_equals_transformers(model, reference):
  torch = pytest.importorskip("torch")
  batch = next(iterator(batch_size=8))
  assert len(set(batch["input_segments"].sum(1))) > 2 and len(set(batch["weights"].sum(1))) == 2
  given = torch_batch(batch)
  with torch.no_grad():
    theirs = reference(**given)
  assert loss_of(model, batch)[0] == pytest.approx(theirs.loss.item(), rel=1e-5)
  hit = (theirs.logits.argmax(-1) == given["labels"])[given["labels"] >= 0].float().mean().item()
  assert loss_of(model, batch)[1] == pytest.approx(hit)


@pytest.mark.slow
def test_padding_changes_nothing(model):
  """More of it, other tokens in it, and none."""
  batch = next(iterator(batch_size=2))
  padded = {k: np.pad(v, [(0, 0), (0, 5 if k.startswith("input") else 3)]) for k, v in batch.items()}
  padded["inputs"] = np.where(padded["input_segments"] > 0, padded["inputs"], 7)
  padded["tokens"] = np.where(padded["segment_ids"] > 0, padded["tokens"], 7)
  n, m = (int(batch[k][0].sum()) for k in ("input_segments", "segment_ids"))
  one = {k: v[:1, : n if k.startswith("input") else m] for k, v in batch.items()}
  run = jax.jit(train.Forward(model.config).__call__)
  want, got, single = (run(model.params, b) for b in (batch, padded, one))
  real = batch["weights"] > 0
  np.testing.assert_allclose(got[:, : real.shape[1]][real], want[real], atol=1e-5)
  np.testing.assert_allclose(single[0], want[0, :m], atol=1e-5)


def test_a_step_counts_tokens_of_encoder_and_decoder(model):
  optax = pytest.importorskip("optax")
  trainable, frozen = tree.split(model.params, tree.map_named(lambda k, x: k == "norm/scale", model.params))
  trainable = jax.tree.map(jnp.copy, trainable)
  forward, optimiser = train.Forward(model.config), optax.sgd(0.1)
  step = train.make_step(
    forward, objectives.make("causal_lm").loss, optimiser, optax.constant_schedule(0.1), accumulate=2
  )
  run, batch = train.Stepper(step, state := train.init_state(trainable, optimiser)), next(iterator())
  state, values = run(state, frozen, None, batch)
  assert values["tokens"] == batch["input_segments"].sum() + batch["segment_ids"].sum()
  longer = {k: np.pad(v, [(0, 0), (0, 8 if k.startswith("input") else 0)]) for k, v in batch.items()}
  _, again = run(state, frozen, None, longer)  # another program, for another length of the prompts alone
  assert again["tokens"] == values["tokens"] and again["loss"] < values["loss"]


def test_scores_equal_full_forwards(model, reference):
  """Label log-likelihoods, and greedy texts as of transformers; padding of prompts and labels does not matter."""
  torch = pytest.importorskip("torch")
  (batch,) = encoder_decoder.eval_batches(TASK, list(rows(2)), model.tokenizer, batch_size=3, seq_len=32)
  labels = np.array([[[8, 9, 10], [6, 0, 0], [9, 5, 0]]] * 3, np.int32)
  label_lengths = np.array([[3, 1, 2]] * 3)
  tokens, lengths = batch["tokens"], batch["lengths"]
  args = labels, label_lengths, 6, (END,), START
  ll, new = evaluate.score(model.config, model.params, tokens, lengths, *args)
  encode, run = (jax.jit(f, static_argnums=0) for f in (transformer.encode, transformer.apply))
  for i, n in enumerate(lengths[:2]):
    encoded = encode(model.config, model.params, tokens[i : i + 1, :n])
    for j, u in enumerate(label_lengths[i]):
      ids = np.array([[START, *labels[i, j, :-1]]])
      table = jax.nn.log_softmax(run(model.config, model.params, ids, encoded=encoded)[0])
      assert ll[i, j] == pytest.approx(sum(float(table[t, labels[i, j, t]]) for t in range(u)), abs=1e-4)
    ids = torch.tensor(tokens[i : i + 1, :n].astype(np.int64))
    with torch.no_grad():
      theirs = reference.generate(ids, max_new_tokens=6, do_sample=False)[0, 1:].tolist()
    assert generate.until_end(new[i], (END,)) == generate.until_end(np.array(theirs), (END,))
  junk = np.where(np.arange(tokens.shape[1]) < lengths[:, None], tokens, 7)
  filled = np.where(np.arange(3) < label_lengths[..., None], labels, 7)
  again = evaluate.score(model.config, model.params, junk, lengths, filled, *args[1:])
  np.testing.assert_array_equal(again[0], ll)
  np.testing.assert_array_equal(again[1], new)


@pytest.mark.slow
def test_an_evaluation_reads_what_generate_writes(model):
  examples, texts, predicted = list(rows(6)), {}, []
  spy = dict(
    score=lambda e, text: texts.update({e["prompt"]: text}) or {"n": 1.0},
    metrics=lambda predictions, references: predicted.extend(predictions) or {},
  )
  how = dict(batch_size=4, seq_len=32, max_new_tokens=6, start=START)
  task = dataclasses.replace(TASK, **spy)
  assert evaluate.run(model.config, model.params, model.tokenizer, task, examples, **how) == {"n": 1.0}
  prompts = [e["prompt"] for e in examples]
  want = generate.generate(model, prompts, max_new_tokens=6)
  assert [texts[p] for p in prompts] == want and len(set(want)) > 2
  encoded, _ = encoder_decoder.encode_all(
    model.tokenizer, [tasks.Formatted(p, label) for p in prompts for label in LABELS], 32, 8, START, eos=False
  )
  batch = encoder_decoder._fit(encoded, slice(None), 32, 0, 8)
  forward = train.Forward(model.config)
  logits = jax.jit(lambda p: transformer.logits(model.config, p, forward(p, batch)))(model.params)
  lp = jnp.take_along_axis(jax.nn.log_softmax(logits), batch["targets"][..., None], axis=-1)[..., 0]
  assert predicted == (lp * batch["weights"]).sum(1).reshape(6, 2).argmax(1).tolist()


def adapter_equals_peft(model, adapted, directory):
  """The loaded adapter moves our logits, to what peft has."""
  torch, batch = pytest.importorskip("torch"), next(iterator())
  with torch.no_grad():
    theirs = adapted(**torch_batch(batch)).logits.numpy()
  forward = train.Forward(model.config)
  logits = jax.jit(lambda p: transformer.logits(model.config, p, forward(p, batch)))
  ours, plain = logits(peft.load(model, directory)), logits(model.params)
  real = batch["weights"] > 0  # what follows </s> differs: it is padding here, and </s> in transformers
  np.testing.assert_allclose(ours[real], theirs[real], atol=1e-4)
  assert jnp.abs(ours - plain)[real].max() > 0.01


@pytest.mark.slow
def test_a_run_learns(done):
  _, summary = done
  assert summary["eval"]["before"]["accuracy"] < 0.8
  assert summary["eval"]["after"] == {"accuracy": 1.0, "exact_match": 1.0}
  # q and v of the encoder, of the decoder, and of the decoder on the encoder; two layers, rank 4.
  assert summary["trainable_params"] == 3 * 2 * 2 * 4 * (32 + 32)


@pytest.mark.slow
def test_the_adapter_of_a_run_is_peft_s(done, model):
  """Loaded by the code in its report."""
  pytest.importorskip("peft")
  adapter = done[0] / "adapter"
  saved = json.loads((adapter / "adapter_config.json").read_text())
  assert (saved["task_type"], saved["target_modules"]) == ("SEQ_2_SEQ_LM", ["q", "v"])
  adapter_equals_peft(model, as_reported(done[0]).eval(), adapter)


def test_an_adapter_of_peft(model, reference, tmp_path):
  torch, hf_peft = pytest.importorskip("torch"), pytest.importorskip("peft")
  torch.manual_seed(0)
  lora = hf_peft.LoraConfig(task_type="SEQ_2_SEQ_LM", r=3, target_modules=["q", "v"], init_lora_weights=False)
  adapted = hf_peft.get_peft_model(reference, lora)
  adapted.save_pretrained(tmp_path)
  adapter_equals_peft(model, adapted.eval(), tmp_path)
  adapted.unload()


@pytest.mark.slow
def test_an_interrupted_run_ends_bit_identical(files, done, tmp_path, monkeypatch):
  undo = test_experiment.interrupt(monkeypatch, train.Stepper, "__call__", STEPS - 10)
  with pytest.raises(KeyboardInterrupt):
    experiment.run(config(files), tmp_path / "cut")
  undo()
  experiment.run(config(files), tmp_path / "cut")
  test_experiment.assert_same_run(tmp_path / "cut", done[0])


@pytest.mark.parametrize(
  "values, message",
  [
    (dict(data__pack=True), r"config\.data\.pack=True.*set it to False"),
    (dict(data__target_len=0), r"config\.data\.target_len=0"),
    (dict(data__target_lenn=9), r"config\.data\.target_lenn.*'target_len'"),
    (dict(data__start=1), r"config\.data\.start"),
    (dict(data__seq_len=1), r"seq_len=1 has no room"),
    (dict(data__share_rows=True), r"config\.data\.share_rows=True.*set it to False"),
    (
      dict(objective={"name": "classification"}, data__pack=..., data__share_rows=..., data__eos=...),
      "head of a t5 model 'classification'",
    ),
  ],
)
def test_bad_settings_are_refused(files, tmp_path, values, message):
  with pytest.raises(errors.UserError, match=message):
    experiment.run(config(files, **values), tmp_path / "run")
  assert not (tmp_path / "run").exists()


def test_target_len_is_of_encoder_decoders_alone():
  decoder = dataclasses.replace(families.get("llama").config(test_experiment.HF_CONFIG))
  settings = config_lib.resolve(
    {
      "model": {"name": "x"},
      "method": {"name": "lora"},
      "task": {"name": "rotten_tomatoes"},
      "data": {"batch_size": 2, "seq_len": 8, "target_len": 4},
      "train": {"steps": 1},
    }
  )
  with pytest.raises(errors.UserError, match=r"config\.data\.target_len"):
    build.batches(settings, models.Model("x", decoder, {}, unigram(), {}), TASK, examples=[])


def test_what_prompts_count_is_of_decoders_alone(model):
  asked = objectives.make("causal_lm", prompt_loss_weight=0.1)
  with pytest.raises(
    errors.UserError, match="config.objective.prompt_loss_weight: an encoder-decoder does not predict"
  ):
    asked.batches(model.config, TASK)


def test_what_begins_a_text(model):
  assert generate.start_id(model) == START
  own = dataclasses.replace(model, generation={"decoder_start_token_id": 5})
  assert generate.start_id(own) == 5
  nothing = {k: v for k, v in HF_CONFIG.items() if not k.endswith("token_id")}
  with pytest.raises(errors.UserError, match="decoder_start_token_id"):
    generate.start_id(dataclasses.replace(model, hf_config=nothing, generation={}))
