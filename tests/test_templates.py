"""Chat templates: what they may do costs nothing they would notice, and what they must not is one message."""

import concurrent.futures
import contextlib
import json
import time
import tracemalloc

import jinja2
import jinja2.ext
import jinja2.sandbox
import pytest

from lora_jax import errors
from lora_jax.tokenizer import templates

TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"x": {}}}}}]
CHATS = [
  [{"role": "user", "content": "hi"}],
  [{"role": "system", "content": " Be brief. "}, {"role": "user", "content": "<b> & 'c' \u00fc"}],
  [{"role": r, "content": f"<think>\n{i}\n</think>\n\n{r}"} for i, r in enumerate(["user", "assistant"] * 3)],
  [
    {"role": "user", "content": "?"},
    {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {"x": [1, {}]}}}]},
    {"role": "tool", "content": "3"},
  ],
]
# The idioms of templates that are in use: of Llama 3, Gemma, Mistral, ChatML, Qwen 3 and gpt-oss.
SOURCES = [
  "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start|>' + "
  "message['role'] + "
  "'<|end|>\n\n' + (message['content'] or '') | trim + '<|eot|>' %}{% if loop.index0 == 0 %}{% set content = bos_token "
  "+ content %}{% endif %}{{ content }}{% endfor %}",
  "{% if messages[0].role == 'system' %}{% set first = messages[0].content.strip() + '\n\n' %}{% set rest = "
  "messages[1:] %}"
  "{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}{% for m in rest %}{% if (m.role == 'user') != "
  "(loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}{{ loop.cycle('a', 'b') ~ "
  "(first if "
  "loop.first else '') ~ m.content }}{% endfor %}{{ rest|length }}",
  "{%- set ns = namespace(last=messages|length - 1, found=false) %}{%- for m in messages[::-1] %}{%- set i = "
  "(messages|length - 1) - loop.index0 %}{%- if not ns.found and m.role == 'user' and m.content is string and not "
  "m.content.startswith('<t>') %}{%- set ns.found = true %}{%- set ns.last = i %}{%- endif %}{%- endfor %}{%- for m in "
  "messages %}{%- set c = m.content if m.content is not none else '' %}{%- if '</think>' in c %}{%- set r = "
  "c.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}{%- set c = c.split('</think>')[-1] %}{{- r "
  "}}{%- endif %}{{- loop.index0 > ns.last or loop.last }}{{- c.replace('\n', ' ').upper()|title|indent(2) }}{%- "
  "for t in "
  "m.tool_calls or [] %}{{- t.function.name }}{{- t.function.arguments | tojson }}{%- endfor %}{%- endfor %}",
  "{% macro show(x, depth=0) %}{% if x is mapping %}{% for k, v in x|dictsort %}{{ '  ' * depth ~ k ~ ':' }}{{ show(v, "
  "depth + 1) }}{% endfor %}{% elif x is sequence and x is not string %}{% for v in x if v is not none %}{{ show(v, "
  "depth)"
  " }}{% else %}none{% endfor %}{% else %}{{ x }}{% endif %}{% endmacro %}{{ show(tools) }}{% call(y) "
  "show(messages) %}{% "
  "endcall %}{% for t in tools|selectattr('type', 'equalto', 'function')|map(attribute='function')|list %}{{ t|tojson("
  "indent=2) }}{{ '%s-%05.1f' % (t.name, 2.5) }}{{ '{:>5}{x}'.format(t.name, x=1) }}{% break %}{% endfor %}",
  "{{ messages|map(attribute='role')|unique|join(', ') }}{{ messages|groupby('role')|list|length }}{{ [1, 2, 3]|sum + "
  "(messages|length) ** 2 }}{{ 'a,b'.split(',')|join('|') }}{{ {'a': 1, 'b': [2]}.items()|list }}{{ 7 // 2 }}{{ 7 % "
  "4 }}"
  "{{ [1] + [2] }}{{ messages|rejectattr('content')|list|length }}{{ range(3)|batch(2)|list }}{{ 'x'|center(5) }}{{ "
  "'abc'[::-1] }}{{ messages[-1]['role'] }}{{ nothing }}{{ nothing is defined }}{{ 1.5|round }}{{ '5'|int }}{{ none }}"
  "{% generation %}{{ messages[0].content }}{% endgeneration %}{% filter upper %}ab{{ bos_token }}{% endfilter %}",
]


