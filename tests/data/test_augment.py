import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from metaprune.data.augment import CropFlip
from metaprune.errors import ConfigError


def slow(augmentation: CropFlip, images: Tensor, generator: torch.Generator) -> Tensor:
    """Image by image: pad, crop, flip."""
    pad, (h, w) = augmentation.pad, images.shape[2:]
    results = []
    for image, down, right, flip in zip(images, *augmentation.draw(len(images), generator), strict=True):
        mode = "constant" if augmentation.fill == "zero" else "reflect"
        padded = torch.nn.functional.pad(image.double()[None], (pad, pad, pad, pad), mode)[0]
        crop = padded[:, down : down + h, right : right + w]
        results.append(crop.flip(2) if flip else crop)
    return torch.stack(results).to(images.dtype)


@given(
    n=st.integers(1, 5),
    c=st.integers(1, 3),
    h=st.integers(5, 9),
    w=st.integers(5, 9),
    pad=st.integers(0, 4),
    flip=st.booleans(),
    fill=st.sampled_from(["zero", "reflect"]),
    dtype=st.sampled_from([torch.uint8, torch.float32]),
    seed=st.integers(0, 1000),
)
def test_equals_the_slow_one(n, c, h, w, pad, flip, fill, dtype, seed):
    augmentation = CropFlip(pad=pad, flip=flip, fill=fill)
    images = torch.randint(256, (n, c, h, w), generator=torch.Generator().manual_seed(seed)).to(dtype)
    before = images.clone()
    changed = augmentation(images, torch.Generator().manual_seed(seed))
    assert changed.dtype == dtype
    assert torch.equal(images, before)
    assert torch.equal(changed, slow(augmentation, images, torch.Generator().manual_seed(seed)))


def test_draws_from_its_generator_alone():
    augmentation, images = CropFlip(), torch.rand(8, 3, 32, 32)
    state = torch.get_rng_state()
    first, again, other = (augmentation(images, torch.Generator().manual_seed(s)) for s in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_every_shift_comes_up_and_half_are_mirrored():
    down, right, flip = CropFlip(pad=4).draw(20_000, torch.Generator().manual_seed(0))
    for offsets in (down, right):
        counts = torch.bincount(offsets, minlength=9)
        assert len(counts) == 9
        assert (counts - 20_000 / 9).abs().max() < 200  # 4.5 standard deviations
    assert abs(int(flip.sum()) - 10_000) < 320
    assert not CropFlip(flip=False).draw(100, torch.Generator().manual_seed(0))[2].any()


def test_no_padding_and_no_flip_is_the_identity():
    images = torch.rand(4, 1, 8, 8)
    assert torch.equal(CropFlip(pad=0, flip=False)(images, torch.Generator()), images)


@pytest.mark.parametrize("options", [{"pad": -1}, {"fill": "mirror"}])
def test_options_that_do_not_fit(options):
    with pytest.raises(ConfigError, match="must hold"):
        CropFlip(**options)


def test_reflecting_needs_enough_pixels():
    with pytest.raises(ConfigError, match="`pad < 3` must hold to reflect images of 3x8"):
        CropFlip(pad=3, fill="reflect")(torch.rand(1, 1, 3, 8), torch.Generator())


def test_is_fast():
    """A batch of CIFAR takes about 0.5 ms on one core; 10 ms is the promise."""
    images = torch.randint(256, (128, 3, 32, 32), dtype=torch.uint8)
    augmentation, generator, times = CropFlip(), torch.Generator().manual_seed(0), []
    for _ in range(20):
        begin = time.perf_counter()
        augmentation(images, generator)
        times.append(time.perf_counter() - begin)
    assert min(times) < 0.010
