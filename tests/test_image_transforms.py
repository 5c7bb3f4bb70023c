"""Image transforms: inputs, results, and use in data loaders. Runs on the fallback too."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import numpy as np
import pytest
import torch
from common import assert_same_bits
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from normfused import transforms
from normfused.functional import normalize
from normfused.transforms import (
    CIFAR10,
    FASHION_MNIST,
    IMAGENET,
    Denormalize,
    MinMaxNormalize,
    Normalize,
    Standardize,
    ToNormalizedTensor,
)


def pixels(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def test_normalize_keeps_torchvisions_contract(device: torch.device) -> None:
    x = torch.rand(2, 3, 5, 6, device=device)
    before = x.clone()
    mean, std = (torch.tensor(v, device=device).view(3, 1, 1) for v in IMAGENET)
    y = Normalize(*IMAGENET)(x)
    torch.testing.assert_close(y, (x - mean) / std, rtol=1e-6, atol=1e-6)
    assert torch.equal(x, before)
    z = Normalize(*IMAGENET, inplace=True)(x)
    assert z is x
    assert_same_bits(x, y)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.uint16, torch.int32, torch.int64])
@pytest.mark.parametrize("output", [None, torch.float64, torch.float16])
def test_normalize_accepts_every_integer(device: torch.device, dtype: torch.dtype, output: torch.dtype | None) -> None:
    limits = torch.iinfo(dtype)
    numbers = np.random.default_rng(0).integers(limits.min, limits.max, (2, 3, 5, 6), endpoint=True)
    x, mean, std = torch.tensor(numbers).to(dtype), 1e-3 * limits.max, 0.25 * limits.max
    y = Normalize(mean, std, dtype=output)(x.to(device)).cpu()
    exact = ((numbers.astype(np.longdouble) - mean) / std).astype(np.float64)
    expected = torch.from_numpy(exact).to(output or torch.float32)
    torch.testing.assert_close(y, expected, rtol=torch.finfo(y.dtype).eps, atol=torch.finfo(y.dtype).eps)


def test_large_integers_keep_their_differences() -> None:
    x = torch.tensor([[[2**30 + 1, 2**30 + 3]]], dtype=torch.int32)
    assert Normalize(2**30 + 2, 1.0)(x).tolist() == [[[-1.0, 1.0]]]


def test_constants_of_any_shape_and_their_names() -> None:
    x = torch.rand(3, 4, 4)
    transform = Normalize(torch.tensor(IMAGENET.mean).double().view(3, 1, 1), np.reshape(IMAGENET.std, (3, 1, 1)))
    assert transform.mean == pytest.approx(IMAGENET.mean)
    assert transform.std == list(IMAGENET.std)
    assert_same_bits(transform(x), Normalize(transform.mean, transform.std)(x))
    with pytest.raises(TypeError, match="Normalize: mean must be a number or a sequence of numbers"):
        Normalize(torch.zeros(3, 1, 2), 1.0)


def test_normalize_accepts_bytes(device: torch.device) -> None:
    x = pixels(2, 3, 5, 6).to(device)
    y = Normalize(*IMAGENET, dtype=torch.bfloat16, memory_format=torch.channels_last)(x)
    assert_same_bits(y, normalize(x, *IMAGENET, dtype=torch.bfloat16, memory_format=torch.channels_last))
    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_to_normalized_tensor_accepts_arrays_images_and_tensors(memory_format: torch.memory_format) -> None:
    array = pixels(7, 9, 3).numpy()
    transform = ToNormalizedTensor(*IMAGENET, memory_format=memory_format)
    want = normalize(torch.from_numpy(array).permute(2, 0, 1), *IMAGENET)
    for image in (array, Image.fromarray(array), torch.from_numpy(array).permute(2, 0, 1)):
        before = np.array(image)
        y = transform(image)
        assert y.shape == (3, 7, 9)
        assert y.dtype == torch.float32
        assert y.unsqueeze(0).is_contiguous(memory_format=memory_format)
        assert torch.equal(y, want)
        assert np.array_equal(np.array(image), before)


def test_to_normalized_tensor_of_gray_images_and_batches() -> None:
    transform = ToNormalizedTensor(*FASHION_MNIST)
    gray = pixels(7, 9).numpy()
    want = (gray[None] / 255 - FASHION_MNIST.mean[0]) / FASHION_MNIST.std[0]
    for image in (gray, Image.fromarray(gray), gray[:, :, None]):
        assert np.allclose(transform(image).numpy(), want, rtol=1e-6, atol=1e-6)
    batch = pixels(4, 7, 9, 3).numpy()
    y = ToNormalizedTensor(*IMAGENET)(batch)
    assert y.shape == (4, 3, 7, 9)
    assert torch.equal(y[2], ToNormalizedTensor(*IMAGENET)(batch[2]))
    assert torch.equal(ToNormalizedTensor(0.5, 0.5)(gray[::-1]), ToNormalizedTensor(0.5, 0.5)(gray[::-1].copy()))


def test_to_normalized_tensor_shares_no_memory_with_its_input() -> None:
    array = np.zeros((3, 4, 3), dtype=np.float32)
    y = ToNormalizedTensor(0.0, 1.0)(array)
    array[:] = 7
    assert y.abs().max() == 0


def test_denormalize_inverts_normalize(device: torch.device) -> None:
    x = pixels(2, 3, 16, 16).to(device)
    y = Normalize(*IMAGENET)(x)
    torch.testing.assert_close(Denormalize(*IMAGENET)(y), x.float() / 255, rtol=0, atol=1e-6)
    assert torch.equal(Denormalize(*IMAGENET, dtype=torch.uint8)(y), x)
    bright = Denormalize(0.0, 1.0, dtype=torch.uint8)(torch.tensor([-1.0, 0.5, 2.0], device=device).view(1, 1, 3))
    assert bright.flatten().tolist() == [0, 128, 255]
    assert torch.equal(Denormalize(*IMAGENET, dtype=torch.uint8)(y.half()), x)


@pytest.mark.parametrize("over", ["image", "batch"])
@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("kind", ["uint8", "float", "channels_last"])
def test_standardize_by_own_statistics(device: torch.device, kind: str, per_channel: bool, over: str) -> None:
    x = pixels(4, 3, 10, 11).to(device)
    x = x if kind == "uint8" else x.float() * 3 - 100
    x = x.contiguous(memory_format=torch.channels_last) if kind == "channels_last" else x
    y = Standardize(over, per_channel)(x)
    dims = [d for d in range(4) if not (d == 0 and over == "image") and not (d == 1 and per_channel)]
    exact = x.double()
    want = (exact - exact.mean(dims, keepdim=True)) / exact.var(dims, correction=0, keepdim=True).sqrt()
    torch.testing.assert_close(y.double(), want, rtol=1e-6, atol=2e-6)
    if over == "image":
        torch.testing.assert_close(Standardize(over, per_channel)(x[1]), y[1])


def test_standardize_with_bessels_correction() -> None:
    x = torch.randn(1, 4, 5)
    torch.testing.assert_close(Standardize(correction=1)(x), (x - x.mean()) / x.std())


@pytest.mark.parametrize("over", ["image", "batch"])
@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64, torch.float16], ids=str)
def test_min_max(device: torch.device, dtype: torch.dtype, per_channel: bool, over: str) -> None:
    x = (torch.rand(4, 3, 10, 11) * 200 + 3).to(device, dtype)
    y = MinMaxNormalize((-1.0, 2.0), over, per_channel)(x)
    dims = [d for d in range(4) if not (d == 0 and over == "image") and not (d == 1 and per_channel)]
    low, high = x.double().amin(dims, keepdim=True), x.double().amax(dims, keepdim=True)
    want = (x.double() - low) / (high - low) * 3 - 1
    rounding = 4 * torch.finfo(torch.promote_types(y.dtype, torch.float16)).eps
    torch.testing.assert_close(y.double(), want, rtol=rounding, atol=rounding)
    assert y.min() == -1.0
    assert y.max() == 2.0


@pytest.mark.parametrize("value", [0, 77, 255])
def test_constant_images(value: int) -> None:
    x = torch.full((3, 5, 5), value, dtype=torch.uint8)
    for image in (x, x.float() / 3):
        assert MinMaxNormalize((0.25, 0.75))(image).unique().tolist() == [0.25]
        assert Standardize()(image).abs().max() < 1e-6


class Pictures(torch.utils.data.Dataset):
    def __init__(self) -> None:
        self.transform = torch.nn.Sequential(ToNormalizedTensor(*CIFAR10), Denormalize(*CIFAR10), Standardize())

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        generator = torch.Generator().manual_seed(index)
        image = torch.randint(0, 256, (9, 9, 3), dtype=torch.uint8, generator=generator).numpy()
        return self.transform(image), torch.get_num_threads()


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_in_loader_workers(context: str) -> None:
    alone = [image for image, _ in (Pictures()[i] for i in range(8))]
    for i, (images, threads) in enumerate(
        DataLoader(Pictures(), batch_size=4, num_workers=2, multiprocessing_context=context)
    ):
        assert torch.equal(images, torch.stack(alone[4 * i : 4 * i + 4]))
        assert threads.tolist() == [1] * 4


TRANSFORMS = [
    Normalize(*IMAGENET),
    ToNormalizedTensor(*IMAGENET),
    Denormalize(*IMAGENET),
    MinMaxNormalize(),
    Standardize(),
]


@pytest.mark.parametrize("transform", TRANSFORMS, ids=lambda t: type(t).__name__)
def test_copies_and_pickles(transform: torch.nn.Module) -> None:
    x = torch.rand(3, 8, 8)
    want = transform(x)
    for again in (copy.deepcopy(transform), pickle.loads(pickle.dumps(transform))):
        assert torch.equal(again(x), want)
        assert repr(again) == repr(transform)
    assert transform.state_dict() == {}


def test_repr() -> None:
    assert repr(Normalize(0.5, (0.25, 0.5))) == "Normalize(mean=[0.5], std=[0.25, 0.5])"
    assert repr(Denormalize(*FASHION_MNIST)) == "Denormalize(mean=[0.286], std=[0.353])"
    assert repr(Standardize()) == "Standardize(over='image', per_channel=True)"
    assert repr(MinMaxNormalize()) == "MinMaxNormalize(range=(0.0, 1.0), over='image', per_channel=False)"


ERRORS = [
    (lambda: Normalize((0.5, 0.5), (1.0, 0.0)), ValueError, "Normalize: std must be above 0, got 0.0 for channel 1"),
    (
        lambda: Normalize(*IMAGENET)(torch.rand(1, 28, 28)),
        ValueError,
        "Normalize: 3 means for an input with 1 channel (dim -3 of shape (1, 28, 28))",
    ),
    (lambda: Normalize(0.5, 0.5, inplace=True)(pixels(3, 4, 4)), TypeError, "Normalize: input must be one of float32,"),
    (
        lambda: Normalize(0.5, 0.5, inplace=True, dtype=torch.half),
        ValueError,
        "Normalize: inplace=True excludes dtype and memory_format",
    ),
    (
        lambda: Normalize(0.5, 0.5)(torch.zeros(1, 4, 4, dtype=torch.bool)),
        TypeError,
        "Normalize: input must be one of uint8, int8, int16, int32, int64, uint16, float32, float64, float16, "
        "bfloat16, got torch.bool",
    ),
    (lambda: ToNormalizedTensor(0.5, 0.5)(Image.new("P", (4, 4))), ValueError, "a palette image contains indices"),
    (
        lambda: ToNormalizedTensor(*IMAGENET)(np.zeros((3, 48, 64), np.uint8)),
        ValueError,
        "an array of shape (3, 48, 64) would have 64 channels: pass a tensor for 3",
    ),
    (lambda: Standardize("row"), ValueError, "Standardize: over must be 'image' or 'batch', got 'row'"),
    (lambda: MinMaxNormalize(eps=-1.0), ValueError, "MinMaxNormalize: eps must be a non-negative finite number, got"),
    (lambda: MinMaxNormalize((1.0, 0.0)), ValueError, "MinMaxNormalize: range must be two finite numbers in ascending"),
    (lambda: Standardize(correction=2), ValueError, "Standardize: correction must be 0 or 1, got 2"),
    (lambda: Standardize()(torch.rand(3, 0, 4)), ValueError, "images of shape (1, 3, 0, 4) have no values"),
]


@pytest.mark.parametrize(("call", "error", "text"), ERRORS)
def test_errors(call: Callable[[], object], error: type[Exception], text: str) -> None:
    with pytest.raises(error) as raised:
        call()
    assert str(raised.value).startswith(text)


def test_all_names_exist() -> None:
    assert all(hasattr(transforms, name) for name in transforms.__all__)
