"""Files written past the page cache hold the same bytes as others, whatever the file system makes of it."""

import errno
import fcntl
import os

import numpy as np
import pytest

from storage.direct import _O_DIRECT, BLOCK_BYTES, write_new

SIZES = [1, 511, 4096, 4097, BLOCK_BYTES - 1, BLOCK_BYTES, BLOCK_BYTES + 1, 2 * BLOCK_BYTES + 12_345]


def sample(size):
    return np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8)


@pytest.mark.parametrize("size", SIZES)
def test_what_is_written_is_what_is_read(tmp_path, size):
    data = sample(size)
    data.flags.writeable = False
    write_new(tmp_path / "file", data)
    assert (tmp_path / "file").read_bytes() == data.tobytes()


def test_memory_that_begins_anywhere(tmp_path):
    data = sample(10_000)[7:]
    write_new(tmp_path / "file", data)
    assert (tmp_path / "file").read_bytes() == data.tobytes()


def test_a_file_system_without_it(tmp_path, monkeypatch):
    real = os.open

    def refusing(path, flags, *mode):
        if flags & _O_DIRECT:
            os.close(real(path, flags & ~_O_DIRECT, *mode))  # as Linux does: made all the same
            raise OSError(errno.EINVAL, "invalid argument")
        return real(path, flags, *mode)

    monkeypatch.setattr(os, "open", refusing)
    write_new(tmp_path / "file", sample(5000))
    assert (tmp_path / "file").read_bytes() == sample(5000).tobytes()


@pytest.mark.parametrize("number", [1, 2])
def test_a_file_system_that_wants_other_blocks(tmp_path, monkeypatch, number):
    real, calls = os.write, []

    def refusing(handle, data):
        calls.append(handle)
        if len(calls) >= number and fcntl.fcntl(handle, fcntl.F_GETFL) & _O_DIRECT:
            raise OSError(errno.EINVAL, "invalid argument")
        return real(handle, data)

    monkeypatch.setattr(os, "write", refusing)
    write_new(tmp_path / "file", sample(BLOCK_BYTES + 5000))
    assert (tmp_path / "file").read_bytes() == sample(BLOCK_BYTES + 5000).tobytes()


@pytest.mark.parametrize("first", [4096, 3 * 4096])
def test_a_write_that_falls_short_goes_on(tmp_path, monkeypatch, first):
    real, calls = os.write, []

    def short(handle, data):
        calls.append(handle)
        return real(handle, memoryview(data)[:first] if len(calls) == 1 else data)

    monkeypatch.setattr(os, "write", short)
    write_new(tmp_path / "file", sample(20_000))
    assert (tmp_path / "file").read_bytes() == sample(20_000).tobytes()


def test_a_file_that_exists_is_left_alone(tmp_path):
    (tmp_path / "file").write_bytes(b"mine")
    with pytest.raises(FileExistsError):
        write_new(tmp_path / "file", sample(100))
    assert (tmp_path / "file").read_bytes() == b"mine"
