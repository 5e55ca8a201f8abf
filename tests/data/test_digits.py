import sys

import torch

from metaprune.data import load


def test_splits_are_about_70_10_20_and_share_no_image():
    data = load("digits")
    sizes = {name: len(split) for name, split in data.splits.items()}
    assert sizes == {"train": 1258, "validation": 180, "test": 359}
    contents = [{image.numpy().tobytes() for image in split.images()} for split in data.splits.values()]
    assert not contents[0] & contents[1]
    assert not contents[0] & contents[2]
    assert not contents[1] & contents[2]
    assert all(len(split.labels.unique()) == 10 for split in data.splits.values())


def test_is_what_scikit_learn_gives():
    from sklearn.datasets import load_digits

    data, bunch = load("digits"), load_digits()
    positions = data.test.positions_N
    mean, std = data.mean[0], data.std[0]
    expected = (torch.from_numpy(bunch.images)[positions, None] / 16 - mean) / std
    torch.testing.assert_close(data.test.images().double(), expected, rtol=1e-5, atol=1e-5)
    assert data.test.labels.tolist() == bunch.target[positions].tolist()


def test_the_datasets_of_scikit_learn_are_not_imported(monkeypatch):
    """That would take every process a second."""
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert len(load("digits").train) == 1258


def test_never_changes():
    """A changed split would make every recorded accuracy incomparable."""
    data = load("digits")
    assert data.fingerprint == load("digits").fingerprint
    assert data.fingerprint == "f683506256fd0c2dae0edf80f88c0faff5348a94f541e9b94a90a761f0ccd342"


def test_training_images_are_normalised():
    images = load("digits").train.images()
    assert abs(images.mean()) < 1e-3
    assert abs(images.std() - 1) < 1e-3
