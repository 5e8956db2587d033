"""Chat templates: Jinja programs that come with a model, run in a sandbox that meters them.

A template is a stranger's program, and Jinja's sandbox leaves it all the time and memory that there is. Here everything
that can take long or grow is paid for in steps before it is done: each run of a loop's, macro's or block's body by the
nodes in it, each operator, filter, test and call by a bound on what it reads and makes. The budget is the same on every
machine, so that a template either always renders a conversation or never does.
"""

import datetime
import functools
import itertools
import json
import re
import threading
import types
from collections.abc import Callable, Mapping
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
import jinja2.utils
from jinja2 import nodes, visitor

from lora_jax import errors

LONGEST = 2**18  # characters of a template
STEPS = 2**24  # of every rendering, about ten seconds
STEPS_A_CHARACTER = 64  # of the conversation, so that long ones have their share
A_CALL = 8  # steps of calling anything
PER_STEP = 4  # characters that are read or copied in one step
BITS = 2**17  # of an integer
DEPTH = 200  # of lists in lists: C code that walks them checks no stack


class Costly(Exception):
  """A template takes more steps than it has, or makes a value that is too large."""


def render(source: str, variables: Mapping[str, Any], where: str) -> str:
  """The text that a template makes of `variables`, as transformers' `apply_chat_template` would.

  Args:
    where: what messages call the template, such as the directory of its model.

  Raises:
    UserError: whatever goes wrong in it, or that it needs too many steps.
  """
  what = f"the chat template of {where}" if where else "the chat template"
  try:
    text = _meter().render(source, variables)
    text.encode()  # lone surrogates
  except Costly as e:
    raise errors.UserError(f"{what} {e}") from e
  except jinja2.TemplateSyntaxError as e:
    raise errors.UserError(f"{what} is no Jinja template: line {e.lineno}: {_line(e)}") from e
  except jinja2.TemplateError as e:
    raise errors.UserError(f"{what} refuses the messages: {_line(e)}") from e
  except Exception as e:  # a program can raise anything
    raise errors.UserError(f"{what} fails on the messages: {type(e).__name__}: {_line(e)}") from e
  return text


def _line(error: Exception) -> str:
  """What an error says, on one line that a terminal can show."""
  text = " ".join(str(error).split())
  return f"{''.join(c if c.isprintable() else '?' for c in text):.500}"


# How filters, tests and methods are paid for, by their names: those of one name do the same, whatever they belong to.
# What is not listed may multiply its input by its largest argument, as `center` and `indent` do.
FREE = frozenset("length count first last items keys values default d attr".split())
EACH = frozenset(
  "map select selectattr reject rejectattr".split()
)  # run something for each item, which pays for itself
OUTER = frozenset("list reverse copy".split())  # copy the outermost level alone
LINEAR = frozenset(  # read their input and arguments a few times, and make no more than that
  "trim upper lower capitalize title string safe int float abs e escape forceescape truncate wordcount tojson "
  "startswith endswith find index split splitlines partition removeprefix removesuffix "
  "isdigit isalpha isalnum isspace isupper islower isnumeric isdecimal istitle isidentifier isprintable isascii "
  "casefold swapcase encode decode == eq equalto != ne > gt greaterthan >= ge < lt lessthan <= le in".split()
)
TESTS = "in == eq equalto != ne > gt greaterthan >= ge < lt lessthan <= le lower upper".split()  # others cost nothing
MACHINERY = (jinja2.runtime.Macro, jinja2.runtime.LoopContext, jinja2.runtime.BlockReference, type)  # pay as they go
SCALARS = frozenset((bool, int, float, type(None)))
VIEWS = frozenset((type({}.keys()), type({}.values()), type({}.items())))
CONTAINERS = frozenset((list, tuple, dict, range)) | VIEWS
ITEM = 16  # what a number, or the place of an item, counts for in characters


def size(x: Any) -> int:
  """Characters of a value; what is shared counts as often as it is reached."""
  kind = type(x)
  if kind is str:
    return len(x)
  if kind in SCALARS:
    return ITEM
  return _deep(x, {}, 0) if kind in CONTAINERS else len(x) if isinstance(x, str | bytes) else ITEM


