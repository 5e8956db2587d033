"""The hub path: the real client against a small hub on loopback that serves a tiny model."""

import contextlib
import dataclasses
import errno
import functools
import hashlib
import http.server
import json
import os
import pathlib
import re
import subprocess
import sys
import threading
import types
import urllib.parse

import huggingface_hub
import jax
import numpy as np
import pytest
import tokenizers
from huggingface_hub import constants, file_download, hf_api
from huggingface_hub.utils import _http

from lora_jax import errors, models
from lora_jax.formats import hf, hub, peft
from lora_jax.methods import lora

CONFIG = dict(
  model_type="llama",
  vocab_size=13,
  hidden_size=8,
  intermediate_size=12,
  num_hidden_layers=2,
  num_attention_heads=2,
  num_key_value_heads=1,
  max_position_embeddings=32,
)
TOKEN = "hf_secret"


def tensors(seed):
  """A random Llama as (name, array) pairs."""
  rng = np.random.default_rng(seed)
  rows = {
    "self_attn.q_proj": (8, 8),
    "self_attn.k_proj": (4, 8),
    "self_attn.v_proj": (4, 8),
    "self_attn.o_proj": (8, 8),
    "mlp.gate_proj": (12, 8),
    "mlp.up_proj": (12, 8),
    "mlp.down_proj": (8, 12),
    "input_layernorm": (8,),
    "post_attention_layernorm": (8,),
  }
  shapes = {f"model.layers.{i}.{k}.weight": s for i in range(2) for k, s in rows.items()}
  shapes |= {"model.embed_tokens.weight": (13, 8), "model.norm.weight": (8,), "lm_head.weight": (13, 8)}
  return [(k, rng.normal(size=s).astype(np.float32)) for k, s in shapes.items()]


def write_model(directory, seed):
  """A model directory with several shards and a tokenizer."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(hf, "SHARD_BYTES", 1500)
    hf.save(directory, CONFIG, tensors(seed))
  words = {w: i for i, w in enumerate("a b c d e f g h i j k l m".split())}
  tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "a")).save(str(directory / "tokenizer.json"))
  return directory


def contents(directory):
  return {p.relative_to(directory).as_posix(): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


@dataclasses.dataclass
class Repo:
  """What the hub holds under one name: files by commit, commits by branch or tag."""

  commits: dict
  refs: dict
  token: str | None = None  # who may know that it exists
  gated: bool = False


@dataclasses.dataclass
class Hub:
  """A hub's state and what was asked of it: (method, path, range header, token)."""

  repos: dict = dataclasses.field(default_factory=dict)
  requests: list = dataclasses.field(default_factory=list)
  cuts: dict = dataclasses.field(default_factory=dict)  # file -> bytes to send of each coming GET before it is cut
  url: str = ""

  def add(self, name, files, revision="main", **kw):
    repo = self.repos.setdefault(name, Repo({}, {}, **kw))
    commit = hashlib.sha1(f"{name}{revision}{len(repo.commits)}".encode()).hexdigest()
    repo.commits[commit], repo.refs[revision] = files, commit
    return commit

  def got(self, suffix, method="GET"):
    """The requests of file contents whose path ends in `suffix`."""
    return [r for r in self.requests if r[0] == method and r[1].startswith("/files/") and r[1].endswith(suffix)]


