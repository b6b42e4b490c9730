"""What processes that share a calibration need; `tests/convert/test_distributed.py` starts several."""

import pytest
import torch
import torch.distributed as dist

from topk_attention.calibrate.processes import Processes
from topk_attention.calibrate.statistics import Curves


def test_a_group_without_processes_is_refused():
    with pytest.raises(ValueError, match=r"group needs processes that talk to each other; call torch\.distributed"):
        Processes.of("world")


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="this torch has no gloo")
def test_what_is_no_group_is_refused_with_its_type():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(TypeError, match="group must be a process group, got str"):
            Processes.of("world")
        assert Processes.of(dist.group.WORLD).count == 1
    finally:
        dist.destroy_process_group()


def test_processes_deal_out_every_item_once():
    dealt = [dict(Processes(None, rank, 3).own(list("abcde"))) for rank in range(3)]
    assert dealt == [{0: "a", 3: "d"}, {1: "b", 4: "e"}, {2: "c"}]


def test_curves_of_parts_are_those_of_all_rows():
    lost, change = torch.rand(2, 9, 3), torch.randn(2, 9, 3)
    texts = (slice(0, 4), slice(4, 5), slice(5, 9))  # one row has no later half
    whole = Curves.empty(2, (1, 2, 4))
    parts = [Curves.empty(2, (1, 2, 4)) for _ in range(3)]
    for part, rows in zip(parts, texts, strict=True):
        whole.add(lost[:, rows], change[:, rows])
        part.add(lost[:, rows], change[:, rows])
    joined = Curves.joined([*parts, Curves.empty(2, (1, 2, 4))])
    assert joined.num_rows == 9
    for name in ("lost_mass", "loss_error", "loss_change"):
        torch.testing.assert_close(getattr(joined, name), getattr(whole, name), rtol=1e-12, atol=1e-14)