def _deep(x, known, depth):
  if type(x) is range:
    return ITEM * len(x)
  if id(x) in known:
    return known[id(x)]
  if depth > DEPTH:
    raise Costly(f"nests lists deeper than {DEPTH}")
  total = ITEM
  for v in itertools.chain(x, x.values()) if type(x) is dict else x:
    kind = type(v)
    total += len(v) if kind is str else _deep(v, known, depth + 1) if kind in CONTAINERS else size(v)
  known[id(x)] = total
  return total


def _outer(x: Any) -> int:
  """Characters of the outermost level of a value."""
  kind = type(x)
  if kind in CONTAINERS:
    return ITEM * len(x)
  return x.size if kind is _Stream else len(x) if isinstance(x, str | bytes) else ITEM


def bound(name: str, value: Any, args: tuple, kw: Mapping[str, Any]) -> int:
  """The most characters that a filter, test or method reads and makes."""
  if name in FREE:
    return 0
  if name in OUTER:
    return _outer(value)
  if name in EACH:  # `attribute` may be a path of many names
    return _outer(value) * (2 + str(args[0] if args else kw.get("attribute", "")).count("."))
  if name == "get":
    return size(args[0]) if args else 0
  n = size(value)
  if kw:
    args = (*args, *kw.values())
  if not args:
    return n * _outer(value) if name == "sum" else n
  sizes = [*map(size, args)]
  if name in LINEAR:
    return n + sum(sizes)
  if name in ("format", "format_map"):
    return _formatted(str(value), args)
  if name == "join":  # the filter joins its value, the method its argument
    return n + sum(sizes) + max(map(_outer, (value, *args))) * max(n, *sizes) // ITEM
  if name == "replace" and len(args) > 1 and all(isinstance(x, str) for x in (value, *args[:2])):
    return n + sum(sizes) + value.count(args[0]) * len(args[1])
  largest = max(1, *sizes, *(abs(x) for x in args if isinstance(x, int)))
  return (n + ITEM) * largest * (_outer(value) if name == "sum" else 1)


def _formatted(text: str, args: Any) -> int:
  """The most characters of a string with fields, `%5d` or `{:5}`, once they are filled in."""
  fields = text.count("%") + text.count("{")
  widths = sum(int(n[:20]) for n in re.findall(r"\d+", text))
  if "*" in text or "{" in text:  # widths that are arguments
    widths += fields * sum(abs(x) for x in _flat(args) if isinstance(x, int))
  return len(text) + widths + fields * size(args)


def _flat(args: Any) -> list:
  return list(args.values()) if isinstance(args, dict) else list(args) if isinstance(args, list | tuple) else [args]


class _Stream:
  """What a lazy filter gives: at most `size` characters of items.

  It knows how many stand behind one another, as C code that frees a long chain of them overflows its stack.
  """

  def __init__(self, items, size, depth):
    if depth > DEPTH:
      raise Costly(f"chains filters deeper than {DEPTH}")
    self._items, self.size, self.depth = items, size, depth

  def __iter__(self):
    return self._items

  def __next__(self):
    return next(self._items)


class _Namespace(jinja2.utils.Namespace):
  def __repr__(self):  # those that hold others often would take for ever to print
    return "<Namespace>"


