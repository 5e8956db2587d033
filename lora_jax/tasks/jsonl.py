"""The user's own data: a JSON Lines file of prompts and responses, or of conversations.

Each line is `{"prompt": str, "response": str}` or `{"messages": [{"role": str, "content": str}, ...]}`. The last
message is the assistant's: it is the response that is generated and scored. In training every assistant message of a
conversation counts as a response in the loss, and every other message as a prompt. With `labels`, a list of all
responses, the task is a classification.

A conversation may have more keys of OpenAI's format and of `apply_chat_template`:

  in a line     `tools`, a list of JSON schemas or a string with such a list in JSON; `documents`;
                `chat_template_kwargs`, further variables of the template such as {"enable_thinking": false}
  in a message  `weight`, the weight of an assistant's message in the loss, 0 for a message not to be learned; and what
                the template reads: `tool_calls`, with which the content may be null, `tool_call_id`, `name`,
                `reasoning_content`, `reasoning` or `thinking`

Keys that are null count as absent. A content may be a list of `{"type": "text", "text": str}`: the texts are joined.
Other keys are refused, unless `ignore` names them.
"""

import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Literal

from lora_jax import errors, files, tasks
from lora_jax.tasks import packaged
from lora_jax.tokenizer import THOUGHTS
from lora_jax.values import Name

PROMPT_LOSS_WEIGHT = None
ROLES = ("system", "user", "assistant", "tool")
MOST_LABELS = 1000  # with labels="all"; more responses than that are free text
PAIR = ("prompt", "response")
CHAT = ("messages", "tools", "documents", "chat_template_kwargs")
MESSAGE = ("role", "content", "weight", "name", "tool_calls", "tool_call_id", *THOUGHTS)
SHAPE = '{"prompt": ..., "response": ...} or {"messages": [{"role": ..., "content": ...}, ...]}'


def load(
  split: str,
  *,
  path: Name,
  validation_path: Name | None = None,
  test_path: Name | None = None,
  ignore: str | Sequence[str] = (),
) -> Sequence[dict]:
  """Examples of a split, as they are in the file.

  A split without a file of its own is taken from `path` by a hash of the prompt, so a prompt is never in two splits,
  and repeated lines are dropped. A file given for validation or test is used whole.

  Args:
    path: the file.
    validation_path, test_path: separate files for these splits; None takes a tenth of `path`.
    ignore: keys of lines and messages to leave out, such as ("id", "source") or "id,source".
  """
  own = {"validation": validation_path, "test": test_path}
  for given in filter(None, own.values()):  # a missing file is an error even if this run does not read it
    files.open(given).close()
  if own.get(split):
    return read(own[split], ignore)
  free = [s for s in tasks.SPLITS if not own.get(s)]
  chosen, seen = [], set()
  for example in read(path, ignore):
    prompt, response = _texts(example)
    line = packaged.digest(*prompt, response)
    if line not in seen and packaged.split_of(packaged.digest(*prompt), free) == split:
      chosen.append(example)
    seen.add(line)
  if not chosen:
    raise errors.UserError(
      f"{path}: too few lines, none falls to the {split} split; give task.{split}_path or more lines"
    )
  return chosen


def format(example: dict) -> tasks.Formatted | tasks.Chat:
  """The prompt and response of a line, or its conversation."""
  if "messages" not in example:
    return tasks.Formatted(example["prompt"], example["response"])
  messages = tuple(m | {"content": _joined(m["content"])} if "content" in m else m for m in example["messages"])
  documents = {"documents": example["documents"]} if example.get("documents") else {}
  return tasks.Chat(messages, _tools(example), documents | (example.get("chat_template_kwargs") or {}))


def labels(
  *, path: Name, labels: Sequence[str] | Literal["all"] | None = None, ignore: Sequence[str] | str = ()
) -> Sequence[str] | None:
  """The responses to choose from; None for free text.

  Args:
    labels: all responses of a classification task, as they are in the file. "all" takes the different responses in
      `path`, in alphabetical order.
  """
  if labels == "all":
    examples = read(path, ignore)
    found = sorted({format(e).response for e in examples})
    if not 2 <= len(found) <= MOST_LABELS:
      many = f"{len(found):,} different responses in {len(examples):,} lines"
      raise errors.UserError(f"config.task.labels='all': {path} has {many}; a classification has 2 to {MOST_LABELS}")
    return found
  if labels is not None and (len(set(labels)) != len(labels) or len(labels) < 2):
    raise errors.UserError(f"config.task.labels={labels!r}: expected a list of two or more different responses")
  return labels


def score(example: dict, text: str) -> dict[str, float]:
  """`exact_match` of the generated response. Empty if the response calls tools, which each model writes its own way."""
  formatted = format(example)
  calls = isinstance(formatted, tasks.Chat) and formatted.messages[-1].get("tool_calls")
  return {} if calls else tasks.exact_match(formatted.response, text)


def read(path: str | pathlib.Path, ignore: Sequence[str] | str = ()) -> list[dict]:
  """All examples of a file, without the keys to `ignore`; blank lines are skipped.

  Raises:
    UserError: a line is malformed; the message names the line and the fault.
  """
  path = pathlib.Path(path)
  ignore = {k.strip() for k in (ignore.split(",") if isinstance(ignore, str) else ignore)}
  lines = files.read(path, math.inf).split("\n")
  examples = []
  for number, line in enumerate(lines, 1):
    if line.strip():
      example = _cleared(files.parse_json(line, f"{path}:{number}"), ignore)
      if fault := _fault(example):
        raise errors.UserError(f"{path}:{number}: {fault}")
      examples.append(example)
  if not examples:
    raise errors.UserError(f"{path} is empty; expected a line of JSON for each example")
  return examples


