"""Every script in examples/ runs, here with a tiny model."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import topk_attention
from pages import ROOT
from tiny_models import write_tiny_llama

SCRIPTS = {
    "convert_and_generate.py": ["--prompt", "a query keeps the keys", "--k", "4", "--new-tokens", "5"],
    "calibrate_heads.py": ["--tokens", "32", "--mean-k", "4"],
    "finetune_with_topk.py": ["--tokens", "32", "--k", "4", "--steps", "2"],
}
LAST_LINE = {
    "convert_and_generate.py": "full: ",
    "calibrate_heads.py": "written: k.json",
    "finetune_with_topk.py": "tuned: 4 layers remember their k",
}


@pytest.fixture(scope="session")
def example_model(tmp_path_factory):
    """Folder of a random Llama whose tokenizer knows a few words."""
    words = ["a", "query", "keeps", "the", "keys", "that", "score", "best"]
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    return write_tiny_llama(folder, words, num_hidden_layers=2, max_position_embeddings=128)


def run(script, arguments, folder):
    """What a script printed, run in a folder as a process of its own."""
    source = Path(topk_attention.__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": str(source), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(ROOT / "examples" / script), *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_example_runs(script, example_model, tmp_path):
    lines = run(script, ["--model", str(example_model), *SCRIPTS[script]], tmp_path).splitlines()
    assert lines[-1].startswith(LAST_LINE[script])


def test_every_script_is_tested_and_listed():
    scripts = {path.name for path in (ROOT / "examples").glob("*.py")} - {"small_model.py"}
    assert scripts == set(SCRIPTS)
    listed = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
    assert all(f"]({script})" in listed for script in scripts)


def test_an_example_without_a_model_says_how_to_get_one(tmp_path):
    code = "import small_model; small_model._PACKAGE = 'no_such_package'; small_model.load(None)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT / "examples", capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "give --model, or: pip install gguf" in done.stderr
