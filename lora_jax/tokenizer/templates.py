"""Chat templates: Jinja programs that come with a model, run in a sandbox that meters them.

A template is a stranger's program, and Jinja's sandbox limits neither its time nor its memory. Here everything that can
take long or grow is paid for in steps before it runs. Each run of the body of a loop, macro or block costs the nodes in
it; each operator, filter, test and call costs a bound on what it reads and makes. The budget is the same on every
machine, so a template either always renders a conversation or never does.
"""

import datetime
import functools
import json
import threading
import types
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
import jinja2.utils
from jinja2 import nodes

from lora_jax import errors
from lora_jax.tokenizer import template_costs as costs

LONGEST = 2**18  # characters of a template
STEPS = 2**23  # for each rendering; no known template takes ten seconds to spend them
STEPS_A_CHARACTER = 64  # more steps for each character of a long conversation
STEPS_A_PAIR = 64  # more steps for each pair of messages: Gemma 4's template looks back from each to all before it
A_CALL = 8  # steps that any call costs


def render(source: str, variables: Mapping[str, Any], where: str) -> str:
  """The text that a template makes from `variables`, the same as transformers' `apply_chat_template` gives.

  Args:
    where: the source of the template for messages, such as the directory of its model.

  Raises:
    UserError: the template fails in any way, or needs too many steps.
  """
  what = f"the chat template of {where}" if where else "the chat template"
  try:
    text = _meter().render(source, variables)
    text.encode()  # fails on lone surrogates
  except costs.Costly as e:
    raise errors.UserError(f"{what} {e}") from e
  except jinja2.TemplateSyntaxError as e:
    raise errors.UserError(f"{what} is not a Jinja template: line {e.lineno}: {errors.line(e)}") from e
  except jinja2.TemplateError as e:
    raise errors.UserError(f"{what} refuses the messages: {errors.line(e)}") from e
  except Exception as e:  # a program can raise anything
    raise errors.UserError(f"{what} fails on the messages: {type(e).__name__}: {errors.line(e)}") from e
  return text


class _Namespace(jinja2.utils.Namespace):
  def __repr__(self):  # namespaces that hold each other many times would take forever to print
    return "<Namespace>"


