"""What cannot fit is refused before it is allocated, with what it needs and what there is."""

import pytest

from lora_jax import errors, memory, models, patterns
from lora_jax.runs import build, command_line, config as config_lib, experiment, needs, sweep
from lora_jax.training import metrics
from tests.test_experiment import changed, compiled, config, files  # noqa: F401, fixtures


@pytest.mark.parametrize(
  "values, message",
  [
    (dict(method__rank=10**9), r"GiB for what config\.method trains; there are"),
    (dict(data__batch_size=8 * 10**9), r"GiB for the states of a layer, of config\.data\.batch_size rows; there are"),
    (dict(eval__beams=10**11), r"texts of max_new_tokens, each with 100,000,000,000 beams"),
    (dict(eval__batch_size=10**10), r"of config\.eval\.batch_size rows"),
    (dict(eval__max_new_tokens=10**9), r"the keys and values of config\.eval\.batch_size texts of max_new_tokens"),
    (dict(data__pack=True, data__seq_len=10**10), r"of config\.data\.batch_size rows"),
  ],
)
def test_what_cannot_fit_is_refused(config, tmp_path, values, message):  # noqa: F811
  with pytest.raises(errors.UserError, match=f"this cannot fit into memory: it needs at least .*{message}"):
    experiment.run(changed(config, **values), tmp_path / "run")
  assert not (tmp_path / "run").exists()


def test_a_rank_beyond_every_index_is_refused(config, tmp_path):  # noqa: F811
  with pytest.raises(errors.UserError, match=r"config\.method asks for more than any memory has"):
    experiment.run(changed(config, method__rank=10**12), tmp_path / "run")


def test_a_new_head_that_cannot_fit_is_refused(files):  # noqa: F811
  with pytest.raises(errors.UserError, match=r"cannot fit into memory: .* GiB for classifier/kernel, which .* lacks"):
    models.load(str(files / "model"), head="classification", n_labels=10**12)


def test_a_regex_of_a_method_that_does_not_end_is_refused(config, tmp_path, monkeypatch):  # noqa: F811
  monkeypatch.setattr(patterns, "SECONDS", 1)
  with pytest.raises(errors.UserError, match="takes more than 1 seconds to search"):
    experiment.run(changed(config, method__targets="(.*)*(.*)*x"), tmp_path / "run")


@pytest.mark.parametrize(
  "error",
  [MemoryError("x"), RuntimeError("RESOURCE_EXHAUSTED:\nx"), RuntimeError("INTERNAL: Out of memory allocating x")],
)
def test_running_out_of_memory_ends_in_one_message(error):
  def command(argv):
    raise error

  with pytest.raises(SystemExit, match="error: there is too little memory: .*x"):
    command_line.run(command, [])


def test_what_is_needed_is_what_is_trained(config):  # noqa: F811
  """Four bytes for each number; members have their own."""
  exp = experiment.build(changed(config, mesh__data=1))
  model = build.load(exp.config, exp.task, exp.mesh)
  trained = "what config.method trains"
  least = needs.least_memory(exp.config, exp.task, model)
  assert least[trained] == memory.size(exp.state.trainable) > 0
  assert needs.least_memory(exp.config, exp.task, model, 3)[trained] == 3 * least[trained]


def test_long_texts_are_no_matter_of_what_a_config_allows(config, monkeypatch):  # noqa: F811
  """Rows are as long as their texts, not as `seq_len`."""
  exp = experiment.build(changed(config, data__seq_len=100, mesh__data=1))
  model = build.load(exp.config, exp.task, exp.mesh)
  longer = config_lib.resolve(changed(config, data__seq_len=10**9, mesh__data=1))
  assert needs.least_memory(longer, exp.task, model) == needs.least_memory(exp.config, exp.task, model)


@pytest.mark.slow
def test_a_group_that_cannot_fit_is_cut_before_it_is_built(config, tmp_path, capsys, monkeypatch):  # noqa: F811
  monkeypatch.setattr(memory, "available", lambda: 4 * 10**6)
  c = changed(config, train__steps=1, train__checkpoint_every=1) | {
    "sweep": {"product": {"train": {"seed": tuple(range(3))}}}
  }
  c["method"] |= {"rank": 4000}
  summary = sweep.run(c, tmp_path / "s")
  assert len(summary["members"]) == 3 and "cut into 3 groups of 1 or fewer" in capsys.readouterr().err
  assert metrics.read_metrics(tmp_path / "s" / "members" / "seed_0" / "metrics.jsonl")