def handler(state):
  """Request handler of the endpoints that the client uses: info, tree, resolve, and the storage behind it."""

  class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args):
      pass

    def reply(self, status, body=b"", **headers):
      self.send_response(status)
      for k, v in ({"Content-Length": len(body)} | headers).items():
        self.send_header(k.replace("_", "-"), str(v))
      self.end_headers()
      if self.command == "GET":
        self.wfile.write(body)

    def fail(self, status, code, message=""):
      self.reply(status, X_Error_Code=code, X_Error_Message=message or code)

    def do_HEAD(self):
      self.do_GET()

    def do_GET(self):
      path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
      token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
      state.requests.append((self.command, path, self.headers.get("Range"), token))
      if m := re.fullmatch(r"/files/(.+?)/([0-9a-f]{40})/(.+)", path):
        return self.contents(state.repos[m[1]].commits[m[2]][m[3]], m[3])
      if m := re.fullmatch(r"/api/models/(.+?)/(revision|tree)/(.+)", path):
        name, kind, revision, file = m[1], m[2], m[3], None
      elif m := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/refs)?", path):
        name, kind, revision, file = m[1], "refs" if m[2] else "revision", "main", None
      elif m := re.fullmatch(r"/(.+?)/resolve/([^/]+)/(.+)", path):
        name, kind, revision, file = m[1], "resolve", m[2], m[3]
      else:
        return self.reply(404)
      return self.hub(name, kind, revision, file, token)

    def hub(self, name, kind, revision, file, token):
      if token not in (None, TOKEN):
        return self.fail(401, "", "Invalid credentials in Authorization header")
      repo = state.repos.get(name)
      if repo is None or repo.token not in (None, token):
        return self.fail(404, "RepoNotFound") if token else self.fail(401, "RepoNotFound", "Invalid username")
      commit = repo.refs.get(revision, revision)
      if commit not in repo.commits:
        return self.fail(404, "RevisionNotFound")
      files = repo.commits[commit]
      if kind == "refs":
        branches = [{"name": k, "ref": f"refs/heads/{k}", "targetCommit": c} for k, c in repo.refs.items()]
        body = {"branches": branches, "tags": [], "converts": []}
        return self.reply(200, json.dumps(body).encode(), Content_Type="application/json")
      if kind == "revision":
        body = {"id": name, "sha": commit, "siblings": [{"rfilename": f} for f in files]}
        return self.reply(200, json.dumps(body).encode(), Content_Type="application/json")
      if kind == "tree":
        body = [
          {"type": "file", "path": f, "size": len(x), "oid": hashlib.sha1(x).hexdigest()} for f, x in files.items()
        ]
        return self.reply(200, json.dumps(body).encode(), Content_Type="application/json")
      if repo.gated:
        return self.fail(403 if token else 401, "GatedRepo")
      if file not in files:
        return self.fail(404, "EntryNotFound")
      digest = hashlib.sha256(files[file]).hexdigest()
      storage = f"{state.url.replace('127.0.0.1', 'localhost')}/files/{name}/{commit}/{file}"
      linked = dict(X_Linked_Etag=f'"{digest}"', X_Linked_Size=len(files[file]), X_Repo_Commit=commit)
      return self.reply(302, Location=storage, **linked)

    def contents(self, data, file):
      total, start = len(data), 0
      if m := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or ""):
        start = int(m[1])
      body = data[start:]
      self.send_response(206 if start else 200)
      self.send_header("Content-Length", str(len(body)))
      if start:
        self.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
      self.end_headers()
      cuts = state.cuts.get(file)
      self.wfile.write(body[: cuts.pop(0)] if cuts else body)

  return Handler


def point_to(monkeypatch, url):
  """Has the client talk to the hub at `url`; it reads HF_ENDPOINT only when it is imported."""
  monkeypatch.setattr(constants, "ENDPOINT", url)
  monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
  monkeypatch.setattr(hf_api.api, "endpoint", url)


@pytest.fixture
def served(tmp_path, monkeypatch):
  """A running hub and a client that knows no other: its own cache, no token, online, plain HTTP, no waiting."""
  state = Hub()
  server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler(state))
  server.daemon_threads = True
  state.url = f"http://127.0.0.1:{server.server_port}"
  threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=0.01), daemon=True).start()
  for k in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
    monkeypatch.delenv(k, raising=False)
  settings = dict(
    HF_HUB_CACHE=str(tmp_path / "cache"),
    HF_TOKEN_PATH=str(tmp_path / "token"),
    HF_HUB_OFFLINE=False,
    HF_HUB_DISABLE_XET=True,
  )
  for k, v in settings.items():
    monkeypatch.setattr(constants, k, v)
  point_to(monkeypatch, state.url)
  for module in (file_download, _http):
    monkeypatch.setattr(module, "time", types.SimpleNamespace(sleep=lambda seconds: None))
  huggingface_hub.utils.disable_progress_bars()
  yield state
  huggingface_hub.utils.enable_progress_bars()
  _http.close_session()
  server.shutdown()
  server.server_close()


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
  return write_model(tmp_path_factory.mktemp("model"), seed=0)


