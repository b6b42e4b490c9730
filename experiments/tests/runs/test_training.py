import pytest
import torch
from torch import nn

from topk_experiments.runs.training import TrainingPlan, load_whole, schedule, train


def new_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Dropout(0.5), nn.Linear(5, 1))


def trained(checkpoint, stop_at=None, **changes):
    """Weights and result of a training on a batch a step, with dropout; interrupted at an evaluation."""
    model = new_model()
    settings = {"steps": 6, "learning_rate": 0.1, "evaluate_every": 2, "identity": {"a": 1}, "warm_up_steps": 2}
    plan = TrainingPlan(**settings | changes, checkpoint=checkpoint)
    sent, modes = [], []

    def losses(step):
        inputs = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
        modes.append(model.training)
        return [model(part).square().sum() / 4 for part in inputs.split(2)]

    def evaluate():
        assert not model.training
        if len(sent) + 1 == stop_at:
            raise KeyboardInterrupt
        return {"validation_loss": model(torch.ones(1, 3)).item()}

    optimizer = torch.optim.AdamW(model.parameters())
    try:
        result = train(model, optimizer, losses, evaluate, plan, sent.append)
    except KeyboardInterrupt:
        return None
    assert all(modes)
    return [parameter.detach().clone() for parameter in model.parameters()], result, sent


def test_an_interrupted_training_ends_with_the_very_same_weights_dropout_included(tmp_path):
    weights, result, sent = trained(tmp_path / "whole.pt")
    assert trained(tmp_path / "cut.pt", stop_at=4) is None
    again, result_again, sent_again = trained(tmp_path / "cut.pt")
    assert all(torch.equal(a, b) for a, b in zip(weights, again, strict=True))
    assert [message["step"] for message in sent_again] == [3, 4, 5, 6]
    assert sent_again == sent[2:]
    for ours, theirs in zip(result_again["curve"], result["curve"], strict=True):
        assert ours | {"elapsed_s": 0} == theirs | {"elapsed_s": 0}


def test_a_checkpoint_of_another_training_is_not_taken(tmp_path):
    trained(tmp_path / "x.pt")
    assert len(trained(tmp_path / "x.pt", identity={"a": 2})[2]) == 6
    assert trained(tmp_path / "x.pt", identity={"a": 2})[2] == []  # all of it is there


def test_parts_add_up_and_gradients_are_limited(tmp_path):
    before = [parameter.detach().clone() for parameter in new_model().parameters()]
    after, result, sent = trained(tmp_path / "x.pt", steps=1, warm_up_steps=0, gradient_norm=1e-9)
    # AdamW divides by the gradient's size; what is this small drowns in its epsilon of 1e-8.
    assert max((a - b).abs().max() for a, b in zip(before, after, strict=True)) < 0.02
    assert result["curve"][0]["training_loss"] == sent[0]["loss"]


def test_a_group_with_a_rate_learns_that_many_times_as_fast(tmp_path):
    model = nn.ParameterList([torch.zeros(1), torch.zeros(1)])
    plan = TrainingPlan(1, 0.1, 1, tmp_path / "x.pt", {}, warm_up_steps=0, falls=False)
    optimizer = torch.optim.SGD([{"params": [model[0]]}, {"params": [model[1]], "rate": 5.0}])
    train(model, optimizer, lambda _: [(model[0] + model[1]).sum() / 2], dict, plan, lambda _: None)
    assert [parameter.item() for parameter in model] == pytest.approx([-0.05, -0.25])


@pytest.mark.parametrize(
    ("step", "falls", "share"), [(1, True, 0.1), (10, True, 1.0), (60, True, 0.55), (110, True, 0.1), (110, False, 1.0)]
)
def test_the_learning_rate_rises_then_falls_to_a_tenth_or_stays(step, falls, share):
    assert schedule(step, 110, 10, falls) == pytest.approx(share)


@pytest.mark.parametrize("content", [b"", b"garbage", b"cos\nsystem\n(S'exit 1'\ntR.", b"PK\x03\x04"])
def test_a_file_that_is_no_checkpoint_is_named(content, tmp_path):
    (tmp_path / "checkpoint.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"checkpoint\.pt is no checkpoint of these commands, or a damaged one"):
        load_whole(tmp_path / "checkpoint.pt")
