"""Text from a model: `python scripts/generate.py --model smollm2-135m --prompt "Once upon a time"`.

With `--chat` the prompt is a message to an instruction-tuned model; without `--prompt` messages are read from standard
input, line by line, and the conversation goes on until it ends (Ctrl-D). Text goes to standard output as it is
written, all else to standard error. `--adapter` takes what Hugging Face's `peft` writes.
"""

import dataclasses
import os
import sys
import time
from collections.abc import Iterator

from absl import app, flags

MODEL = flags.DEFINE_string("model", None, "A directory, a .gguf file, the name of a packaged model, or hf:org/name.")
PROMPT = flags.DEFINE_string("prompt", None, "What to continue, or the only message of a chat; else standard input.")
CHAT = flags.DEFINE_bool("chat", False, "Use the model's chat template.")
SYSTEM = flags.DEFINE_string("system", None, "The system message of a chat.")
ADAPTER = flags.DEFINE_string("adapter", None, "A PEFT adapter: a directory, or hf:org/name[@revision].")
MERGE = flags.DEFINE_bool("merge", False, "Merge the adapter into the weights, which is faster.")
DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float32", "float16"], "Of weights and activations.")
NEW = flags.DEFINE_integer("max_new_tokens", 256, "Length of an answer.")
TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "Randomness; 0 takes the most likely token.")
TOP_K = flags.DEFINE_integer("top_k", 0, "Only so many of the most likely tokens; 0 is all.")
TOP_P = flags.DEFINE_float("top_p", 1.0, "Only the most likely tokens, up to this probability together.")
SEED = flags.DEFINE_integer("seed", 0, "Of random numbers.")
BEAMS = flags.DEFINE_integer("beams", 1, "Beam search with so many beams; the text comes at once, at the end.")
LENGTH_PENALTY = flags.DEFINE_float(
  "length_penalty", 1.0, "Of beam search: scores are divided by length to this power."
)
NO_REPEAT = flags.DEFINE_integer("no_repeat_ngram", 0, "No sequence of so many tokens comes twice; 0 allows all.")
STOP = flags.DEFINE_multi_string("stop", [], "Text that ends an answer; may be repeated.")
flags.mark_flag_as_required("model")


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected argument {argv[1]!r}; write --prompt {argv[1]!r}")
  from absl import logging

  from lora_jax import errors

  logging.set_verbosity(logging.WARNING)
  try:
    run()
  except errors.UserError as e:
    sys.exit(f"error: {e}")
  except KeyboardInterrupt:
    sys.exit(130)
  except BrokenPipeError:  # such as by `| head`; nothing can be written when Python flushes at its end
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def run() -> None:
  """Answers the prompt, or each line of standard input."""
  check_flags()
  from lora_jax import errors, models, weights
  from lora_jax.formats import adapter, peft

  head = peft.head(ADAPTER.value) if ADAPTER.value else {}
  model = models.load(MODEL.value, dtype=DTYPE.value, **head)
  if model.tokenizer is None:
    raise errors.UserError(f"{MODEL.value} has no tokenizer.json, so that it takes no text")
  if ADAPTER.value:
    params = adapter.load(model, ADAPTER.value)
    model = dataclasses.replace(model, params=weights.merge(params) if MERGE.value else params)
  messages = [{"role": "system", "content": SYSTEM.value}] if SYSTEM.value else []
  for prompt in prompts():
    if not CHAT.value:
      answer(model, prompt)
      continue
    messages.append({"role": "user", "content": prompt})
    text = model.tokenizer.chat(messages, add_generation_prompt=True)
    messages.append({"role": "assistant", "content": answer(model, model.tokenizer.encode(text))})


def check_flags() -> None:
  """Raises UserError for values out of range, and for flags that would do nothing."""
  from lora_jax import errors

  beam = BEAMS.value != 1
  idle = {"with --beams": "temperature top_k top_p seed"} if beam else {"without --beams": "length_penalty"}
  idle |= {} if CHAT.value else {"without --chat": "system"}
  idle |= {} if ADAPTER.value else {"without --adapter": "merge"}
  for when, names in idle.items():
    if wrong := [f"--{k}" for k in names.split() if flags.FLAGS[k].value != flags.FLAGS[k].default]:
      raise errors.UserError(f"{', '.join(wrong)} would do nothing {when}")
  from lora_jax import decode

  decode.check(NEW.value, TEMPERATURE.value, TOP_K.value, TOP_P.value, NO_REPEAT.value, BEAMS.value)


def prompts() -> Iterator[str]:
  """`--prompt`; or in a chat the lines of standard input, and else all of it."""
  from lora_jax import errors

  if PROMPT.value is not None:
    yield PROMPT.value
  elif sys.stdin is None:
    raise errors.UserError("there is nothing to continue: give --prompt, or text on standard input")
  elif not CHAT.value:
    yield sys.stdin.read()
  else:
    terminal = sys.stdin.isatty()
    while True:
      print("> " if terminal else "", end="", file=sys.stderr, flush=True)
      if not (line := sys.stdin.readline()):
        return
      if line.strip():
        yield line.strip()


def answer(model, prompt: str | list[int]) -> str:
  """Prints the continuation as it is written, and how fast that was."""
  from lora_jax import generate

  how = dict(max_new_tokens=NEW.value, no_repeat_ngram=NO_REPEAT.value, stop=STOP.value)
  if BEAMS.value > 1:
    how |= dict(beams=BEAMS.value, length_penalty=LENGTH_PENALTY.value)
    (text,) = generate.generate(model, [prompt], **how)
    print(text, flush=True)
    return text
  start, times, pieces = time.perf_counter(), [], []
  how |= dict(temperature=TEMPERATURE.value, top_k=TOP_K.value, top_p=TOP_P.value, seed=SEED.value)
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
  app.run(main)
