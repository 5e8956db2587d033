"""Files changed at random, for tests that read them, and chat templates made at random."""

import copy
import json
import struct

from hypothesis import strategies as st

# Values that take the place of others.
HOSTILE = [
  *(None, True, False, 0, 1, -1, 2, 3, 7, 2**31, 2**63, -(2**63), 10**400, 0.5, -0.0, 1e-320, 1e308, float("nan")),
  *(
    float("inf"),
    "",
    "a",
    "null",
    "1",
    "\ud800",
    "\x00",
    "../x",
    "a" * 5000,
    "(",
    "(.*)*(.*)*x",
    "{{",
    "\u202e",
    "<s>",
  ),
  *([], {}, [[]], [None], ["a", 1], [1, 2], {"a": None}, {"content": 1}, [[[[[[]]]]]], ["a"] * 300, {"": {"": ""}}),
]


def places(value, at=()):
  """The paths of everything in a tree of JSON but its root."""
  for k, v in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
    yield (*at, k)
    yield from places(v, (*at, k))


def mutate(rng, value):
  """A JSON value that differs in one to three places: changed, removed, added, renamed, put into a list."""
  value = copy.deepcopy(value)
  hostile = lambda: copy.deepcopy(rng.choice(HOSTILE))
  for _ in range(rng.randint(1, 3)):
    found = [*places(value)]
    if not found or rng.random() < 0.02:
      return hostile()
    *before, last = rng.choice(found)
    inner = value
    for k in before:
      inner = inner[k]
    how = rng.randint(0, 9)
    if how == 0:
      del inner[last]
    elif how == 1 and isinstance(inner, dict):
      inner[rng.choice(["", "x", last + "s", last.upper(), "\ud800"])] = inner.pop(last)
    elif how == 2:
      inner[last] = [inner[last]]
    elif how == 3 and isinstance(inner, dict):
      inner["x"] = hostile()
    elif how == 4 and isinstance(inner[last], int | float | str):
      inner[last] = (
        str(inner[last]) if rng.random() < 0.5 else -inner[last] if not isinstance(inner[last], str) else "x"
      )
    else:
      inner[last] = hostile()
  return value


def damage(rng, content, near=None):
  """Bytes that differ in one to four places, most of them among the first `near`."""
  content = bytearray(content)
  for _ in range(rng.randint(1, 4)):
    at = rng.randrange(max(1, min(near or len(content), len(content))))
    how = rng.randint(0, 20)
    if how == 0:
      del content[at:]
    elif how == 1:
      del content[at : at + rng.randint(1, 40)]
    elif how == 2:
      content[at:at] = rng.randbytes(rng.randint(1, 8))
    elif how < 6:
      content[at : at + 8] = struct.pack("<Q", rng.choice([0, 1, 2**31, 2**32, 2**62, 2**63, 2**64 - 1]))
    elif how < 9:
      content[at : at + 4] = struct.pack("<I", rng.choice([0, 1, 2, 8, 9, 2**31, 2**32 - 1]))
    elif content:
      content[at : at + 1] = bytes([rng.choice([rng.randrange(256), *b'0159-"[]{},: '])])
  return bytes(content)


rngs = st.randoms(use_true_random=True)
mutated = lambda value: rngs.map(lambda rng: mutate(rng, value))
damaged = lambda content, near=None: rngs.map(lambda rng: damage(rng, content, near))


def dumps(value):
  """As JSON, which may be no UTF-8 and may have numbers that are none."""
  return json.dumps(value, ensure_ascii=True).encode("utf-8", "surrogatepass")


def damage_tensors(rng, content):
  """A safetensors file whose header is another JSON value, or whose bytes are."""
  if rng.random() < 0.3:
    return damage(rng, content, 1000)
  n = int.from_bytes(content[:8], "little")
  header = dumps(mutate(rng, json.loads(content[8 : 8 + n])))
  return struct.pack("<Q", len(header)) + header + content[8 + n :]


ATOMS = [
  "messages",
  "m",
  "ns.x",
  "f(x)",
  "x",
  "'ab'",
  "'%s{}'",
  "3",
  "9**9",
  "1.5",
  "none",
  "[]",
  "{'a': x}",
  "range(99)",
]
ATOMS += [
  "messages[0].content",
  "loop.index",
  "bos_token",
  "(x, x)",
  "[x, x]",
  "tools",
  "undefined",
  "caller()",
  "'\ud800'",
]
FILTERS = (
  "trim tojson join length list upper title sort unique first last sum string int batch(9) center(9**9) indent(9) "
)
FILTERS += (
  "replace('a','bb') map('upper') map('center',9**8) select format(9,9) round(9) dictsort items reverse groupby('a') "
)
FILTERS += (
  "default(x) truncate(9) wordwrap(1) pprint slice(9**9) attr('x') tojson(indent=9**9) safe escape urlize xmlattr"
)
METHODS = [
  "strip()",
  "split('a')",
  "upper()",
  "replace('','aa')",
  "join(x)",
  "format(x)",
  "center(9**9)",
  "items()",
  "get(x)",
]
METHODS += [
  "__class__",
  "append(1)",
  "encode('x')",
  "expandtabs(9**9)",
  "translate({97: x})",
  "x",
  "0",
  "startswith('a')",
]
KEYS = ["0", "::-1", "1:", "x", "'a'"]
OPERATORS = ["+", "~", "*", "**", "%", "-", "/", "//", "==", "<", "in", "and", "or", "if x else"]


def expression(rng, depth=2):
  """An expression of Jinja."""
  if not depth or rng.random() < 0.2:
    return rng.choice(ATOMS)
  inner = expression(rng, depth - 1)
  match rng.randint(0, 3):
    case 0:
      return f"({inner})|{rng.choice(FILTERS.split())}"
    case 1:
      return f"({inner}).{rng.choice(METHODS)}"
    case 2:
      return f"({inner})[{rng.choice(KEYS)}]"
  return f"({inner}) {rng.choice(OPERATORS)} ({expression(rng, depth - 1)})"


STATEMENTS = [
  "{{ EXPR }}",
  "{% set x = EXPR %}",
  "{% set ns.x = EXPR %}",
  "{% for x in EXPR %}BODY{% endfor %}",
  "{% for i in range(10**5) if EXPR %}BODY{% endfor %}",
  "{% for x in [EXPR] recursive %}BODY{{ loop([x]) }}{% endfor %}",
  "{% if EXPR %}BODY{% else %}BODY{% endif %}",
  "{% macro f(x) %}BODY{{ f(x) }}{% endmacro %}{{ f(1) }}",
  "{% macro f(x) %}BODY{% endmacro %}{% call f(EXPR) %}BODY{% endcall %}",
  "{% set x %}BODY{% endset %}",
  "{% filter FILTER %}BODY{% endfilter %}",
]


def program(rng, depth=3):
  """A chat template with loops, macros and variables that grow."""
  if not depth:
    return "{{ x }}"
  source = "{% set ns = namespace(x='ab', y=1) %}{% set x = 'ab' %}" if depth == 3 else ""
  for _ in range(rng.randint(1, 2)):
    part = rng.choice(STATEMENTS).replace("EXPR", expression(rng)).replace("FILTER", rng.choice(FILTERS.split()))
    while "BODY" in part:
      part = part.replace("BODY", program(rng, depth - 1), 1)
    source += part
  return source
