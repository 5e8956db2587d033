"""An objective that lies in a folder of its own: cross-entropy, and how far the model is from what it was.

Two terms of different normalisers, and another tree. It is the same alone, in a population, in micro-batches, in packed
rows and on a mesh, and what a plain reference with the logits of the whole batch says.
"""

import dataclasses
import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lora_jax import errors, methods, sharding, tree, weights
from lora_jax.batches import rows as rows_lib
from lora_jax.model import prompts, transformer
from lora_jax.runs import experiment, sweep
from lora_jax.training import auxiliary, head, objectives, optim, population, train
from lora_jax.weights import fused
from tests.test_experiment import assert_same_run, changed, compiled, config, files, interrupt, timeless  # noqa: F401
from tests.test_train import CONFIG, batch, close, forward

SOURCE = '''
"""Cross-entropy, and the KL divergence to the pretrained model at all tokens."""

import jax
import jax.numpy as jnp

from lora_jax.training import head
from lora_jax.training.objectives import causal_lm
from lora_jax.values import Count, NonNegative

HEAD = "lm"
batches, common = causal_lm.batches, lambda batch: jnp.count_nonzero(batch["segment_ids"], axis=-1).max()


def aux(model):
  """The pretrained model."""
  return model.params


def chunk_sums(logits, reference, targets, weights, real):
  logp, logq = jax.nn.log_softmax(logits), jax.nn.log_softmax(reference)
  picked = jnp.take_along_axis(logp, targets[..., None], -1)[..., 0]
  return (-jnp.sum(weights * picked), jnp.sum(real * (jnp.exp(logp) * (logp - logq)).sum(-1))), ()


def loss(forward, params, batch, aux, *, step, common=None, chunk: Count = 16, beta: NonNegative = 1.0):
  """Both terms.

  Args:
    chunk: positions.
    beta: of the divergence.
  """
  real = batch["segment_ids"] > 0
  both, arrays = [forward.projection(p, batch) for p in (params, aux)], (batch["targets"], batch["weights"], real)
  (nll, kl), _ = head.sums(chunk_sums, both, arrays, real, chunk=forward.share(chunk), most=common)
  n = real.sum().astype(jnp.float32)
  terms = {"nll": (nll, batch["weights"].sum()), "kl": (beta * kl, n)}
  return terms, {"weight": (2.0 * n, n), "at": (step * n, n)}
'''
ADAM = dict(schedule="constant", warmup=0, learning_rate=2e-2, eps=1e-2)
BETA = 0.7
STEPS = 3


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory):
  """A folder that holds the objective `near`."""
  path = tmp_path_factory.mktemp("objectives")
  (path / "near.py").write_text(SOURCE)
  objectives.__path__.append(str(path))
  yield
  objectives.__path__.remove(str(path))
  sys.modules.pop(f"{objectives.__name__}.near", None)


def near():
  return objectives.make("near", beta=BETA)


@functools.cache
def base():
  """A pretrained model."""
  params = jax.eval_shape(lambda: transformer.init(CONFIG, jax.random.key(0)))
  rng = np.random.default_rng(0)
  draw = lambda k, x: (
    jnp.asarray(1.0 if "norm" in k else 0.3 * rng.standard_normal(x.shape), x.dtype) + jnp.zeros(x.shape)
  )
  return tree.map_named(draw, params)


def member(seed=0, name="lora", **kw):
  """(params, mask) of a method over the model, LoRA's B as if it had been trained."""
  own = {"lora": {"rank": 2, "targets": "all-linear"}}.get(name, {})
  params, mask = methods.init(jax.random.key(seed), base(), {"name": name, **own, **kw})
  bump = lambda k, x: x + 0.2 * jnp.sin(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape) if k.endswith("/b") else x
  return tree.map_named(bump, params), mask


def parts(params, mask, forward_=None, **how):
  """(step, state, frozen, aux) of a run of its own."""
  trainable, frozen = tree.split(params, mask)
  optimiser, rate = optim.make(steps=STEPS, **ADAM)
  step = train.make_step(forward_ or forward(CONFIG), near().loss, optimiser, rate, **how)
  return step, train.init_state(trainable, optimiser), frozen, auxiliary.beside(base(), frozen)


def alone(params, mask, data, **how):
  """(metrics of each step, trained leaves)."""
  step, state, frozen, aux = parts(params, mask, **how)
  step, rows = jax.jit(step), []
  for b in data:
    state, metrics = step(state, frozen, aux, b)
    rows.append({k: float(v) for k, v in metrics.items()})
  return rows, state.trainable


