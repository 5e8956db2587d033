"""Methods in lists, what they leave behind, and the keywords that one takes of another."""

import numpy as np
import pytest

from lora_jax import errors, methods, tree
from lora_jax.formats import adapter
from tests.method_cases import KEY, model, run
from tests.noise import moved


def test_a_list_of_methods_is_a_method():
  """LongLoRA's (Chen et al. 2023, section 3.3): LoRA on attention beside trained norms and embeddings."""
  m = model("llama")
  method = [
    {"name": "lora", "rank": 2, "targets": "q,k,v,o"},
    {"name": "full", "targets": [r"norm/scale$", r"^norm/scale$", r"embed/kernel$"]},
  ]
  params, mask = methods.init(KEY, m.params, method)
  trained = {k for k, t in tree.flatten(mask).items() if t}
  assert {k.rpartition("/")[2] for k in trained if "/attn/" in k} == {"a", "b"}
  assert {"embed/kernel", "norm/scale", "layers/attn_norm/scale", "layers/mlp_norm/scale"} <= trained
  # The other way round the matrices that were trained first still are, inside the nodes.
  params, mask = methods.init(KEY, m.params, [{"name": "full", "targets": "attn/q"}, {"name": "lora", "targets": "q"}])
  trained = {k for k, t in tree.flatten(mask).items() if t}
  assert trained == {f"layers/attn/q/kernel/{k}" for k in ("base", "a", "b")}
  assert methods.title(method) == "lora+full"


@pytest.mark.parametrize(
  "names, whole",
  [("full", True), ("full norms", True), ("relora", True), ("lora relora", True), ("lora", False), ("norms", False)]
  + [("lora full", False), ("full houlsby", False), ("bitfit partial", True), ("prompt_tuning full", False)],
)
def test_a_run_leaves_a_model_or_an_adapter(names, whole):
  """LongLoRA's embeddings and norms go into the adapter, as PEFT's modules_to_save do."""
  assert methods.leaves_model([{"name": n} for n in names.split()]) == whole


@pytest.mark.parametrize("others", [["houlsby"], ["ia3"], ["prompt_tuning"], ["norms"], ["tokens"]])
def test_lists_are_saved_whole(others, tmp_path):
  """In PEFT's form where it has a place for all of it, else in ours: nothing that was trained is left out."""
  m, method = model("llama"), [{"name": "lora"}, *({"name": n} for n in others)]
  params, mask = methods.init(KEY, m.params, method)
  params = moved(params, mask)
  adapter.save(m, params, mask, method, tmp_path)
  np.testing.assert_allclose(run(m, adapter.load(m, tmp_path)), run(m, params), atol=2e-5)


@pytest.mark.parametrize(
  "name, taken, refused",
  [
    ("rslora", "bias", "rslora"),
    ("lora_fa", "rslora", "tied"),
    ("lora_plus", "lr_ratio", "lora_bias"),
    ("pissa", "iterations", "init"),
    ("olora", "dropout", "bias"),
    ("dora", "init", "tied"),
    ("relora", "rslora", "init"),
  ],
)
def test_variants_take_the_keywords_of_lora_but_those_they_set(name, taken, refused):
  assert taken in methods.fields(name)
  with pytest.raises(errors.UserError, match=rf"unknown key config\.method\.{refused}"):
    methods.resolve({"name": name, refused: None})
