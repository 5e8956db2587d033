"""Checkpoints of a run: orbax directories that are written in the background, each complete or absent.

`directory/<step>` holds the leaves of the state under their path names, the state of the data iterator, and checksums
of the files. Nothing is pickled.
"""

import contextlib
import json
import logging
import pathlib
import zlib
from typing import Any

import jax

from lora_jax import errors, tree

CHECKSUMS = "checksums.json"


class Checkpoints:
  """The newest checkpoints of one run. Use it as a context manager, or call `close`.

  A checkpoint gets its final name by one rename when it is complete, so a process killed at any moment leaves the last
  complete one. In a run of several processes all make the same calls, on a directory that all of them see.
  """

  def __init__(self, directory: str | pathlib.Path, keep: int = 2, writes: bool = True):
    """Opens or creates `directory` and removes what a killed process left half-written in it.

    Args:
      directory: `DIR/checkpoints`.
      keep: number of checkpoints to keep; older ones are deleted after each save.
      writes: False leaves half-written checkpoints alone, since another process may be writing them.
    """
    from orbax.checkpoint import v1 as ocp

    self.directory = pathlib.Path(directory).absolute()
    self._saving = None
    context = ocp.Context()
    context.array.saving.use_compression = False  # weights hardly compress
    context.async_options.post_finalization_callback = lambda: self._seal()  # orbax would copy a bound method
    with _quiet():
      self._orbax = ocp.training.Checkpointer(
        self.directory,
        context=context,
        preservation_policy=ocp.training.preservation_policies.LatestN(keep),
        cleanup_tmp_directories=writes,
      )

  def save(self, step: int, state: Any, data_state: Any = None) -> None:
    """Starts to save `state` as the checkpoint of `step`, unless that step is already saved.

    Returns once the arrays are copied, so they may be donated. Writing continues in the background.

    Args:
      step: number of finished training steps.
      state: tree of arrays and random keys, on any mesh. It may have None holes, but no array of size 0.
      data_state: JSON value, such as the state of the data iterator.
    """
    if step in self.steps():
      return
    self._saving = step
    self._orbax.save_async(step, _flatten(state), force=True, custom_metadata={"data_state": data_state})

  def wait(self) -> None:
    """Returns when the last `save` is on disk. Raises the error if it failed."""
    self._orbax.wait()

  def steps(self) -> list[int]:
    """The steps of the complete checkpoints, oldest first."""
    self.wait()
    return [c.step for c in self._orbax.checkpoints]

  def latest_step(self) -> int | None:
    """The step of the newest complete checkpoint, or None."""
    return max(self.steps(), default=None)

  def restore(self, step: int, like: Any) -> tuple[Any, Any]:
    """The (state, data_state) in the checkpoint of `step`.

    Args:
      step: the step of a complete checkpoint, such as `latest_step()`.
      like: tree of arrays or `jax.ShapeDtypeStruct` with the structure, shapes, dtypes and shardings of the result. Its
        mesh may differ from the mesh of the saved state. A leaf without sharding goes to one device.

    Raises:
      UserError: there is no such checkpoint, one of its files is damaged, or its leaves differ from those of `like`.
    """
    if step not in self.steps():
      have = ", ".join(map(str, self.steps())) or "none"
      raise errors.UserError(f"{self.directory} has no checkpoint of step {step}; it has steps: {have}")
    if fault := self._fault(step):
      raise self._damaged(step, fault)
    want = {k: _target(x) for k, x in _flatten(like).items()}
    with _quiet():
      saved = self._orbax.metadata(step)
      if saved.metadata is None or "data_state" not in (saved.custom_metadata or {}):
        raise self._damaged(step, "its metadata cannot be read")
      if misfit := _misfit(want, saved.metadata):
        raise errors.UserError(f"checkpoint {self.directory / str(step)} is of another run: {misfit}")
      try:
        flat = self._orbax.load(step, want)
      except (KeyError, ValueError, OSError) as e:
        raise self._damaged(step, str(e.__cause__ or e).splitlines()[0]) from e
    return tree.unflatten(like, flat), saved.custom_metadata["data_state"]

  def close(self) -> None:
    """Waits for the last `save`, then ends the background threads."""
    self._orbax.close()

  def __enter__(self):
    return self

  def __exit__(self, *exc):
    self.close()

  def _seal(self) -> None:
    """Writes the checksums. Orbax calls this when the arrays are on disk, before it renames the directory."""
    (path,) = [p for p in self.directory.iterdir() if p.name.partition(".")[0] == str(self._saving)]
    (path / CHECKSUMS).write_text(json.dumps(_checksums(path / "state")))

  def _fault(self, step: int) -> str | None:
    """What is wrong with the files of a checkpoint, or None."""
    path = self.directory / str(step)
    try:
      written = dict(json.loads((path / CHECKSUMS).read_text()))
    except (OSError, ValueError, TypeError):
      return f"{CHECKSUMS} cannot be read"
    found = _checksums(path / "state")
    for k, v in written.items():
      if k not in found:
        return f"file {k} is missing"
      if found[k] != v:
        return f"file {k} has changed: {found[k][0]:,} bytes, expected {v[0]:,} with CRC {v[1]:08x}"
    return None

  def _damaged(self, step: int, fault: str) -> errors.UserError:
    good = max((s for s in self.steps() if s < step and not self._fault(s)), default=None)
    path = self.directory / str(step)
    go_on = "no earlier checkpoint is intact" if good is None else f"delete it to go on from step {good}"
    return errors.UserError(f"checkpoint {path} is damaged ({fault}); {go_on}")


def _flatten(state: Any) -> dict[str, jax.Array]:
  """The leaves by name. Raises ValueError if two leaves have the same name."""
  flat = tree.flatten(state)
  if len(flat) != len(jax.tree.leaves(state)):
    raise ValueError("two leaves of the state have the same path name")
  return flat


def _target(x: Any) -> jax.ShapeDtypeStruct:
  """The shape, dtype and sharding that orbax shall give to a leaf like `x`."""
  sharding = getattr(x, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def _checksums(directory: pathlib.Path) -> dict[str, list[int]]:
  """The size and checksum of each file under a directory, `{file: [bytes, CRC-32]}`."""
  sums = {}
  for path in sorted(p for p in directory.rglob("*") if p.is_file()):
    crc = size = 0
    with path.open("rb") as f:
      while chunk := f.read(1 << 22):
        crc = zlib.crc32(chunk, crc)
        size += len(chunk)
    sums[path.relative_to(directory).as_posix()] = [size, crc]
  return sums


def _misfit(want: dict[str, jax.ShapeDtypeStruct], saved: dict[str, Any]) -> str:
  """How saved leaves differ from wanted leaves in name, shape or dtype; empty if they agree."""

  def describe(x):
    return f"{x.dtype}{list(x.shape)}"

  def bits(x):
    return jax.eval_shape(jax.random.key_data, x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x

  found = [f"it lacks {k}" for k in sorted(want.keys() - saved.keys())]
  found += [f"it has {k}, which this run lacks" for k in sorted(saved.keys() - want.keys())]
  for k in sorted(want.keys() & saved.keys()):
    expected, have = describe(bits(want[k])), describe(saved[k])
    if expected != have:
      found.append(f"{k} is {have}, expected {expected}")
  return "; ".join(found[:4]) + (f"; and {len(found) - 4} more" if len(found) > 4 else "")


@contextlib.contextmanager
def _quiet():
  """Keeps orbax from logging errors that it also raises or returns."""
  before = logging.root.manager.disable
  logging.disable(logging.ERROR)
  try:
    yield
  finally:
    logging.disable(before)
