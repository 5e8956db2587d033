"""AdaLoRA: the formula and the penalty, the budget step by step against the peft library's, and its files."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lora_jax import errors, methods, models, tree, weights
from lora_jax.formats import adapter, peft as peft_format
from lora_jax.methods import adalora, budget
from lora_jax.model import transformer
from lora_jax.training import optim, train
from tests import noise
from tests.noise import moved
from tests.test_dora import apply
from tests.test_families import outputs
from tests.test_lora import first_output, load, load_family
from tests.test_models import torch_logits

pytestmark = [
  pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
  pytest.mark.filterwarnings("ignore:The following rank_pattern keys:RuntimeWarning"),  # of PEFT, about its own form
  pytest.mark.filterwarnings("ignore:Adapter 'default'"),  # and about matrices that have lost all ranks
]

CONFIG = transformer.Config(50, 16, 3, 4, 2, 4, 24, dtype="float32", tied=True)
KEY = jax.random.key(0)
TOKENS = np.random.default_rng(0).integers(0, 50, (2, 12))
FIELDS = ("a", "e", "b")


@pytest.fixture(scope="module")
def base():
  return transformer.init(CONFIG, KEY)


def test_formula(base):
  params = moved(*adalora.init(KEY, base, targets="q", init_r=5, target_r=2, alpha=7.0))
  node = jax.tree.map(lambda x: x[1], params["layers"]["attn"]["q"]["kernel"])
  x = jax.random.normal(KEY, (2, 3, 16))
  change = ((x @ node.a) * node.e) @ node.b.reshape(5, -1) * 7 / (5 + 1e-5)
  want = weights.dot("BTD,DNH->BTNH", x, node.base) + change.reshape(2, 3, 4, 4)
  np.testing.assert_allclose(node.dot("BTD,DNH->BTNH", x), want, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_starts_as_the_model(base):
  params, mask = adalora.init(KEY, base, targets="all-linear", init_r=20)
  np.testing.assert_array_equal(apply(CONFIG, params, TOKENS), apply(CONFIG, base, TOKENS))
  node = params["layers"]["attn"]["q"]["kernel"]
  for x in (node.a, node.b):
    np.testing.assert_allclose(x.std(), 0.02, rtol=0.05)
  assert len(np.unique(node.a)) == node.a.size
  assert {k.rpartition("/")[2] for k, m in tree.flatten(mask).items() if m} == set(FIELDS)


def test_padding_does_not_count(base):
  params, mask = adalora.init(KEY, base, targets="layers/[12]/attn/q", init_r=5, target_r=2)
  assert methods.size(params, mask) == 2 * (16 * 5 + 5 + 5 * 16)
  merged = weights.merge(moved(params, mask))["layers"]["attn"]["q"]["kernel"]
  np.testing.assert_array_equal(merged[0], base["layers"]["attn"]["q"]["kernel"][0])
  assert np.abs(merged[1] - base["layers"]["attn"]["q"]["kernel"][1]).max() > 1e-5


@pytest.mark.slow
def test_penalty(base):
  """The mean distance from orthogonality over the A and B of adapted layers, times the weight."""
  params = moved(*adalora.init(KEY, base, targets=["layers/[12]/attn/q", "down"], init_r=3, target_r=2), size=1.0)
  want = []
  for layers, node in (
    ((1, 2), params["layers"]["attn"]["q"]["kernel"]),
    (range(3), params["layers"]["mlp"]["down"]["kernel"]),
  ):
    for i in layers:
      a, b = np.asarray(node.a[i]), np.asarray(node.b[i]).reshape(3, -1)
      want += [np.linalg.norm(a.T @ a - np.eye(3)), np.linalg.norm(b @ b.T - np.eye(3))]
  np.testing.assert_allclose(adalora.penalty(params, orth_reg_weight=0.3, alpha=1.0), 0.3 * np.mean(want), rtol=1e-5)
  node = params["layers"]["attn"]["q"]["kernel"]
  exact = node.replace(a=jnp.eye(16)[None, :, :3].repeat(3, 0), b=jnp.eye(16)[:3].reshape(1, 3, 4, 4).repeat(3, 0))
  grad = jax.grad(lambda a: adalora.penalty({"q": exact.replace(a=a)}))(exact.a)
  assert np.isfinite(grad).all()


def peft_model(torch, peft, **kw):
  """Two linear layers with AdaLoRA of the peft library."""
  torch.manual_seed(0)

  class Model(torch.nn.Module):
    def __init__(self):
      super().__init__()
      self.q, self.v = torch.nn.Linear(6, 10), torch.nn.Linear(10, 4)

    def forward(self, x):
      return self.v(torch.tanh(self.q(x)))

  return peft.get_peft_model(Model(), peft.AdaLoraConfig(target_modules=["q", "v"], **kw))


def as_ours(module):
  """Our node of a layer of theirs."""
  array = lambda t: jnp.asarray(t.detach().numpy())
  a, e, b = (array(getattr(module, f"lora_{c}")["default"]) for c in "AEB")
  rank = len(e)
  w = array(module.base_layer.weight).T
  return budget.AdaLoRA(w, a.T, e[:, 0], b.T, jnp.float32(module.scaling["default"] / (rank + 1e-5)))


@pytest.mark.parametrize(
  "schedule",
  [dict(tinit=0, tfinal=0, deltaT=1), dict(tinit=2, tfinal=3, deltaT=2), dict(tinit=3, tfinal=4, deltaT=3)],
)
def test_budget_and_pruning_are_those_of_peft(schedule):
  """The same gradients for 14 steps: the same entries stay, after every step, with momentum in the optimiser."""
  peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
  steps, ranks = 14, dict(init_r=6, target_r=2)
  theirs = peft_model(torch, peft, total_step=steps, lora_alpha=5, **ranks, **schedule)
  layers = {k: getattr(theirs.base_model.model, k) for k in "qv"}
  params = {k: as_ours(module) for k, module in layers.items()}
  mask = {k: jax.tree.map(lambda _: False, w).replace(a=True, e=True, b=True) for k, w in params.items()}
  trainable, _ = tree.split(params, mask)
  adam = dict(b1=0.9, b2=0.999, eps=1e-8)
  optimiser = adalora.optimiser(optax.adam(1e-2, **adam), steps=steps, alpha=5, **ranks, **schedule)
  state = optimiser.init(trainable)
  update = jax.jit(optimiser.update)
  torch_optimiser = torch.optim.Adam([p for p in theirs.parameters() if p.requires_grad], lr=1e-2, eps=1e-8)
  grad = lambda m, c: jnp.asarray(getattr(m, f"lora_{c}")["default"].grad.numpy())
  pruned = []
  for step in range(1, steps + 1):
    x = torch.randn(8, 6)
    torch_optimiser.zero_grad()
    ((theirs(x) - torch.sin(x[:, :4])) ** 2).mean().backward()
    grads = {
      k: w.replace(a=grad(layers[k], "A").T, e=grad(layers[k], "E")[:, 0], b=grad(layers[k], "B").T)
      for k, w in trainable.items()
    }
    torch_optimiser.step()
    theirs.base_model.update_and_allocate(step)
    before = state
    updates, state = update(grads, state, trainable)
    if smoothed := theirs.base_model.rankallocator.exp_avg_ipt:
      for k, w in state.sensitivity.items():
        for ours, c in ((w.a.T, "A"), (w.e[:, None], "E"), (w.b.T, "B")):
          want = smoothed[f"{k}.lora_{c}.default"].numpy()
          np.testing.assert_allclose(ours, want, rtol=1e-3, atol=1e-7)
    else:  # from the last pruning on
      assert step >= steps - schedule["tfinal"]
      jax.tree.map(np.testing.assert_array_equal, state.sensitivity, before.sensitivity)
    trainable = optax.apply_updates(trainable, updates)
    for k, w in trainable.items():
      want = as_ours(layers[k])
      np.testing.assert_array_equal(w.e == 0, want.e == 0, err_msg=f"step {step}")
      jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), [w.a, w.e, w.b], [want.a, want.e, want.b])
    pruned.append(sum(int((w.e == 0).sum()) for w in trainable.values()))
  assert pruned[-1] == 2 * (6 - 2)
  assert len(set(pruned)) > 2
  budgets = [budget.budget(s, 12, 4, schedule["tinit"], steps - schedule["tfinal"]) for s in range(1, steps + 1)]
  assert budgets == [theirs.base_model.rankallocator.budget_schedule(s)[0] for s in range(1, steps + 1)]


def test_budget_falls_as_a_cubic():
  budgets = [budget.budget(s, 100, 20, 5, 45) for s in range(60)]
  assert budgets[:6] == [100] * 6 and budgets[45:] == [20] * 15
  assert budgets[25] == 20 + 80 // 8
  assert budgets == sorted(budgets, reverse=True)


def test_layers_that_are_not_adapted_have_no_part_in_the_budget(base):
  """Nor do they push others out: 2 of 3 layers, half of whose ranks stay."""
  kw = dict(init_r=4, target_r=2, targets="layers/[02]/attn/q")
  params, mask = adalora.init(KEY, base, **kw)
  params = moved(params, mask)
  trainable, _ = tree.split(params, mask)
  optimiser = adalora.optimiser(optax.sgd(0.1), steps=2, **kw)
  state = optimiser.init(trainable)
  for step in range(2):
    gradient = lambda k, x: noise.add(k, np.zeros(x.shape, np.float32), 1.0, step).at[1].set(0)
    grads = tree.map_named(gradient, trainable)
    updates, state = optimiser.update(grads, state, trainable)
    trainable = optax.apply_updates(trainable, updates)
  e = np.asarray(trainable["layers"]["attn"]["q"]["kernel"].e)
  assert (e[[0, 2]] == 0).sum() == 4


@pytest.mark.slow
def test_training_reaches_the_target_in_one_program_and_members_are_runs(base):
  """Through `train.make_step` with the penalty; two members under vmap prune as two runs do."""
  spec = {"name": "adalora", "init_r": 4, "target_r": 2, "targets": "q,down", "tinit": 1, "tfinal": 1}
  params, mask = methods.init(KEY, base, spec)
  steps = 6
  optimiser, rate = optim.make(steps=steps, learning_rate=1e-2, warmup=0, **methods.wrappers(spec, steps))
  batch = dict(
    tokens=TOKENS,
    targets=np.roll(TOKENS, -1, 1),
    weights=np.ones(TOKENS.shape, np.float32),
    segment_ids=np.ones_like(TOKENS),
  )
  from lora_jax.training import objectives

  step = train.make_step(
    train.Forward(CONFIG), objectives.make("causal_lm").loss, optimiser, rate, penalty=methods.penalty(spec)
  )
  trainable, frozen = tree.split(params, mask)
  starts = [
    trainable,
    jax.tree.map(lambda x: x + 0.01 * jnp.sin(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), trainable),
  ]

  def run(trainable):
    return jax.lax.scan(lambda s, _: step(s, frozen, None, batch), train.init_state(trainable, optimiser), None, steps)

  single = jax.jit(run)
  alone = [single(t) for t in starts]
  both, metrics = jax.jit(jax.vmap(run))(jax.tree.map(lambda *xs: jnp.stack(xs), *starts))
  for i, (state, seen) in enumerate(alone):
    kept = [np.asarray(w.e) != 0 for w in jax.tree.leaves(state.trainable, is_leaf=budget.is_node)]
    assert sum(k.sum() for k in kept) == 2 * 6
    assert seen["loss"][-1] < seen["loss"][0]
    together = jax.tree.map(lambda x: x[i], both.trainable)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), together, state.trainable)


def test_state_is_named_as_the_weights_are(base):
  """So the rules that place weights place it, and checkpoints hold it."""
  params, mask = adalora.init(KEY, base, init_r=3, target_r=2)
  trainable, _ = tree.split(params, mask)
  names = tree.names(adalora.optimiser(optax.adam(1e-3), steps=5).init(trainable))
  for k in tree.names(trainable):
    assert f"sensitivity/{k}" in names and f"uncertainty/{k}" in names
  assert "keep/layers/attn/q/kernel" in names


@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("targets", ["q,v", "all-linear", "layers/1/attn/q"])
def test_peft_loads_what_we_save_and_so_do_we(tmp_path, targets, pruned):
  peft = pytest.importorskip("peft")
  ref, model = load(tmp_path / "base", num_key_value_heads=2)
  params = moved(*adalora.init(KEY, model.params, targets=targets, init_r=4, target_r=2, alpha=40.0), size=0.3)
  if pruned:
    drop = lambda w: w.replace(e=w.e * (jax.random.uniform(KEY, w.e.shape) > 0.5)) if budget.is_node(w) else w
    params = jax.tree.map(drop, params, is_leaf=budget.is_node)
  peft_format.save(model, params, tmp_path / "adapter")
  saved = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
  assert bool(saved["rank_pattern"]) == pruned
  theirs = peft.PeftModel.from_pretrained(ref, str(tmp_path / "adapter")).eval()
  tokens = np.arange(60).reshape(2, 30)
  ours = apply(model.config, params, tokens)
  np.testing.assert_allclose(ours, torch_logits(theirs, tokens), atol=1e-4, rtol=1e-4)
  assert np.abs(ours - apply(model.config, model.params, tokens)).max() > 1e-2
  again = peft_format.load(model, tmp_path / "adapter")
  np.testing.assert_allclose(apply(model.config, again, tokens), ours, atol=1e-5)
  assert tree.names(again) == tree.names(params)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "neox"])
def test_we_load_what_peft_saves(tmp_path, name):
  """After an allocation, so that ranks differ."""
  peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
  if name == "llama":
    (ref, model), targets = load(tmp_path / "base", num_key_value_heads=2), ["q_proj", "v_proj", "down_proj"]
  else:
    ref, model, targets = load_family(tmp_path / "base", name)
  how = dict(init_r=4, target_r=2, total_step=3, lora_alpha=40, fan_in_fan_out=name == "gpt2")
  theirs = peft.get_peft_model(ref, peft.AdaLoraConfig(target_modules=targets, **how))
  with torch.no_grad():
    for k, p in theirs.named_parameters():
      if "lora_" in k and p.requires_grad:
        p.add_(0.3 * torch.randn_like(p))
  for step in range(1, 4):
    for p in theirs.parameters():
      p.grad = torch.randn_like(p) if p.requires_grad else None
    theirs.base_model.update_and_allocate(step)
  theirs.eval().save_pretrained(str(tmp_path / "adapter"))
  params = peft_format.load(model, tmp_path / "adapter")
  ours = outputs(model.config, params, TOKENS)
  np.testing.assert_allclose(ours, first_output(theirs), atol=1e-4, rtol=1e-4)
  assert np.abs(ours - outputs(model.config, model.params, TOKENS)).max() > 1e-2


SCHEDULE = dict(init_r=5, target_r=2, tinit=3, tfinal=4, deltaT=2, beta1=0.7, beta2=0.9, orth_reg_weight=0.25)


@pytest.mark.parametrize("steps", [0, 50])
def test_the_schedule_is_in_the_config_for_peft(tmp_path, steps):
  """And comes back; where the number of steps is not known, the least with which PEFT takes the config."""
  peft = pytest.importorskip("peft")
  ref, model = load(tmp_path / "base", num_key_value_heads=2)
  spec = {"name": "adalora", **SCHEDULE}
  params, mask = methods.init(KEY, model.params, spec)
  adapter.save(model, params, mask, spec, tmp_path / "adapter", steps)
  want = SCHEDULE | {"total_step": steps or 3 + 4 + 1}
  config = peft.PeftConfig.from_pretrained(str(tmp_path / "adapter"))
  assert {k: getattr(config, k) for k in want} == want
  theirs = peft.PeftModel.from_pretrained(ref, str(tmp_path / "adapter"), is_trainable=True)
  assert theirs.base_model.rankallocator.peft_config.total_step == want["total_step"]
  again = peft_format.load(model, tmp_path / "adapter")
  peft_format.save(model, again, tmp_path / "again")
  assert json.loads((tmp_path / "again/adapter_config.json").read_text()).items() >= want.items()


def test_the_schedule_of_peft_is_read(tmp_path):
  peft = pytest.importorskip("peft")
  ref, model = load(tmp_path / "base", num_key_value_heads=2)
  theirs = peft.get_peft_model(ref, peft.AdaLoraConfig(target_modules=["q_proj"], total_step=60, **SCHEDULE))
  theirs.save_pretrained(str(tmp_path / "adapter"))
  params = peft_format.load(model, tmp_path / "adapter")
  node = params["layers"]["attn"]["q"]["kernel"]
  assert dict(node.schedule) == {k: v for k, v in SCHEDULE.items() if k != "init_r"} | {"total_step": 60}
  jax.jit(lambda p: p)(params)  # what is static has a hash
  config = tmp_path / "adapter/adapter_config.json"
  wrong = {"target_r": 0, "deltaT": [1], "tinit": -1, "beta2": 1, "orth_reg_weight": "x", "total_step": 0.5}
  config.write_text(json.dumps(json.loads(config.read_text()) | wrong))
  with pytest.raises(errors.UserError) as e:
    peft_format.load(model, tmp_path / "adapter")
  assert all(f"{k} is {v!r}, expected" in str(e.value) for k, v in wrong.items())


def test_misfits_are_listed_together(tmp_path, base):
  import safetensors.numpy

  model = models.Model("tiny", CONFIG, base, None, {"model_type": "llama"})
  params = moved(*adalora.init(KEY, base, init_r=3, target_r=2))
  peft_format.save(model, params, tmp_path)
  path, config = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
  good, settings = safetensors.numpy.load_file(path), json.loads(config.read_text())
  names = sorted(k for k in good if k.endswith("lora_E"))
  bad = dict(good)
  del bad[names[0]]
  bad[names[1]] = bad[names[1]][:-1].copy()
  bad[names[2].replace("_proj", "_what")] = bad.pop(names[2])
  safetensors.numpy.save_file(bad, path)
  with pytest.raises(errors.UserError) as e:
    peft_format.load(model, tmp_path)
  for said in (*(n.removeprefix("base_model.model.") for n in names[:3]), "_what"):
    assert said in str(e.value)
  safetensors.numpy.save_file(good, path)
  name = names[0].removeprefix("base_model.model.")
  for edit, message in (
    ({"rank_pattern": {name: [True, False]}}, "has 2 entries"),
    ({"rank_pattern": {name: [True, True, False]}}, r"lora_A is \(3, 16\), expected \(2, 16\)"),
    ({"rank_pattern": {name: 3}}, "lists of true and false"),
    ({"init_r": 0}, "init_r is 0"),
    ({"rank_pattern": {"layers.9.lora_E": [True] * 3}}, "layers.9"),
  ):
    config.write_text(json.dumps(settings | edit))
    with pytest.raises(errors.UserError, match=message):
      peft_format.load(model, tmp_path)


@pytest.mark.parametrize(
  "option, message",
  [
    ({"layer_replication": [[0, 1], [2, 3], [1, 2]]}, r"layer_replication=\[\[0, 1\], .* is not supported"),
    ({"trainable_token_indices": [1, 2]}, r"trainable_token_indices=\[1, 2\] is not supported"),
    ({"modules_to_save": ["nothing"]}, "modules_to_save of the config without tensors: nothing"),
    ({"use_rslora": True, "lora_bias": True, "alpha_pattern": {"q_proj": 99}, "use_qalora": True}, None),
  ],
)
def test_options_of_lora_count_as_far_as_peft_applies_them(tmp_path, option, message):
  peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
  ref, model = load(tmp_path / "base", num_key_value_heads=2)
  theirs = peft.get_peft_model(ref, peft.AdaLoraConfig(target_modules=["q_proj"], total_step=3, **option)).eval()
  with torch.no_grad():
    for k, p in theirs.named_parameters():
      if "lora_" in k and p.requires_grad:
        p.add_(0.3 * torch.randn_like(p))
  theirs.save_pretrained(str(tmp_path / "adapter"))
  if message:
    with pytest.raises(errors.UserError, match=message):
      peft_format.load(model, tmp_path / "adapter")
  else:
    ours = outputs(model.config, peft_format.load(model, tmp_path / "adapter"), TOKENS)
    np.testing.assert_allclose(ours, first_output(theirs), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
  "kw, message",
  [
    ({"targets": "w_q"}, "matches nothing"),
    ({"init_r": 2, "target_r": 4}, "target_r <= init_r"),
    ({"deltaT": 0, "dropout": 1.0}, "deltaT >= 1.*dropout"),
    ({"beta1": 1.0}, "beta1"),
    ({"orth_reg_weight": -1.0}, "orth_reg_weight"),
  ],
)
def test_bad_settings_are_refused(base, kw, message):
  with pytest.raises(errors.UserError, match=message):
    adalora.init(KEY, base, **kw)


def test_a_schedule_without_pruning_is_refused():
  with pytest.raises(errors.UserError, match="no step to prune"):
    adalora.optimiser(optax.sgd(1.0), steps=10, tinit=5, tfinal=5)
