"""Fashion-MNIST as Debian keeps it: IDX files are read value for value, and damaged ones refused by name."""

import gzip
import struct

import numpy as np
import pytest

from flatmin.train.data import load_images
from flatmin.train.data.fashion_mnist import read_idx, read_idx_files


def idx_bytes(values: np.ndarray) -> bytes:
    return struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim, *values.shape) + values.astype(np.uint8).tobytes()


@pytest.fixture
def idx_dir(tmp_path):
    generator = np.random.default_rng(0)
    for part, count in (("train", 40), ("t10k", 15)):
        images = generator.integers(256, size=(count, 28, 28))
        for kind, values in (("images-idx3", images), ("labels-idx1", np.arange(count) % 10)):
            (tmp_path / f"{part}-{kind}-ubyte.gz").write_bytes(gzip.compress(idx_bytes(values)))
    return tmp_path


def test_idx_files_are_read_value_for_value(idx_dir, monkeypatch):
    monkeypatch.setattr("flatmin.train.data.fashion_mnist.DEBIAN_DIR", idx_dir)
    images = read_idx_files(idx_dir)
    expected = np.random.default_rng(0).integers(256, size=(40, 28, 28))
    assert np.array_equal(images.train_images.numpy(), expected[..., None])
    assert images.test_labels.tolist() == [*range(10), *range(5)]
    assert images.classes[9] == "Ankle boot"
    loaded = load_images("fashion-mnist", idx_dir / "absent", download=False)
    assert sorted(loaded.train_images.flatten(1).tolist()) == sorted(images.train_images.flatten(1).tolist())
    assert not (idx_dir / "absent").exists()


VALUES = np.arange(24).reshape(2, 3, 4)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (gzip.compress(idx_bytes(VALUES))[:-12], "must be a whole gzip file, got one that says: "),
        (gzip.compress(idx_bytes(VALUES))[:20], "must be a whole gzip file, got one that says: "),
        (b"", "must begin like an IDX file of unsigned bytes, got b''"),
        (idx_bytes(VALUES), "must be a whole gzip file, got one that says: Not a gzipped file"),
        (
            gzip.compress(b"\x00\x00\x09" + idx_bytes(VALUES)[3:]),
            r"must begin like an IDX file of unsigned bytes, got b",
        ),
        (gzip.compress(idx_bytes(VALUES)[:12]), r"must begin like an IDX file of unsigned bytes, got b'\\x00"),
        (gzip.compress(idx_bytes(VALUES)[:-1]), r"as many values as its shape \[2, 3, 4\] says, got 23"),
        (gzip.compress(idx_bytes(VALUES) + b"\0"), r"as many values as its shape \[2, 3, 4\] says, got 25"),
    ],
    ids=["cut", "cut early", "empty", "not packed", "not bytes", "cut header", "a value less", "a value more"],
)  # names, because a packed file holds the time and would be another test in every process
def test_damaged_idx_files_are_refused_by_name(tmp_path, content, message):
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_idx(path)
    assert str(caught.value).startswith(str(path))


def test_a_flipped_bit_in_a_gzip_file_is_refused(tmp_path):
    path = tmp_path / "x.gz"
    for position in range(10, 40):
        content = bytearray(gzip.compress(idx_bytes(VALUES)))
        content[position] ^= 0x10
        path.write_bytes(content)
        with pytest.raises(ValueError, match="must"):
            read_idx(path)


def test_idx_labels_out_of_range_are_refused(idx_dir):
    (idx_dir / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx_bytes(np.full(15, 11))))
    with pytest.raises(ValueError, match=r"test_labels must be in \[0, 10\), got 11") as caught:
        read_idx_files(idx_dir)
    assert str(idx_dir) in str(caught.value)
