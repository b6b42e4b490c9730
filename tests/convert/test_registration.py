"""transformers knows the name "topk" whichever library is imported first, and importing ours stays cheap."""

from __future__ import annotations

import subprocess
import sys

import pytest

CHECK = """
from transformers import AttentionInterface, AttentionMaskInterface
assert "topk" in AttentionInterface().keys(), "attention"
assert "topk" in AttentionMaskInterface().keys(), "mask"
"""


def run(code: str) -> None:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    "imports",
    [
        "import topk_attention",
        "import topk_attention, transformers.masking_utils",
        "import topk_attention, transformers.models.llama.modeling_llama",
        "import topk_attention; from transformers import AutoModel; AutoModel",
        "import transformers; import topk_attention",
        "import transformers.modeling_utils; import topk_attention",
        "from transformers import AutoModel; AutoModel; import topk_attention",
    ],
)
def test_the_name_is_registered_in_every_import_order(imports):
    run(imports + "\n" + CHECK)


def test_importing_the_library_does_not_import_transformers():
    run("import topk_attention, sys\nassert not any(name.startswith('transformers') for name in sys.modules)")


def test_the_library_works_where_transformers_is_not_installed():
    run(
        "import sys\n"
        "sys.modules['transformers'] = None\n"
        "import torch, topk_attention\n"
        "q = torch.randn(1, 2, 5, 4)\n"
        "assert topk_attention.topk_attention(q, q, q, k=2).shape == q.shape\n"
    )


def test_tracebacks_and_inspection_still_find_the_source_of_transformers():
    run(
        "import topk_attention, inspect, transformers.modeling_utils as m\n"
        "assert 'class PreTrainedModel' in inspect.getsource(m)\n"
    )
