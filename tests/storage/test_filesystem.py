from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import storage.filesystem
from storage.bucket import ObjectTier
from storage.contract import PersistentTierContract, same_bytes, sample_chunk
from storage.files import FileReader
from storage.filesystem import FileTier, open_reader, open_tier
from storage.format import read_chunk
from storage.header import CorruptChunk
from storage.opener_contract import OpenerContract
from storage.tier import ChunkMissing, TierError, TierFull

BUDGET = 256 * 1024


def files_below(root):
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())


def chunk_files(root):
    return [name for name in files_below(root) if name.endswith(".arrow")]


def unfinished_files(root):
    return [name for name in files_below(root / ".tmp") if "/" in name]


class TestFileTier(PersistentTierContract):
    @pytest.fixture
    def reopen(self, tmp_path):
        tiers = []

        def reopen(budget_bytes):
            tiers.append(FileTier(tmp_path / "ssd", budget_bytes))
            return tiers[-1]

        yield reopen
        for tier in tiers:
            tier.close()

    @pytest.fixture
    def tier(self, reopen):
        return reopen(BUDGET)

    def break_writes(self, tier, monkeypatch):
        monkeypatch.setattr(os, "write", half_of_it_then(OSError(errno.EIO, "input/output error")))

    @pytest.mark.parametrize(
        ("number", "expected", "advice"),
        [
            (errno.ENOSPC, TierFull, "free space"),
            (errno.EDQUOT, TierFull, "quota"),
            (errno.EACCES, TierError, "write access"),
            (errno.EROFS, TierError, "read-only"),
            (errno.EIO, TierError, "rror"),
        ],
    )
    @pytest.mark.parametrize("step", ["write", "fsync", "rename", "fsync of the folder"])
    def test_any_error_at_any_step_leaves_nothing(self, tier, tmp_path, monkeypatch, step, number, expected, advice):
        key, data = sample_chunk(1, 20_000)
        error = OSError(number, os.strerror(number))
        with monkeypatch.context() as broken:
            if step == "write":
                broken.setattr(os, "write", half_of_it_then(error))
            elif step == "fsync":
                broken.setattr(os, "fsync", failing(error))
            elif step == "rename":
                broken.setattr(storage.filesystem.Path, "replace", failing(error))
            else:
                (tmp_path / "ssd" / key[:2]).mkdir()  # so that it is the one after the rename
                broken.setattr(storage.filesystem, "_sync_folder", failing(error))
            with pytest.raises(expected, match=advice):
                tier.put(key, data)
        assert key not in tier
        assert tier.keys() == []
        assert tier.used_bytes == 0
        assert not [name for name in chunk_files(tmp_path / "ssd") if key in name]
        assert unfinished_files(tmp_path / "ssd") == []
        assert tier.put(key, data) == len(data)

    def test_order_of_a_write(self, tier, tmp_path, monkeypatch):
        """Data is on the device before its name is, and the name before put returns."""
        steps = []
        fsync, replace = os.fsync, storage.filesystem.Path.replace

        def note_fsync(handle):
            name = os.readlink(f"/proc/self/fd/{handle}")
            steps.append("fsync folder" if os.path.isdir(name) else "fsync file")
            fsync(handle)

        def note_replace(source, target):
            steps.append("rename")
            return replace(source, target)

        key, data = sample_chunk(2, 20_000)
        (tmp_path / "ssd" / key[:2]).mkdir()
        monkeypatch.setattr(os, "fsync", note_fsync)
        monkeypatch.setattr(storage.filesystem.Path, "replace", note_replace)
        tier.put(key, data)
        assert steps == ["fsync file", "rename", "fsync folder"]

    def test_fans_out_by_key(self, tier, tmp_path):
        key, data = sample_chunk(3, 20_000)
        tier.put(key, data)
        assert chunk_files(tmp_path / "ssd") == [f"{key[:2]}/{key}.arrow"]
        assert (tmp_path / "ssd" / key[:2] / f"{key}.arrow").read_bytes() == data.tobytes()

    @pytest.mark.parametrize("key", ["../../etc/passwd", "", "a", "a/b", ".tmp", "ab\0cd"])
    def test_refuses_keys_that_are_no_names(self, tier, key):
        with pytest.raises(ValueError, match="chunk key"):
            tier.put(key, sample_chunk(4, 0)[1])
        with pytest.raises(ValueError, match="chunk key"):
            tier.open(key)

    def test_an_open_chunk_outlives_delete_and_the_tier(self, tier):
        key, data = sample_chunk(5, 20_000)
        tier.put(key, data)
        reader, whole = tier.open(key), tier.read(key)
        k, v = reader.layer(1)
        tier.delete(key)
        tier.close()
        reader.verify()
        assert same_bytes(whole, data)
        expected_k, expected_v = read_chunk(data).layer(1)
        assert np.array_equal(k, expected_k)
        assert np.array_equal(v, expected_v)

    def test_closed_readers_keep_no_file_open(self, tier):
        chunks = dict(sample_chunk(seed, 8000) for seed in range(0, 100, 10))
        for key, data in chunks.items():
            tier.put(key, data)
        before = len(os.listdir("/proc/self/fd"))
        kept = [tier.open(key) for key in chunks]
        whole = [tier.read(key) for key in chunks]
        for reader in kept:
            reader.close()
        assert len(os.listdir("/proc/self/fd")) == before
        assert len(whole) == 10

    def test_a_chunk_that_does_not_open_keeps_no_file_open(self, tier):
        key, data = sample_chunk(0, 8000)
        tier.put(key, data[:-1])
        before = len(os.listdir("/proc/self/fd"))
        with pytest.raises(CorruptChunk) as caught:
            tier.open(key)
        assert len(os.listdir("/proc/self/fd")) == before
        del caught

    def test_ignores_what_is_not_a_chunk(self, tier, tmp_path, reopen):
        key, data = sample_chunk(6, 20_000)
        tier.put(key, data)
        for name in ("notes.txt", f"{key[:2]}/readme", "zz/other.arrow"):
            path = tmp_path / "ssd" / name
            path.parent.mkdir(exist_ok=True)
            path.write_text("not a chunk")
        again = reopen(BUDGET)
        assert again.keys() == [key]
        assert again.used_bytes == len(data)

    def test_restart_keeps_the_newest_and_deletes_the_rest(self, tier, tmp_path, reopen):
        keys = fill(tier, tmp_path / "ssd")
        tier.close()
        again = reopen(BUDGET // 2)
        assert again.keys() == keys[-len(again.keys()) :]
        assert 0 < len(again.keys()) < len(keys)
        assert len(chunk_files(tmp_path / "ssd")) == len(again.keys())

    def test_restart_beside_a_living_writer_deletes_nothing(self, tier, tmp_path, reopen):
        keys = fill(tier, tmp_path / "ssd")
        small = reopen(BUDGET // 2)
        assert len(small.keys()) < len(keys)
        assert len(chunk_files(tmp_path / "ssd")) == len(keys)
        assert all(key in small for key in keys)

    def test_refuses_a_place_that_is_a_file(self, tmp_path):
        (tmp_path / "file").write_text("x")
        with pytest.raises(TierError, match="choose another folder"):
            FileTier(tmp_path / "file", BUDGET)

    def test_refuses_a_place_it_may_not_write(self, tmp_path, monkeypatch):
        error = PermissionError(errno.EACCES, "permission denied")
        monkeypatch.setattr(storage.filesystem.Path, "mkdir", failing(error))
        with pytest.raises(TierError, match="write access"):
            FileTier(tmp_path / "ssd", BUDGET)


class TestFileReader(OpenerContract):
    @pytest.fixture
    def tier(self, tmp_path):
        tier = FileTier(tmp_path / "ssd", 10 << 20)
        yield tier
        tier.close()

    @pytest.fixture
    def opener(self, tier, tmp_path):
        return FileReader(tmp_path / "ssd")

    def test_a_reader_holds_its_file_and_close_lets_go(self, tier, opener):
        key, data = sample_chunk(1, 200_000)
        tier.put(key, data)
        before = len(os.listdir("/proc/self/fd"))
        reader = opener.open(key)
        tier.delete(key)
        reader.verify()
        reader.close()
        assert len(os.listdir("/proc/self/fd")) == before

    def test_a_read_error_is_a_tier_error_and_not_a_signal(self, tier, opener, monkeypatch):
        key, data = sample_chunk(2, 200_000)
        tier.put(key, data)
        reader = opener.open(key)
        monkeypatch.setattr(os, "preadv", failing(OSError(errno.EIO, "input/output error")))
        with pytest.raises(TierError, match="rror"):
            reader.layer(1)
        with pytest.raises(TierError):
            opener.open(key)
        with pytest.raises(TierError):
            tier.read(key)
        reader.close()

    def test_a_file_cut_short_while_it_is_read_is_corrupt(self, tier, opener, tmp_path):
        key, data = sample_chunk(3, 200_000)
        tier.put(key, data)
        reader = opener.open(key)
        os.truncate(tmp_path / "ssd" / key[:2] / f"{key}.arrow", 100_000)
        with pytest.raises(CorruptChunk):
            reader.layer(2)
        reader.close()


class TestDeadAndLivingWriters:
    def test_a_living_writers_files_are_left_alone(self, tmp_path):
        first = FileTier(tmp_path, BUDGET)
        unfinished = first._temp.path / "half.arrow"
        unfinished.write_bytes(b"half")
        second = FileTier(tmp_path, BUDGET)
        assert unfinished.exists()
        first.close()
        second.close()
        assert files_below(tmp_path) == [".tmp/start"]

    def test_a_dead_writers_files_are_cleared_away(self, tmp_path):
        script = (
            "import os, sys; from storage.filesystem import FileTier; tier = FileTier(sys.argv[1], 1 << 20); "
            "(tier._temp.path / 'half.arrow').write_bytes(b'half'); os._exit(1)"
        )
        subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=False)
        assert [name for name in unfinished_files(tmp_path) if name.endswith("half.arrow")]
        with FileTier(tmp_path, BUDGET)._temp._lock:
            assert unfinished_files(tmp_path) == []

    def test_many_start_at_once(self, tmp_path):
        script = (
            "import sys; from storage.filesystem import FileTier; from storage.contract import sample_chunk\n"
            "tier = FileTier(sys.argv[1], 1 << 22)\n"
            "for seed in range(0, 80, 4): tier.put(*sample_chunk(seed, 8000))\n"
            "print(len(tier.keys())); tier.close()"
        )
        writers = [
            subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True)
            for _ in range(3)
        ]
        assert [writer.communicate(timeout=60)[0].strip() for writer in writers] == ["20"] * 3
        tier = FileTier(tmp_path, 1 << 22)
        assert len(list(tier.inventory())) == 20
        tier.close()
        assert unfinished_files(tmp_path) == []


