"""Builds the tokenizer that a GGUF file describes, as a `tokenizers.Tokenizer`."""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from lora_jax import errors

# How text is cut before merging, for each value of tokenizer.ggml.pre: the expressions that the models were trained
# with. None is GPT-2's.
LLAMA3 = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
  r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_WORD = r"[^\r\n\p{L}\p{N}]?"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEKKEN = rf"{_WORD}{_UPPER}*{_LOWER}+|{_WORD}{_UPPER}+{_LOWER}*|\p{{N}}" + _REST
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
GPT4O = rf"{_WORD}{_UPPER}*{_LOWER}+{_SHORT}|{_WORD}{_UPPER}+{_LOWER}*{_SHORT}|\p{{N}}{{1,3}}" + _REST
SPLITS = {
  # smollm as in transformers. SmolLM2's own tokenizer also isolates digits, with other ids for "\n\n1" or "  1".
  **dict.fromkeys(("default", "gpt-2", "smollm", "olmo", "phi-2", "mpt")),
  **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "dbrx", "smaug-bpe"), LLAMA3),
  **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), QWEN2),
  "tekken": TEKKEN,
  "gpt-4o": GPT4O,
}
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4  # tokenizer.ggml.token_type
SPACE = "\u2581"  # a blank in SentencePiece vocabularies
FIELDS = {
  **{"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"},
  **{"cls": "cls", "sep": "seperator", "mask": "mask"},  # the format's spelling
}


@errors.parsing("GGUF tokenizer is damaged")
def build(metadata: Mapping[str, Any]) -> tuple[tokenizers.Tokenizer, dict[str, int | None]]:
  """The tokenizer in a file's metadata, and its special tokens {bos, eos, pad, cls, sep, mask: id or None}.

  Raises:
    UserError: the kind of tokenizer is unknown, or fields are missing or inconsistent.
  """
  get = functools.partial(_field, metadata)
  kinds = {"gpt2": _byte_level, "llama": _sentencepiece, "bert": _wordpiece, "t5": _unigram}
  make = errors.choose(get("model"), kinds, "GGUF tokenizer")
  tokens, types = get("tokens"), get("token_type")
  if not isinstance(tokens, list) or not isinstance(types, list) or len(types) != len(tokens):
    raise errors.UserError("GGUF tokenizer: expected as many tokenizer.ggml.token_type as tokenizer.ggml.tokens")
  ids = {k: get(f"{name}_token_id", None) for k, name in FIELDS.items()}
  if make is _wordpiece:
    # A file may omit the tokens that every BERT has, or call the first token bos.
    named = {k: tokens.index(f"[{k.upper()}]") for k in FIELDS if f"[{k.upper()}]" in tokens}
    ids = {k: i if i is not None else named.get(k) for k, i in ids.items()} | {"bos": None, "eos": None}
  if bad := {k: i for k, i in ids.items() if i is not None and not 0 <= i < len(tokens)}:
    raise errors.UserError(f"GGUF tokenizer: {bad} outside of a vocabulary of {len(tokens)}")
  special = {i for i, kind in enumerate(types) if kind == CONTROL or i in ids.values()}
  plain = {i for i, kind in enumerate(types) if kind == USER_DEFINED} - special
  backend = make(get, tokens, special | plain)
  spelling = {i: t for t, i in backend.get_vocab().items()} if make is not _byte_level else {}
  for group, is_special in ((special, True), (plain, False)):
    added = (spelling.get(i, tokens[i]) for i in sorted(group))
    backend.add_tokens([tokenizers.AddedToken(t, normalized=False, special=is_special) for t in added])
  _frame(backend, {k: None if i is None else tokens[i] for k, i in ids.items()}, get)
  return backend, {k: i for k, i in ids.items() if k != "unk"}


_REQUIRED = object()


def _field(metadata: Mapping[str, Any], name: str, default: Any = _REQUIRED) -> Any:
  if name == "architecture":
    return metadata.get("general.architecture", default)
  value = metadata.get(f"tokenizer.ggml.{name}", default)
  if value is _REQUIRED:
    raise errors.UserError(f"GGUF tokenizer: no metadata tokenizer.ggml.{name}")
  return value


def _byte_level(get: Callable, tokens: list[str], added: set[int]) -> tokenizers.Tokenizer:
  pre = get("pre", "default")
  split = errors.choose(pre, SPLITS, "tokenizer.ggml.pre")
  merges = [tuple(m.split(" ")) for m in get("merges")]
  spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  alphabet = frozenset(spell.alphabet())
  # The text of an added token is literal. Other words are spelled in the alphabet of bytes, unless they already are.
  words = (t if i in added or alphabet.issuperset(t) else spell.pre_tokenize_str(t)[0][0] for i, t in enumerate(tokens))
  backend = tokenizers.Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(words)}, merges=merges))
  cut = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
  if split is not None:
    cut = pre_tokenizers.Sequence([pre_tokenizers.Split(tokenizers.Regex(split), "isolated"), cut])
  backend.pre_tokenizer = cut
  backend.decoder = decoders.ByteLevel()
  return backend