@pytest.fixture
def tiny(served, model_dir):
  """The hub with `org/tiny`: sharded, with other copies of the weights beside the shards."""
  extra = {"README.md": b"#", "pytorch_model.bin": b"\x80", "original/consolidated.safetensors": b"x"}
  extra |= {"model.fp16.safetensors": b"y", "onnx/config.json": b"{}", "onnx/model.onnx": b"z"}
  served.add("org/tiny", contents(model_dir) | extra)
  return served


def assert_same(path, directory):
  """The model at `path` equals the one in `directory` bit for bit."""
  a, b = models.load(str(path), dtype="float32"), models.load(str(directory), dtype="float32")
  jax.tree.map(np.testing.assert_array_equal, a.params, b.params)
  assert a.config == b.config and a.tokenizer.encode("a") == b.tokenizer.encode("a")


def unplug(monkeypatch):
  """The hub is gone: its port answers nothing."""
  point_to(monkeypatch, "http://127.0.0.1:9")


def refused(name, *words, download=hub.download):
  """Downloading `name` is one readable error of one line that holds all of `words`."""
  with pytest.raises(errors.UserError) as e:
    download(name)
  message = str(e.value)
  assert f"hf:{name.partition('@')[0].removesuffix('/x.gguf')}" in message and "\n" not in message
  for w in words:
    assert w in message, message


def test_sharded_model_arrives_bit_for_bit_and_nothing_else(tiny, model_dir):
  path = hub.download("org/tiny")
  assert len(list(path.glob("*.safetensors"))) > 2
  assert contents(path) == contents(model_dir)
  assert_same(path, model_dir)


def test_unsharded_model(served, tmp_path):
  hf.save(tmp_path / "m", CONFIG, tensors(1))
  files = contents(tmp_path / "m")
  served.add("org/one", files | {"model-fp16.safetensors": b"x", "chat_template.jinja": b"{{ messages }}"})
  path = hub.download("org/one")
  assert contents(path) == files | {"chat_template.jinja": b"{{ messages }}"}


def test_revisions_are_kept_apart(tiny, model_dir, tmp_path):
  other = write_model(tmp_path / "other", seed=7)
  commit = tiny.add("org/tiny", contents(other), revision="exp/v2")
  assert_same(hub.download("org/tiny@exp/v2"), other)
  assert_same(hub.download("org/tiny"), model_dir)
  assert_same(hub.download(f"org/tiny@{commit}"), other)
  assert hub.download("org/tiny@exp/v2").name == commit


def test_a_branch_that_moves_is_followed(tiny, tmp_path):
  old = hub.download("org/tiny")
  new = write_model(tmp_path / "new", seed=3)
  commit = tiny.add("org/tiny", contents(new))
  path = hub.download("org/tiny")
  assert path.name == commit != old.name
  assert_same(path, new)


def test_a_branch_that_moves_meanwhile_mixes_no_commits(tiny, model_dir, tmp_path, monkeypatch):
  new = contents(write_model(tmp_path / "new", seed=3))
  weight_files = hub.hf.weight_files
  monkeypatch.setattr(hub.hf, "weight_files", lambda path: tiny.add("org/tiny", new) and weight_files(path))
  assert_same(hub.download("org/tiny"), model_dir)


def test_cached_model_is_not_fetched_again(tiny):
  path = hub.download("org/tiny")
  tiny.requests.clear()
  assert hub.download("org/tiny") == path
  assert not tiny.got("")
  tiny.requests.clear()
  hub.download(f"org/tiny@{path.name}")
  assert not tiny.got("")


def test_private_repository(served, model_dir, monkeypatch):
  served.add("org/private", contents(model_dir), token=TOKEN)
  refused("org/private", "private", "HF_TOKEN", "hf auth login", f"{served.url}/org/private")
  monkeypatch.setenv("HF_TOKEN", "hf_other")
  refused("org/private", "does not accept the token")
  monkeypatch.setenv("HF_TOKEN", TOKEN)
  assert_same(hub.download("org/private"), model_dir)
  assert {r[3] for r in served.requests if r[1].startswith("/files/")} == {None}  # the storage host gets no token