def same_rows(got, want, **kw):
  for g, w in zip(got, want, strict=True):
    assert g.keys() == w.keys()
    for k in g.keys() - {"tokens"}:
      np.testing.assert_allclose(g[k], w[k], err_msg=k, **kw)


def logits_of(params, b):
  """[B, T, V], all of them."""
  x = transformer.hidden(CONFIG, params, b["tokens"], positions=b["positions"], segment_ids=b["segment_ids"])[0]
  return transformer.logits(CONFIG, params, x)


def test_it_is_found_with_its_keys():
  assert "near" in objectives.names() and objectives.fields("near").keys() == {"chunk", "beta", "prompt_loss_weight"}
  with pytest.raises(errors.UserError, match="did you mean 'near'"):
    objectives.get("neer")
  with pytest.raises(errors.UserError, match="unknown key config.objective.betta; did you mean 'beta'"):
    objectives.make("near", betta=1.0)


def test_loss_and_gradients_are_those_of_full_logits():
  (params, mask), b = member(), batch()
  trainable, frozen = tree.split(params, mask)
  real = jnp.asarray(b["segment_ids"] > 0, jnp.float32)

  def terms(trainable):
    logp, logq = (jax.nn.log_softmax(logits_of(p, b)) for p in (tree.join(trainable, frozen), base()))
    nll = -(b["weights"] * jnp.take_along_axis(logp, b["targets"][..., None], -1)[..., 0]).sum() / b["weights"].sum()
    kl = (real * (jnp.exp(logp) * (logp - logq)).sum(-1)).sum() / real.sum()
    return nll + BETA * kl, (nll, BETA * kl)

  (want, (nll, kl)), grads = jax.jit(jax.value_and_grad(terms, has_aux=True))(trainable)
  assert kl > 0.05 and abs(nll - kl) > 0.05
  keep = optax.GradientTransformation(lambda p: p, lambda g, s, p=None: (jax.tree.map(jnp.zeros_like, g), g))
  for accumulate in (1, 4):
    step = jax.jit(train.make_step(forward(CONFIG), near().loss, keep, lambda n: 1.0, accumulate=accumulate))
    state, metrics = step(train.init_state(trainable, keep), frozen, base(), b)
    for k, v in {"loss": want, "nll": nll, "kl": kl, "weight": 2.0, "at": 0.0}.items():
      np.testing.assert_allclose(metrics[k], v, rtol=1e-5, err_msg=k)
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(grads), rtol=1e-5)
    close(state.opt_state, grads, atol=2e-6)


def test_members_of_a_population_are_runs_of_their_own():
  members = [member(0, rank=1), member(1, rank=4), member(2, rank=2)]
  data = [batch(seed=i) for i in range(STEPS)]
  trees = population.stack(members)
  kw = optim_keywords()
  hyper = population.hyper(steps=[STEPS] * 3, seeds=[0, 1, 2], optim=[kw] * 3, batches=[0, 0, 0], dropout=trees.dropout)
  make_optimiser = functools.partial(population.optimiser, **kw)
  together = dataclasses.replace(forward(CONFIG), members=3)
  state, aux = population.init_state(trees, hyper, make_optimiser), auxiliary.beside(base(), trees.shared)
  assert not aux.own, "the reference is the base that all share"
  wanted = [alone(params, mask, data) for params, mask in members]
  for stacked in (False, True):
    step = jax.jit(population.make_step(together, near(), make_optimiser, shared_batch=not stacked))
    now, rows = state, []
    for b in data:
      b = jax.tree.map(lambda x: x[None], b) if stacked else b
      now, metrics = step(now, hyper, trees.own, trees.shared, aux, b)
      rows.append({k: np.asarray(v) for k, v in metrics.items()})
    for i, ((params, mask), (want, trained)) in enumerate(zip(members, wanted, strict=True)):
      same_rows([{k: v[i] for k, v in row.items()} for row in rows], want, rtol=1e-4, atol=1e-5)
      close(population.unstack(now.members.trainable, i, tree.split(params, mask)[0]), trained, rtol=1e-3, atol=1e-5)


def optim_keywords():
  kw = dict(name="adamw", weight_decay=0.0, clip_norm=1.0, b1=0.9, b2=0.999)
  return kw | ADAM


