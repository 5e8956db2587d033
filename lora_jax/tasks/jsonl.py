"""The user's own data: a JSON Lines file of prompts and responses, or of conversations.

Each line is `{"prompt": str, "response": str}` or `{"messages": [{"role": str, "content": str}, ...]}`. The last
message is the assistant's: the response that is generated and scored. In training every assistant message of a
conversation carries the loss of a response, the other messages that of a prompt. With `labels`, which lists all
responses, it is a classification task.
"""

import json
import pathlib
from collections.abc import Sequence

from lora_jax import errors, tasks
from lora_jax.tasks import _packaged
from lora_jax.values import Name

PROMPT_LOSS_WEIGHT = None
ROLES = ("system", "user", "assistant", "tool")


def load(
  split: str, *, path: Name, validation_path: Name | None = None, test_path: Name | None = None
) -> Sequence[dict]:
  """Examples of a split, as they are in the file.

  Splits without a file of their own are taken from `path` by a hash of the prompt, so that one prompt is never in
  two of them, and repeated lines are dropped. A file given for validation or test is used whole.

  Args:
    path: the file.
    validation_path, test_path: files of their own for these splits; None takes a tenth of `path`.
  """
  own = {"validation": validation_path, "test": test_path}
  if own.get(split):
    return read(own[split])
  free = [s for s in tasks.SPLITS if not own.get(s)]
  chosen, seen = [], set()
  for example in read(path):
    prompt, response = _texts(example)
    line = _packaged.digest(*prompt, response)
    if line not in seen and _packaged.split_of(_packaged.digest(*prompt), free) == split:
      chosen.append(example)
    seen.add(line)
  if not chosen:
    raise errors.UserError(
      f"{path}: too few lines, none falls to the {split} split; give task.{split}_path or more lines"
    )
  return chosen


def format(example: dict) -> tasks.Formatted | tasks.Chat:
  """The line's prompt and response, or its conversation."""
  if "messages" in example:
    return tasks.Chat(tuple(example["messages"]))
  return tasks.Formatted(example["prompt"], example["response"])


def labels(*, labels: Sequence[str] | None = None) -> Sequence[str] | None:
  """The responses to choose from; None for free text.

  Args:
    labels: all responses, as they are in the file, for a classification task.
  """
  if labels is not None and (isinstance(labels, str) or len(set(labels)) != len(labels) or len(labels) < 2):
    raise errors.UserError(f"config.task.labels={labels!r}: expected a list of two or more different responses")
  return labels


def score(example: dict, text: str) -> dict[str, float]:
  """`exact_match` of the generated response."""
  return tasks.exact_match(format(example).response, text)


def read(path: str | pathlib.Path) -> list[dict]:
  """All examples of a file; blank lines are skipped. UserError names the line that is wrong, and how."""
  path = pathlib.Path(path)
  try:
    lines = path.read_text(encoding="utf-8").split("\n")
  except (OSError, UnicodeDecodeError) as e:
    raise errors.UserError(f"cannot read {path}: {e}; expected a JSON Lines file in UTF-8") from e
  examples = []
  for number, line in enumerate(lines, 1):
    if line.strip():
      try:
        example = json.loads(line)
      except json.JSONDecodeError as e:
        raise errors.UserError(f"{path}:{number}: no JSON: {e}") from e
      if fault := _fault(example):
        raise errors.UserError(f"{path}:{number}: {fault}")
      examples.append(example)
  if not examples:
    raise errors.UserError(f"{path} is empty; expected a line of JSON an example")
  return examples


def _fault(example: object) -> str | None:
  """What is wrong with a line, or None."""
  shape = '{"prompt": ..., "response": ...} or {"messages": [{"role": ..., "content": ...}, ...]}'
  if not isinstance(example, dict):
    return f"expected an object {shape}, found {type(example).__name__}"
  if "messages" in example:
    return _messages_fault(example["messages"])
  for key in ("prompt", "response"):
    if key not in example:
      return f"no {key!r}: expected {shape}, found keys {sorted(example)}"
    if not isinstance(example[key], str):
      return f"{key!r} must be a string, found {type(example[key]).__name__}"
  return None if example["response"] else "'response' is empty: there is nothing to learn"


def _messages_fault(messages: object) -> str | None:
  if not isinstance(messages, list) or not messages:
    return "'messages' must be a list that is not empty"
  for i, message in enumerate(messages):
    if not isinstance(message, dict):
      return f"messages[{i}] must be an object, found {type(message).__name__}"
    for key in ("role", "content"):
      if not isinstance(message.get(key), str):
        return f"messages[{i}] needs a string {key!r}, found {message.get(key)!r}"
    if message["role"] not in ROLES:
      return f"messages[{i}] has unknown role {message['role']!r}; {errors.nearest(message['role'], ROLES)}"
  if messages[-1]["role"] != "assistant":
    return f"the last message must be the assistant's, found role {messages[-1]['role']!r}"
  if not messages[-1]["content"]:
    return "the last message is empty: there is nothing to learn"
  return "the first message cannot be the assistant's" if messages[0]["role"] == "assistant" else None


def _texts(example: dict) -> tuple[list[str], str]:
  """What comes before the response, and the response."""
  if "messages" not in example:
    return [example["prompt"]], example["response"]
  *before, last = example["messages"]
  return [m["role"] + ": " + m["content"] for m in before], last["content"]
