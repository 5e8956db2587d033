"""One experiment: a config in, the artifacts of its directory out.

The directory holds config.json, metrics.jsonl, summary.json, report.md, plots/, tensorboard/, checkpoints/ (orbax) and
adapter/ (PEFT) or model/ (Hugging Face), and where texts are generated texts.json. The same call again goes on from the
last checkpoint.
"""

import concurrent.futures
import dataclasses
import functools
import math
import os
import pathlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from lora_jax import errors, memory, methods, models, progress, sharding, tasks, tree, weights
from lora_jax.batches import causal, classification, encoder_decoder, iterator
from lora_jax.formats import adapter, checkpoint, hf
from lora_jax.inference import evaluate, generate
from lora_jax.model import architecture, prompts
from lora_jax.results import report, usage
from lora_jax.runs import config as config_lib, warm_start, workdir as workdir_lib
from lora_jax.runs.config import Config
from lora_jax.training import metrics, objectives, optim, step_log, train

BACKGROUND = concurrent.futures.ThreadPoolExecutor(1, "compile")
SHOWN = 4  # examples whose texts a report shows


@dataclasses.dataclass(frozen=True)
class Scores:
  """What an evaluation finds.

  Fields:
    values: metrics.
    texts: {"prompt", "expected", "text"} of the first examples, where texts were generated.
  """

  values: Mapping[str, float]
  texts: Sequence[Mapping[str, str]] = ()


@dataclasses.dataclass
class Experiment:
  """A config made real: everything that a run needs, nothing written yet."""

  config: Config
  mesh: jax.sharding.Mesh
  model: models.Model
  task: tasks.Task
  state: train.State
  frozen: Any
  step: Callable
  batches: Any
  mask: Any
  between: list

  @property
  def params(self) -> Any:
    """The whole tree, trainable and frozen."""
    return self.state.params(self.frozen)


def build(config: Mapping | Config, model: models.Model | None = None) -> Experiment:
  """Loads model and data and applies the method; UserError for whatever the config has wrong.

  Args:
    model: what `load` gave for this config, to share one base between runs; it is left as it is.
  """
  config = config_lib.resolve(config)
  task, mesh = check(config), make_mesh(config)
  model, state, frozen, mask, optimiser, rate = _adapted(config, task, mesh, model)
  step = train.make_step(
    *computes(config, model.config),
    optimiser,
    rate,
    seed=config.train.seed,
    accumulate=config.train.accumulate,
    penalty=methods.penalty(config.method),
  )
  examples = batches(config, model, task, prompts.of(state.params(frozen)))
  model = dataclasses.replace(model, params=None)  # the state and the frozen tree own the arrays now
  placement = jax.tree.map(lambda x: x.sharding, state)
  compiled = functools.partial(jax.jit, donate_argnums=1, out_shardings=placement)
  between = [(period, compiled(fn)) for period, fn in methods.between(config.method)]
  return Experiment(config, mesh, model, task, state, frozen, train.Stepper(step, state), examples, mask, between)


def make_mesh(config: Config) -> jax.sharding.Mesh:
  """The mesh of a config."""
  return sharding.make_mesh(**dataclasses.asdict(config.mesh))


def check(config: Mapping | Config) -> tasks.Task:
  """The task of a config, with its data; UserError for whatever can be wrong before the model is loaded."""
  config = config_lib.resolve(config)
  scored, mesh = ("test", "validation") if config.eval.every else ("test",), make_mesh(config)
  rows = sharding.batch_divisor(mesh) * config.train.accumulate
  if config.data.batch_size % rows:
    raise errors.UserError(
      f"config.data.batch_size={config.data.batch_size} is no multiple of {rows} (data * fsdp * accumulate)"
    )
  _check_processes(mesh)
  task = tasks.get(**config.task)
  classifies = config.objective["name"] == "classification"
  if classifies and not task.n_outputs:
    how = "; config.task.labels lists them, or is 'all'" if "labels" in config.task else ""
    raise errors.UserError(
      f"task {task.name!r} has no labels or numbers for config.objective.name='classification'{how}"
    )
  for split in ("train", *scored):
    task.load(split)  # what is wrong with them is said now, not after training
  return task


