"""BatchNorm follows a compression, and does nothing to a model that was not compressed."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from spectrim.errors import UserError
from spectrim.statistics.batchnorm import reestimate
from spectrim.statistics.objective import Objective


def net() -> nn.Sequential:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 5, 3), nn.BatchNorm2d(5), nn.Flatten()
    )
    for norm in (model[1], model[4]):
        norm.running_mean.normal_()  # type: ignore[union-attr,operator]
        norm.running_var.uniform_(0.5, 2)  # type: ignore[union-attr,operator]
    return model.eval()


def objective(count: int = 2) -> Objective:
    batches = [(torch.randn(20, 3, 8, 8), torch.zeros(20).long()) for _ in range(count)]
    return Objective(F.cross_entropy, {"calibration": batches})


def copy_of(model: nn.Sequential) -> nn.Sequential:
    other = net()
    other.load_state_dict(model.state_dict())
    return other


def test_an_uncompressed_model_keeps_its_statistics() -> None:
    dense = net()
    same = copy_of(dense)
    reestimate(same, dense, objective(), samples=40)
    for key, value in dense.state_dict().items():
        torch.testing.assert_close(same.state_dict()[key], value, atol=1e-6, rtol=1e-6)


def test_scale_and_shift_of_a_channel_are_undone_exactly() -> None:
    """Scaled and shifted convolutions give the dense outputs again: each layer is corrected before the next is seen."""
    dense = net()
    changed = copy_of(dense)
    with torch.no_grad():
        for conv in (changed[0], changed[3]):
            conv.weight.mul_(torch.rand(len(conv.weight), 1, 1, 1) + 0.5)  # type: ignore[operator,arg-type]
            conv.bias.add_(torch.randn(len(conv.bias)))  # type: ignore[operator,arg-type]
    x = torch.randn(7, 3, 8, 8)
    before = (changed(x) - dense(x)).abs().max()
    reestimate(changed, dense, objective(), samples=40)
    after = (changed(x) - dense(x)).abs().max()
    assert before > 0.5
    assert after < 1e-3
    assert not changed.training


def test_the_dense_model_and_its_hooks_stay_as_they_were() -> None:
    dense = net().train()
    changed = copy_of(dense)
    state = {key: value.clone() for key, value in dense.state_dict().items()}
    reestimate(changed, dense, objective(), samples=40)
    assert all(value.equal(state[key]) for key, value in dense.state_dict().items())
    assert dense.training
    assert not any(module._forward_pre_hooks for model in (dense, changed) for module in model.modules())


def test_a_model_without_batch_norm_is_left_alone_and_nothing_to_see_is_refused() -> None:
    plain = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    reestimate(plain, plain, objective(0), samples=40)
    with pytest.raises(UserError, match="calibration split is empty"):
        reestimate(net(), net(), objective(0), samples=40)


def test_a_dead_channel_divides_nothing_by_zero() -> None:
    dense = net()
    changed = copy_of(dense)
    with torch.no_grad():
        dense[0].weight[0] = 0  # type: ignore[operator,index]
        changed[0].weight[1] = 0  # type: ignore[operator,index]
    reestimate(changed, dense, objective(), samples=40)
    outputs: Tensor = changed(torch.randn(4, 3, 8, 8))
    assert torch.isfinite(outputs).all()


def test_the_dense_model_is_passed_through_once_for_many_compressed_ones() -> None:
    dense, judge, calls = net(), objective(), []
    dense[0].register_forward_hook(lambda *_: calls.append(1))
    found = []
    for scale in (0.5, 0.7, 0.5):
        changed = copy_of(dense)
        with torch.no_grad():
            changed[0].weight.mul_(scale)  # type: ignore[operator,arg-type]
        reestimate(changed, dense, judge, samples=40)
        found.append(changed[1].running_mean)
    assert len(calls) == 2 and torch.equal(found[0], found[2])  # type: ignore[arg-type]
    with torch.no_grad():
        dense[0].bias.add_(1.0)  # type: ignore[operator,arg-type]
    reestimate(copy_of(dense), dense, judge, samples=40)
    assert len(calls) == 4


def test_a_loader_that_shuffles_shows_both_models_the_same_images() -> None:
    images = TensorDataset(torch.randn(40, 3, 8, 8) * torch.rand(40, 1, 1, 1) * 5, torch.zeros(40).long())
    judge, dense = Objective(F.cross_entropy, {"calibration": DataLoader(images, 10, shuffle=True)}), net()
    for _ in range(3):
        same = copy_of(dense)
        reestimate(same, dense, judge, samples=40)
        for key, value in dense.state_dict().items():
            torch.testing.assert_close(same.state_dict()[key], value, atol=1e-6, rtol=1e-6)