CRASHING_WRITER = """
import sys
from storage.contract import sample_chunk
from storage.filesystem import FileTier

tier = FileTier(sys.argv[1], 1 << 30)
chunks = [sample_chunk(seed, 3_000_000) for seed in range(0, 40, 4)]
print("ready", flush=True)
while True:
    for key, data in chunks:
        tier.put(key, data)
        tier.delete(key) if key[0] in "0123" else None
    for key in tier.keys()[::2]:
        tier.delete(key)
"""


def test_a_killed_writer_leaves_only_whole_chunks(tmp_path):
    """SIGKILL in the middle of puts, several times; what a restart finds is complete, and only that is there."""
    num_found = num_unfinished = 0
    for attempt in range(20):
        writer = subprocess.Popen([sys.executable, "-c", CRASHING_WRITER, str(tmp_path)], stdout=subprocess.PIPE)
        assert writer.stdout.readline() == b"ready\n"
        time.sleep(0.05 + 0.037 * attempt)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        writer.stdout.close()
        num_unfinished += len(unfinished_files(tmp_path))
        tier = FileTier(tmp_path, 1 << 30)
        assert unfinished_files(tmp_path) == []
        found = list(tier.inventory())
        assert len(found) == len(chunk_files(tmp_path)) == len(tier.keys())
        for header, size in found:
            reader = tier.open(header.key)
            reader.verify()
            assert reader.num_bytes == size
        assert tier.used_bytes == sum(size for _, size in found)
        num_found += len(found)
        tier.close()
        if attempt >= 4 and num_found and num_unfinished:
            break
    assert num_found > 0
    assert num_unfinished > 0, "no kill hit a put: the test proved nothing"


