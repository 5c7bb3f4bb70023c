"""Transforms of images together with labels, boxes and metadata, and with constants of each image."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from common import assert_same_bits
from PIL import Image
from torch import Tensor

import normfused
from normfused.transforms import Denormalize, MinMaxNormalize, Normalize, Standardize, ToNormalizedTensor


class TVTensor(Tensor):
    """The base class of torchvision's tv_tensors, which the tests do not install."""


class TVImage(TVTensor):
    pass


class Video(TVTensor):
    pass


class Mask(TVTensor):
    pass


class BoundingBoxes(TVTensor):
    pass


@pytest.fixture
def _tv_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.SimpleNamespace(TVTensor=TVTensor, Image=TVImage, Video=Video)
    monkeypatch.setitem(sys.modules, "torchvision.tv_tensors", module)


TRANSFORMS = [
    Normalize(0.5, 0.25),
    ToNormalizedTensor(0.5, 0.25),
    Denormalize(0.5, 0.25),
    MinMaxNormalize(),
    Standardize(),
]


@pytest.fixture(params=TRANSFORMS, ids=lambda transform: type(transform).__name__)
def transform(request: pytest.FixtureRequest) -> Callable[..., Any]:
    transform: Callable[..., Any] = request.param
    return transform


def test_pairs_lists_and_dicts(transform: Callable[..., Any]) -> None:
    image, label = torch.rand(3, 4, 5), torch.tensor(7)
    want = transform(image)
    for sample in ((image, label), [image, label]):
        got = transform(sample)
        assert type(got) is type(sample)
        assert_same_bits(got[0], want)
        assert got[1] is label
    got = transform(image, label)
    assert isinstance(got, tuple)
    assert_same_bits(got[0], want)
    nested = {"id": "x", "label": label, "inputs": {"image": image, "size": [4, 5]}}
    got = transform(nested)
    assert list(got) == list(nested)
    assert_same_bits(got["inputs"]["image"], want)
    assert (got["id"], got["label"], got["inputs"]["size"]) == ("x", label, [4, 5])
    assert nested["inputs"]["image"] is image  # the sample itself is not changed


@pytest.mark.usefixtures("_tv_tensors")
def test_only_images_are_transformed(transform: Callable[..., Any]) -> None:
    """As in torchvision: with an image among them, plain tensors, masks and boxes are not images."""
    image, other = torch.rand(3, 4, 5), torch.rand(2, 3, 4, 5)
    sample = {
        "plain": torch.rand(3, 4, 5),
        "mask": torch.ones(1, 4, 5).as_subclass(Mask),
        "boxes": torch.ones(2, 2, 4).as_subclass(BoundingBoxes),
        "image": image.as_subclass(TVImage),
        "video": other.as_subclass(Video),
    }
    got = transform(sample)
    for name in ("plain", "mask", "boxes"):
        assert got[name] is sample[name]
    for name, want, kind in (("image", transform(image), TVImage), ("video", transform(other), Video)):
        assert type(got[name]) is kind
        assert_same_bits(got[name].as_subclass(Tensor), want)
    masks_first = transform(torch.ones(1, 4, 5).as_subclass(Mask), image)
    assert type(masks_first[0]) is Mask
    assert_same_bits(masks_first[1], transform(image))


@pytest.mark.parametrize(
    "transform", [ToNormalizedTensor(0.5, 0.25), MinMaxNormalize(), Standardize()], ids=lambda t: type(t).__name__
)
def test_pictures_with_labels(transform: Callable[..., Any]) -> None:
    picture = Image.fromarray(np.arange(60, dtype=np.uint8).reshape(4, 5, 3))
    got = transform((torch.rand(3, 4, 5), picture, "cat"))
    assert_same_bits(got[1], transform(picture))
    assert got[2] == "cat"


@pytest.mark.usefixtures("_tv_tensors")
def test_a_sample_without_an_image_is_refused(transform: Callable[..., Any]) -> None:
    name = type(transform).__name__
    with pytest.raises(TypeError, match=f"{name}: no image among the inputs: Tensor, str"):
        transform((torch.tensor(1), "cat"))
    with pytest.raises(TypeError, match=f"{name}: no image among the inputs: nothing"):
        transform({})
    with pytest.raises(TypeError, match=f"{name}: no image among the inputs: Mask"):
        transform([torch.ones(1, 4, 5).as_subclass(Mask)])


