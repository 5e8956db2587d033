"""Models and adapters of the Hugging Face hub, fetched by its own client into its own cache.

The client's environment variables hold here too: HF_HOME or HF_HUB_CACHE (where the cache is), HF_TOKEN (or
`hf auth login`), HF_HUB_OFFLINE, HF_ENDPOINT (a mirror).
"""

import contextlib
import errno
import pathlib
import re
from collections.abc import Callable
from typing import Any

from lora_jax import errors
from lora_jax.formats import hf

NAME = re.compile(
  r"(?P<repo>\w[\w.-]*(?:/[\w.-]+)?)(?:/(?P<file>[^@\s]+\.gguf))?(?:@(?P<revision>\w[^@\s]*))?", re.ASCII
)
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")


def download(name: str) -> pathlib.Path:
  """The local copy of a model: a directory with config.json and safetensors, or one GGUF file.

  From a directory it fetches the JSON and template files at the top and the safetensors that
  `model.safetensors.index.json` names (or `model.safetensors`), but no other copies of the weights. A revision is
  resolved to a commit first, and every file comes from that commit, whose hash names the directory. Files in the cache
  are not fetched again. If the hub cannot be reached, the last known commit of the revision is used, provided that the
  cache holds it complete.

  Args:
    name: `org/name` or `org/name/file.gguf`, followed by `@revision` for a branch, tag or commit other than `main`.

  Raises:
    UserError: the name is malformed; the hub does not have the model or denies it to this user; the repository has no
      safetensors; there is no connection, no space, or no copy in the cache while offline.
  """
  match = NAME.fullmatch(name)
  if match is None or ".." in name:
    raise errors.UserError(
      f"hf:{name} is not the name of a model on the Hugging Face hub; "
      "write hf:org/name, hf:org/name@revision or hf:org/name/file.gguf"
    )
  return _file(name, match) if match["file"] else _snapshot(name, match)


def download_adapter(name: str) -> pathlib.Path:
  """The local copy of an adapter: a directory with the `ADAPTER` files of one commit; see `download`.

  Args:
    name: `org/name`, followed by `@revision` for a branch, tag or commit other than `main`.

  Raises:
    UserError: as for `download`, or the repository is not an adapter.
  """
  import huggingface_hub

  match = NAME.fullmatch(name)
  if match is None or match["file"] or ".." in name:
    raise errors.UserError(
      f"hf:{name} is not the name of an adapter on the Hugging Face hub; write hf:org/name or hf:org/name@revision"
    )

  def call(fn, **kw):
    return _call(fn, name, via="download_adapter", repo_id=match["repo"], **kw)

  # The weights come second, from the same commit as the config, as in a model.
  fetch = huggingface_hub.snapshot_download
  root = pathlib.Path(call(fetch, revision=match["revision"], allow_patterns=[ADAPTER[0]]))
  if (root / ADAPTER[0]).exists():
    call(fetch, revision=root.name, allow_patterns=[ADAPTER[1]])
  if missing := [f for f in ADAPTER if not (root / f).exists()]:
    listing = call(huggingface_hub.list_repo_files, revision=root.name)
    raise errors.UserError(_lacking(match, missing, listing))
  return root


def _missing(directory: pathlib.Path) -> list[str]:
  return [f for f in ["config.json", *hf.weight_files(directory)] if not (directory / f).exists()]


def _snapshot(name: str, match: re.Match) -> pathlib.Path:
  import huggingface_hub

  repo = match["repo"]

  def fetch(**kw):
    return _call(huggingface_hub.snapshot_download, name, repo_id=repo, **kw)

  # The weights come last and by exact name: without them the directory does not pass for a model.
  small = dict(allow_patterns=["*.json", "*.jinja"], ignore_patterns=["*/*"])
  root = pathlib.Path(fetch(revision=match["revision"], **small))
  if (root / "config.json").exists():
    fetch(revision=root.name, allow_patterns=hf.weight_files(root))
  if missing := _missing(root):
    listing = _call(huggingface_hub.list_repo_files, name, repo_id=repo, revision=root.name)
    raise errors.UserError(_lacking(match, missing, listing))
  return root


def _file(name: str, match: re.Match) -> pathlib.Path:
  import huggingface_hub
  from huggingface_hub import errors as hub

  repo, file, revision = match.group("repo", "file", "revision")
  try:
    path = _call(huggingface_hub.hf_hub_download, name, repo_id=repo, filename=file, revision=revision)
    return pathlib.Path(path)
  except errors.UserError as e:
    absent = isinstance(e.__cause__, hub.EntryNotFoundError)
    if not absent or isinstance(e.__cause__, hub.LocalEntryNotFoundError):  # the latter: missing from the cache
      raise
    listing = _call(huggingface_hub.list_repo_files, name, repo_id=repo, revision=revision)
    have = [f for f in listing if f.endswith(".gguf")]
    raise errors.UserError(f"{_spell(repo, revision)} has no file {file}; {errors.nearest(file, have)}") from e


