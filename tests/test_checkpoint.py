import os
import pathlib
import shutil
import signal
import subprocess
import sys
import textwrap
import time

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lora_jax import errors, tree
from lora_jax.formats import checkpoint

pytest.importorskip("orbax.checkpoint")

ROOT = pathlib.Path(checkpoint.__file__).parents[1]


def make_state(seed=0):
  key = jax.random.key(seed)
  params = {
    "layers": {
      "q": {"a": jax.random.normal(key, (2, 8, 4)), "b": jnp.full((2, 4, 8), seed, jnp.float32)},
      "k": None,
    },
    "head": jnp.arange(24).reshape(8, 3).astype(jnp.bfloat16) / 7,
  }
  return {
    "params": params,
    "opt": optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)).init(params),
    "step": jnp.int32(seed),
    "mask": jnp.arange(8) % 2 == 0,
    "packed": jnp.arange(16, dtype=jnp.uint8),
    "seed": jnp.uint32(2**32 - 1 - seed),
    "key": key,
    "keys": jax.random.split(key, 8),
    "rbg": jax.random.key(seed, impl="rbg"),
  }


def bits(x):
  x = jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x
  return np.asarray(x).tobytes()


def assert_same(got, want):
  assert jax.tree.structure(got) == jax.tree.structure(want)
  for (k, x), y in zip(tree.flatten(got).items(), jax.tree.leaves(want), strict=True):
    assert x.shape == y.shape and x.dtype == y.dtype and bits(x) == bits(y), k


def abstract(state, sharding=None):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding or x.sharding), state)


def files(directory):
  return sorted(p for p in directory.rglob("*") if p.is_file())


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """A directory with checkpoints of steps 1 and 2."""
  directory = tmp_path_factory.mktemp("run") / "checkpoints"
  with checkpoint.Checkpoints(directory) as c:
    c.save(1, make_state(1), {"next_index": 10})
    c.save(2, make_state(2), {"next_index": 20})
  return directory


def test_round_trip_is_exact(saved):
  with checkpoint.Checkpoints(saved) as c:
    assert c.steps() == [1, 2] and c.latest_step() == 2
    for step in (1, 2):
      state, data_state = c.restore(step, abstract(make_state()))
      assert_same(state, make_state(step))
      assert data_state == {"next_index": step * 10}


def test_the_target_may_be_the_state_itself(saved):
  with checkpoint.Checkpoints(saved) as c:
    assert_same(c.restore(2, make_state())[0], make_state(2))


def test_a_target_without_shardings_goes_to_one_device(saved):
  with checkpoint.Checkpoints(saved) as c:
    state, _ = c.restore(2, jax.eval_shape(make_state))
  assert_same(state, make_state(2))
  assert all(x.devices() == {jax.devices()[0]} for x in jax.tree.leaves(state))


def test_special_floats_and_data_state_survive(tmp_path):
  x = jnp.array([0x7FC00001, 0xFF800000, 0x80000000, 1], jnp.uint32).view(jnp.float32)
  data_state = {"a": [1, None, 0.1, "é"], "b": {}}
  with checkpoint.Checkpoints(tmp_path) as c:
    c.save(0, {"x": x}, data_state)
    state, restored = c.restore(0, {"x": x})
  assert bits(state["x"]) == bits(x) and restored == data_state


def test_keeps_the_newest_and_skips_what_is_there(tmp_path):
  with checkpoint.Checkpoints(tmp_path / "c", keep=2) as c:
    assert c.latest_step() is None
    for step in (1, 2, 3, 10):
      c.save(step, {"x": jnp.int32(step)})
    c.save(10, {"x": jnp.int32(-1)})
    assert c.steps() == [3, 10]
    assert int(c.restore(10, {"x": jnp.int32(0)})[0]["x"]) == 10
  assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["10", "3"]


def test_arrays_may_be_donated_after_save(tmp_path):
  overwrite = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)
  with checkpoint.Checkpoints(tmp_path) as c:
    for step in range(5):
      x = jax.block_until_ready(jnp.full((1000, 1000), step, jnp.float32))
      c.save(step, {"x": x})
      jax.block_until_ready(overwrite(x))
      assert np.all(np.asarray(c.restore(step, {"x": jnp.zeros((1000, 1000))})[0]["x"]) == step)


def test_restores_onto_another_mesh(tmp_path):
  if jax.device_count() < 8:
    pytest.skip("needs 8 devices")
  devices, P = np.array(jax.devices()[:8]), jax.sharding.PartitionSpec
  one = jax.sharding.Mesh(devices.reshape(8, 1), ("fsdp", "tensor"))
  two = jax.sharding.Mesh(devices.reshape(2, 4), ("fsdp", "tensor"))
  state = {
    "w": jnp.arange(64.0).reshape(8, 8),
    "keys": jax.random.split(jax.random.key(0), 8),
    "step": jnp.int32(3),
  }
  spec = {"w": P("fsdp", "tensor"), "keys": P("fsdp"), "step": P()}
  place = lambda mesh: {k: jax.sharding.NamedSharding(mesh, s) for k, s in spec.items()}  # noqa: E731
  with checkpoint.Checkpoints(tmp_path) as c:
    c.save(1, jax.device_put(state, place(one)))
    for mesh in (two, one):
      like = {k: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place(mesh)[k]) for k, x in state.items()}
      got, _ = c.restore(1, like)
      assert_same(got, state)
      assert all(got[k].sharding.is_equivalent_to(place(mesh)[k], got[k].ndim) for k in got)
    cpu = jax.sharding.SingleDeviceSharding(devices[3])
    got, _ = c.restore(1, abstract(state, cpu))
    assert_same(got, state)
    assert got["w"].devices() == {devices[3]}


