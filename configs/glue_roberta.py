"""RoBERTa-base on GLUE: everything, biases, adapters or LoRA? Hu et al. 2021, table 2.

https://arxiv.org/abs/2106.09685, with the hyperparameters of table 9. Eight tasks, four methods, five seeds each; the
seeds of a method on a task are one program. LoRA on MRPC, RTE and STS-B starts from LoRA on MNLI. `MNLI` is where a run
without --workdir leaves that adapter, be it of all tasks or of MNLI alone.

Command: python -m experiments.run --config configs/glue_roberta.py
  160 members in 32 groups: days on one GPU, most of them for MNLI and QQP. tensorflow_datasets downloads the data.
  `configs/glue_roberta.py:mrpc` is one task, as is any other of mnli sst2 mrpc cola qnli qqp rte stsb: 20 members in 4
  groups. Give each task after MNLI its own --workdir. Not run yet.
  `configs/glue_roberta.py:smol` is SmolLM2-135M-Instruct with a new head, on sentences of Rotten Tomatoes and BBC news
  articles, from packages: runs offline; 24 members in 8 groups.
Hardware: one NVIDIA H200: 2 min 43 s (smol), at most 10 GiB.
Expected (smol, mean of 3 seeds): Rotten Tomatoes 83.0 finetuning, 84.0 BitFit, 84.2 adapters, 84.0 LoRA; BBC News 95.7,
98.2, 98.8, 98.6.
Published, means over the eight tasks: finetuning 86.4, BitFit 85.2, adapters 84.4 (0.3M) and 85.4 (0.9M), LoRA 87.2.
LoRA's MNLI 87.5, SST-2 95.1, MRPC 89.7, CoLA 63.4, QNLI 93.3, QQP 90.8, RTE 86.6, STS-B 91.5; all rows are in `ROWS`.
LoRA's scores are medians of five seeds, each at its best epoch. Ours are means after the last step. MNLI is scored on
matched genres alone (in the paper on both). A tenth of each training set is held out here; steps are the paper's.
"""

from configs import common

MNLI = "runs/glue_roberta/members/mnli_lora-seed_0/adapter"
# task: (its column, metric, training examples).
TASKS = {
  "mnli": ("MNLI", "accuracy", 392_702),
  "sst2": ("SST-2", "accuracy", 67_349),
  "mrpc": ("MRPC", "accuracy", 3_668),
  "cola": ("CoLA", "matthews", 8_551),
  "qnli": ("QNLI", "accuracy", 104_743),
  "qqp": ("QQP", "accuracy", 363_846),
  "rte": ("RTE", "accuracy", 2_490),
  "stsb": ("STS-B", "pearson", 5_749),
}
# method: (its row, keywords).
METHODS = {
  "full": ("Fine-tuning", {"name": "full"}),
  "bitfit": ("BitFit", {"name": "bitfit"}),
  "adapter": ("Adapters", {"name": "pfeiffer", "size": 48}),
  "lora": ("LoRA", {"name": "lora", "rank": 8, "alpha": 8.0, "targets": "q,v"}),
}
# method: (batch size, epochs, learning rate, weight decay), one value or one for each of TASKS.
SETTINGS = {
  # Liu et al. 2019, from memory of their table 10: one rate of their grid.
  "full": (16, 10, 2e-5, 0.1),
  # Ben Zaken et al. 2021, the official code's defaults.
  "bitfit": (8, 16, 1e-3, 0.0),
  # The paper's source of these numbers, Rücklé et al. 2021, is not at hand: table 9, RoBERTa-large, Adapter^P of 0.8M,
  # whose texts are cut to 128 tokens.
  "adapter": (32, (5, 20, 20, 20, 10, 20, 20, 20), 3e-4, 0.0),
  # Table 9. The scripts in the authors' repository have alpha 16, eight GPUs of these batch sizes each, and this decay.
  "lora": (
    (16, 16, 16, 32, 32, 16, 32, 16),
    (30, 60, 30, 80, 25, 25, 80, 40),
    (5e-4, 5e-4, 4e-4, 4e-4, 4e-4, 5e-4, 5e-4, 4e-4),
    0.1,
  ),
}
LENGTHS = {"adapter": {"seq_len": 128}}
ROWS = {
  "Fine-tuning": (87.6, 94.8, 90.2, 63.6, 92.8, 91.9, 78.7, 91.2),
  "BitFit": (84.7, 93.7, 92.7, 62.0, 91.8, 84.0, 81.5, 90.8),
  "Adapters, 0.3M": (
    *((87.1, 0.0), (94.2, 0.1), (88.5, 1.1), (60.8, 0.4)),
    *((93.1, 0.1), (90.2, 0.0), (71.5, 2.7), (89.7, 0.3)),
  ),
  "Adapters": (  # 0.9M
    *((87.3, 0.1), (94.7, 0.3), (88.4, 0.1), (62.6, 0.9)),
    *((93.0, 0.2), (90.6, 0.0), (75.9, 2.2), (90.3, 0.1)),
  ),
  "LoRA": (
    *((87.5, 0.3), (95.1, 0.2), (89.7, 0.7), (63.4, 1.2)),
    *((93.3, 0.3), (90.8, 0.1), (86.6, 0.7), (91.5, 0.2)),
  ),
}