def _check_processes(mesh: jax.sharding.Mesh) -> None:
  """Raises UserError where processes would not read rows of their own: each reads its share of a batch."""
  n, rows = jax.process_count(), sharding.batch_divisor(mesh)
  if rows % n:
    raise errors.UserError(f"config.mesh: data * fsdp is {rows}, no multiple of the {n} processes that share the rows")
  if n > 1 and mesh.shape["population"] > 1:
    raise errors.UserError(
      f"config.mesh.population={mesh.shape['population']}: members are spread over the devices of one process; start "
      "processes by themselves, each with its --shard i/n"
    )


def computes(config: Config, arch: architecture.Config, members: int = 1) -> tuple[Callable, Callable]:
  """(forward, objective) of a config, for `train.make_step`.

  Args:
    members: how many are trained together; the logits of a chunk are those of all.
  """
  own = {k: v for k, v in config.objective.items() if k not in ("name", "prompt_loss_weight")}
  if "chunk" in own:
    own["chunk"] = max(own["chunk"] // members, 1)
  packed = config.data.pack or config.data.share_rows
  return train.Forward(arch, packed), functools.partial(objectives.OBJECTIVES[config.objective["name"]], **own)


def batches(
  config: Config, model: models.Model, task: tasks.Task, soft: prompts.Soft | None = None, examples: Any = None
) -> iterator.TrainIterator:
  """Training batches as the model takes them; of the task's examples, or of `examples`."""
  if model.config.head == "classification":
    kind, own = classification, {}
  elif model.config.encoder_layers:
    kind, own = encoder_decoder, {"start": generate.start_id(model)}
  else:
    rows = sharding.batch_divisor(make_mesh(config)) * config.train.accumulate
    kind, own = causal, {"prompt_loss_weight": config_lib.prompt_loss_weight(config, task)}
    own["multiple"] = math.lcm(rows, jax.process_count()) // jax.process_count()
  settings = config_lib.for_batches(config, kind)
  examples = task.load("train") if examples is None else examples
  if config.data.train_examples > len(examples):
    there = f"task {task.name!r} has {len(examples):,} to train on"
    raise errors.UserError(f"config.data.train_examples={config.data.train_examples:,}: {there}")
  if config.data.train_examples:
    examples = _sample(examples, config.data.train_examples, config.data.seed)
  return kind.train_iterator(
    task,
    examples,
    model.tokenizer,
    **own,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
    soft=soft,
    **settings,
  )


def load(config: Config, task: tasks.Task, mesh: jax.sharding.Mesh) -> models.Model:
  """The pretrained model of a config, on the mesh, with the head that its objective trains."""
  classifies, given = config.objective["name"] == "classification", dataclasses.asdict(config.model)
  if classifies:
    own = {"head": "classification", "n_labels": task.n_outputs}
    given |= {k: v for k, v in own.items() if given[k] is None}
  model = models.load(**given, sharding=sharding.placer(mesh))
  if model.config.head != ("classification" if classifies else "lm"):
    raise errors.UserError(
      f"config.objective.name={config.objective['name']!r} does not train a model with the head "
      f"{model.config.head!r}: a classifier needs 'classification', a language model 'causal_lm'"
    )
  if model.tokenizer is None:
    raise errors.UserError(f"model {model.name!r} has no tokenizer.json beside its weights")
  return model


def adapt(config: Config, task: tasks.Task, model: models.Model) -> tuple[Any, Any, Any]:
  """(params, mask of what is trained, mask of the frozen leaves that change between steps or None) of a config."""
  method = methods.prepare(config.method, model.tokenizer, task.labels or ())
  params, mask = methods.init(jax.random.key(config.train.seed), model.params, method)
  for section in ("data", "eval"):
    length, before = getattr(config, section).seq_len, prompts.prefix_length(params)
    if model.config.position == "learned" and before + length > model.config.max_seq_len:
      after = f" after a prefix of {before}" if before else ""
      raise errors.UserError(
        f"config.{section}.seq_len={length}{after} is more than the {model.config.max_seq_len} positions of "
        f"{model.name!r}"
      )
  if model.config.head == "classification":
    params, mask = methods.train_also(params, mask, model.head_leaves)
  if config.train.init_from:
    params = warm_start.start(model, params, mask, config.train.init_from)
  return params, mask, methods.held(method, params)


def least_memory(config: Config, task: tasks.Task, model: models.Model, members: int = 1) -> dict[str, int]:
  """{what of the config asks for it: bytes} of memory that `members` runs on a model need, beside the model."""
  c, rows, length = model.config, config.data.batch_size // config.train.accumulate, memory.SHORTEST
  if config.data.pack:
    length = config.data.seq_len
  elif config.data.share_rows:  # how many rows they share only their lengths tell
    rows, length = 1, config.data.seq_len
  method, masks = methods.prepare(config.method, model.tokenizer, task.labels or ()), []

  def trained(params):
    params, mask = methods.init(jax.random.key(0), params, method)
    masks.append(mask)
    return params

  try:
    shapes = jax.eval_shape(trained, model.params)
  except (OverflowError, MemoryError) as e:
    raise errors.UserError(f"config.method asks for more than any memory has: {errors.line(e)}") from e
  scored = max(config.eval.batch_size // members, 1)
  need = {
    "what config.method trains": memory.size(tree.split(shapes, masks[0])[0]),
    "the states of a layer, of config.data.batch_size rows": memory.states(c, rows, length),
    "the states of a layer, of config.eval.batch_size rows": memory.states(c, scored),
  }
  if c.causal and config.eval.max_new_tokens:
    what = "the keys and values of config.eval.batch_size texts of max_new_tokens"
    what += f", each with {config.eval.beams:,} beams" if config.eval.beams > 1 else ""
    need[what] = memory.cache(c, scored * config.eval.beams, memory.SHORTEST + config.eval.max_new_tokens)
  return {k: members * n for k, n in need.items()}


def _adapted(config: Config, task: tasks.Task, mesh: jax.sharding.Mesh, given: models.Model | None = None) -> tuple:
  """(model, state before the first step, frozen tree, mask, optimiser, its learning rate) of a config."""
  place = sharding.placer(mesh)
  model = given or load(config, task, mesh)
  memory.check(least_memory(config, task, model), mesh.size)
  params, mask, held = adapt(config, task, model)
  trainable, frozen = tree.split(sharding.put(params, place), mask)
  if held is not None:
    held, frozen = tree.split(frozen, tree.split(held, mask)[1])
  how = methods.wrappers(config.method, config.train.steps)
  optimiser, rate = optim.make(steps=config.train.steps, **dataclasses.asdict(config.optim), **how)
  state = sharding.put(train.init_state(trainable, optimiser, held), place)
  state = train.unshared(state, (frozen, model.params if given else None))
  return model, state, frozen, mask, optimiser, rate


def trained(workdir: str | os.PathLike, step: int | None = None) -> models.Model:
  """The model of a run, finished or not, with its adapters, from the checkpoint of `step` (None: the newest)."""
  return restored(workdir, step)[0]


def restored(workdir: str | os.PathLike, step: int | None = None) -> tuple[models.Model, Any, list[dict], int]:
  """(model with its adapters, mask of what was trained, methods as they were applied, steps of the whole training) of
  a run's checkpoint."""
  workdir = pathlib.Path(workdir)
  config = config_lib.of_directory(workdir, hf.read_json(workdir / "config.json"))
  if not (workdir / "checkpoints").is_dir():
    raise errors.UserError(f"{workdir} has no checkpoints")
  task = tasks.get(**config.task)
  model, state, frozen, mask, *_ = _adapted(config, task, sharding.make_mesh())
  with checkpoint.Checkpoints(workdir / "checkpoints") as saved:
    step = saved.latest_step() if step is None else step
    if step is None:
      raise errors.UserError(f"{workdir} has no checkpoint yet")
    state, _ = saved.restore(step, state)
  method = methods.prepare(config.method, model.tokenizer, task.labels or ())
  return dataclasses.replace(model, params=state.params(frozen)), mask, method, config.train.steps


def run(
  config: Mapping | Config,
  workdir: str | os.PathLike,
  command: str = "",
  model: models.Model | None = None,
  before: Scores | None = None,
) -> dict:
  """Runs an experiment in `workdir`, or what is left of it, and returns its summary; `command` is for the report.

  Args:
    model: as in `build`.
    before: scores of the pretrained model, if they are known.

  Raises:
    UserError: bad config, missing data, a directory of another config, or a loss that is not finite.
  """
  config, workdir, started = config_lib.resolve(config), workdir_lib.check(workdir), time.perf_counter()
  if config_lib.finished(config, workdir):
    progress.say(f"{workdir} is complete: see {workdir / 'report.md'}, or give another --workdir")
    return hf.read_json(workdir / "summary.json")
  exp = build(config, model)
  say_cut(config, [exp.batches])
  if jax.process_index() == 0:
    metrics.write_json(workdir / "config.json", config.to_dict())
  with jax.set_mesh(exp.mesh), checkpoint.Checkpoints(workdir / "checkpoints") as saved:
    start = saved.latest_step() or 0
    if start:
      exp.state, data_state = saved.restore(start, exp.state)
      exp.batches.set_state(data_state)
      progress.say(f"going on from the checkpoint of step {start}")
    with metrics.Metrics(workdir, config.train.steps, resume_step=start) as out:
      earlier = sum(v for row in out.history() for k, v in row.items() if k.endswith("seconds"))
      score(exp, out, 0, "before", "test", before)
      fit(exp, out, saved)
      score(exp, out, config.train.steps, "after", "test")
      history = out.history()
    export(exp, workdir)
    summary = summarise(exp, history, earlier + time.perf_counter() - started)
  if jax.process_index() == 0:
    use = usage.section(exp.model, workdir, exp.task.labels or ())
    report.write_report(workdir, summary, history, config.to_dict(), command, use)
    metrics.write_json(workdir / "summary.json", summary)
  return summary


def say_cut(config: Config, iterators: Iterable[iterator.TrainIterator]) -> None:
  """Says how many training examples are too long, of each choice of them."""
  for examples, cut in sorted({(b.examples, b.truncated) for b in iterators if b.truncated}):
    progress.say(f"cut to config.data.seq_len={config.data.seq_len}: {cut:,} of {examples:,} training examples")


def score(
  exp: Experiment, out: metrics.Metrics, step: int, prefix: str, split: str, known: Scores | None = None
) -> None:
  """Evaluates on a split and logs `prefix/metric` at `step`, unless the log already has them."""
  if any(row["step"] == step and any(k.startswith(f"{prefix}/") for k in row) for row in out.history()):
    return
  start = time.perf_counter()
  if known is None:
    (known,) = scores(exp.config, exp.model, exp.task, evaluate.one(exp.params), exp.mesh, prefix, split)
  record(out, step, prefix, known, seconds=time.perf_counter() - start)
  progress.say(f"{prefix}: " + "  ".join(f"{k} {v:.4f}" for k, v in known.values.items()))


def record(out: metrics.Metrics, step: int, prefix: str, found: Scores, **more: float) -> None:
  """Logs `prefix/metric` at `step`, and keeps the texts from before and after training."""
  if prefix != "validation":
    out.keep_texts(prefix, found.texts)
  out.log(step, {**found.values, **more}, prefix)


def scores(
  config: Config,
  model: models.Model,
  task: tasks.Task,
  members: evaluate.Members,
  mesh: jax.sharding.Mesh,
  prefix: str,
  split: str,
  ahead: bool = False,
) -> list[Scores]:
  """Metrics of each member on a split of the task, and on general text if the config names one.

  Args:
    ahead: only compile what would run; see `compile_scores`.
  """
  settings = config.eval
  examples = _sample(task.load(split), settings.examples)
  bar = None if ahead else progress.Progress(len(examples), f"evaluating {prefix}")
  how = {
    "ahead": ahead,
    "batch_size": max(settings.batch_size // members.n, 1),
    "seq_len": settings.seq_len,
    "same_length": settings.same_length,
    "place": functools.partial(sharding.replicate, mesh=mesh),
  }
  run, text, written = evaluate.run_classifiers, {}, {}
  if model.config.head != "classification":
    run = evaluate.run_members
    search = evaluate.Search(**{f.name: getattr(settings, f.name) for f in dataclasses.fields(evaluate.Search)})
    text = {"max_new_tokens": settings.max_new_tokens, "start": generate.start_id(model), "search": search}
    text["written"] = written.__setitem__
  shown = lambda done, _: bar.update(done)
  values = run(model.config, members, model.tokenizer, task, examples, progress=shown, **how, **text)
  if bar:
    bar.close()
  if settings.general:
    general = tasks.get(settings.general)
    texts = [" ".join(general.texts(e)) for e in _sample(general.load("test"), settings.general_examples)]
    losses = evaluate.text_loss(model.config, members, model.tokenizer, texts, **how)
    values = [v | {"general_loss": x} for v, x in zip(values, losses, strict=True)]
  asked = [task.format(e) for e in examples[:SHOWN]] if written else []
  row = lambda f, text: {"prompt": f.prompt, "expected": f.response, "text": text}
  return [Scores(v, list(map(row, asked, written.get(i, ())))) for i, v in enumerate(values)]


def compile_scores(
  config: Config, model: models.Model, task: tasks.Task, members: evaluate.Members, mesh: jax.sharding.Mesh, *of: str
) -> concurrent.futures.Future:
  """Compiles what `scores` with these arguments runs, while this thread does something else.

  To be waited for before `scores` is called, which finds the programs then. What goes wrong goes wrong there again.
  """
  members = members.shapes()

  def work():
    with jax.set_mesh(mesh):
      scores(config, model, task, members, mesh, *of, ahead=True)

  return BACKGROUND.submit(work)


def _sample(examples: Any, n: int, seed: int = 0) -> list[dict]:
  """The same `n` examples at every call, in order."""
  indices = np.random.default_rng(seed).permutation(len(examples))[:n]
  return [examples[int(i)] for i in np.sort(indices)]


def fit(exp: Experiment, out: metrics.Metrics, saved: checkpoint.Checkpoints) -> None:
  """Trains from `exp.state` to the last step; logs, evaluates and saves on the way."""
  run, every = exp.config.train, exp.config.eval.every

  def diverged(step, _, values):
    good = saved.latest_step()
    kept = f"the checkpoint of step {good} is kept" if good else "there is no checkpoint yet"
    raise errors.UserError(f"{step_log.not_finite(step, values)}; {kept}. {step_log.ADVICE}")

  log = step_log.Log([out], exp.step, [run.steps], run.log_every, diverged)
  for step in range(int(exp.state.step) + 1, run.steps + 1):
    # Before the next step, so that a run that was cut off between a checkpoint and its validation makes up for it.
    if every and step > 1 and (step - 1) % every == 0:
      log.flush()
      since = time.perf_counter()
      score(exp, out, step - 1, "validation", "validation")
      log.skip(time.perf_counter() - since)
    batch = sharding.put_batch(next(exp.batches), exp.mesh)
    exp.state, values = exp.step(exp.state, exp.frozen, batch)
    for period, change in exp.between:
      if step % period == 0 and step < run.steps:
        exp.state = change(jax.random.fold_in(jax.random.key(run.seed), step), exp.state)
    log.add(step, values)
    if step == run.steps or step % run.checkpoint_every == 0:
      log.flush(write=True)
      saved.save(step, exp.state, exp.batches.get_state())


def export(exp: Experiment, workdir: pathlib.Path) -> None:
  """Writes `adapter/`, or the whole `model/`, see `methods.leaves_model`."""
  model = dataclasses.replace(exp.model, params=sharding.to_host(exp.params))
  if jax.process_index():
    return
  method = methods.prepare(exp.config.method, model.tokenizer, exp.task.labels or ())
  if methods.leaves_model(method):
    models.save(model, workdir / "model")
  else:
    steps = exp.config.train.steps
    adapter.save(model, model.params, exp.mask, method, workdir / "adapter", steps)


def summarise(exp: Experiment, history: list[dict], wall_seconds: float) -> dict:
  """The content of summary.json."""
  base = tree.flatten(weights.strip(exp.params))
  trainable = tree.flatten(exp.state.trainable)
  rows = [{k.removeprefix("train/"): v for k, v in row.items()} for row in history if "train/loss" in row]
  scores = {
    prefix: {
      k.removeprefix(f"{prefix}/"): v
      for row in history
      for k, v in row.items()
      if k.startswith(f"{prefix}/") and not k.endswith("/seconds")
    }
    for prefix in ("before", "after")
  }
  return report.summary(
    model=exp.model.name,
    method=methods.title(exp.config.method),
    task=exp.task.name,
    trainable_params=methods.size(exp.params, exp.mask),
    total_params=tree.size(base) + tree.size([x for k, x in trainable.items() if k not in base]),
    **scores,
    steps=exp.config.train.steps,
    loss_first=rows[0]["loss"],
    loss_last=rows[-1]["loss"],
    tokens_per_second=sum(r["tokens"] for r in rows) / sum(r["seconds"] for r in rows),
    compile_seconds=sum(r["compile_seconds"] for r in rows),
    step_seconds=float(np.median([r["seconds"] / r["steps"] for r in rows[1:] or rows])),
    wall_seconds=wall_seconds,
    train_examples=exp.batches.examples,
    cut=exp.batches.truncated,
    step_memory_bytes=exp.step.memory_bytes,
    dtype=exp.model.config.dtype,
    devices=f"{exp.mesh.size} x {jax.devices()[0].device_kind}",
  )
