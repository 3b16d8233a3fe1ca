"""The cache of files by hash trusts nobody: not the disk, not the broker, not its own folder."""

import hashlib
from pathlib import Path

import pytest

from headrace.client.blobs import BlobCache, check_hash
from headrace.errors import ProtocolError

CONTENT = b"a tokenizer"
DIGEST = hashlib.sha256(CONTENT).hexdigest()


def test_what_was_kept_is_found(tmp_path):
    cache = BlobCache(tmp_path / "blobs")
    assert cache.get(DIGEST) is None
    cache.put(DIGEST, CONTENT)
    assert cache.get(DIGEST) == CONTENT
    assert [path.name for path in (tmp_path / "blobs").iterdir()] == [DIGEST]
    assert (tmp_path / "blobs").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("damage", [b"", b"a tokenizes", CONTENT * 2])
def test_a_damaged_file_is_as_good_as_none(tmp_path, damage):
    cache = BlobCache(tmp_path)
    (tmp_path / DIGEST).write_bytes(damage)
    assert cache.get(DIGEST) is None
    cache.put(DIGEST, CONTENT)
    assert cache.get(DIGEST) == CONTENT


def test_the_default_folder_is_the_users_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HEADRACE_CACHE", str(tmp_path))
    BlobCache().put(DIGEST, CONTENT)
    assert (tmp_path / "blobs" / DIGEST).read_bytes() == CONTENT


def test_content_must_be_what_its_hash_says(tmp_path):
    with pytest.raises(ProtocolError, match="damaged"):
        BlobCache(tmp_path).put(DIGEST, b"something else")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_takes_nothing_costs_only_the_copy(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    cache = BlobCache(tmp_path / "file" / "below")
    cache.put(DIGEST, CONTENT)
    assert cache.get(DIGEST) is None


def test_a_disk_that_fills_up_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    BlobCache(tmp_path).put(DIGEST, CONTENT)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["", "abc", "../" + "a" * 61, "A" * 64, "a" * 63 + "/", "a" * 64 + "\n"])
def test_only_hashes_name_files(tmp_path, name):
    with pytest.raises(ProtocolError, match="not a sha256"):
        check_hash(name)
    with pytest.raises(ProtocolError):
        BlobCache(tmp_path).get(name)