def get_config(task: str = ""):
  """All tasks, one of TASKS, or "smol"."""
  if task not in ("", "smol", *TASKS):
    raise KeyError(f"unknown task {task!r}; known: {', '.join(TASKS)}, smol, or none for all")
  config = common.get_sweep("smol" if task == "smol" else "")
  config.objective = {"name": "classification"}
  config.data = {"batch_size": 32, "seq_len": 256}
  return smol(config) if task == "smol" else full(config, [task] if task else list(TASKS))


def full(config, names: list[str]):
  """The tasks, methods and rates of the paper."""
  config.model.name = "hf:FacebookAI/roberta-base"
  config.data.seq_len = 512
  config.train.log_every = 100
  config.train.checkpoint_every = 5000
  config.eval = {"examples": 50_000, "every": 0, "batch_size": 640, "seq_len": 512}
  config.sweep = {
    "list": {f"{name}_{method}": member(name, method) for name in names for method in METHODS},
    "product": {"train": {"seed": (0, 1, 2, 3, 4)}},
  }
  metrics = tuple(dict.fromkeys(TASKS[name][1] for name in names))
  config.table = table(metrics, "task.subset", {name: TASKS[name][0] for name in names})
  config.table["published"] = {"RoBERTa-base": published(names, len(metrics) > 1)}
  return config


def table(metrics, path: str, tasks: dict) -> dict:
  """Table 2's layout, except that tasks are rows: the scores of a row can be compared."""
  return {
    "paper": "Hu et al. 2021, table 2",
    "metric": metrics,
    "rows": path,
    "row_labels": tuple(tasks.items()),
    "columns": "method",
    "column_labels": tuple((common.text(method), label) for label, method in METHODS.values()),
    "x": "trainable_params",
    "log": True,
    "lines": path,
  }


def member(name: str, method: str) -> dict:
  """Overrides of a method on a task."""
  i = list(TASKS).index(name)
  batch_size, epochs, rate, decay = (x[i] if isinstance(x, tuple) else x for x in SETTINGS[method])
  steps = -(-TASKS[name][2] // batch_size) * epochs
  length = LENGTHS.get(method, {})
  warm = {"init_from": MNLI} if method == "lora" and name in ("mrpc", "rte", "stsb") else {}
  return {
    "task": {"name": "glue", "subset": name},
    "method": METHODS[method][1],
    "data": {"batch_size": batch_size, **length},
    "eval": length,
    "optim": {"learning_rate": rate, "weight_decay": decay},
    "train": {"steps": steps, **warm},
  }


def published(names: list[str], groups: bool) -> tuple:
  """The columns of ROWS as rows, in groups by metric if there are several."""
  found = dict(zip(TASKS, zip(*ROWS.values(), strict=True), strict=True))
  rows = {name: tuple(zip(ROWS, found[name], strict=True)) for name in names}
  return tuple((f"{TASKS[n][1]}, {TASKS[n][0]}" if groups else TASKS[n][0], row) for n, row in rows.items())


def smol(config):
  """Two tasks whose data are packages, with the paper's methods and rates."""
  tasks = {"news": {"name": "bbc_news"}, "reviews": {"name": "rotten_tomatoes"}}
  rates = {"full": 2e-5, "bitfit": 1e-3, "adapter": 3e-4, "lora": 5e-4}
  config.eval.seq_len = 256
  config.sweep = {
    "list": {
      f"{name}_{method}": {"task": task, "method": kw, "optim": {"learning_rate": rates[method]}}
      for name, task in tasks.items()
      for method, (_, kw) in METHODS.items()
    },
    "product": {"train": {"seed": (0, 1, 2)}},
  }
  config.table = table("accuracy", "task.name", {"rotten_tomatoes": "Rotten Tomatoes", "bbc_news": "BBC News"})
  return config
