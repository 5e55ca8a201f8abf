import numpy as np
import pytest
import torch

from metaprune.data import load
from metaprune.errors import InputError

RNG = np.random.default_rng(0)
X = RNG.integers(256, size=(30, 3, 8, 8), dtype=np.uint8)
Y = np.arange(30) % 4
GOOD = {"x_train": X, "y_train": Y, "x_test": X[:7], "y_test": Y[:7]}


def saved(tmp_path, **arrays):
    np.savez(tmp_path / "data.npz", **arrays)
    return f"npz:{tmp_path / 'data.npz'}"


def test_train_and_test(tmp_path):
    data = load(saved(tmp_path, **GOOD))
    assert [len(split) for split in data.splits.values()] == [27, 3, 7]
    assert data.classes == ("0", "1", "2", "3")
    assert data.input_shape == (3, 8, 8)
    assert np.array_equal(data.test.source.read(data.test.positions_N).numpy(), X[:7])
    assert data.test.labels.tolist() == Y[:7].tolist()
    images = data.train.images()
    torch.testing.assert_close(images.mean(dim=(0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)


def test_own_validation(tmp_path):
    data = load(saved(tmp_path, **GOOD, x_validation=X[3:9], y_validation=Y[3:9]))
    assert [len(split) for split in data.splits.values()] == [30, 6, 7]
    assert data.validation.labels.tolist() == Y[3:9].tolist()


def test_one_set_is_cut(tmp_path):
    data = load(saved(tmp_path, x=X[:, 0], y=Y.reshape(-1, 1)))
    assert [len(split) for split in data.splits.values()] == [21, 3, 6]
    assert data.input_shape == (1, 8, 8)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_floating_point_is_kept_on_its_scale(dtype, tmp_path):
    x = (X[:, :1] / 255).astype(dtype)
    data = load(saved(tmp_path, x=x, y=Y, mean=np.array([0.5]), std=np.array([0.25]), classes=np.array(list("abcd"))))
    assert (data.mean, data.std, data.classes) == ((0.5,), (0.25,), ("a", "b", "c", "d"))
    positions = data.train.positions_N
    expected = (torch.from_numpy(x.astype(np.float32))[positions] - 0.5) / 0.25
    torch.testing.assert_close(data.train.images(), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x_train": X.astype(np.int64)}, "'x_train' in .* must be uint8 or floating point, but it is int64"),
        ({"x_train": X.reshape(30, -1)}, r"must have the shape \(n, channels, height, width\) .* has \(30, 192\)"),
        ({"x_train": X.transpose(0, 2, 3, 1)}, r"channels last; .* store x_train.transpose\(0, 3, 1, 2\)"),
        ({"x_test": X[:7, :1]}, "one shape"),
        ({"x_test": X[:7] / 255}, "mixed"),
        ({"x_test": np.full((7, 3, 8, 8), np.nan)}, "'x_test' in .* must be finite, but 1344 values"),
        ({"y_test": Y}, "label for each"),
        ({"y_train": Y - 1}, r"'y_train' in .* from -1"),
        ({"y_train": Y / 2}, "whole number"),
        ({"y_train": Y * 1000}, "count the classes from 0"),
        ({"x_test": X[:0], "y_test": Y[:0]}, "whole number"),
        ({"mean": np.zeros(3)}, "both `mean` and `std`"),
        ({"mean": np.zeros(2), "std": np.ones(2)}, "needs 3 means"),
        ({"mean": np.zeros(3), "std": np.zeros(3)}, "positive stds"),
        ({"mean": np.array(list("abc")), "std": np.ones(3)}, "finite number for each channel"),
        ({"classes": np.array(["a", "b"])}, "`0 <= label < 2` must hold"),
        ({"x_tset": X}, "'x_tset' that has no meaning here. Did you mean 'x_test'"),
        ({"x_train": np.array([None] * 30)}, "Object arrays cannot be loaded"),
    ],
)
def test_arrays_that_are_refused(change, message, tmp_path):
    with pytest.raises(InputError, match=message):
        load(saved(tmp_path, **{**GOOD, **change}))


@pytest.mark.parametrize("missing", list(GOOD))
def test_missing_array(missing, tmp_path):
    with pytest.raises(InputError, match=f"must hold an array '{missing}', but it holds "):
        load(saved(tmp_path, **{name: array for name, array in GOOD.items() if name != missing}))


def test_files_that_are_refused(tmp_path):
    saved(tmp_path, **GOOD)
    with pytest.raises(InputError, match=r"there is no file .*Did you mean .*data.npz"):
        load(f"npz:{tmp_path / 'dat.npz'}")
    content = (tmp_path / "data.npz").read_bytes()
    for broken in (b"", b"text", content[:-50]):
        (tmp_path / "data.npz").write_bytes(broken)
        with pytest.raises(InputError, match=rf"data.npz \({len(broken)} bytes\) cannot be read as a numpy archive"):
            load(f"npz:{tmp_path / 'data.npz'}")