def test_micro_batches_and_packed_rows_are_one_batch():
  params, mask = member()
  data = [batch(seed=i) for i in range(STEPS)]
  rows, trained = alone(params, mask, data)
  assert rows[0]["loss"] == pytest.approx(rows[0]["nll"] + rows[0]["kl"], rel=1e-6)
  assert [r["at"] for r in rows] == [0, 1, 2] and rows[0]["kl"] > 0.05
  packed = []
  for b in data:
    n = b["segment_ids"].sum(1)
    examples = [{k: b[k][i, : n[i]] for k in ("tokens", "targets", "weights")} for i in range(len(n))]
    packed.append(rows_lib.compact(examples, slice(0, len(n)), 16, 0, 4))
  assert packed[0]["segment_ids"].max() > 2
  for got, after in (alone(params, mask, data, accumulate=2), alone(params, mask, packed)):
    same_rows(got, rows, rtol=1e-4, atol=1e-5)
    close(after, trained, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_weights_of_the_whole_batch_cost_no_forward_pass(optimised):
  """Of several terms in micro-batches: one more loop, and no more products of matrices."""
  programs = []
  for accumulate in (1, 4):
    step, *arguments = parts(*member(), accumulate=accumulate)
    programs.append(jax.jit(step).lower(*arguments, batch()).compile().as_text())
  dots, loops = ([text.count(word) for text in programs] for word in (" dot(", " while("))
  assert dots[0] == dots[1] > 0 and loops[1] == loops[0] + 2


@pytest.mark.slow
def test_eight_devices_are_one(sizes=(2, 4, 1)):
  params, mask = member()
  data = [batch(seed=i) for i in range(STEPS)]
  rows, trained = alone(params, mask, data)
  mesh = sharding.make_mesh(*sizes)
  place = sharding.Placer(mesh)
  step, state, frozen, _ = parts(params, mask)
  state, frozen = sharding.put(state, place), sharding.put(frozen, place)
  with jax.set_mesh(mesh):
    aux = auxiliary.beside(sharding.put(base(), place), frozen)
    stepper, got = train.Stepper(step, state), []
    for b in data:
      state, metrics = stepper(state, frozen, aux, sharding.put_batch(b, mesh))
      got.append({k: float(v) for k, v in metrics.items()})
  same_rows(got, rows, rtol=1e-4, atol=1e-5)
  close(jax.device_get(state.trainable), trained, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["lora", "norms", "bitfit", "full", "lora of a part"])
def test_the_reference_is_no_second_copy(name):
  """The program has as arguments the leaves that are trained once more, and no other."""
  c = dataclasses.replace(CONFIG, fused=True, attn_bias="qkv") if name in ("lora of a part", "bitfit") else CONFIG
  params = base() if c is CONFIG else transformer.init(c, jax.random.key(0))
  method = {"name": "lora", "targets": "q"} if name == "lora of a part" else {"name": name}
  adapted, _ = methods.init(jax.random.key(0), params, method)
  params = fused.like(params, adapted)
  adapted, mask = methods.init(jax.random.key(0), params, method)
  trainable, frozen = tree.split(adapted, mask)
  trainable = jax.tree.map(jnp.copy, trainable)
  optimiser, rate = optim.make(steps=STEPS, **ADAM)
  state, b = train.init_state(trainable, optimiser), batch()
  of = train.Forward(c, packed=True)
  size = {}
  for k, objective, aux in (("plain", "causal_lm", None), ("near", "near", auxiliary.beside(params, frozen))):
    step = jax.jit(train.make_step(of, objectives.make(objective).loss, optimiser, rate))
    size[k] = step.lower(state, frozen, aux, b).compile().memory_analysis().argument_size_in_bytes
  trained = [x for k, x in tree.flatten(params).items() if tree.flatten(mask).get(k)]
  assert bool(trained) == (not name.startswith("lora"))
  assert size["near"] - size["plain"] == tree.nbytes(trained)


def test_soft_tokens_are_not_read_as_rows_of_the_table():
  soft, _ = methods.init(jax.random.key(0), base(), {"name": "prompt_tuning", "length": 2})
  with pytest.raises(errors.UserError, match="soft tokens"):
    auxiliary.check_soft(prompts.of(soft), base())
  auxiliary.check_soft(None, base())
  auxiliary.check_soft(prompts.of(soft), soft)


@pytest.mark.slow
def test_a_run_by_itself_in_a_sweep_and_interrupted(config, tmp_path, monkeypatch):  # noqa: F811
  given = changed(config, objective={"name": "near", "beta": 0.5}, train__steps=4)
  alone = experiment.run(given, tmp_path / "alone")
  rows = timeless(tmp_path / "alone")
  assert [row["train/at"] for row in rows if "train/at" in row] == [0, 1, 2, 3]
  assert all(
    row["train/loss"] == pytest.approx(row["train/nll"] + row["train/kl"]) for row in rows if "train/kl" in row
  )
  undo = interrupt(monkeypatch, train.Stepper, "__call__", 4)
  with pytest.raises(KeyboardInterrupt):
    experiment.run(given, tmp_path / "cut")
  undo()
  experiment.run(given, tmp_path / "cut")
  assert_same_run(tmp_path / "cut", tmp_path / "alone")
  swept = sweep.run(given | {"sweep": {"product": {"method": {"rank": (4, 2)}}}}, tmp_path / "sweep")
  assert len(swept["groups"]) == 1
  for k in ("loss_first", "loss_last"):
    assert swept["members"][0]["train"][k] == pytest.approx(alone["train"][k], rel=1e-4)


def test_a_run_with_soft_tokens_is_refused(config):  # noqa: F811
  method = {"name": "prompt_tuning", "length": 2}
  with pytest.raises(errors.UserError, match="soft tokens"):
    experiment.build(changed(config, objective={"name": "near"}, method=method))


def test_batches_that_do_not_say_what_is_padding_count_all_tokens():
  params, mask = member()
  trainable, frozen = tree.split(params, mask)
  optimiser, rate = optim.make(steps=STEPS, **ADAM)
  step = train.make_step(train.Forward(CONFIG), objectives.make().loss, optimiser, rate)
  b = {k: v for k, v in batch().items() if k not in ("segment_ids", "positions")}
  _, metrics = jax.jit(step)(train.init_state(trainable, optimiser), frozen, None, b)
  assert metrics["tokens"] == b["tokens"].size and metrics["tokens"].dtype == "float32"


@pytest.mark.parametrize("terms, metrics", [("a,b", "a"), ("a", "seconds"), ("a,loss", ""), ("a", "tokens")])
def test_names_that_mean_two_things_are_refused(terms, metrics):
  one, (params, mask) = jnp.float32(1), member()
  named = lambda text: {k: (one, one) for k in text.split(",") if k}
  trainable, frozen = tree.split(params, mask)
  optimiser, rate = optim.make(steps=STEPS, **ADAM)
  step = train.make_step(None, lambda *_, **__: (named(terms), named(metrics)), optimiser, rate)
  with pytest.raises(ValueError, match="names that are taken"):
    step(train.init_state(trainable, optimiser), frozen, None, batch())


# The two ways of the chunked head.

B, T, D, V, R = 3, 21, 8, 40, 2


def project(w, x, dtype):
  return weights.dot("BTD,DV->BTV", x, w, dtype)


@functools.cache
def inputs():
  k = jax.random.split(jax.random.key(0), 9)
  x, y = (jax.random.normal(i, (B, T, D)) for i in k[:2])
  kernel, other = (jax.random.normal(i, (D, V)) for i in k[2:4])
  a, b = jax.random.normal(k[4], (D, R)), jax.random.normal(k[5], (R, V))
  used = jax.random.bernoulli(k[6], 0.6, (B, T))
  return x, y, kernel, other, a, b, jax.random.randint(k[7], (B, T), 0, V), used, jax.random.normal(k[8], (B, T))


def per_position(logits, reference, targets, factor):
  """Two values a position: a likelihood, and a divergence times an array that may be trained too."""
  logp, logq = jax.nn.log_softmax(logits), jax.nn.log_softmax(reference)
  picked = jnp.take_along_axis(logp, targets[..., None], -1)[..., 0]
  return picked, factor * (jnp.exp(logq) * (logq - logp)).sum(-1)


def lora_head(kernel, a, b):
  return weights.LoRA(kernel, a, b, jnp.float32(0.5), jnp.int32(R))


@pytest.mark.parametrize("trained", ["frozen", "head", "lora", "both"])
@pytest.mark.parametrize("way", ["sums", "values"])
@pytest.mark.parametrize("chunk", [1, 27, 1000])
def test_the_chunked_head_equals_full_logits(trained, way, chunk):
  """A function of rows that is not linear, as preferences have, for values; two weighted sums for sums."""
  x, y, kernel, other, a, b, targets, used, factor = inputs()
  learned = {"frozen": (x,), "head": (x, kernel), "lora": (x, a, b), "both": (x, kernel, y, other, factor)}[trained]

  def given(*learned):
    """(heads and states of both, factor)."""
    if trained == "lora":
      return (learned[0], lora_head(kernel, *learned[1:])), (y, other), factor
    if trained == "both":
      return learned[:2], learned[2:4], learned[4]
    return (learned[0], learned[1] if trained == "head" else kernel), (y, other), factor

  def reduced(first, second, row_weights=(0.3, -2.0, 1.0)):
    return sum(w * jax.nn.softplus(row) for w, row in zip(row_weights, first, strict=True)) + (second**2).sum()

  def full(*learned):
    ours, theirs, factor = given(*learned)
    first, second = per_position(*(project(w, x, jnp.float32) for x, w in (ours, theirs)), targets, factor)
    first, second = (jnp.where(used, v, 0) for v in (first, second))
    return reduced(first.sum(1), second) if way == "values" else 0.3 * first.sum() - 2 * second.sum() ** 2

  def ours(*learned):
    *both, factor = given(*learned)
    projections = [head.Projection(x, w, project) for x, w in both]
    if way == "values":
      found = head.values(per_position, projections, (targets, factor), used, chunk=chunk)
      return reduced(found[0].sum(1), found[1])

    def fn(logits, reference, targets, factor, used):
      first, second = per_position(logits, reference, targets, factor)
      return {"first": (used * first).sum(), "second": (used * second).sum()}, {"n": used.sum()}

    found, metrics = head.sums(fn, projections, (targets, factor, used), used, chunk=chunk)
    assert metrics["n"].shape == ()
    return 0.3 * found["first"] - 2 * found["second"] ** 2

  numbers = tuple(range(len(learned)))
  want, grads = jax.jit(jax.value_and_grad(full, numbers))(*learned)
  got, found = jax.jit(jax.value_and_grad(ours, numbers))(*learned)
  np.testing.assert_allclose(got, want, rtol=2e-6)
  np.testing.assert_allclose(jax.jit(ours)(*learned), want, rtol=2e-6)
  for g, w in zip(found, grads, strict=True):
    np.testing.assert_allclose(g, w, rtol=1e-4, atol=2e-6 * float(jnp.abs(w).max()))
  assert all(float(jnp.abs(w).max()) > 0.1 for w in grads)


@pytest.mark.parametrize("way", ["sums", "values"])
def test_no_whole_logits_and_no_gradient_of_a_frozen_head_exist(way):
  x, _, kernel, _, _, _, targets, used, _ = inputs()
  x, targets, used = (jnp.concatenate([v] * 8, axis=1) for v in (x, targets, used))

  def loss(x, w, trained):
    p = head.Projection(x, w, project)
    if way == "values":
      fn = lambda logits, targets: per_position(logits, logits, targets, 0.0)[0]
      return head.values(fn, [p], (targets,), used, chunk=8).sum()
    fn = lambda logits, targets, used: ((used * per_position(logits, logits, targets, 0.0)[0]).sum(), ())
    return head.sums(fn, [p], (targets, used), used, chunk=8)[0]

  program = lambda which: jax.jit(jax.grad(functools.partial(loss, trained=which), which)).lower(x, kernel).as_text()
  frozen, learned = program(0), program(1)
  assert f"tensor<{B}x8x{V}xf32>" in frozen and f"tensor<{B}x{8 * T}x{V}xf32>" not in frozen + learned
  zeros = f"(tensor<f32>) -> tensor<{D}x{V}xf32>"
  assert zeros in learned and zeros not in frozen


def test_members_share_the_chunks_of_both_ways():
  """Under vmap with a head that all share: what a loop over members gives."""
  x, y, kernel, other, _, _, targets, used, factor = inputs()
  xs = jnp.stack([x, y])

  def loss(x):
    projections = [head.Projection(x, kernel, project), head.Projection(y, other, project)]
    found = head.values(per_position, projections, (targets, factor), used, chunk=8, most=jnp.int32(T))
    fn = lambda logits, targets, used: ((used * per_position(logits, logits, targets, 0.0)[0]).sum(), ())
    total, _ = head.sums(fn, projections[:1], (targets, used), used, chunk=8, most=jnp.int32(T))
    return (found[0] * found[1]).sum() + total**2

  got = jax.jit(jax.vmap(jax.value_and_grad(loss)))(xs)
  want = [jax.jit(jax.value_and_grad(loss))(x) for x in xs]
  for i in (0, 1):
    np.testing.assert_allclose(got[0][i], want[i][0], rtol=1e-5)
    np.testing.assert_allclose(got[1][i], want[i][1], rtol=1e-4, atol=1e-3)
