"""Run where the wheel is installed and the repository is not: is all there, and nothing else?"""

import importlib
import importlib.metadata
import importlib.util
import json
from pathlib import Path

from lsa_jax import config_io

PRESETS = ("tiny", "bench", "v4_flash", "v4_pro")
SHIPPED = {"configs", "evals", "infer", "lsa_jax", "pallas_kernels", "train"}

installed = {Path(str(file)).parts[0] for file in importlib.metadata.files("lsa_jax") or ()}
tops = {name for name in installed if not name.endswith(".dist-info") and name != ".."}
assert tops == SHIPPED, f"the wheel must hold {SHIPPED}, got {tops}"
assert importlib.util.find_spec("tests") is None, "tests must not be shipped"
importlib.import_module("train.backbone_command")
vocabulary = importlib.import_module("evals.mini.vocabulary")
assert Path(str(vocabulary.__file__)).with_name("tokenizer.json").exists()
assert set(PRESETS) <= set(config_io.preset_names()), config_io.preset_names()
for preset in config_io.preset_names():
    assert config_io.load_config(preset).num_layers > 0, preset
embedded = importlib.import_module("infer.embedded").find()
assert embedded is not None, "the wheel must hold infer/weights"
assert embedded.indexer.with_name("CARD.md").is_file()
reply = json.loads(Path("reply.json").read_text())
assert reply["ids"], reply
print(f"wheel: {sorted(tops)}, presets {config_io.preset_names()}, reply {reply['ids']}")
