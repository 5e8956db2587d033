"""Texts to token ids, each with its weight in the loss.

A text is made of pieces: prompts, and responses to learn. It is encoded once, as a whole, and each token belongs to the
piece that its characters are in. Encoding the pieces apart would give tokens that the model never reads or writes:
SentencePiece begins every text with a blank of its own, and any vocabulary merges across a border.

A chat template renders the whole text of a conversation. Plain text begins with what the tokenizer puts before a text,
such as BOS.
"""

import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from lora_jax import errors, progress, tasks
from lora_jax.tokenizer import THOUGHTS

Formatted = tasks.Formatted | tasks.Chat


@dataclasses.dataclass(frozen=True)
class Piece:
  """A part of a text. `weight` is the weight of its tokens in the loss, None in a prompt."""

  text: str
  weight: float | None = None


@dataclasses.dataclass(frozen=True)
class Text:
  """An encoded text.

  Fields:
    ids: int32 [n].
    weights: float32 [n], the weight of predicting each token; nan in prompts.
    prompt: how many tokens precede the last response.
    first: how many of these begin the text, and stay when a long prompt is cut.
    weight: the weight of the last response.
  """

  ids: np.ndarray
  weights: np.ndarray
  prompt: int
  first: int
  weight: float


class Notes:
  """Remarks for the user on how texts were read: a line for each kind, with its number and its first example."""

  def __init__(self):
    self._found = {}

  def add(self, line: str, example: str = "") -> None:
    """Counts one more remark of a kind."""
    n, first = self._found.get(line, (0, example))
    self._found[line] = n + 1, first

  def say(self) -> None:
    """Prints the lines."""
    for line, (n, first) in self._found.items():
      progress.say(f"{line} ({n:,}" + (f", such as {first})" if first else ")"))


SPANS = (
  "some examples have a token of both prompt and response, which is learned; a blank between the two belongs to the "
  "response"
)
PARTS = "some answers do not begin as the chat template's generation prompt ends; they are learned from where they part"


def pieces(tokenizer: Any, formatted: Formatted, notes: Notes | None = None) -> list[list[Piece]]:
  """The texts to learn from an example, each in pieces of which the last is a response.

  A conversation is one text, with each assistant message as a response. Where the chat template rewrites earlier turns,
  as Qwen3's drops their thoughts, a new text begins: the prompt for the next answer, and the answer. So a response
  always follows the very text that the model is given to generate it.
  """
  if isinstance(formatted, tasks.Formatted):
    return [[Piece(formatted.prompt), Piece(formatted.response, 1.0)]]
  if notes:
    note_unread(tokenizer, formatted, notes)
  found, done = [], ""
  for i, message in enumerate(formatted.messages):
    if message["role"] != "assistant":
      continue
    asked, answered = render(tokenizer, formatted, i, True), render(tokenizer, formatted, i + 1)
    border = common(asked, answered)
    if border < len(asked):
      if border < len(render(tokenizer, formatted, i)):
        said = str(message.get("content"))[:40]
        raise errors.UserError(
          f"the model's chat template puts messages[{i}] ({said!r}) after another text than the one that asks for it; "
          "give prompts and responses, or a model with another template"
        )
      if notes:
        notes.add(PARTS, f"{asked[border:]!r} and {answered[border : border + 20]!r}")
    if not found or border < len(done) or not answered.startswith(done):
      found.append([])
      done = ""
    found[-1] += [Piece(asked[len(done) : border]), Piece(answered[border:], message.get("weight", 1.0))]
    done = answered
  return [text for text in found if any(piece.weight for piece in text)] or found


def prompt(tokenizer: Any, formatted: Formatted) -> str:
  """The text that the model is given to write the (last) response."""
  if isinstance(formatted, tasks.Formatted):
    return formatted.prompt
  return render(tokenizer, formatted, -1, True)


def answered(tokenizer: Any, formatted: Formatted, response: str | None = None) -> str:
  """The text of the prompt with the example's own response, or `response`; a conversation as its template writes it."""
  if isinstance(formatted, tasks.Formatted):
    return formatted.prompt + (formatted.response if response is None else response)
  if response is not None:
    last = {"role": "assistant", "content": response}
    formatted = dataclasses.replace(formatted, messages=(*formatted.messages[:-1], last))
  return render(tokenizer, formatted)


def render(tokenizer: Any, chat: tasks.Chat, n: int | None = None, add_generation_prompt: bool = False) -> str:
  """The chat template's text for the first `n` messages."""
  messages = [{k: v for k, v in m.items() if k != "weight"} for m in chat.messages[:n]]
  return tokenizer.chat(messages, add_generation_prompt=add_generation_prompt, **chat.variables)


