import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from metaprune.data import load
from metaprune.errors import InputError

TRAIN = [f"data_batch_{number}" for number in range(1, 6)]
NAMES = [*TRAIN, "test_batch"]


def records(count: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.concatenate([rng.integers(10, size=(count, 1)), rng.integers(256, size=(count, 3072))], 1).astype(
        np.uint8
    )


@pytest.fixture
def batches() -> dict[str, np.ndarray]:
    return {name: records(5 + seed, seed) for seed, name in enumerate(NAMES)}


def write_binary(folder: Path, batches: dict[str, np.ndarray]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, batch in batches.items():
        (folder / f"{name}.bin").write_bytes(batch.tobytes())
    return folder


def as_python2(batch: np.ndarray) -> bytes:
    """The official files' own opcodes: protocol 2, byte strings, numpy's names before version 2."""

    def text(value: bytes) -> bytes:
        return b"U" + bytes([len(value)]) + value

    def number(value: int) -> bytes:
        return b"J" + struct.pack("<i", value)

    raw = batch[:, 1:].tobytes()
    dtype = b"cnumpy\ndtype\n" + text(b"u1") + number(0) + number(1) + b"\x87R"
    dtype += b"(" + number(3) + text(b"|") + b"NNN" + number(-1) + number(-1) + number(0) + b"tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n" + number(0) + b"\x85" + text(b"b") + b"\x87R"
    array += b"(" + number(1) + number(len(batch)) + number(3072) + b"\x86" + dtype + b"\x89"
    array += b"T" + struct.pack("<i", len(raw)) + raw + b"tb"
    labels = b"](" + b"".join(number(int(label)) for label in batch[:, 0]) + b"e"
    return b"\x80\x02}(" + text(b"data") + array + text(b"labels") + labels + b"u."


def as_python3(protocol: int, keys: type) -> object:
    def write(batch: np.ndarray) -> bytes:
        fields = {"data": batch[:, 1:].copy(), "labels": batch[:, 0].tolist(), "batch_label": b"batch", "x": [1.5, {}]}
        return pickle.dumps({k.encode() if keys is bytes else k: v for k, v in fields.items()}, protocol=protocol)

    return write


def with_numpy_labels(batch: np.ndarray) -> bytes:
    return pickle.dumps({"data": np.asfortranarray(batch[:, 1:]), "labels": batch[:, 0].astype(np.int64)})


def with_scalar_labels(batch: np.ndarray) -> bytes:
    return pickle.dumps({"data": batch[:, 1:].copy(), "labels": list(batch[:, 0].astype(np.int64))})


def test_binary_layout(tmp_path, batches):
    write_binary(tmp_path / "cifar-10-batches-bin", batches)
    for folder in (tmp_path, tmp_path / "cifar-10-batches-bin"):
        data = load(f"cifar10:{folder}")
        assert data.input_shape == (3, 32, 32)
        assert len(data.classes) == 10
        assert data.task == "classification"
        assert (data.mean, data.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        test = batches["test_batch"]
        assert data.test.labels.tolist() == test[:, 0].tolist()
        stored = data.test.source.read(data.test.positions_N).numpy()
        assert np.array_equal(stored.reshape(-1, 3072), test[:, 1:])
        red = (test[0, 1] / 255 - 0.485) / 0.229
        assert float(data.test.images()[0, 0, 0, 0]) == pytest.approx(red, abs=1e-5)


def test_validation_is_a_tenth_of_training_and_follows_the_contents(tmp_path, batches):
    data = load(f"cifar10:{write_binary(tmp_path / 'a', batches)}")
    total = sum(len(batches[name]) for name in TRAIN)
    assert len(data.train) + len(data.validation) == total == 35
    assert len(data.validation) == 3  # 35 - round(0.9 * 35)

    def contents(split):
        return {image.numpy().tobytes() for image in split.images()}

    assert not contents(data.train) & contents(data.validation)
    moved = dict(zip(NAMES, [*(batches[name] for name in reversed(TRAIN)), batches["test_batch"]], strict=True))
    again = load(f"cifar10:{write_binary(tmp_path / 'b', moved)}")
    assert contents(again.validation) == contents(data.validation)


@pytest.mark.parametrize(
    "write",
    [
        as_python2,
        *(as_python3(protocol, keys) for protocol in (0, 1, 2, 3, 4, 5) for keys in (bytes, str)),
        with_numpy_labels,
        with_scalar_labels,
    ],
)
def test_python_layout_equals_the_binary_one(write, tmp_path, batches):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name, batch in batches.items():
        (folder / name).write_bytes(write(batch))
    binary, python = load(f"cifar10:{write_binary(tmp_path / 'bin', batches)}"), load(f"cifar10:{tmp_path}")
    assert binary.fingerprint == python.fingerprint
    assert torch.equal(binary.train.images(), python.train.images())


class Call:
    """Pickles as the call of a function."""

    def __init__(self, function, *args, state=None):
        self.call = (function, args) if state is None else (function, args, state)

    def __reduce__(self):
        return self.call


HOSTILE = {
    "system": pickle.dumps(Call(os.system, "echo unpickled")),
    "eval": pickle.dumps({"data": Call(eval, "print('unpickled')")}),
    "numpy function": pickle.dumps(Call(np.load, "/etc/passwd", None, True)),
    "numpy submodule": b"cnumpy.lib.npyio\nload\n.",
    "getattr": pickle.dumps(Call(getattr, "x", "upper")),
    "dotted name": pickle.dumps(np.ndarray.tofile, protocol=4),
    "object array": pickle.dumps({"data": np.array([[None]]), "labels": [1]}),
    "huge array": pickle.dumps(Call(np.ndarray, (10**12,))),
    "state of a function": b"cnumpy.core.multiarray\n_reconstruct\n}S'__doc__'\nS'x'\nsb.",
    "state of a class": b"cnumpy\nndarray\n}S'value'\nS'x'\nsb.",
    "persistent id": b"Pfile\n.",
    "extension": b"\x82\x01.",
    "set": pickle.dumps({"data": {1, 2}, "labels": frozenset()}),
    "not a dict": pickle.dumps([1, 2]),
    "no data": pickle.dumps({"labels": [1]}),
    "other shape": pickle.dumps({"data": np.zeros((2, 10), np.uint8), "labels": [1, 2]}),
    "other type": pickle.dumps({"data": np.zeros((2, 3072)), "labels": [1, 2]}),
    "label out of range": pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [1, 10]}),
    "too few labels": pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [1]}),
    "no images": pickle.dumps({"data": np.zeros((0, 3072), np.uint8), "labels": []}),
    "truncated": as_python2(records(4, 0))[:-100],
    "text": b"this is no pickle",
}


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")
@pytest.mark.parametrize("case", HOSTILE)
def test_python_files_that_are_refused(case, tmp_path, batches, capfd):
    for name, batch in batches.items():
        (tmp_path / name).write_bytes(as_python2(batch))
    load(f"cifar10:{tmp_path}")
    (tmp_path / "data_batch_3").write_bytes(HOSTILE[case])
    with pytest.raises(InputError, match="data_batch_3"):
        load(f"cifar10:{tmp_path}")
    assert "unpickled" not in capfd.readouterr().out