def test_unknown_repository(served, monkeypatch):
  refused("org/nothing", "no such repository", "private", "HF_TOKEN")
  monkeypatch.setenv("HF_TOKEN", TOKEN)
  refused("org/nothing", "no such repository", "the one that was sent may not")


def test_gated_repository(served, model_dir, monkeypatch):
  served.add("org/gated", contents(model_dir), gated=True)
  refused("org/gated", "gated", "accept its conditions", f"{served.url}/org/gated", "HF_TOKEN")
  monkeypatch.setenv("HF_TOKEN", TOKEN)
  refused("org/gated", "gated", "accept its conditions", "account of your token")
  served.repos["org/gated"].gated = False
  assert_same(hub.download("org/gated"), model_dir)


def test_unknown_revision(tiny):
  tiny.add("org/tiny", {}, revision="exp/v2")
  refused("org/tiny@exp/v3", "no branch, tag or commit exp/v3", "did you mean 'exp/v2'")
  refused("org/tiny@nightly", "valid: exp/v2, main")
  refused(f"org/tiny@{'0' * 40}", f"no branch, tag or commit {'0' * 40}")


@pytest.mark.parametrize(
  "files, words",
  [
    (["config.json", "pytorch_model.bin"], ["lacks model.safetensors", "pickled", "pytorch_model.bin"]),
    (["a-Q4.gguf"], ["lacks config.json", "hf:org/odd/a-Q4.gguf"]),
    (["adapter_config.json", "adapter_model.safetensors"], ["lacks config.json", "adapter"]),
    (["config.json", *[f"f{i}" for i in range(20)]], ["f19", "and 6 more"]),
    (["model.safetensors"], ["lacks config.json"]),
    ([], ["holds: nothing"]),
  ],
)
def test_repository_that_is_no_model(served, files, words):
  served.add("org/odd", dict.fromkeys(files, b"{}"))
  refused("org/odd", *words)
  assert not any(served.got(f) for f in (".bin", ".gguf", ".safetensors"))


def test_missing_shard_is_named(tiny, model_dir):
  files = contents(model_dir)
  shard = sorted(f for f in files if f.endswith(".safetensors"))[1]
  del files[shard]
  tiny.add("org/hole", files)
  refused("org/hole", f"lacks {shard}")


@pytest.mark.parametrize("weight_map", [{"a": "../../etc/passwd"}, {"a": "*"}, {"a": 3}, [], None])
def test_index_that_names_no_files_of_the_repository(served, weight_map):
  index = {"model.safetensors.index.json": json.dumps({"weight_map": weight_map}).encode()}
  served.add("org/bad", index | {"config.json": b"{}", "x.safetensors": b"x"})
  with pytest.raises(errors.UserError, match="weight_map"):
    hub.download("org/bad")
  assert not served.got(".safetensors")


def shard_of(directory):
  return sorted(directory.glob("*.safetensors"))[1].name


def test_connection_cut_once_resumes_where_it_broke(tiny, model_dir, monkeypatch):
  monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 100)
  shard = shard_of(model_dir)
  tiny.cuts[shard] = [700]
  with contextlib.suppress(errors.UserError):  # older clients leave it to the next call
    hub.download("org/tiny")
  assert_same(hub.download("org/tiny"), model_dir)
  assert [r[2] for r in tiny.got(shard)] == [None, "bytes=700-"]