def encode(tokenizer: Any, formatted: Sequence[Formatted], notes: Notes | None = None) -> Iterator[Text]:
  """The texts to learn from all examples; see `pieces`. A text without a prompt begins with BOS or the end token."""
  notes = Notes() if notes is None else notes
  parts = [(text, isinstance(f, tasks.Chat)) for f in formatted for text in pieces(tokenizer, f, notes)]
  begin, ends = tokenizer.begin, tokenizer.end_ids
  encoded = tokenizer.encode_offsets(["".join(p.text for p in text) for text, _ in parts])
  for (text, chat), (ids, offsets) in zip(parts, encoded, strict=True):
    of = _assigned(text, offsets)
    weights = np.array([np.nan if p.weight is None else p.weight for p in text], np.float32)[of]
    at = np.searchsorted(of, np.arange(len(text) + 1))  # where each piece begins, and the end
    if chat:
      for i in range(1, len(text), 2):
        end = at[i] + turn_end(tokenizer, ids[at[i] : at[i + 1]].tolist(), ends)
        weights[end : at[i + 1]] = np.nan
      ids, weights = ids[:end], weights[:end]  # `end` is the end of the last turn
    elif at[1] < len(ids) and offsets[at[1], 0] < len(text[0].text):
      notes.add(SPANS, f"{text[0].text[-20:]!r} + {text[1].text[:20]!r}")
    before = _before(tokenizer, () if chat else begin, not at[-2])
    first = len(before) or int(ids[:1].tolist() == [tokenizer.bos_id])
    ids = np.concatenate([np.array(before, np.int32), ids])
    weights = np.concatenate([np.full(len(before), np.nan, np.float32), weights])
    yield Text(ids, weights, len(before) + int(at[-2]), first, text[-1].weight)


def _before(tokenizer: Any, begin: Sequence[int], empty: bool) -> list[int]:
  """The tokens before a text: `begin`, or for an `empty` prompt one token to predict the response from."""
  start = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
  return list(begin) or ([start] if empty and start is not None else [])


def _assigned(text: Sequence[Piece], offsets: np.ndarray) -> np.ndarray:
  """The piece of each token, int [n]: the piece of its last character, or a response if it has any character of one."""
  borders = np.cumsum([len(p.text) for p in text])

  def piece(at):
    return np.minimum(np.searchsorted(borders, at, side="right"), len(text) - 1)

  of, begins = piece(offsets[:, 1] - 1), piece(offsets[:, 0])
  prompts = np.array([p.weight is None for p in text])
  return np.where(prompts[of] & (begins < of), of - 1, of)


def turn_end(tokenizer: Any, ids: Sequence[int], ends: Sequence[int]) -> int:
  """How many tokens of a conversation's answer are learned: all but white space after a token that ends a text."""
  end = next((n for n in range(len(ids), 0, -1) if ids[n - 1] in ends), len(ids))
  return len(ids) if tokenizer.decode(ids[end:], skip_special_tokens=False).strip() else end


def questions(
  tokenizer: Any, formatted: Sequence[Formatted], labels: Sequence[str] = ()
) -> tuple[list[list[int]], list[int], list[list[list[int]]]]:
  """Prompts to continue, as ids; how many ids of each begin the text; and the ids of each label after each prompt.

  Prompt and label are encoded as one text. A prompt loses the tokens at its end that would be different with one of the
  labels. Labels come without a token that ends the text.
  """
  asked = tokenizer.encode_batch([prompt(tokenizer, f) for f in formatted])
  whole = iter(tokenizer.encode_batch([answered(tokenizer, f, label) for f in formatted for label in labels]))
  begin, ends = tokenizer.begin, tokenizer.end_ids
  prompts, firsts, answers = [], [], []
  for f, ids in zip(formatted, asked, strict=True):
    texts = [next(whole) for _ in labels]
    chat = isinstance(f, tasks.Chat)
    n = min([len(ids), *(common(ids, text) for text in texts)])
    answers.append([without_end(tokenizer, text[n:], ends if chat else ()) for text in texts])
    if empty := [label for label, text in zip(labels, answers[-1], strict=True) if not text]:
      raise errors.UserError(f"the label {empty[0]!r} has no tokens after {prompt(tokenizer, f)[-40:]!r}")
    before = _before(tokenizer, () if chat else begin, not n)
    prompts.append([*before, *ids[:n]])
    firsts.append(len(before) or int(ids[:1] == [tokenizer.bos_id]))
  return prompts, firsts, answers


def without_end(tokenizer: Any, ids: Sequence[int], ends: Sequence[int]) -> list[int]:
  """An answer's ids without the token of `ends` that ends it."""
  ids = list(ids[: turn_end(tokenizer, ids, ends)])
  return ids[:-1] if ids and ids[-1] in ends else ids


def common(a: Sequence, b: Sequence) -> int:
  """The length of the longest common prefix."""
  n = min(len(a), len(b))
  return n if a[:n] == b[:n] else next(i for i in range(n) if a[i] != b[i])


def note_unread(tokenizer: Any, chat: tasks.Chat, notes: Notes) -> None:
  """Notes the keys of a conversation that its template does not read."""
  keys = {k for m in chat.messages for k, v in m.items() if v is not None} - {"role", "content", "weight"}
  for key in sorted(keys | chat.variables.keys()):
    names = THOUGHTS if key in THOUGHTS else (key,)
    if not any(re.search(rf"\b{re.escape(name)}\b", tokenizer.chat_template or "") for name in names):
      notes.add(f"some conversations have {key!r}, which the model's chat template does not read")