def _sentencepiece(get: Callable, tokens: list[str], added: set[int]) -> tokenizers.Tokenizer:
  gemma = get("architecture", "").startswith("gemma")
  scores = get("scores", None)
  if gemma:
    # Runs of blanks are spelt literally. Unlike the scores, the order of the tokens is the order of the merges.
    tokens = [SPACE * len(t) if len(t) > 1 and not t.strip(" ") else t for t in tokens]
    scores = [-i for i in range(len(tokens))]
  vocab = {t: i for i, t in enumerate(tokens)}
  merges = [tuple(m.split(" ")) for m in get("merges", [])]
  merges = merges or _merges(tokens, vocab, get("scores") if scores is None else scores)
  unknown = {"unk_token": tokens[get("unknown_token_id", 0)]} if gemma else {}
  backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, fuse_unk=True, byte_fallback=True, **unknown))
  prefix = get("add_space_prefix", not gemma)
  steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
  backend.decoder = decoders.Sequence(steps + [decoders.Strip(" ", 1)] * prefix)
  if get("architecture", "") == "phi3" and prefix:
    # The prefix also stands before a blank, where Metaspace would omit it.
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
  else:
    backend.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, "first" if prefix else "never", split=False)
  return backend


def _merges(tokens: list[str], vocab: dict[str, int], scores: Sequence[float]) -> list[tuple[str, str]]:
  # SentencePiece does not store merges: any two tokens that make a third merge, best score first, then longest parts.
  rows = []
  for i, token in enumerate(tokens):
    parts = ((token[:n], token[n:]) for n in range(1, len(token)))
    rows += [(-scores[i], -len(a), -len(b), i, vocab[a], vocab[b]) for a, b in parts if a in vocab and b in vocab]
  return [(tokens[a], tokens[b]) for *_, a, b in sorted(rows)]


def _wordpiece(get: Callable, tokens: list[str], added: set[int]) -> tokenizers.Tokenizer:
  # GGUF files mark tokens that begin a word; BERT's vocabularies mark tokens that continue one.
  words = [t if i in added else t[1:] if t.startswith(SPACE) else f"##{t}" for i, t in enumerate(tokens)]
  cased = any(re.search("[A-Z]", t) for i, t in enumerate(tokens) if i not in added)
  vocab = {t: i for i, t in enumerate(words)}
  backend = tokenizers.Tokenizer(models.WordPiece(vocab=vocab, unk_token="[UNK]", max_input_chars_per_word=100))
  backend.normalizer = normalizers.BertNormalizer(lowercase=not cased)
  backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
  backend.decoder = decoders.WordPiece()
  return backend


def _unigram(get: Callable, tokens: list[str], added: set[int]) -> tokenizers.Tokenizer:
  # T5's sentinel tokens have lost their names: they are the first hundred rows beyond the vocabulary, in reverse order.
  blanks = [i for i, t in enumerate(tokens) if re.fullmatch(r"\[PAD\d+\]", t)][:100]
  names = {i: f"<extra_id_{99 - n}>" for n, i in enumerate(blanks)}
  added |= set(blanks)
  vocab = [(names.get(i, t), s) for i, (t, s) in enumerate(zip(tokens, get("scores"), strict=True))]
  backend = tokenizers.Tokenizer(models.Unigram(vocab, unk_id=get("unknown_token_id", 2), byte_fallback=False))
  if charsmap := get("precompiled_charsmap", None):
    backend.normalizer = normalizers.Precompiled(bytes(x % 256 for x in charsmap))
  space = pre_tokenizers.Metaspace(SPACE, "always", split=True)
  backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), space])
  backend.decoder = decoders.Metaspace(SPACE, "always", split=True)
  backend.add_special_tokens([names[i] for i in blanks])
  return backend


def _frame(backend: tokenizers.Tokenizer, tokens: Mapping[str, str | None], get: Callable) -> None:
  # Sets what `add_special_tokens` puts around one text and around two.
  if get("model") == "bert":
    first, last = tokens["cls"], tokens["sep"]
    if first is None or last is None:
      raise errors.UserError("GGUF tokenizer: expected tokens [CLS] and [SEP]")
    single, second = [f"{first}:0", "$A:0", f"{last}:0"], ["$B:1", f"{last}:1"]
  else:
    first = tokens["bos"] if get("add_bos_token", get("model") == "llama") else None
    last = tokens["eos"] if get("add_eos_token", get("model") == "t5") else None
    single = [f"{first}:0"] * (first is not None) + ["$A:0"] + [f"{last}:0"] * (last is not None)
    second = [x.replace("$A", "$B").removesuffix("0") + "1" for x in single]
  special = [(t, backend.token_to_id(t)) for t in dict.fromkeys((first, last)) if t is not None]
  backend.post_processor = processors.TemplateProcessing(single=single, pair=single + second, special_tokens=special)
