from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from metaprune.data import load
from metaprune.errors import ConfigError, InputError


def picture(seed: int, height: int = 20, width: int = 30) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(256, size=(height, width, 3), dtype=np.uint8))


def fill(folder: Path, count: int, first: int = 0, classes: tuple[str, ...] = ("cat", "dog")) -> None:
    for index in range(count):
        place = folder / classes[index % len(classes)]
        place.mkdir(parents=True, exist_ok=True)
        picture(first + index).save(place / f"{index:03}.png")


def paths(split) -> list[str]:
    return [split.source.paths[position] for position in split.positions_N]


def test_plain_folder_is_cut_by_path(tmp_path):
    fill(tmp_path, 40)
    (tmp_path / "cat" / "notes.txt").write_text("not an image")
    (tmp_path / ".cache").mkdir()
    data = load(f"imagefolder:{tmp_path}?size=16")
    assert data.classes == ("cat", "dog")
    assert data.input_shape == (3, 16, 16)
    assert [len(split) for split in data.splits.values()] == [28, 4, 8]
    everything = [path for split in data.splits.values() for path in paths(split)]
    assert len(set(everything)) == len(everything) == 40
    for split in data.splits.values():
        assert [path.split("/")[0] for path in paths(split)] == [data.classes[label] for label in split.labels]
    again = load(f"imagefolder:{tmp_path}?size=16")
    assert [paths(s) for s in again.splits.values()] == [paths(s) for s in data.splits.values()]
    assert again.fingerprint == data.fingerprint


@pytest.mark.parametrize("name", ["validation", "val"])
def test_folder_with_all_splits(name, tmp_path):
    for split, count in (("train", 6), (name, 4), ("test", 2)):
        fill(tmp_path / split, count)
    data = load(f"imagefolder:{tmp_path}?size=8")
    assert [len(split) for split in data.splits.values()] == [6, 4, 2]
    assert all(path.startswith(f"{name}/") for path in paths(data.validation))


def test_without_validation_a_tenth_of_training_is_held_out(tmp_path):
    fill(tmp_path / "train", 20)
    fill(tmp_path / "test", 4)
    data = load(f"imagefolder:{tmp_path}?size=8")
    assert [len(split) for split in data.splits.values()] == [18, 2, 4]
    assert all(path.startswith("train/") for path in paths(data.validation))


def test_without_test_the_validation_folder_is_reported(tmp_path):
    fill(tmp_path / "train", 20)
    fill(tmp_path / "val", 4)
    data = load(f"imagefolder:{tmp_path}?size=8")
    assert [len(split) for split in data.splits.values()] == [18, 2, 4]
    assert all(path.startswith("val/") for path in paths(data.test))


def test_pixels(tmp_path):
    """Shorter side to the size, centre cut out, RGB whatever the file has."""
    fill(tmp_path, 20)
    Image.new("L", (16, 16), 51).save(tmp_path / "cat" / "000.png")
    picture(3, 16, 32).save(tmp_path / "cat" / "002.png")
    data = load(f"imagefolder:{tmp_path}?size=16")
    source = data.train.source
    grey, wide = source.read(torch.tensor([source.paths.index(f"cat/00{k}.png") for k in (0, 2)]))
    assert (grey == 51).all()
    assert torch.equal(wide, torch.from_numpy(np.array(picture(3, 16, 32))).permute(2, 0, 1)[:, :, 8:24])
    assert source.read(torch.tensor([5])).shape == (1, 3, 16, 16)


def test_batches_are_read_ahead_in_order(tmp_path):
    fill(tmp_path, 40)
    train = load(f"imagefolder:{tmp_path}?size=8").train
    together = torch.cat([images for images, _ in train.batches(5)])
    assert torch.equal(together, train.images())
    passes = [
        torch.cat([x for x, _ in train.batches(5, shuffle=torch.Generator().manual_seed(1), augment=True)])
        for _ in range(2)
    ]
    assert torch.equal(*passes)
    assert not torch.equal(passes[0], together)
    next(iter(train.batches(5)))  # a reader that is dropped half-way stops by itself


def test_fingerprint_sees_the_files(tmp_path):
    fill(tmp_path, 20)
    before = load(f"imagefolder:{tmp_path}?size=8").fingerprint
    picture(99).save(tmp_path / "cat" / "000.png")
    assert load(f"imagefolder:{tmp_path}?size=8").fingerprint != before


def test_damaged_file_is_named(tmp_path):
    fill(tmp_path, 20)
    target = tmp_path / "cat" / "004.png"
    target.write_bytes(target.read_bytes()[:200])
    data = load(f"imagefolder:{tmp_path}?size=8")
    with pytest.raises(InputError, match=r"004\.png cannot be read as an image"):
        [batch for split in data.splits.values() for batch in split.batches(4)]
    target.write_bytes(b"")
    with pytest.raises(InputError, match=r"004.png is empty \(0 bytes\)"):
        load(f"imagefolder:{tmp_path}?size=8")


@pytest.mark.parametrize(
    ("query", "message"),
    [("?size=0", "at least 1"), ("?size=big", "'big'"), ("?siz=8", "Did you mean 'size'"), ("?size", "''")],
)
def test_options(query, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        load(f"imagefolder:{tmp_path}{query}")


def test_folders_that_are_refused(tmp_path):
    with pytest.raises(InputError, match="is no folder"):
        load(f"imagefolder:{tmp_path / 'nowhere'}")
    with pytest.raises(InputError, match="one subfolder per class"):
        load(f"imagefolder:{tmp_path}")
    fill(tmp_path / "a", 3)
    with pytest.raises(InputError, match="3 images are too few for 3 splits"):
        load(f"imagefolder:{tmp_path / 'a'}")
    fill(tmp_path / "b" / "train", 20)
    with pytest.raises(InputError, match="neither test/ nor val/"):
        load(f"imagefolder:{tmp_path / 'b'}")
    fill(tmp_path / "b" / "test", 4, classes=("cat", "horse"))
    with pytest.raises(InputError, match=r"'horse' .* has none"):
        load(f"imagefolder:{tmp_path / 'b'}")
    fill(tmp_path / "c", 30, classes=("train", "test"))
    with pytest.raises(InputError, match="one subfolder per class, but they hold the images"):
        load(f"imagefolder:{tmp_path / 'c'}")
