"""Text from a model: `python scripts/generate.py --model smollm2-135m --prompt "Once upon a time"`.

With `--chat` the prompt is a message to an instruction-tuned model; without `--prompt` messages are read from standard
input, line by line, until it ends (Ctrl-D). Text goes to standard output as it is written, and everything else to
standard error. `--adapter` takes what Hugging Face's `peft` writes.
"""

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

from lora_jax import errors
from lora_jax.runs import command_line
from lora_jax.values import Count, Name, NonNegative, Seed, Share, Size

Flags = argparse.Namespace


def parser() -> command_line.Parser:
  """The flags."""
  p = command_line.Parser("python scripts/generate.py", "Text from a model.")
  p.add_argument(
    "--model", required=True, help="a directory, a .gguf file, the name of a packaged model, or hf:org/name"
  )
  p.add_argument("--prompt", help="what to continue, or the only message of a chat; else standard input")
  p.add_argument("--chat", action="store_true", help="use the model's chat template")
  p.add_argument("--system", help="the system message of a chat")
  p.value("--adapter", Name, None, "a PEFT adapter: a directory, or hf:org/name[@revision]")
  p.add_argument("--merge", action="store_true", help="merge the adapter into the weights, which is faster")
  p.value("--dtype", Literal["bfloat16", "float32", "float16"], "bfloat16", "of weights and activations")
  p.value("--max_new_tokens", Count, 256, "length of an answer")
  p.value("--temperature", NonNegative, 0.0, "randomness; 0 takes the most likely token")
  p.value("--top_k", Size, 0, "only so many of the most likely tokens; 0 is all")
  p.value("--top_p", Share, 1.0, "only the most likely tokens, up to this probability together")
  p.value("--seed", Seed, 0, "of random numbers")
  p.value("--beams", Count, 1, "beam search with so many beams; the text comes at once, at the end")
  p.value("--length_penalty", float, 1.0, "of beam search: scores are divided by length to this power")
  p.value("--no_repeat_ngram", Size, 0, "no sequence of so many tokens comes twice; 0 allows all")
  p.add_argument("--stop", action="append", default=[], help="text that ends an answer; may be repeated")
  return p


def main(argv: Sequence[str] | None = None) -> None:
  """Runs the command line."""
  command_line.run(run, argv)


def run(argv: Sequence[str]) -> None:
  """Answers the prompt, or each line of standard input."""
  flags = parser().parse_args(argv)
  check_flags(flags)
  from absl import logging

  from lora_jax import models, weights
  from lora_jax.formats import adapter, peft

  logging.set_verbosity(logging.WARNING)
  head = peft.head(flags.adapter) if flags.adapter else {}
  model = models.load(flags.model, dtype=flags.dtype, **head)
  if model.tokenizer is None:
    raise errors.UserError(f"{flags.model} has no tokenizer.json, so it cannot read text")
  if flags.adapter:
    params = adapter.load(model, flags.adapter)
    model = dataclasses.replace(model, params=weights.merge(params) if flags.merge else params)
  messages = [{"role": "system", "content": flags.system}] if flags.system else []
  for prompt in prompts(flags):
    if not flags.chat:
      answer(flags, model, prompt)
      continue
    messages.append({"role": "user", "content": prompt})
    text = model.tokenizer.chat(messages, add_generation_prompt=True)
    messages.append({"role": "assistant", "content": answer(flags, model, model.tokenizer.encode(text))})


def check_flags(flags: Flags) -> None:
  """Raises UserError for values out of range, and for flags that would do nothing."""
  beam = flags.beams != 1
  default = parser().get_default
  idle = {"with --beams": "temperature top_k top_p seed"} if beam else {"without --beams": "length_penalty"}
  idle |= {} if flags.chat else {"without --chat": "system"}
  idle |= {} if flags.adapter else {"without --adapter": "merge"}
  for when, names in idle.items():
    if wrong := [f"--{k}" for k in names.split() if getattr(flags, k) != default(k)]:
      raise errors.UserError(f"{', '.join(wrong)} would do nothing {when}")
  from lora_jax.inference import decode

  decode.check(flags.max_new_tokens, flags.temperature, flags.top_k, flags.top_p, flags.no_repeat_ngram, flags.beams)


def prompts(flags: Flags) -> Iterator[str]:
  """`--prompt`; or else standard input, in a chat line by line."""
  if flags.prompt is not None:
    yield flags.prompt
  elif sys.stdin is None:
    raise errors.UserError("there is nothing to continue: give --prompt, or text on standard input")
  elif not flags.chat:
    yield read(sys.stdin.read)
  else:
    terminal = sys.stdin.isatty()
    while True:
      print("> " if terminal else "", end="", file=sys.stderr, flush=True)
      if not (line := read(sys.stdin.readline)):
        return
      if line.strip():
        yield line.strip()


def read(text: Callable[[], str]) -> str:
  """What `text` reads from standard input; UserError if that is not UTF-8."""
  with errors.parsing("standard input"):
    return text()


def answer(flags: Flags, model, prompt: str | list[int]) -> str:
  """Prints the continuation as it is written, and how fast that was."""
  from lora_jax.inference import generate

  how = dict(max_new_tokens=flags.max_new_tokens, no_repeat_ngram=flags.no_repeat_ngram, stop=flags.stop)
  if flags.beams > 1:
    how |= dict(beams=flags.beams, length_penalty=flags.length_penalty)
    (text,) = generate.generate(model, [prompt], **how)
    print(text, flush=True)
    return text
  start = time.perf_counter()
  times = []
  pieces = []
  how |= dict(temperature=flags.temperature, top_k=flags.top_k, top_p=flags.top_p, seed=flags.seed)
  for piece in generate.stream(model, prompt, **how, progress=lambda n: times.append(time.perf_counter())):
    pieces.append(piece)
    print(piece, end="", flush=True)
  print(flush=True)
  report = f"{len(times)} tokens"
  if len(times) > 2:  # both programs have been compiled when there are two tokens
    rate = (len(times) - 2) / (times[-1] - times[1])
    report += f", {rate:.1f} tokens/s after {times[1] - start:.1f} s for the prompt and for compiling"
  print(f"[{report}]", file=sys.stderr)
  return "".join(pieces)


if __name__ == "__main__":
  main()
