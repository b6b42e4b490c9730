"""Models of a few thousand weights, given as configurations of one's own."""

import pytest
import torch

from convert_models import tiny_bert, tiny_llama, tiny_t5
from topk_experiments.benchmarks.model import Point
from topk_experiments.models.pretrained import find_model

_BUILD = {"bert": tiny_bert, "t5": tiny_t5, "llama": tiny_llama}


@pytest.fixture(scope="session")
def config_folder(tmp_path_factory):
    """family -> folder of a configuration, without weights."""
    folders = {}
    for family, build in _BUILD.items():
        folders[family] = tmp_path_factory.mktemp("configs") / f"tiny-{family}"
        build().config.save_pretrained(folders[family])
    return folders


@pytest.fixture
def point(config_folder):
    """A point of a tiny model: `point(family, method, **changes)`."""

    torch.manual_seed(0)

    def of(family="bert", method="topk", **changes):
        source = find_model(str(config_folder[family]))
        options = {"length": 40, "k": 6, "decoder_length": 9, "backend": "chunked", "source": source}
        return Point(source.name, method, **options | changes)

    return of
