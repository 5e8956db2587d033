"""Summaries of sweeps, as they are read from a file: what tables and plots are made of."""

import copy
import json
import re

import numpy as np

BASE = {
  "model": {"name": "tiny"},
  "task": {"name": "rotten_tomatoes"},
  "method": {"name": "lora", "rank": 8, "targets": "q,v", "alpha": 16.0},
  "optim": {"learning_rate": 2e-4},
  "train": {"seed": 0, "steps": 30},
}
RANKS, TARGETS, SEEDS = (1, 4, 64), (("q",), ("q", "v")), (0, 1, 2)
TABLE6 = {
  "paper": "Hu et al. 2021, table 6",
  "metric": "accuracy",
  "rows": "method.targets",
  "columns": "method.rank",
  "row_labels": {"('q',)": "$W_q$", "q,v": "Wq & Wv"},
  "published": {
    "MNLI, GPT-3 175B": {
      "$W_q$": {"1": 90.7, "2": 90.9, "4": [91.1, 0.1], "64": 90.7},
      "Wq & Wv": {"1": 91.3, "64": 91.4},
      "all": {"1": 91.2},
    }
  },
  "log": True,
}


def member(name, overrides, after, **more):
  losses = [3 - 0.05 * i for i in range(30)]
  return {
    "name": name,
    "overrides": overrides,
    "model": "tiny",
    "task": "rotten_tomatoes",
    "eval": {"before": dict.fromkeys(after, 0.5), "after": after},
    "trainable_params": 1000,
    "total_params": 50_000,
    "saved_bytes": 4000,
    "train": {"steps": 30, "loss_first": 3.0, "loss_last": 1.5},
    "losses": {"step": list(range(1, 31)), "loss": losses},
    **more,
  }


def summary(members, table, **more):
  """As it is read from a file."""
  whole = {
    "config": BASE,
    "table": table,
    "members": members,
    "groups": [[m["name"] for m in members]],
    "wall_seconds": 12.3,
    "versions": {"jax": "0.10.2"},
  }
  return json.loads(json.dumps(whole | more))


def accuracy(t, r, s):
  return 0.80 + 0.01 * len(t) + 0.002 * np.log2(r).item() + (0.001, -0.003, 0.002)[s]


def by_rank():
  """A table of targets and ranks, with three seeds."""
  members = [
    member(
      f"{'+'.join(t)}-{r}-{s}",
      {"method": {"targets": t, "rank": r}, "train": {"seed": s}},
      {"accuracy": accuracy(t, r, s), "label_loss": 0.9 - 0.1 * len(t)},
      trainable_params=100_000 * r * len(t),
    )
    for t in TARGETS
    for r in RANKS
    for s in SEEDS
  ]
  return summary(members, TABLE6)


def fails(swept, *names):
  """The summary with members that failed."""
  out = copy.deepcopy(swept)
  for m in out["members"]:
    if m["name"] in names:
      kept = {k: m[k] for k in ("name", "overrides")}
      m.clear()
      m.update(kept, error="step 3: loss nan")
  return out


def rows(text):
  """{first cell: cells} of a Markdown table."""
  lines = [re.split(r"(?<!\\) \| ", line[2:-2]) for line in text.splitlines() if line.startswith("| ")]
  return {line[0]: line[1:] for line in lines if line[0] != "---"}


def several(**layout_):
  metric = {"trainable_params": 0, "bleu": 0.9, "nist": 8.5, "meteor": 0.46, "val_loss": 1.2}
  members = [
    member(f"{r}", {"method": {"rank": r}}, {k: v + 0.01 * r for k, v in metric.items()}, trainable_params=98_304 * r)
    for r in (4, 1)
  ]
  for m in members:
    del m["eval"]["after"]["trainable_params"]
  labels = {"bleu": "BLEU", "meteor": "METEOR"}
  return summary(members, {"metric": list(metric), "column_labels": labels, **layout_})


DIMENSIONS, REACHED = (10, 100, 1000), {True: (0.6, 0.8, 0.88), False: (0.55, 0.7, 0.78)}


def dimensions(metric="accuracy", sign=1, **table):
  """Two lines over dimensions, and full finetuning, each of two seeds; in an order that is none."""
  score = lambda x, s: {metric: sign * (x + (0.01, -0.01)[s])}
  members = [
    member(
      f"{scales}-{d}-{s}",
      {"method": {"name": "intrinsic", "dimension": d, "layer_scales": scales}, "train": {"seed": s}},
      score(x, s),
    )
    for scales, row in REACHED.items()
    for d, x in reversed(list(zip(DIMENSIONS, row, strict=True)))
    for s in (0, 1)
  ]
  members[2:2] = [member(f"full-{s}", {"method": {"name": "full"}}, score(0.9, s)) for s in (0, 1)]
  labels = (("True", "SAID"), ("False", "DID"), ("-", "full"))
  rows_ = {"rows": "method.layer_scales", "row_labels": labels, "lines": "method.layer_scales"}
  columns = {"columns": "method.dimension", "x": "method.dimension", "column_labels": {"-": "all"}}
  return summary(members, {"metric": metric, **rows_, **columns, "log": True, "d90": 0.9, **table})