class _Generation(jinja2.ext.Extension):
  """`{% generation %} ... {% endgeneration %}`, by which templates mark what the model writes."""

  tags = {"generation"}

  def parse(self, parser):
    line = next(parser.stream).lineno
    return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _Meter(jinja2.sandbox.ImmutableSandboxedEnvironment):
  """The environment that renders templates and counts their steps. Each thread has one."""

  intercepted_binops = frozenset(("*", "**", "%"))

  def __init__(self):
    super().__init__(
      trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols], finalize=self._paid
    )
    self.left = 0
    self._given = None
    self._template = functools.lru_cache(maxsize=8)(self._built)
    self.filters = {k: self._metered(k, f) for k, f in self.filters.items()}
    self.filters["tojson"] = self._metered("tojson", self._tojson)
    self.filters |= {costs.STEP: self._step(), costs.ADD: self._add()}
    self.filters |= {costs.PAID: self._payment(), costs.COPIED: self._copied()}
    self.tests |= {k: self._metered(k, self.tests[k]) for k in costs.TESTS}
    self.tests["divisibleby"] = lambda x, n: self.call_binop(None, "%", x, n) == 0
    del self.globals["lipsum"]
    self.globals |= {
      "dict": lambda *args, **kw: dict(*args, **kw),  # the type's own methods could change the messages
      "namespace": _Namespace,
      "raise_exception": _refuse,
      "strftime_now": lambda fmt: datetime.datetime.now().strftime(fmt),
    }

  def render(self, source: str, variables: Mapping[str, Any]) -> str:
    """The text that a template makes from variables. Raises whatever the template raises."""
    self.left = STEPS
    self._given = variables
    try:
      return self._template(source).render(variables)
    finally:
      self._given = None

  def _built(self, source: str) -> jinja2.Template:
    if len(source) > LONGEST:
      raise costs.Costly(f"has {len(source):,} characters, more than {LONGEST:,}")
    with warnings.catch_warnings():
      warnings.simplefilter("ignore", SyntaxWarning)  # about the Python code that Jinja generates
      return self.from_string(costs.Payments().visit(self.parse(source)).set_environment(self))

  def spend(self, characters: int) -> None:
    """Pays for reading or making this many characters."""
    self.left -= A_CALL + characters // costs.PER_STEP
    if self.left < 0:
      self.borrow()

  def borrow(self) -> None:
    """Adds, once, the steps that the size of the conversation allows. Raises `Costly` if they are not enough."""
    if self._given is not None:
      longest = max((len(x) for x in self._given.values() if isinstance(x, list | tuple)), default=0)
      self.left += STEPS_A_CHARACTER * costs.size(dict(self._given)) + STEPS_A_PAIR * longest**2
      self._given = None
    if self.left < 0:
      raise costs.Costly("takes too many steps, or makes too much text")

  def is_safe_attribute(self, obj, attr, value):
    if type(obj) in (str, jinja2.runtime.LoopContext):  # the usual case, for which Jinja's own check is slow
      return not attr.startswith("_")
    return super().is_safe_attribute(obj, attr, value)

  def call(self, context, obj, /, *args, **kw):
    own = {k: v for k, v in kw.items() if k not in ("_loop_vars", "_block_vars")} if kw else kw  # Jinja adds these two
    if type(obj) is types.BuiltinMethodType:
      self.spend(costs.bound(obj.__name__, obj.__self__, args, own))
      return costs.check_integer(obj(*args, **own))
    if isinstance(obj, costs.MACHINERY):
      self.spend(sum(map(costs.outer, args)))
    elif (method := getattr(obj, "__wrapped__", None)) is not None:  # the sandbox replaces `str.format`
      self.spend(costs.bound(method.__name__, method.__self__, args, own))
    else:
      self.spend(costs.size(args) + costs.size(own))
    return costs.check_integer(super().call(context, obj, *args, **kw))

  def call_binop(self, context, operator, left, right):
    if type(left) is int and type(right) is int:
      if operator == "*" and left.bit_length() + right.bit_length() > costs.BITS:
        raise costs.Costly(f"makes an integer of more than {costs.BITS} bits")
      if operator == "**" and left.bit_length() * abs(right) > costs.BITS:
        raise costs.Costly(f"makes an integer of more than {costs.BITS} bits")
    elif operator == "%" and isinstance(left, str | bytes):
      self.spend(costs.formatted(left if isinstance(left, str) else left.decode("latin-1"), right))
    elif operator == "*":
      for x, n in ((left, right), (right, left)):
        if isinstance(n, int) and hasattr(x, "__len__"):
          self.spend(costs.outer(x) * max(0, n))
    return super().call_binop(context, operator, left, right)

  def _metered(self, name: str, fn: Callable) -> Callable:
    """A filter or test that pays first."""
    skip = int(hasattr(fn, "jinja_pass_arg"))  # Jinja passes the first argument

    @functools.wraps(fn)
    def call(*args, **kw):
      value = args[skip] if len(args) > skip else None
      if name == "join" and isinstance(value, costs.Stream | types.GeneratorType):
        value = list(value)
        args = (*args[:skip], value, *args[skip + 1 :])
      cost = costs.bound(name, value, args[skip + 1 :], kw)
      self.spend(cost)
      out = fn(*args, **kw)
      if type(out) is types.GeneratorType:
        return costs.Stream(out, costs.outer(value) if name in costs.EACH else cost, 1 + getattr(value, "depth", 0))
      return costs.check_integer(out)

    return call

  def _paid(self, x: Any) -> Any:
    """Pays for a value that is printed, compared or looked up, and returns it."""
    kind = type(x)
    if kind is str:
      self.left -= 1 + len(x) // costs.PER_STEP
    elif kind not in costs.SCALARS:
      self.left -= 1 + costs.size(x) // costs.PER_STEP
    if self.left < 0:
      self.borrow()
    return x

  # Filters that `costs.Payments` puts into templates. They ask for the context so that Jinja does not evaluate them at
  # compile time. They are short, since they run for every turn of a loop and every sum.

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

    @jinja2.pass_context
    def payment(context, x):
      return paid(x)

    return payment

  def _copied(self):
    @jinja2.pass_context
    def copied(context, x):
      self.spend(costs.outer(x))
      return x

    return copied

  def _add(self):
    @jinja2.pass_context
    def add(context, *parts):
      for x in parts:
        if type(x) is not str:
          break
      else:
        self.left -= 1 + sum(map(len, parts)) // costs.PER_STEP
        if self.left < 0:
          self.borrow()
        return "".join(parts)
      total = parts[0]
      for x in parts[1:]:
        self.spend(costs.outer(total) + costs.outer(x))
        total = total + x
      return total

    return add

  def _tojson(self, x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    kw = dict(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    if indent is None and separators is None:
      return json.dumps(x, **kw)
    self.spend(costs.outer(indent) if isinstance(indent, str) else abs(int(indent or 0)))
    chunks = []
    for chunk in json.JSONEncoder(**kw).iterencode(x):  # like `dumps`, but in steps that can be paid for
      self.spend(len(chunk))
      chunks.append(chunk)
    return "".join(chunks)


def _refuse(message):
  raise jinja2.TemplateError(message)


_threads = threading.local()


def _meter() -> _Meter:
  if not hasattr(_threads, "meter"):
    _threads.meter = _Meter()
  return _threads.meter