def test_unknown_step_is_named(saved):
  with checkpoint.Checkpoints(saved) as c, pytest.raises(errors.UserError, match="step 7; it has steps: 1, 2"):
    c.restore(7, make_state())


@pytest.mark.parametrize(
  "change, message",
  [
    (lambda s: s["params"].pop("head"), "it has params/head, which this run lacks"),
    (lambda s: s.update(extra=jnp.zeros(3)), "it lacks extra"),
    (lambda s: s.update(packed=jnp.zeros(9, jnp.uint8)), r"packed is uint8\[16\], expected uint8\[9\]"),
    (
      lambda s: s["params"].update(head=jnp.zeros((8, 3))),
      r"head is bfloat16\[8, 3\], expected float32\[8, 3\]",
    ),
  ],
)
def test_a_state_that_does_not_fit_is_refused(saved, change, message):
  like = make_state()
  change(like)
  with checkpoint.Checkpoints(saved) as c, pytest.raises(errors.UserError, match=message) as e:
    c.restore(2, like)
  assert str(saved / "2") in str(e.value)


def test_two_leaves_of_one_name_are_refused(tmp_path):
  with checkpoint.Checkpoints(tmp_path) as c, pytest.raises(ValueError, match="same path name"):
    c.save(1, {"a": {"b": jnp.zeros(1)}, "a/b": jnp.zeros(1)})


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove"])
def test_every_damaged_file_is_found(saved, tmp_path, damage, caplog):
  """Any damage is either reported, with the step to go back to, or harmless."""
  shutil.copytree(saved, tmp_path / "c")
  reported = []
  for path in files(tmp_path / "c" / "2"):
    content = path.read_bytes()
    if damage == "truncate":
      path.write_bytes(content[: len(content) // 2])
    elif damage == "flip":
      path.write_bytes(content[:-9] + bytes([content[-9] ^ 4]) + content[-8:])
    else:
      path.unlink()
    with checkpoint.Checkpoints(tmp_path / "c") as c:
      assert c.latest_step() == 2
      try:
        assert_same(c.restore(2, make_state())[0], make_state(2))
      except errors.UserError as e:
        reported.append(path)
        assert str(tmp_path / "c" / "2") in str(e) and "go on from step 1" in str(e)
      assert_same(c.restore(1, make_state())[0], make_state(1))
    path.write_bytes(content)
  assert set(files(tmp_path / "c" / "2" / "state")) <= set(reported)
  assert not caplog.records, "one message is enough"


def test_without_an_intact_checkpoint_the_message_says_so(saved, tmp_path):
  shutil.copytree(saved, tmp_path / "c")
  for step in "12":
    (tmp_path / "c" / step / checkpoint.CHECKSUMS).write_text("[")
  with (
    checkpoint.Checkpoints(tmp_path / "c") as c,
    pytest.raises(errors.UserError, match="no earlier checkpoint"),
  ):
    c.restore(2, make_state())


SAVE_FOREVER = """
  import itertools, sys
  import jax, jax.numpy as jnp
  from lora_jax.formats import checkpoint
  c = checkpoint.Checkpoints(sys.argv[1])
  start = c.latest_step() or 0
  for step in itertools.count(start + 1):
    state = {"x": jnp.full((500, 1000), step, jnp.float32), "y": [jnp.int32(step)] * 9}
    c.save(step, state, {"next_index": step})
    c.wait()
    print(step, flush=True)
"""


@pytest.mark.slow
def test_killed_at_any_moment_the_last_complete_checkpoint_remains(tmp_path):
  rng = np.random.default_rng(0)
  seen_half_written = False
  for _ in range(8):
    command = [sys.executable, "-c", textwrap.dedent(SAVE_FOREVER), tmp_path]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
      first = process.stdout.readline()
      time.sleep(rng.uniform(0, 0.5))
      process.send_signal(signal.SIGKILL)
      done = int((first + process.stdout.read()).split()[-1])
    seen_half_written |= any(not p.name.isdigit() for p in tmp_path.iterdir())
    with checkpoint.Checkpoints(tmp_path) as c:
      step = c.latest_step()
      assert step in (done, done + 1)
      zeros = {"x": jnp.zeros((500, 1000)), "y": [jnp.int32(0)] * 9}
      state, data_state = c.restore(step, zeros)
      assert np.all(np.asarray(state["x"]) == step) and data_state == {"next_index": step}
    assert all(p.name.isdigit() for p in tmp_path.iterdir())
  assert seen_half_written
