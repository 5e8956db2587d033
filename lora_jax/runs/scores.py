"""What an evaluation finds: metrics of members on a split of their task, and on general text where a config asks."""

import concurrent.futures
import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from lora_jax import models, progress, sharding, tasks
from lora_jax.inference import evaluate, generate
from lora_jax.inference.members import Evaluation, Members
from lora_jax.runs import build
from lora_jax.runs.config import Config
from lora_jax.training import metrics

BACKGROUND = concurrent.futures.ThreadPoolExecutor(1, "compile")
SHOWN = 4  # examples whose texts a report shows


@dataclasses.dataclass(frozen=True)
class Scores:
  """What an evaluation finds of one member.

  Fields:
    values: metrics.
    texts: {"prompt", "expected", "text"} of the first examples, where texts were generated.
  """

  values: Mapping[str, float]
  texts: Sequence[Mapping[str, str]] = ()


@dataclasses.dataclass(frozen=True)
class Subject:
  """Members of one config that are scored together; `model` says how they are run, its parameters do not matter."""

  config: Config
  model: models.Model
  task: tasks.Task
  members: Members
  mesh: jax.sharding.Mesh


def find(subject: Subject, prefix: str, split: str) -> list[Scores]:
  """The scores of each member; `prefix` is what people are told that is evaluated."""
  bar = progress.Progress(len(_examples(subject, split)), f"evaluating {prefix}")
  found = _evaluation(subject, split, lambda done, _: bar.update(done)).run()
  bar.close()
  return found


def compile_ahead(subject: Subject, split: str) -> concurrent.futures.Future:
  """Compiles what `find` runs, while this thread does something else.

  To be waited for before `find` is called, which finds the programs then. If it fails, `find` fails the same way.
  """
  subject = dataclasses.replace(subject, members=subject.members.shapes())

  def work():
    with jax.set_mesh(subject.mesh):
      _evaluation(subject, split, lambda done, total: None).compile()

  return BACKGROUND.submit(work)


def record(out: metrics.Metrics, step: int, prefix: str, found: Scores, **more: float) -> None:
  """Logs `prefix/metric` at `step`, and keeps the texts from before and after training."""
  if prefix != "validation":
    out.keep_texts(prefix, found.texts)
  out.log(step, {**found.values, **more}, prefix)


def said(prefix: str, found: Scores) -> str:
  """The metrics in a line."""
  return f"{prefix}: " + "  ".join(f"{k} {v:.4f}" for k, v in found.values.items())


def _examples(subject: Subject, split: str) -> list[dict]:
  return build.sample(subject.task.load(split), subject.config.eval.examples)


def _evaluation(subject: Subject, split: str, shown: Callable[[int, int], None]) -> Evaluation:
  """What is run, whose result is the `Scores` of each member."""
  settings, model, members = subject.config.eval, subject.model, subject.members
  how = {
    "batch_size": max(settings.batch_size // members.n, 1),
    "seq_len": settings.seq_len,
    "same_length": settings.same_length,
    "place": functools.partial(sharding.replicate, mesh=subject.mesh),
  }
  examples, written = _examples(subject, split), {}
  scored, text = evaluate.outputs, {}
  if model.config.head != "classification":
    scored = evaluate.answers
    search = evaluate.Search(**{f.name: getattr(settings, f.name) for f in dataclasses.fields(evaluate.Search)})
    text = {"max_new_tokens": settings.max_new_tokens, "start": generate.start_id(model), "search": search}
    text["written"] = written.__setitem__
  main = scored(model.config, members, model.tokenizer, subject.task, examples, progress=shown, **how, **text)
  general = _general(subject, how) if settings.general else Evaluation(members, (), lambda: [{}] * members.n)

  def result() -> list[Scores]:
    values = [a | b for a, b in zip(main.result(), general.result(), strict=True)]
    asked = [subject.task.format(e) for e in examples[:SHOWN]] if written else []
    row = lambda f, text: {"prompt": f.prompt, "expected": f.response, "text": text}
    return [Scores(v, list(map(row, asked, written.get(i, ())))) for i, v in enumerate(values)]

  return Evaluation(members, itertools.chain(main.calls, general.calls), result)


def _general(subject: Subject, how: Mapping[str, Any]) -> Evaluation:
  """What members have forgotten: the loss on texts of another task."""
  settings, model = subject.config.eval, subject.model
  task = tasks.get(settings.general)
  texts = [" ".join(task.texts(e)) for e in build.sample(task.load("test"), settings.general_examples)]
  found = evaluate.text_losses(model.config, subject.members, model.tokenizer, texts, **how)
  return Evaluation(subject.members, found.calls, lambda: [{"general_loss": x} for x in found.result()])