class TestOpenTier:
    @pytest.mark.parametrize("scheme", ["", "file://", "local://"])
    def test_paths_and_file_urls(self, tmp_path, scheme):
        tier = open_tier(f"{scheme}{tmp_path}/ssd", BUDGET)
        assert isinstance(tier, FileTier)
        assert (tmp_path / "ssd").is_dir()
        tier.close()

    def test_other_urls(self):
        tier = open_tier("memory://somewhere", BUDGET, deadline_s=3.0)
        assert isinstance(tier, ObjectTier)
        assert tier.deadline_s == 3.0

    def test_an_unknown_scheme_is_explained(self):
        with pytest.raises(TierError, match="nowhere"):
            open_tier("nowhere://bucket", BUDGET)


def fill(tier, root):
    """Eight chunks whose files are a second apart; their keys, oldest first."""
    keys = []
    for age in range(8):
        key, data = sample_chunk(age, BUDGET // 8)
        tier.put(key, data)
        os.utime(root / key[:2] / f"{key}.arrow", (1000 + age, 1000 + age))
        keys.append(key)
    return keys


def failing(error):
    def fail(*args, **kwargs):
        raise error

    return fail


def half_of_it_then(error):
    write, calls = os.write, []

    def write_half(handle, data):
        calls.append(handle)
        if len(calls) > 1:
            raise error
        return write(handle, memoryview(data)[: len(data) // 2])

    return write_half


def test_a_lost_file_is_missing_and_no_longer_counted(tmp_path):
    tier = FileTier(tmp_path, BUDGET)
    key, data = sample_chunk(7, 20_000)
    tier.put(key, data)
    (tmp_path / key[:2] / f"{key}.arrow").unlink()
    assert key not in tier
    assert tier.used_bytes == 0
    with pytest.raises(ChunkMissing):
        tier.open(key)
    tier.close()


@pytest.mark.parametrize("scheme", ["file://", ""])
def test_a_reader_beside_the_tier_reads_and_changes_nothing(tmp_path, scheme):
    tier = FileTier(tmp_path, 10**6)
    key, data = sample_chunk(1, 20_000)
    tier.put(key, data)
    before = sorted(tmp_path.rglob("*"))
    reader = open_reader(f"{scheme}{tmp_path}")
    chunk = reader.open(key)
    assert chunk.header == read_chunk(data).header
    chunk.verify()
    with pytest.raises(ChunkMissing):
        reader.open("0" * 64)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_reader_of_a_bucket():
    tier = ObjectTier("memory://readers", 10**6)
    key, data = sample_chunk(1, 20_000)
    tier.put(key, data)
    open_reader("memory://readers").open(key).verify()
    with pytest.raises(ChunkMissing):
        open_reader("memory://readers").open("0" * 64)
