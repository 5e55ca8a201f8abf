import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from metaprune.data import DATASETS, Dataset, Split, from_arrays, load
from metaprune.errors import ConfigError, InputError


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load("digits")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def collect(batches: Iterator[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = zip(*batches, strict=True)
    return torch.cat(images), torch.cat(labels)


def small(count: int = 12, dtype: torch.dtype = torch.uint8) -> Dataset:
    images = torch.randint(256, (count, 3, 8, 6), generator=seeded(1)).to(dtype)
    labels = torch.arange(count) % 3
    parts = {"train": torch.arange(0, count - 4), "validation": torch.tensor([count - 4, count - 3])}
    parts["test"] = torch.tensor([count - 2, count - 1])
    scale = 1 / 255 if dtype == torch.uint8 else 1.0
    splits = {name: (images, labels, part) for name, part in parts.items()}
    return from_arrays("small", "tests:small", splits, classes=("a", "b", "c"), scale=scale)


class TestSplit:
    def test_unshuffled_batches_are_the_images_in_order(self, digits):
        images, labels = collect(digits.test.batches(50))
        assert torch.equal(images, digits.test.images())
        assert torch.equal(labels, digits.test.labels)
        assert images.dtype == torch.float32
        assert labels.dtype == torch.int64
        assert images.shape == (len(digits.test), *digits.input_shape)

    def test_normalisation(self):
        data = small()
        stored = data.train.source.read(data.train.positions_N).double() / 255
        mean, std = (torch.tensor(values).double().view(3, 1, 1) for values in (data.mean, data.std))
        torch.testing.assert_close(data.train.images().double(), (stored - mean) / std, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize(("drop_last", "sizes"), [(False, [5, 3]), (True, [5])])
    def test_last_batch(self, drop_last, sizes):
        assert [len(labels) for _, labels in small().train.batches(5, drop_last=drop_last)] == sizes

    def test_same_generator_gives_same_pass(self, digits):
        passes = [collect(digits.train.batches(64, shuffle=seeded(s), augment=True)) for s in (1, 1, 2)]
        assert torch.equal(passes[0][0], passes[1][0])
        assert torch.equal(passes[0][1], passes[1][1])
        assert not torch.equal(passes[0][1], passes[2][1])

    def test_a_second_pass_differs_from_the_first(self, digits):
        generator = seeded()
        first, second = (collect(digits.train.batches(64, shuffle=generator))[1] for _ in range(2))
        assert not torch.equal(first, second)

    def test_shuffling_moves_images_with_their_labels(self, digits):
        images, labels = collect(digits.validation.batches(32, shuffle=seeded()))
        order = torch.randperm(len(digits.validation), generator=seeded())
        assert torch.equal(images, digits.validation.images(order))
        assert torch.equal(labels, digits.validation.labels[order])

    def test_augmentation_does_not_change_the_order(self, digits):
        plain = collect(digits.train.batches(64, shuffle=seeded()))
        changed = collect(digits.train.batches(64, shuffle=seeded(), augment=True))
        assert torch.equal(plain[1], changed[1])
        assert not torch.equal(plain[0], changed[0])

    def test_a_pass_goes_on_in_the_middle(self, digits):
        generator = seeded()
        whole = list(digits.train.batches(64, shuffle=generator, augment=True))
        resumed = seeded()
        rest = list(digits.train.batches(64, shuffle=resumed, augment=True, start=7))
        assert len(rest) == len(whole) - 7
        assert all(torch.equal(a, b) for one, two in zip(whole[7:], rest, strict=True) for a, b in zip(one, two))
        assert torch.equal(generator.get_state(), resumed.get_state())

    def test_subset_is_fixed_and_nested(self, digits):
        first, again, other = (digits.train.subset(50, seed) for seed in (3, 3, 4))
        assert len(first) == 50
        assert isinstance(first, Split)
        assert first.name == "train"
        assert torch.equal(first.positions_N, again.positions_N)
        assert not torch.equal(first.positions_N, other.positions_N)
        assert torch.equal(digits.train.subset(20, 3).positions_N, first.positions_N[:20])
        assert len(first.positions_N.unique()) == 50
        assert set(first.positions_N.tolist()) <= set(digits.train.positions_N.tolist())
        assert torch.equal(collect(first.batches(8))[1], first.labels)

    @pytest.mark.parametrize("n", [0, 361])
    def test_subset_of_an_impossible_size(self, n, digits):
        with pytest.raises(ConfigError, match=f"`1 <= n <= 359` must hold for a subset of the split 'test', but n={n}"):
            digits.test.subset(n, 0)

    @pytest.mark.parametrize("options", [{"batch_size": 0}, {"batch_size": 4, "start": -1}])
    def test_impossible_batches_are_refused_before_the_first(self, options, digits):
        with pytest.raises(ConfigError, match="must hold"):
            digits.test.batches(**options)
        with pytest.raises(ConfigError, match="needs a generator"):
            digits.test.batches(4, augment=True)

    @pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
    def test_nothing_that_is_handed_out_is_shared(self, dtype):
        data = small(dtype=dtype)
        before = data.train.images().clone()
        for images, labels in data.train.batches(4, shuffle=seeded(), augment=True):
            images.zero_()
            labels.zero_()
        data.train.images().zero_()
        assert torch.equal(data.train.images(), before)


class TestDataset:
    def test_fingerprint_follows_contents_and_splits(self):
        data = small()
        assert data.fingerprint == small().fingerprint != small(count=13).fingerprint
        assert len(data.fingerprint) == 64
        swapped = {**data.splits, "test": data.validation, "validation": data.test}
        assert replace(data, splits=swapped).fingerprint != data.fingerprint
        assert replace(data, spec="elsewhere").fingerprint == data.fingerprint
        labels = data.train.labels_all.clone()
        labels[0] += 1
        changed = {**data.splits, "train": replace(data.train, labels_all=labels)}
        assert replace(data, splits=changed).fingerprint != data.fingerprint

    def test_default_statistics_are_those_of_the_training_images(self):
        data = small()
        images = data.train.images()
        torch.testing.assert_close(images.mean(dim=(0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
        torch.testing.assert_close(images.std(dim=(0, 2, 3), correction=0), torch.ones(3), atol=1e-5, rtol=0)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda x, y: (x.double(), y), "uint8 or float32"),
            (lambda x, y: (x[0], y), "shape"),
            (lambda x, y: (x, y[:-1]), "label for each"),
            (lambda x, y: (x, y.int()), "int64"),
            (lambda x, y: (x, y - 1), "labels from -1 to 1"),
            (lambda x, y: (x, y + 1), "labels from 1 to 3"),
            (lambda x, y: (x.float() / 0, y), "finite"),
            (lambda x, y: (x[:, :, 1:], y), "one shape"),
        ],
    )
    def test_arrays_that_do_not_fit(self, change, message):
        images, labels = torch.zeros(6, 1, 4, 4, dtype=torch.uint8), torch.arange(6) % 3
        good = (images, labels, torch.arange(6))
        bad = (*change(images, labels), torch.arange(6))
        with pytest.raises(InputError, match=message):
            from_arrays("bad", "bad", {"train": good, "validation": good, "test": bad}, classes=tuple("abc"), scale=1.0)

    def test_missing_split(self):
        data = small()
        with pytest.raises(InputError, match=r"none for \['test'\]"):
            replace(data, splits={"train": data.train, "validation": data.validation})
        empty = replace(data.train, positions_N=data.train.positions_N[:0])
        with pytest.raises(InputError, match=r"none for \['train'\]"):
            replace(data, splits={**data.splits, "train": empty})
        with pytest.raises(InputError, match=r"none for \['train', 'validation', 'test'\]"):
            from_arrays("bad", "bad", {}, classes=(), scale=1.0)


class TestLoad:
    def test_registered_names(self):
        assert set(DATASETS) >= {"digits", "cifar10", "imagefolder", "npz"}

    @pytest.mark.parametrize(
        ("spec", "message"),
        [
            ("digit", "Did you mean 'digits'"),
            ("cifar:/some/where", "Did you mean 'cifar10'.*Known: cifar10, digits, imagefolder, npz, package.module"),
            ("", "'' is neither"),
            ("no_such_package.part:make", "neither a dataset nor a module"),
            ("digits:3", "takes nothing after it"),
            ("cifar10", "needs the folder"),
            ("npz:", "needs a file"),
            ("imagefolder", "needs a folder"),
        ],
    )
    def test_errors(self, spec, message):
        with pytest.raises(ConfigError, match=message):
            load(spec)

    @pytest.fixture
    def user_module(self, tmp_path, monkeypatch):
        (tmp_path / "my_data.py").write_text(
            """
import torch
from metaprune.data import from_arrays

def make():
    x, y = torch.rand(9, 1, 4, 4), torch.arange(9) % 2
    splits = {name: (x, y, torch.arange(k, k + 3)) for k, name in ((0, "train"), (3, "validation"), (6, "test"))}
    return from_arrays("mine", "my_data:make", splits, classes=("no", "yes"), scale=1.0)

def nothing():
    return None

def broken():
    return 1 / 0
"""
        )
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "path", list(sys.path))
        yield
        sys.modules.pop("my_data", None)

    @pytest.mark.usefixtures("user_module")
    def test_factory(self):
        data = load("my_data:make")
        assert data.name == "mine"
        assert next(data.train.batches(3))[0].shape == (3, 1, 4, 4)
        for name, message in (("nothing", "returned a NoneType"), ("broken", "ZeroDivisionError"), ("mak", "'make'")):
            with pytest.raises(ConfigError, match=message):
                load(f"my_data:{name}")