def _lacking(match: re.Match, missing: list[str], listing: list[str]) -> str:
  """The message about a repository that lacks files of a model or adapter."""
  repo, revision = match.group("repo", "revision")
  hint = ""
  if ADAPTER[0] in missing and "config.json" in listing:
    hint = "; it is a model, not an adapter"
  elif gguf := [f for f in listing if f.endswith(".gguf")]:
    hint = f"; for one of its GGUF files write {_spell(f'{repo}/{gguf[0]}', revision)}"
  elif ADAPTER[0] in listing and ADAPTER[1] not in missing:
    hint = "; it is an adapter: load the model that its adapter_config.json names, then the adapter"
  elif any(f.endswith((".bin", ".pt", ".pth", ".ckpt")) for f in listing):
    hint = "; pickled weights (.bin, .pt) are refused, since they can run code: look for a revision with safetensors"
  shown = ", ".join(sorted(listing)[:15]) + (f" and {len(listing) - 15} more" if len(listing) > 15 else "")
  return f"{_spell(repo, revision)} lacks {', '.join(missing)}{hint}; it holds: {shown or 'nothing'}"


def _call(fn: Callable, name: str, via: str = "download", **kw: Any) -> Any:
  """The result of `fn(**kw)`, a function of the hub's client, whose errors become UserError.

  Args:
    name: name of the model or adapter, for messages.
    via: the function of this module that would fetch it, for messages.
  """
  from huggingface_hub import errors as hub

  try:
    return fn(**kw)
  except Exception as e:  # errors of the client, of its HTTP library, and of the system
    if isinstance(e, hub.LocalEntryNotFoundError) and isinstance(e.__cause__, hub.HfHubHTTPError):
      e = e.__cause__
    raise errors.UserError(f"hf:{name}: {_reason(e, name, via)}") from e


def _reason(e: Exception, name: str, via: str) -> str:
  """What went wrong and what to do about it."""
  import huggingface_hub
  from huggingface_hub import constants, errors as hub

  repo, revision = NAME.fullmatch(name).group("repo", "revision")
  first = next(iter(str(e).strip().splitlines()), "")
  page = f"{constants.ENDPOINT}/{repo}"
  status = getattr(getattr(e, "response", None), "status_code", None)
  token = huggingface_hub.get_token()
  log_in = "log in with `hf auth login` or set HF_TOKEN"
  if isinstance(e, hub.HFValidationError):
    return f"this is not the name of a repository ({first}); write hf:org/name"
  if constants.HF_HUB_OFFLINE and isinstance(e, hub.LocalEntryNotFoundError | hub.OfflineModeIsEnabled):
    return (
      f"HF_HUB_OFFLINE is set and {_cached(repo)}; unset it, or fetch it first where there is a network: "
      f"python -c \"from lora_jax.formats import hub; hub.{via}('{name}')\""
    )
  if status == 401 and "nvalid credentials" in str(e):
    return f"the hub does not accept the token that was sent; {log_in} with a new one"
  if isinstance(e, hub.GatedRepoError):
    return f"the repository is gated; accept its conditions on {page}" + (
      " with the account of your token" if token else f", then {log_in}"
    )
  if isinstance(e, hub.RepositoryNotFoundError) or status == 401:
    return f"the hub has no such repository, or it is private; check the name on {page}; for a private one " + (
      "use a token that may read it (the one that was sent may not)" if token else log_in
    )
  if status == 403:
    return f"access is denied ({first}); use a token that may read {page}"
  if isinstance(e, hub.RevisionNotFoundError):
    return f"the repository has no branch, tag or commit {revision or 'main'}; {errors.nearest(revision, _refs(repo))}"
  if getattr(e, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(e):
    return (
      f"no space left in {constants.HF_HUB_CACHE}; `hf cache` shows what can go, "
      "or set HF_HOME to a directory on a larger disk"
    )
  if isinstance(e, PermissionError) or getattr(e, "errno", None) == errno.EROFS:
    return f"cannot write to the cache ({first}); set HF_HOME to a directory of yours"
  if status is not None:
    return f"the hub answered {status} ({first}); try again later"
  if isinstance(e, hub.LocalEntryNotFoundError) or "Connect" in type(e).__name__:
    return f"{constants.ENDPOINT} cannot be reached and {_cached(repo)}; run the same again when there is a network"
  return (
    f"the download broke off ({type(e).__name__}: {first}); "
    "files that arrived complete are kept, run the same again to go on"
  )


def _refs(repo: str) -> list[str]:
  """The names of a repository's branches and tags; empty if the hub does not list them."""
  import huggingface_hub

  with contextlib.suppress(Exception):  # not every mirror lists them, and this is not the error to report
    refs = huggingface_hub.list_repo_refs(repo)
    return [r.name for r in refs.branches + refs.tags]
  return []


def _spell(repo: str, revision: str | None) -> str:
  return f"hf:{repo}@{revision}" if revision else f"hf:{repo}"


def _cached(repo: str) -> str:
  """A clause that says which complete commits of a repository the cache holds."""
  from huggingface_hub import constants

  folder = pathlib.Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}" / "snapshots"
  found = sorted(folder.glob("*"))
  complete = [p.name for p in found if not _missing(p) or all((p / f).exists() for f in ADAPTER)]
  what = ", ".join(_spell(repo, c) for c in complete) if complete else "no complete copy of it"
  return f"the cache {constants.HF_HUB_CACHE} holds {'only ' if complete else ''}{what}"