class MetaTensor(Tensor):
    """As MONAI's: its metadata are copied by a method."""

    meta: dict[str, Any]

    def copy_meta_from(self, other: MetaTensor) -> None:
        self.meta = dict(other.meta)


class Tagged(Tensor):
    tag: str


def test_subclasses_and_their_metadata_are_kept(transform: Callable[..., Any]) -> None:
    image = torch.rand(3, 4, 5)
    volume, tagged = image.as_subclass(MetaTensor), image.as_subclass(Tagged)
    volume.meta, tagged.tag = {"spacing": 2}, "left"
    got, other = transform(volume), transform(tagged)
    assert type(got) is MetaTensor
    assert got.meta == {"spacing": 2}
    assert (type(other), other.tag) == (Tagged, "left")
    for result in (got, other):
        assert_same_bits(result.as_subclass(Tensor), transform(image))
    assert type(transform(torch.nn.Parameter(image, requires_grad=False))) is Tensor


def test_samples_compile() -> None:
    image = torch.rand(3, 4, 5)
    compiled = torch.compile(Normalize(0.5, 0.25), fullgraph=True, backend="eager")
    got = compiled({"image": image, "label": 3})
    torch.testing.assert_close(got["image"], Normalize(0.5, 0.25)(image))
    assert got["label"] == 3


# --- constants of each image -------------------------------------------------------------------


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float16])
def test_constants_of_each_image(device: torch.device, dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    x = (torch.rand(4, 3, 6, 5) * 200).to(device, dtype).contiguous(memory_format=memory_format)
    mean, std = torch.rand(4, 3), torch.rand(4, 3) + 0.5
    want = torch.stack([normfused.normalize(image, m, s) for image, m, s in zip(x, mean, std, strict=True)])
    for y in (normfused.normalize(x, mean, std), Normalize(mean.numpy(), std)(x)):
        assert_same_bits(y, want)
        assert y.is_contiguous(memory_format=memory_format)
    out = torch.empty_like(want)
    assert normfused.normalize(x, mean, std, out=out) is out
    assert_same_bits(out, want)
    if dtype.is_floating_point:
        same = x.clone()
        assert normfused.normalize_(same, mean, std) is same
        assert_same_bits(same, want)
        back = Denormalize(mean, std)(want)
        assert_same_bits(back, torch.stack([Denormalize(*c)(y) for *c, y in zip(mean, std, want, strict=True)]))


def test_a_number_beside_constants_of_each_image() -> None:
    x, mean = torch.rand(2, 3, 4, 4), torch.rand(2, 3)
    torch.testing.assert_close(normfused.normalize(x, mean, 2.0), (x - mean[:, :, None, None]) / 2)
    transform = Normalize(mean, 2.0)
    assert (transform.mean, transform.std) == (mean.double().tolist(), [2.0])


def test_constants_of_each_image_are_differentiable() -> None:
    x = torch.rand(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    mean, std = torch.rand(2, 3), torch.rand(2, 3) + 0.5
    assert torch.autograd.gradcheck(lambda x: normfused.normalize(x, mean, std), (x,))


def test_constants_of_other_images_are_refused() -> None:
    mean, std = torch.rand(4, 3), torch.rand(4, 3) + 1
    message = r"normalize: constants for 4 images need input of shape \(4, C, H, W\), got "
    for shape in ((3, 3, 5, 6), (3, 5, 6), (1, 4, 3, 5, 6)):
        with pytest.raises(ValueError, match=message):
            normfused.normalize(torch.rand(shape), mean, std)
    for other in (torch.rand(3), torch.rand(3, 3), [1.0, 1.0, 1.0, 1.0]):
        with pytest.raises(
            ValueError, match=r"normalize: (mean|std) must be a number or of shape \(N, C\) as the other"
        ):
            normfused.normalize(torch.rand(4, 3, 5, 6), mean, other)
    with pytest.raises(ValueError, match="normalize: 2 means for an input with 3 channels"):
        normfused.normalize(torch.rand(4, 3, 5, 6), mean[:, :2], std[:, :2])
