"""The cost of each operation in a chat template, and the places in its program that pay for them; see templates.py."""

import itertools
import re
from collections.abc import Mapping
from typing import Any

import jinja2
from jinja2 import nodes, visitor

PER_STEP = 4  # characters that are read or copied in one step
BITS = 2**17  # the largest integer
DEPTH = 200  # the deepest nesting of lists: C code that walks them does not check its stack


class Costly(Exception):
  """A template takes more steps than its budget, or makes a value that is too large."""


# How filters, tests and methods are paid for, by name: those with the same name do the same.
# Names that are not listed may multiply their input by their largest argument, as `center` and `indent` do.
FREE = frozenset("length count first last items keys values default d attr".split())
EACH = frozenset("map select selectattr reject rejectattr".split())  # run something that pays for itself on each item
OUTER = frozenset("list reverse copy".split())  # copy only the outermost level
LINEAR = frozenset(  # read their input and arguments a few times, and make at most as much
  "trim upper lower capitalize title string safe int float abs e escape forceescape truncate wordcount tojson "
  "startswith endswith find index split splitlines partition removeprefix removesuffix "
  "isdigit isalpha isalnum isspace isupper islower isnumeric isdecimal istitle isidentifier isprintable isascii "
  "casefold swapcase encode decode == eq equalto != ne > gt greaterthan >= ge < lt lessthan <= le in".split()
)
TESTS = "in == eq equalto != ne > gt greaterthan >= ge < lt lessthan <= le lower upper".split()  # others cost nothing
MACHINERY = (jinja2.runtime.Macro, jinja2.runtime.LoopContext, jinja2.runtime.BlockReference, type)  # pay as they run
SCALARS = frozenset((bool, int, float, type(None)))
VIEWS = frozenset((type({}.keys()), type({}.values()), type({}.items())))
CONTAINERS = frozenset((list, tuple, dict, range)) | VIEWS
ITEM = 16  # characters that a number, or the place of an item, counts for


def size(x: Any) -> int:
  """The size of a value in characters. A shared part counts each time it is reached."""
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
    return known[id(x)][0]
  if depth > DEPTH:
    raise Costly(f"nests lists deeper than {DEPTH}")
  total = ITEM
  for v in itertools.chain(x, x.values()) if type(x) is dict else x:
    kind = type(v)
    total += len(v) if kind is str else _deep(v, known, depth + 1) if kind in CONTAINERS else size(v)
  known[id(x)] = total, x  # keeping `x` keeps its id unique
  return total


def outer(x: Any) -> int:
  """The size of a value's outermost level in characters."""
  kind = type(x)
  if kind in CONTAINERS:
    return ITEM * len(x)
  return x.size if kind is Stream else len(x) if isinstance(x, str | bytes) else ITEM


def bound(name: str, value: Any, args: tuple, kw: Mapping[str, Any]) -> int:
  """The most characters that a filter, test or method reads and makes."""
  if name in FREE:
    return 0
  if name in OUTER:
    return outer(value)
  if name in EACH:  # `attribute` may be a path of many names
    return outer(value) * (2 + str(args[0] if args else kw.get("attribute", "")).count("."))
  if name == "get":
    return size(args[0]) if args else 0
  n = size(value)
  if kw:
    args = (*args, *kw.values())
  if not args:
    return n * outer(value) if name == "sum" else n
  sizes = [*map(size, args)]
  if name in LINEAR:
    return n + sum(sizes)
  if name in ("format", "format_map"):
    return formatted(str(value), args)
  if name == "join":  # the filter joins its value, the method its argument
    return n + sum(sizes) + max(map(outer, (value, *args))) * max(n, *sizes) // ITEM
  if name == "replace" and len(args) > 1 and all(isinstance(x, str) for x in (value, *args[:2])):
    return n + sum(sizes) + value.count(args[0]) * len(args[1])
  largest = max(1, *sizes, *(abs(x) for x in args if isinstance(x, int)))
  return (n + ITEM) * largest * (outer(value) if name == "sum" else 1)


def formatted(text: str, args: Any) -> int:
  """The most characters that a string with fields, `%5d` or `{:5}`, has once they are filled in."""
  fields = text.count("%") + text.count("{")
  widths = sum(int(n[:20]) for n in re.findall(r"\d+", text))
  if "*" in text or "{" in text:  # widths that are arguments
    widths += fields * sum(abs(x) for x in _flat(args) if isinstance(x, int))
  return len(text) + widths + fields * size(args)


def _flat(args: Any) -> list:
  return list(args.values()) if isinstance(args, dict) else list(args) if isinstance(args, list | tuple) else [args]


class Stream:
  """The output of a lazy filter: items of at most `size` characters together.

  `depth` counts the filters in a chain, since C code that frees a long chain overflows its stack.
  """

  def __init__(self, items, size, depth):
    if depth > DEPTH:
      raise Costly(f"chains filters deeper than {DEPTH}")
    self._items = items
    self.size = size
    self.depth = depth

  def __iter__(self):
    return self._items

  def __next__(self):
    return next(self._items)


def check_integer(x: Any) -> Any:
  """The value itself. Raises Costly for an integer that takes long to multiply or print."""
  if type(x) is int and x.bit_length() > BITS:
    raise Costly(f"makes an integer of more than {BITS} bits")
  return x


# Names of filters that a template cannot spell.
STEP, ADD, PAID, COPIED = "(step)", "(add)", "(paid)", "(copied)"


class Payments(visitor.NodeTransformer):
  """Puts payments into the syntax tree of a template."""

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
  """Whether a value is a constant, a number or a boolean."""
  numbers = (nodes.Compare, nodes.Not, nodes.Test, nodes.Sub, nodes.Div, nodes.FloorDiv)
  length = isinstance(node, nodes.Filter) and node.name in ("length", "count")
  return length or isinstance(node, numbers) or _is_constant(node)


def _paid(node: nodes.Expr) -> nodes.Expr:
  return node if _is_small(node) else _filter(PAID, node)


def _filter(name: str, node: nodes.Expr, args: list[nodes.Expr] | None = None) -> nodes.Filter:
  return nodes.Filter(node, name, args or [], [], None, None, lineno=node.lineno)
