"""Text to token ids and back, and chat templates.

A tokenizer comes from a Hugging Face directory (tokenizer.json) or from the metadata of a GGUF file. It gives the same
ids as `transformers.AutoTokenizer` on the same files, without importing transformers.
"""

import dataclasses
import functools
import itertools
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tokenizers

from lora_jax import errors, files
from lora_jax.formats import hf
from lora_jax.tokenizer import ggml, templates

CHUNK = 4096  # texts that are encoded at once, since the encodings of `tokenizers` take much memory
SPECIAL = ("bos", "eos", "pad", "cls", "sep", "mask")
THOUGHTS = ("reasoning_content", "thinking", "reasoning")  # templates read the first or the second
# Special tokens of a directory that does not list them, by its tokenizer_class in lower case or its model_type.
BERT = {"pad": "[PAD]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
ROBERTA = {"bos": "<s>", "eos": "</s>", "pad": "<pad>", "cls": "<s>", "sep": "</s>", "mask": "<mask>"}
GPT2 = {"bos": "<|endoftext|>", "eos": "<|endoftext|>"}
T5 = {"eos": "</s>", "pad": "<pad>"}
DEFAULTS = {"bert": BERT, "distilbert": BERT, "roberta": ROBERTA, "gpt2": GPT2, "t5": T5, "mt5": T5}


@dataclasses.dataclass(frozen=True)
class Tokenizer:
  """A tokenizer and its chat template.

  Fields:
    backend: the `tokenizers.Tokenizer`, without truncation or padding.
    chat_template: Jinja source, or None.
    bos_id, eos_id, pad_id, cls_id, sep_id, mask_id: ids of special tokens, None if the model has no such token.
    ends: further ids at which the model ends a text, such as those in generation_config.json.
    rows: number of rows of the model's embedding, None if it is not known.
    source: where it was read from, for messages.
  """

  backend: tokenizers.Tokenizer = dataclasses.field(repr=False)
  chat_template: str | None = None
  bos_id: int | None = None
  eos_id: int | None = None
  pad_id: int | None = None
  cls_id: int | None = None
  sep_id: int | None = None
  mask_id: int | None = None
  ends: tuple[int, ...] = ()
  rows: int | None = None
  source: str = dataclasses.field(default="", compare=False)

  @property
  def vocab_size(self) -> int:
    """Number of tokens, including added ones. The embedding may have more rows."""
    return self.backend.get_vocab_size()

  @property
  def begin(self) -> tuple[int, ...]:
    """The ids that `add_special_tokens` puts before a text, such as BOS."""
    probe = self._run(self.backend.encode, "a")
    rows = zip(probe.ids, probe.sequence_ids, strict=True)
    return tuple(i for i, _ in itertools.takewhile(lambda row: row[1] is None, rows))

  @functools.cached_property
  def end_ids(self) -> tuple[int, ...]:
    """All tokens that end a text: `ends`, `eos_id`, and the token that the chat template puts after an answer."""
    known = (*self.ends, self.eos_id, self._turn_end())
    return tuple(dict.fromkeys(i for i in known if i is not None))

  def _turn_end(self) -> int | None:
    mark = "answer#1"
    try:
      text = self.chat([{"role": "user", "content": "question"}, {"role": "assistant", "content": mark}])
    except errors.UserError:  # there is no template, or it requires other messages
      return None
    ids = self._run(self.backend.encode, text.rpartition(mark)[2], add_special_tokens=False).ids
    added = self.backend.get_added_tokens_decoder()
    return ids[0] if ids and ids[0] in added and added[ids[0]].special else None

  def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
    """The ids of a text. Special tokens that are spelled out in it become their own ids.

    Args:
      add_special_tokens: add the tokens that frame the model's inputs.

    Raises:
      UserError: see `check`.
    """
    ids = self._run(self.backend.encode, text, add_special_tokens=add_special_tokens).ids
    self.check([ids])
    return ids

  def encode_batch(self, texts: Iterable[str], add_special_tokens: bool = False) -> list[list[int]]:
    """The ids of each text, as of `encode`, on all cores."""
    encode = functools.partial(self._run, self.backend.encode_batch_fast, add_special_tokens=add_special_tokens)
    found = [x.ids for chunk in _chunks(list(texts)) for x in encode(chunk)]
    self.check(found)
    return found

  def check(self, rows: Iterable[Sequence[int]]) -> None:
    """Raises UserError if an id in `rows` is beyond the model's embedding, where JAX would read the last row."""
    most = max((row.max() if isinstance(row, np.ndarray) else max(row) for row in rows if len(row)), default=0)
    if self.rows is not None and most >= self.rows:
      raise errors.UserError(
        f"token {self.backend.id_to_token(int(most))!r} has id {most}, but the embedding has {self.rows} rows: resize "
        "the model's embedding or remove the token from the tokenizer"
      )

  def encode_offsets(self, texts: Sequence[str]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The ids int32 [n] and offsets int32 [n, 2] of each text, on all cores.

    Offsets are the first character of each token and the one after its last. Several tokens may share a character.
    Blanks that a tokenizer drops or does not count go to the token that follows.
    """
    greedy = {i: t.content for i, t in self.backend.get_added_tokens_decoder().items() if t.lstrip or t.rstrip}
    for chunk in _chunks(texts):
      encoded = self._run(self.backend.encode_batch, chunk, add_special_tokens=False)
      for text, x in zip(chunk, encoded, strict=True):
        ids, offsets = np.array(x.ids, np.int32), np.array(x.offsets, np.int32).reshape(-1, 2)
        ends = np.maximum.accumulate(offsets[:, 1])
        offsets = np.stack([np.minimum(offsets[:, 0], np.append(0, ends[:-1])), ends], axis=1)
        for k in np.flatnonzero(np.isin(ids, list(greedy))) if greedy else ():
          # Such a token swallows the blanks around it, which may belong to another piece of the text.
          a, b = offsets[k]
          if (at := text.find(content := greedy[int(ids[k])], a, b)) >= 0:
            offsets[k] = at, at + len(content)
        yield ids, offsets

  def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
    """The text of ids. Bytes that are not UTF-8 become U+FFFD."""
    return self._run(self.backend.decode, [int(i) for i in ids], skip_special_tokens=skip_special_tokens)

  def _run(self, fn: Callable, *args: Any, **kw: Any) -> Any:
    """The result of `fn(*args, **kw)`, a method of the backend; it fails if a regex of the tokenizer takes too long."""
    with errors.parsing(f"the tokenizer of {self.source or 'this model'} fails"):
      return fn(*args, **kw)

  def chat(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = False, **variables: Any) -> str:
    """The chat template's text for messages such as {"role": "user", "content": "..."}.

    As in transformers, a value of None in a message counts as absent, and an assistant's thoughts may have any of the
    names `THOUGHTS`.

    Args:
      add_generation_prompt: end with what precedes the assistant's next message.
      variables: further variables of the template, such as `tools`.

    Raises:
      UserError: the model has no template, or its template refuses the messages.
    """
    if self.chat_template is None:
      raise errors.UserError("this model has no chat template: use prompt and response, or an instruction-tuned model")
    ids = {k: getattr(self, f"{k}_id") for k in SPECIAL}
    names = {f"{k}_token": self.backend.id_to_token(i) for k, i in ids.items() if i is not None}
    given = {"tools": None, "documents": None} | names | variables
    given |= {"messages": [_message(m) for m in messages], "add_generation_prompt": add_generation_prompt}
    return templates.render(self.chat_template, given, self.source)

  def save(self, directory: str | os.PathLike) -> None:
    """Writes tokenizer.json and tokenizer_config.json, which `from_directory` and transformers read."""
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for k in SPECIAL:
      if (i := getattr(self, f"{k}_id")) is not None:
        config[f"{k}_token"] = self.backend.id_to_token(i)
    if self.chat_template is not None:
      config["chat_template"] = self.chat_template
    files.write(directory / "tokenizer.json", self.backend.to_str(pretty=True).encode())
    files.write(directory / "tokenizer_config.json", json.dumps(config, indent=2, ensure_ascii=False).encode())


def from_directory(directory: str | os.PathLike) -> Tokenizer:
  """The tokenizer of a Hugging Face directory.

  Reads tokenizer.json and, where they exist, tokenizer_config.json, special_tokens_map.json and chat_template.jinja.
  The post-processor of tokenizer.json frames a text; `add_bos_token` is ignored, as in transformers.

  Raises:
    UserError: a file is missing or malformed, or names a token that the vocabulary lacks.
  """
  directory = pathlib.Path(directory)
  file = directory / "tokenizer.json"
  if not file.exists():
    raise errors.UserError(f"{directory} has no tokenizer.json; transformers' `save_pretrained` writes one")
  text = files.read(file)
  with errors.parsing(f"{file} is not a tokenizer"):
    backend = tokenizers.Tokenizer.from_str(text)
    backend.no_truncation()
    backend.no_padding()
  config = {}
  for name in ("special_tokens_map.json", "tokenizer_config.json"):
    if (directory / name).exists():
      config |= hf.read_json(directory / name)
  tokens = {k: v.get("content") if isinstance(v := config.get(f"{k}_token"), dict) else v for k in SPECIAL}
  if bad := {k: v for k, v in tokens.items() if not isinstance(v, str | None)}:
    raise errors.UserError(f"{directory}: expected special tokens that are strings, found {str(bad):.200}")
  tokens |= {k: v for k, v in _defaults(directory, config).items() if backend.token_to_id(v) is not None}
  if missing := {k: v for k, v in tokens.items() if v is not None and backend.token_to_id(v) is None}:
    raise errors.UserError(f"{directory}: tokens that tokenizer.json does not have: {missing}")
  with errors.parsing(f"{file} is not a tokenizer"):
    known = {t.content for t in backend.get_added_tokens_decoder().values() if t.special}
    backend.add_special_tokens([v for v in tokens.values() if v is not None and v not in known])
  ids = {f"{k}_id": None if v is None else backend.token_to_id(v) for k, v in tokens.items()}
  return Tokenizer(backend, _chat_template(directory, config.get("chat_template")), **ids, source=str(directory))


def from_gguf(metadata: Mapping[str, Any], source: str = "") -> Tokenizer:
  """The tokenizer that a GGUF file describes in its metadata (`tokenizer.ggml.*`, `tokenizer.chat_template`).

  It is byte-level BPE ("gpt2"), SentencePiece BPE with byte fallback ("llama"), WordPiece ("bert") or Unigram ("t5").
  Control tokens and tokens with a role, such as bos, become special tokens. User-defined tokens become plain added
  tokens.

  Args:
    source: the file, for messages.

  Raises:
    UserError: the tokenizer is of another kind, or fields are missing or inconsistent.
  """
  backend, ids = ggml.build(metadata)
  template = _text_or_none(metadata.get("tokenizer.chat_template"), f"chat template of {source or 'the GGUF file'}:")
  return Tokenizer(backend, template, **{f"{k}_id": i for k, i in ids.items()}, source=source)


def _defaults(directory: pathlib.Path, config: Mapping[str, Any]) -> dict[str, str]:
  """The usual special tokens of a kind of model, except those that the files mention."""
  file = directory / "config.json"
  model_type = hf.read_json(file).get("model_type") if file.exists() else None
  kind = str(config.get("tokenizer_class") or model_type).lower().removesuffix("fast").removesuffix("tokenizer")
  return {k: v for k, v in DEFAULTS.get(kind, {}).items() if f"{k}_token" not in config}


def _chat_template(directory: pathlib.Path, value: Any) -> str | None:
  file = directory / "chat_template.jinja"
  if file.exists():
    return files.read(file)
  where = f"chat template in {directory / 'tokenizer_config.json'}:"
  if isinstance(value, list):
    table = {str(x.get("name")): x.get("template") for x in value if isinstance(x, dict)}
    value = errors.choose("default", table, where)
  return _text_or_none(value, where)


def _text_or_none(value: Any, what: str) -> str | None:
  if not isinstance(value, str | None):
    raise errors.UserError(f"{what} expected a string, found {value!r:.100}")
  return value


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
  """A message as templates read it: without None, and with thoughts under the names that templates use."""
  message = {k: v for k, v in message.items() if v is not None}
  thoughts = next((message[k] for k in THOUGHTS if k in message), None)
  return message if thoughts is None else {"thinking": thoughts} | message | {"reasoning_content": thoughts}


def _chunks(texts: Sequence[str]) -> Iterator[Sequence[str]]:
  return (texts[i : i + CHUNK] for i in range(0, len(texts), CHUNK))