@pytest.mark.parametrize("source", SOURCES)
def test_equals_jinja(source):
  """The same text as in Jinja's own sandbox, or a refusal where that raises."""
  env = jinja2.sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[templates._Generation, jinja2.ext.loopcontrols]
  )
  env.filters["tojson"] = lambda x, indent=None: json.dumps(x, ensure_ascii=False, indent=indent)
  env.globals["raise_exception"] = templates._refuse
  for messages in CHATS:
    variables = {"messages": messages, "tools": TOOLS, "bos_token": "<s>"}
    try:
      want = env.from_string(source).render(variables)
    except Exception:
      with pytest.raises(errors.UserError, match="the chat template of x"):
        templates.render(source, variables, "x")
    else:
      assert templates.render(source, variables, "x") == want


GROW = "{%% set ns = namespace(x=%s) %%}{%% for i in range(60) %%}{%% set ns.x = %s %%}{%% endfor %%}%s"
USES = "ns.x; ns.x|tojson; '%s' % (ns.x,); '' ~ ns.x; {ns.x: 1}; {}[ns.x]; {}.get(ns.x); [ns.x]|unique|list".split("; ")
COSTLY = [
  "{{ 'a' * 10**11 }}",
  "{% for i in range(10**5) %}{% for j in range(10**5) %}{% endfor %}{% endfor %}",
  "{% for i in range(10**5) %}{% for j in range(10**5) if false %}{% endfor %}{% endfor %}",
  "{% for i in range(10**5) %}{% for i in range(10**5) %}" + "x" * 10**5 + "{% endfor %}{% endfor %}",
  "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
  "{% for i in range(10**5) %}{{ range(10**5)|map('abs')|select|list|sort }}{% endfor %}",
  "{% set a = 'a' * 10**6 %}{% for i in range(10**5) %}{{ 'b' in a }}{{ a[1:] == a }}{% endfor %}",
  "{% set a = 'a' * 10**6 %}{{ a.rfind('b' + a) }}",
  "{{ 'a'|center(10**10) }}",
  "{{ range(9)|map('string')|map('center', 10**10)|list }}",
  "{{ 'a'.center(10**10) }}",
  "{{ ('\t' * 10**5).expandtabs(10**6) }}",
  "{{ '%1000000000d'|format(1) }}",
  "{{ '%*d' % (10**9, 1) }}",
  "{{ '%1000000000d' is divisibleby 5 }}",
  "{{ '{:1000000000}'.format(1) }}",
  "{{ '{:{w}}'.format(1, w=10**9) }}",
  "{{ ('{0}' * 10**5).format('x' * 10**6) }}",
  "{{ ('a\n' * 10**5)|indent('x' * 10**5) }}",
  "{{ range(10**5)|join('x' * 10**6) }}",
  "{{ ('x' * 10**6).join(range(10**5)|map('string')) }}",
  "{{ ('a' * 10**6)|replace('a', 'b' * 10**6) }}",
  "{{ ('a' * 10**6).replace('', 'b' * 10**6) }}",
  "{{ ('a' * 10**6).translate({97: 'b' * 10**6}) }}",
  "{{ [1]|batch(10**10, 0)|list }}",
  "{{ 1.5|round(10**10, 'ceil') }}",
  "{{ [[1]]|tojson(indent=10**10) }}",
  "{{ 9 ** (10**9) }}",
  "{{ ('f' * 10**7)|int(0, 16) // 7 }}",
  "{{ (1).to_bytes(10**11, 'big') }}",
  "{% set x = 'a' * 10**7 %}{{ " + "+".join(["x"] * 999) + " }}",
  "{% set ns = namespace(x=()) %}{% for i in range(10**5) %}{% set ns.x = (ns.x,) %}{% endfor %}{{ {ns.x: 1} }}",
  "{% set ns = namespace(x=[1]) %}{% for i in range(10**5) %}{% set ns.x = ns.x|map('upper') %}{% endfor %}",
  GROW % ("9", "ns.x * ns.x", ""),
  GROW % ("'ab'", "ns.x + ns.x", ""),
  GROW % ("'ab'", "ns.x ~ ns.x", ""),
  GROW % ("[1]", "ns.x + ns.x", ""),
  *(
    GROW % ("(1,)", "(ns.x, ns.x)", f"{{{{ {use} }}}}")
    for use in ("ns.x", "ns.x|tojson", "'%s' % (ns.x,)", "'' ~ ns.x")
  ),
  *(
    GROW % ("(1,)", "(ns.x, ns.x)", f"{{{{ {use} }}}}")
    for use in ("{ns.x: 1}", "{}[ns.x]", "{}.get(ns.x)", "[ns.x]|unique|list")
  ),
  GROW % ("1", "cycler(ns.x, ns.x).items", "{{ ns.x|string }}"),
  GROW % ("1", "dict(a=ns.x, b=ns.x)", "{{ ns.x == 1 }}"),
  "{{ 1 }}" * 10**5,
]