def test_connection_cut_for_good_leaves_nothing_half_written(tiny, model_dir, monkeypatch):
  shard = shard_of(model_dir)
  tiny.cuts[shard] = [700, *[0] * 20]
  refused("org/tiny", "broke off", "run the same again")
  snapshot = next(pathlib.Path(constants.HF_HUB_CACHE).glob("models--*/snapshots/*"))
  assert (snapshot / "config.json").exists() and not (snapshot / shard).exists()

  with monkeypatch.context() as patch:
    patch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused("org/tiny", "HF_HUB_OFFLINE", "no complete copy")
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    unplug(patch)
    refused("org/tiny", "cannot be reached", "no complete copy")

  arrived = [f for f in contents(snapshot) if f.endswith(".safetensors")]
  tiny.cuts.clear()
  tiny.requests.clear()
  assert_same(hub.download("org/tiny"), model_dir)
  assert len(tiny.got(shard)) == 1
  assert not tiny.got("config.json") and not any(tiny.got(f) for f in arrived)


def test_offline_uses_the_cache(tiny, model_dir, monkeypatch):
  path = hub.download("org/tiny")
  tiny.requests.clear()
  monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
  assert hub.download("org/tiny") == path
  assert_same(hub.download(f"org/tiny@{path.name}"), model_dir)
  refused("org/tiny@v2", "HF_HUB_OFFLINE", f"holds only hf:org/tiny@{path.name}")
  refused("org/other", "HF_HUB_OFFLINE", "no complete copy", "hub.download('org/other')")
  assert not tiny.requests


def test_hub_out_of_reach_uses_the_cache(tiny, model_dir, monkeypatch):
  path = hub.download("org/tiny")
  unplug(monkeypatch)
  assert hub.download("org/tiny") == path
  refused("org/other", "http://127.0.0.1:9 cannot be reached", "no complete copy")


def test_shard_removed_from_the_cache_is_noticed_offline(tiny, model_dir, monkeypatch):
  path = hub.download("org/tiny")
  (path / shard_of(path)).unlink()
  monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
  refused("org/tiny", "HF_HUB_OFFLINE", "no complete copy")


def test_gguf_file(served, monkeypatch):
  first = served.add("org/quants", {"a-Q4_1.gguf": b"GGUF1", "sub/b.gguf": b"GGUF2", "a-F16.gguf": b"GGUF3"}, "v1")
  served.add("org/quants", {"a-Q4_1.gguf": b"GGUF4"})
  assert hub.download("org/quants/sub/b.gguf@v1").read_bytes() == b"GGUF2"
  path = hub.download("org/quants/a-Q4_1.gguf")
  assert path.read_bytes() == b"GGUF4" and path.suffix == ".gguf"
  assert hub.download(f"org/quants/a-Q4_1.gguf@{first}").read_bytes() == b"GGUF1"
  assert not served.got("F16.gguf")
  with pytest.raises(errors.UserError, match="no file a-Q4_0.gguf; did you mean 'a-Q4_1.gguf'"):
    hub.download("org/quants/a-Q4_0.gguf")
  refused("org/nothing/x.gguf", "no such repository")
  monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
  assert hub.download("org/quants/a-Q4_1.gguf") == path
  refused("org/quants/x.gguf", "HF_HUB_OFFLINE", "hub.download('org/quants/x.gguf')")


@pytest.mark.parametrize(
  "error, words",
  [
    (OSError(errno.ENOSPC, "No space left on device"), ["no space left", "HF_HOME"]),
    (RuntimeError("Data processing error: No space left on device (os error 28)"), ["no space left"]),
    (PermissionError(errno.EACCES, "Permission denied", "/cache"), ["cannot write", "HF_HOME"]),
    (OSError(errno.EROFS, "Read-only file system"), ["cannot write"]),
    (TimeoutError("timed out"), ["broke off", "TimeoutError", "run the same again"]),
  ],
)
def test_trouble_of_the_machine(tiny, monkeypatch, error, words):
  def write(*args, **kw):
    raise error

  monkeypatch.setattr(file_download, "http_get", write)
  refused("org/tiny", *words)


@pytest.mark.parametrize(
  "status, words",
  [(s, [f"answered {s}", "try again later"]) for s in (429, 500, 503)]
  + [(401, ["no such repository", "HF_TOKEN"]), (403, ["access is denied"])],
)
def test_refusal_without_a_reason(tiny, monkeypatch, status, words):
  class Broken(handler(tiny)):
    def hub(self, *args):
      self.reply(status)

  server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Broken)
  threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=0.01), daemon=True).start()
  point_to(monkeypatch, f"http://127.0.0.1:{server.server_port}")
  refused("org/tiny", *words)
  server.shutdown()
  server.server_close()