class _Generation(jinja2.ext.Extension):
  """`{% generation %} ... {% endgeneration %}`, by which templates mark what the model writes."""

  tags = {"generation"}

  def parse(self, parser):
    line = next(parser.stream).lineno
    return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _Meter(jinja2.sandbox.ImmutableSandboxedEnvironment):
  """The environment of templates; a thread has one, which counts the steps of what it renders."""

  intercepted_binops = frozenset(("*", "**", "%"))

  def __init__(self):
    super().__init__(
      trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols], finalize=self._paid
    )
    self.left, self._given = 0, None
    self._template = functools.lru_cache(maxsize=8)(self._built)
    self.filters = {k: self._metered(k, f) for k, f in self.filters.items()}
    self.filters["tojson"] = self._metered("tojson", self._tojson)
    self.filters |= {STEP: self._step(), ADD: self._add(), PAID: self._payment(), COPIED: self._copied()}
    self.tests |= {k: self._metered(k, self.tests[k]) for k in TESTS}
    self.tests["divisibleby"] = lambda x, n: self.call_binop(None, "%", x, n) == 0
    del self.globals["lipsum"]
    self.globals |= {
      "dict": lambda *args, **kw: dict(*args, **kw),  # whose methods would change the messages
      "namespace": _Namespace,
      "raise_exception": _refuse,
      "strftime_now": lambda fmt: datetime.datetime.now().strftime(fmt),
    }

  def render(self, source: str, variables: Mapping[str, Any]) -> str:
    """What a template makes of variables, or what it raises."""
    self.left, self._given = STEPS, variables
    try:
      return self._template(source).render(variables)
    finally:
      self._given = None

  def _built(self, source: str) -> jinja2.Template:
    if len(source) > LONGEST:
      raise Costly(f"has {len(source):,} characters, more than {LONGEST:,}")
    return self.from_string(_Payments().visit(self.parse(source)).set_environment(self))

  def spend(self, characters: int) -> None:
    """Pays for what reads or makes so many characters."""
    self.left -= A_CALL + characters // PER_STEP
    if self.left < 0:
      self.borrow()

  def borrow(self) -> None:
    """Adds, once, what the size of the conversation allows; Costly when that is not enough."""
    if self._given is not None:
      self.left += STEPS_A_CHARACTER * size(dict(self._given))
      self._given = None
    if self.left < 0:
      raise Costly("takes too many steps, or makes too much text")

  def is_safe_attribute(self, obj, attr, value):
    if type(obj) in (str, jinja2.runtime.LoopContext):  # nearly always, and Jinja's answer takes long
      return not attr.startswith("_")
    return super().is_safe_attribute(obj, attr, value)

  def call(self, context, obj, /, *args, **kw):
    own = {k: v for k, v in kw.items() if k not in ("_loop_vars", "_block_vars")} if kw else kw  # Jinja adds those
    if type(obj) is types.BuiltinMethodType:
      self.spend(bound(obj.__name__, obj.__self__, args, own))
      return _small(obj(*args, **own))
    if isinstance(obj, MACHINERY):
      self.spend(sum(map(_outer, args)))
    elif (method := getattr(obj, "__wrapped__", None)) is not None:  # the sandbox's own `str.format`
      self.spend(bound(method.__name__, method.__self__, args, own))
    else:
      self.spend(size(args) + size(own))
    return _small(super().call(context, obj, *args, **kw))

  def call_binop(self, context, operator, left, right):
    if type(left) is int and type(right) is int:
      if operator == "*" and left.bit_length() + right.bit_length() > BITS:
        raise Costly(f"makes an integer of more than {BITS} bits")
      if operator == "**" and left.bit_length() * abs(right) > BITS:
        raise Costly(f"makes an integer of more than {BITS} bits")
    elif operator == "%" and isinstance(left, str | bytes):
      self.spend(_formatted(left if isinstance(left, str) else left.decode("latin-1"), right))
    elif operator == "*":
      for x, n in ((left, right), (right, left)):
        if isinstance(n, int) and hasattr(x, "__len__"):
          self.spend(_outer(x) * max(0, n))
    return super().call_binop(context, operator, left, right)

  def _metered(self, name: str, fn: Callable) -> Callable:
    """A filter or test that pays first."""
    skip = int(hasattr(fn, "jinja_pass_arg"))  # its first argument is Jinja's

    @functools.wraps(fn)
    def call(*args, **kw):
      value = args[skip] if len(args) > skip else None
      if name == "join" and isinstance(value, _Stream | types.GeneratorType):
        value = list(value)
        args = (*args[:skip], value, *args[skip + 1 :])
      cost = bound(name, value, args[skip + 1 :], kw)
      self.spend(cost)
      out = fn(*args, **kw)
      if type(out) is types.GeneratorType:
        return _Stream(out, _outer(value) if name in EACH else cost, 1 + getattr(value, "depth", 0))
      return _small(out)

    return call

  def _paid(self, x: Any) -> Any:
    """A value that is printed, compared or looked up."""
    kind = type(x)
    if kind is str:
      self.left -= 1 + len(x) // PER_STEP
    elif kind not in SCALARS:
      self.left -= 1 + size(x) // PER_STEP
    if self.left < 0:
      self.borrow()
    return x

  # Filters that `_Payments` puts into templates. As they ask for the context Jinja does not work them out when it
  # compiles; they are short, since they run for every turn of a loop and every sum.

  def _step(self):
    @jinja2.pass_context
    def step(context, n):
      self.left -= n
      if self.left < 0:
        self.borrow()
      return True

    return step

  def _payment(self):
    paid = self._paid
    return jinja2.pass_context(lambda context, x: paid(x))

  def _copied(self):
    @jinja2.pass_context
    def copied(context, x):
      self.spend(_outer(x))
      return x

    return copied

  def _add(self):
    @jinja2.pass_context
    def add(context, *parts):
      for x in parts:
        if type(x) is not str:
          break
      else:
        self.left -= 1 + sum(map(len, parts)) // PER_STEP
        if self.left < 0:
          self.borrow()
        return "".join(parts)
      total = parts[0]
      for x in parts[1:]:
        self.spend(_outer(total) + _outer(x))
        total = total + x
      return total

    return add

  def _tojson(self, x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    kw = dict(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    if indent is None and separators is None:
      return json.dumps(x, **kw)
    self.spend(_outer(indent) if isinstance(indent, str) else abs(int(indent or 0)))
    chunks = []
    for chunk in json.JSONEncoder(**kw).iterencode(x):  # `dumps` does the same, but does not say how far it is
      self.spend(len(chunk))
      chunks.append(chunk)
    return "".join(chunks)


def _small(x: Any) -> Any:
  if type(x) is int and x.bit_length() > BITS:
    raise Costly(f"makes an integer of more than {BITS} bits")
  return x


def _refuse(message):
  raise jinja2.TemplateError(message)


# Filters that no template can spell.
STEP, ADD, PAID, COPIED = "(step)", "(add)", "(paid)", "(copied)"


class _Payments(visitor.NodeTransformer):
  """Puts payments into a template."""

  def _body(self, node):
    node = self.generic_visit(node)
    cost = sum(len(n.data) // PER_STEP if isinstance(n, nodes.TemplateData) else 1 for n in node.find_all(nodes.Node))
    step = _filter(STEP, nodes.Const(1 + cost, lineno=node.lineno))
    node.body.insert(0, nodes.ExprStmt(step, lineno=node.lineno))
    return node

  visit_Macro = visit_CallBlock = visit_Block = _body

  def visit_For(self, node):
    node = self._body(node)
    if node.test is not None:
      node.test = nodes.And(_filter(STEP, nodes.Const(8, lineno=node.lineno)), node.test, lineno=node.lineno)
    return node

  def visit_Add(self, node):
    parts = [node.right]
    while isinstance(node.left, nodes.Add):
      node = node.left
      parts.append(node.right)
    first, *rest = map(self.visit, [node.left, *reversed(parts)])
    return _filter(ADD, first, rest)

  def visit_Concat(self, node):
    node = self.generic_visit(node)
    node.nodes = [_paid(n) for n in node.nodes]
    return node

  def visit_Compare(self, node):
    node = self.generic_visit(node)
    sides = [node.expr, *(o.expr for o in node.ops)]
    if len(sides) == 2 and _is_small(sides[0]) and node.ops[0].op in ("in", "notin") and not _is_constant(sides[1]):
      node.ops[0].expr = _filter(COPIED, sides[1])
    elif sum(map(_is_small, sides)) < len(sides) - 1:
      node.expr = _paid(node.expr)
      for o in node.ops:
        o.expr = _paid(o.expr)
    return node

  def visit_Getitem(self, node):
    node = self.generic_visit(node)
    if isinstance(node.arg, nodes.Slice):
      return _filter(COPIED, node) if node.ctx == "load" else node
    node.arg = _paid(node.arg)
    return node

  def visit_Pair(self, node):
    node = self.generic_visit(node)
    node.key = _paid(node.key)
    return node


def _is_constant(node: nodes.Expr) -> bool:
  if isinstance(node, nodes.List | nodes.Tuple):
    return all(map(_is_constant, node.items))
  return isinstance(node, nodes.Const)


def _is_small(node: nodes.Expr) -> bool:
  """Whether a value is a constant, a number or a truth value."""
  numbers = (nodes.Compare, nodes.Not, nodes.Test, nodes.Sub, nodes.Div, nodes.FloorDiv)
  length = isinstance(node, nodes.Filter) and node.name in ("length", "count")
  return length or isinstance(node, numbers) or _is_constant(node)


def _paid(node: nodes.Expr) -> nodes.Expr:
  return node if _is_small(node) else _filter(PAID, node)


def _filter(name: str, node: nodes.Expr, args: list[nodes.Expr] | None = None) -> nodes.Filter:
  return nodes.Filter(node, name, args or [], [], None, None, lineno=node.lineno)


_threads = threading.local()


def _meter() -> _Meter:
  if not hasattr(_threads, "meter"):
    _threads.meter = _Meter()
  return _threads.meter