@pytest.mark.parametrize("source", COSTLY, ids=range(len(COSTLY)))
def test_time_and_memory_are_bounded(source):
  started = time.process_time()
  with pytest.raises(errors.UserError, match="^the chat template of some/model (takes|makes|nests|chains|has)"):
    templates.render(source, {"messages": CHATS[0]}, "some/model")
  assert time.process_time() - started < 15


@pytest.mark.slow
def test_whatever_multiplies_its_input_is_paid_for():
  """All methods of strings and numbers and all filters that there are, with arguments that ask for much."""
  methods = [f"x.{k}" for k in dir(str) if not k.startswith("_")] + [
    f"n.{k}" for k in dir(int) if not k.startswith("_")
  ]
  calls = [f"{m}({args})" for m in methods for args in ("big", "a, big", "big, a", "{97: big}", "big, 'little'")]
  calls += [f"{v}|{f}({args})" for v in "xnl" for f in jinja2.filters.FILTERS for args in ("big", "a, big", "big, big")]
  tracemalloc.start()
  started = time.process_time()
  for call in calls:
    for big in (10**9, "b" * 10**5):
      variables = {"x": "a\t%s{}" * 10**3, "a": "a", "n": 3, "l": ["aaaa"] * 10**3, "big": big}
      with contextlib.suppress(errors.UserError):
        templates.render(f"{{{{ {call} }}}}", variables, "x")
  assert tracemalloc.get_traced_memory()[1] < 2**28
  tracemalloc.stop()
  assert time.process_time() - started < 120


@pytest.mark.parametrize(
  ("source", "match"),
  [
    ("{{ 1 / 0 }}", "fails on the messages: ZeroDivisionError"),
    ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    ("{{ " + "(" * 900 + "1" + ")" * 900 + " }}", "RecursionError"),
    ("{% for i in range(10**12) %}{% endfor %}", "OverflowError: Range too big"),
    ("{{ 'a'.encode('nope') }}", "LookupError: unknown encoding"),
    ("{{ '\\ud800' }}", "UnicodeEncodeError"),
    ("{{ " + "9" * 5000 + " }}", "ValueError"),
    ("{% include 'x' %}", "TypeError: no loader"),
    ("{% for i in [1] %}" * 50 + "{% endfor %}" * 50, "SyntaxError"),
    ("{% for %}", "is not a Jinja template: line 1"),
    ("{{ raise_exception('no\nsystem \x1b[31m role') }}", r"refuses the messages: no system \\x1b\[31m role$"),
    ("{{ dict.update(messages[0], {'content': 1}) }}", "refuses the messages"),
    ("{{ messages.append(1) }}", "refuses the messages"),
    ("{{ ''.__class__ }}{{ ''.__class__.__mro__ }}", "refuses the messages"),
    ("{{ lipsum(10**6) }}", "'lipsum' is undefined"),
  ],
)
def test_errors_are_one_line(source, match):
  with pytest.raises(errors.UserError, match=match) as e:
    templates.render(source, {"messages": CHATS[0]}, "some/model")
  assert str(e.value).startswith("the chat template of some/model ") and "\n" not in str(e.value)
  assert CHATS[0] == [{"role": "user", "content": "hi"}]


def test_long_conversations_have_their_share():
  """What is linear in the conversation never runs out of steps, whatever its length."""
  source = (
    "{% for m in messages %}{% for x in m.content.split('a') %}{{ x }}{% endfor %}{{ m.content|trim }}{% endfor %}"
  )
  messages = [{"role": "user", "content": "a" * 10**6}] * 3
  assert templates.render(source, {"messages": messages}, "x").count("a") == 3 * 10**6


def test_long_conversations_may_be_compared_with_themselves():
  source = "{% for m in messages %}{% for x in messages %}{% if x.role == m.role %}{% endif %}{% endfor %}.{% endfor %}"
  messages = [{"role": "user", "content": "a"}] * 1200
  assert templates.render(source, {"messages": messages}, "x") == "." * 1200


def test_threads_do_not_share_their_steps():
  render = lambda source: templates.render(source, {"messages": CHATS[2]}, "x")
  want = render(SOURCES[2])

  def work(i):
    if i % 4:
      return render(SOURCES[2]) == want
    with pytest.raises(errors.UserError, match="steps"):
      render(COSTLY[1])
    return True

  with concurrent.futures.ThreadPoolExecutor(4) as pool:
    assert all(pool.map(work, range(20)))