def test_missing_file(tmp_path, batches):
    write_binary(tmp_path, batches)
    (tmp_path / "data_batch_4.bin").unlink()
    with pytest.raises(InputError, match=r"data_batch_4.bin is missing; a multiple of 3073 bytes \(30730000 in the"):
        load(f"cifar10:{tmp_path}")


@pytest.mark.parametrize("size", [0, 1, 3072, 3074, 6000])
def test_truncated_file(size, tmp_path, batches):
    write_binary(tmp_path, batches)
    content = (tmp_path / "test_batch.bin").read_bytes()[:size]
    (tmp_path / "test_batch.bin").write_bytes(content)
    with pytest.raises(InputError, match=rf"test_batch.bin has {size} bytes, but a multiple of 3073 bytes"):
        load(f"cifar10:{tmp_path}")


def test_binary_file_with_other_content(tmp_path, batches):
    batches["data_batch_2"][1, 0] = 77
    with pytest.raises(InputError, match=r"data_batch_2.bin must hold images with labels from 0 to 9, but .* label 77"):
        load(f"cifar10:{write_binary(tmp_path, batches)}")


def test_missing_folder(tmp_path):
    with pytest.raises(InputError, match="nowhere does not exist"):
        load(f"cifar10:{tmp_path / 'nowhere'}")
    with pytest.raises(InputError, match="holds none of them"):
        load(f"cifar10:{tmp_path}")


def test_real_data(cifar10):
    data = load(f"cifar10:{cifar10}")
    assert {name: len(split) for name, split in data.splits.items()} == {
        "train": 45_000,
        "validation": 5_000,
        "test": 5_000,
    }
    assert torch.bincount(data.test.labels).tolist() == [500] * 10
    assert data.fingerprint == "ceeacda8b39f3bd92a80a0f5920a45e01eae08a580575fd01c05fa08ab1cd482"
    generator = torch.Generator().manual_seed(0)
    images, labels = next(data.train.batches(128, shuffle=generator, augment=True))
    assert images.shape == (128, 3, 32, 32)
    assert labels.shape == (128,)
