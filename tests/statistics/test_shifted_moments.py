"""Moments of a wide convolution without its patches are those of the patches."""

import pytest
import torch
from torch import Tensor, nn

from spectrim.api import compress
from spectrim.refit import factors, moments
from spectrim.refit.moments import Flows, moments_of
from spectrim.statistics import shifted_moments
from spectrim.statistics.input_moments import Rows, input_moments
from spectrim.statistics.objective import Objective
from spectrim.statistics.shifted_moments import is_wide, padded, patch_moment, shifts

LAYERS = {
    "usual": (nn.Conv2d(4, 6, 3, padding=1), (7, 7)),
    "groups, other sides, reflected": (
        nn.Conv2d(4, 6, (3, 2), padding=(1, 0), groups=2, padding_mode="reflect"),
        (5, 6),
    ),
    "a row": (nn.Conv2d(4, 6, (1, 3), padding=(0, 1)), (3, 2)),
    "kernel beyond the image": (nn.Conv2d(4, 6, 5, padding=2), (3, 4)),
    "one position": (nn.Conv2d(4, 6, 3), (3, 3)),
    "same, circular": (nn.Conv2d(4, 6, 3, padding="same", padding_mode="circular"), (3, 4)),
    "even kernel": (nn.Conv2d(4, 6, (2, 4), padding=(0, 2), bias=False), (5, 6)),
}


@pytest.fixture(params=LAYERS)
def given(request: pytest.FixtureRequest) -> tuple[nn.Conv2d, Tensor]:
    torch.manual_seed(0)
    layer, sides = LAYERS[request.param]
    return layer, torch.randn(3, 4, *sides)


@pytest.fixture
def all_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shifted_moments, "LARGE", 1)


def test_is_the_moment_of_the_patches(given: tuple[nn.Conv2d, Tensor]) -> None:
    layer, x = given
    patches = Rows(layer, "channel").inputs(x.double())
    count, moment = patch_moment(layer, padded(layer, x.double()))
    assert count == patches.shape[1]
    torch.testing.assert_close(moment, patches.mT @ patches)


def test_shifts_of_a_kernel_are_counted_without_their_opposites() -> None:
    assert [shifts(kernel) for kernel in ((1, 1), (1, 3), (3, 3))] == [1, 3, 13]


def test_images_of_zeros_have_no_moment() -> None:
    layer = nn.Conv2d(2, 3, 3, padding=1)
    assert not patch_moment(layer, padded(layer, torch.zeros(2, 2, 5, 5)))[1].any()


def test_only_wide_kernels_that_move_pixel_by_pixel_are_read_so(all_wide: None) -> None:
    assert is_wide(nn.Conv2d(2, 3, 3))
    others = nn.Conv2d(2, 3, 3, stride=2), nn.Conv2d(2, 3, 3, dilation=(1, 2)), nn.Conv2d(2, 3, 1), nn.Linear(2, 3)
    assert not any(map(is_wide, others))


def test_a_convolution_of_a_published_network_is_not_wide() -> None:
    assert not is_wide(nn.Conv2d(256, 256, 3))
    assert is_wide(nn.Conv2d(512, 512, 3))


@pytest.mark.parametrize("alike", [True, False], ids=["images alike", "images of two sizes"])
def test_a_refit_gets_the_same_moments(
    given: tuple[nn.Conv2d, Tensor], alike: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, x = given
    other = x[:1] if alike else torch.randn(2, 4, 6, 7)
    with torch.no_grad():
        flows = Flows([x, other], [layer(x), layer(other)], [None, None])
    processes = Objective(nn.CrossEntropyLoss(), {"calibration": [(x, torch.zeros(3))]}).processes("calibration")
    expected = moments_of(layer, flows, processes)
    monkeypatch.setattr(shifted_moments, "LARGE", 1)
    monkeypatch.setattr(moments, "_sums", lambda *_: pytest.fail("the patches were made"))
    for found, wanted in zip(moments_of(layer, flows, processes).means, expected.means, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("view", ["channel", "spatial", "vertical"])
def test_whitening_gets_the_same_moments(
    given: tuple[nn.Conv2d, Tensor], view: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, x = given
    model = nn.Sequential(layer, nn.Flatten())
    objective = Objective(nn.CrossEntropyLoss(), {"calibration": [(x, torch.zeros(3)), (x[1:], torch.zeros(2))]})
    expected = input_moments(model, {"0": [view]}, objective, 5)["0"][view]
    monkeypatch.setattr(shifted_moments, "LARGE", 1)
    found = input_moments(model, {"0": [view]}, objective, 5)["0"][view]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_half_inputs_do_not_make_the_moments_coarse(all_wide: None, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer, x = nn.Conv2d(4, 6, 3, padding=1), torch.randn(8, 4, 6, 6)
    processes = Objective(nn.CrossEntropyLoss(), {"calibration": [(x, torch.zeros(8))]}).processes("calibration")
    with torch.no_grad():
        expected = moments_of(layer, Flows([x], [layer(x)], [None]), processes)
        half = x.to(dtype)
        with torch.autocast("cpu", dtype):
            wanted = layer(x)
        given = [moments_of(layer, Flows([inputs], [wanted], [None]), processes) for inputs in (x, half)]
    assert wanted.dtype == dtype
    for found in given:
        for one, other in zip(found.means, expected.means, strict=True):
            assert one.dtype == torch.float64
            torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(given[0].xx_gII, expected.xx_gII)  # whose inputs have every digit


def test_a_refit_of_wide_convolutions_runs_under_autocast(all_wide: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(factors, "LARGE", 1)
    torch.manual_seed(0)
    convolutions = nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)
    net = nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).eval()
    x = torch.randn(16, 3, 8, 8)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        result = compress(net, calibration=[(x, torch.randint(4, (16,)))], params_kept=0.6)
        assert result.plan
        assert (result.model(x) - net(x)).abs().mean() < net(x).abs().mean()