@pytest.mark.parametrize(
  "name",
  [
    "",
    "org/",
    "/name",
    "org/name/more",
    "org/name@",
    "org/name@/etc/passwd",
    "org/name@../../x",
    "org/name@a/../../x",
    "../name",
    "org/../x.gguf",
    "org/name/../../x.gguf",
    "org name",
    "org/na--me",
    "org/name.git",
    "https://huggingface.co/org/name",
    "org/näme",
  ],
)
def test_malformed_name(served, name):
  with pytest.raises(errors.UserError, match="hf:org/name") as e:
    hub.download(name)
  assert name in str(e.value)
  assert not served.requests


@pytest.fixture
def adapter(tiny, model_dir, tmp_path):
  """An adapter of `org/tiny`, which is also on the hub as `org/adapter`, and its commit there."""
  model = models.load(str(model_dir), dtype="float32")
  params, mask = lora.init(jax.random.key(0), model.params)
  peft.save(model, jax.tree.map(lambda x, m: x + 1 if m else x, params, mask), tmp_path / "adapter")
  beside = {"README.md": b"#", "adapter_model.bin": b"\x80", "tokenizer.json": b"{}", "sub/adapter_config.json": b"{}"}
  return tmp_path / "adapter", tiny.add("org/adapter", contents(tmp_path / "adapter") | beside)


def test_adapter(tiny, model_dir, adapter, monkeypatch):
  directory, commit = adapter
  path = hub.download_adapter("org/adapter")
  assert path.name == commit and contents(path) == contents(directory)
  model = models.load(str(model_dir), dtype="float32")
  jax.tree.map(np.testing.assert_array_equal, peft.load(model, "hf:org/adapter"), peft.load(model, directory))
  assert peft.head("hf:org/adapter") == {}
  tiny.add("org/adapter", {"adapter_config.json": b"{}", "adapter_model.safetensors": b""})
  assert hub.download_adapter(f"org/adapter@{commit}") == path
  tiny.requests.clear()
  monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
  jax.tree.map(np.testing.assert_array_equal, peft.load(model, f"hf:org/adapter@{commit}"), peft.load(model, directory))
  refuse = functools.partial(refused, download=hub.download_adapter)
  refuse("org/adapter@v2", "HF_HUB_OFFLINE", f"holds only hf:org/adapter@{commit}")
  refuse("org/other", "no complete copy", "hub.download_adapter('org/other')")
  assert not tiny.requests


def test_repository_that_is_no_adapter(tiny):
  refuse = functools.partial(refused, download=hub.download_adapter)
  refuse("org/tiny", "lacks adapter_config.json, adapter_model.safetensors", "it is a model, not an adapter")
  tiny.add("org/pickled", {"adapter_config.json": b"{}", "adapter_model.bin": b"\x80"})
  refuse("org/pickled", "lacks adapter_model.safetensors", "pickled")
  refuse("org/nothing", "no such repository")
  refuse("org/pickled@v9", "no branch, tag or commit v9")
  assert not tiny.got(".bin") and not tiny.got("config.json", "HEAD")
  for name in ("", "org/name/x.gguf", "../x", "org/a/../b"):
    with pytest.raises(errors.UserError, match="not the name of an adapter"):
      hub.download_adapter(name)


def test_environment_of_a_fresh_process(tiny, model_dir, tmp_path):
  """Users set the environment; here the client reads it itself."""
  code = "import sys; from lora_jax.formats import hub; print(hub.download(sys.argv[1]))"
  env = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
  env |= {"HF_ENDPOINT": tiny.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
  run = [sys.executable, "-c", code, "org/tiny"]
  online = subprocess.run(run, env=env, capture_output=True, text=True, check=True)
  assert_same(online.stdout.strip(), model_dir)
  assert pathlib.Path(online.stdout.strip()).is_relative_to(tmp_path / "home")
  offline = subprocess.run(run, env=env | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=True)
  assert offline.stdout == online.stdout