def _cleared(example: object, ignore: set[str]) -> object:
  """A line without the keys to ignore and without null values, which tables write for absent ones."""
  if not isinstance(example, dict):
    return example
  example = {k: v for k, v in example.items() if v is not None and k not in ignore}
  if isinstance(messages := example.get("messages"), list):
    example["messages"] = [_cleared(m, ignore) for m in messages]
  return example


def _fault(example: object) -> str | None:
  """What is wrong with a line, or None."""
  if not isinstance(example, dict):
    return f"expected an object {SHAPE}, found {type(example).__name__}"
  if "messages" in example:
    return _unknown(example, CHAT) or _messages_fault(example["messages"]) or _variables_fault(example)
  for key in PAIR:
    if key not in example:
      return f"no {key!r}: expected {SHAPE}, found keys {sorted(example)}"
    if not isinstance(example[key], str):
      return f"{key!r} must be a string, found {type(example[key]).__name__}"
  return _unknown(example, PAIR) or (None if example["response"] else "'response' is empty: there is nothing to learn")


def _unknown(found: Mapping, known: Sequence[str], where: str = "") -> str | None:
  """A message about a key that is not known, or None."""
  for key in found:
    if key not in known:
      return f"{where}unknown key {key!r}, {errors.nearest(key, known)} (config.task.ignore={key!r} leaves it out)"
  return None


def _messages_fault(messages: object) -> str | None:
  if not isinstance(messages, list) or not messages:
    return "'messages' must be a list that is not empty"
  for i, message in enumerate(messages):
    if not isinstance(message, dict):
      return f"messages[{i}] must be an object, found {type(message).__name__}"
    if fault := _message_fault(message):
      return f"messages[{i}]{fault}"
  last = messages[-1]
  if last["role"] != "assistant":
    return f"the last message must be the assistant's, found role {last['role']!r}"
  if not any(last.get(k) for k in ("content", "tool_calls", *THOUGHTS)):
    return "the last message is empty: there is nothing to learn"
  if not any(m.get("weight", 1) for m in messages if m["role"] == "assistant"):
    return "every assistant message has weight 0: there is nothing to learn"
  return "the first message cannot be the assistant's" if messages[0]["role"] == "assistant" else None


def _message_fault(message: dict) -> str | None:
  role, content = message.get("role"), message.get("content")
  if not isinstance(role, str):
    return f" needs a string 'role', found {role!r}"
  if role not in ROLES:
    return f" has unknown role {role!r}; {errors.nearest(role, ROLES)}"
  if fault := _unknown(message, MESSAGE, ": "):
    return fault
  if isinstance(content, list):
    for part in content:
      if not isinstance(part, dict) or part.keys() != {"type", "text"} or not isinstance(part["text"], str):
        return f' has a content that is not text: {str(part)[:60]}; expected {{"type": "text", "text": ...}}'
  elif not isinstance(content, str) and not (content is None and role == "assistant" and message.get("tool_calls")):
    return f" needs a string 'content', found {content!r}"
  calls = message.get("tool_calls", [])
  if not isinstance(calls, list) or not all(isinstance(c, dict) for c in calls):
    return f": 'tool_calls' must be a list of objects, found {str(calls)[:60]}"
  weight = message.get("weight", 1)
  if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < math.inf:
    return f": 'weight' must be a number from 0, found {weight!r}"
  if role != "assistant" and "weight" in message:
    return f": only assistant messages have a 'weight', not role {role!r}"
  return None


def _variables_fault(example: dict) -> str | None:
  """What is wrong with the variables of the chat template, or None."""
  try:
    tools = _tools(example)
  except errors.UserError as e:
    return str(e)
  for key, value in {"tools": tools, "documents": example.get("documents")}.items():
    if value is not None and (not isinstance(value, list) or not all(isinstance(x, dict) for x in value)):
      return f"{key!r} must be a list of objects, found {str(value)[:60]}"
  given = example.get("chat_template_kwargs")
  if given is not None and not isinstance(given, dict):
    return f"'chat_template_kwargs' must be an object, found {str(given)[:60]}"
  taken = sorted((given or {}).keys() & {*CHAT, "add_generation_prompt"})
  return f"'chat_template_kwargs' cannot have {taken[0]!r}" if taken else None


def _joined(content: str | list[dict] | None) -> str | None:
  return "".join(part["text"] for part in content) if isinstance(content, list) else content


def _tools(example: dict) -> list[dict] | None:
  """The tools of a line, as a list. Tables whose columns have one type store them as a string."""
  tools = example.get("tools")
  return files.parse_json(tools, "'tools' is a string") if isinstance(tools, str) and tools else tools or None


def _texts(example: dict) -> tuple[list[str], str]:
  """What precedes the response, and the response, as texts that differ whenever lines do."""
  if "messages" not in example:
    return [example["prompt"]], example["response"]
  said, weights = [], []
  for m in example["messages"]:
    rest = {k: v for k, v in m.items() if k not in ("role", "content", "weight")}
    said.append(
      m["role"] + ": " + (_joined(m.get("content")) or "") + (json.dumps(rest, sort_keys=True) if rest else "")
    )
    weights.append(m.get("weight", 1))
  *before, last = said
  given = {k: v for k, v in example.items() if k != "messages" and v}
  before += [json.dumps(given, sort_keys=True)] if given else []
  return before, last.removeprefix("assistant: ") + (str(weights) if set(weights) != {1} else "")
