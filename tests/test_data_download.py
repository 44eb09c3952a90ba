"""data/download.py: fetching from a server on this machine; nothing here leaves it."""

import errno
import gzip
import hashlib
import io
import os
import tarfile
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from odn_fast.data import DataError, download
from odn_fast.data.download import Source, ensure


class Server:
    """Serves ``files`` (path -> bytes) and counts what is asked for."""

    def __init__(self):
        self.files, self.asked, self.cut = {}, [], False
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                outer.asked.append(self.path)
                content = outer.files.get(self.path)
                if content is None:
                    self.send_error(404)
                    return
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content[: len(content) // 2] if outer.cut else content)

            def log_message(self, *arguments):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    def offer(self, path, content):
        self.files[path] = content
        return f"{self.address}{path}", hashlib.md5(content).hexdigest()

    def close(self):
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def server(monkeypatch):
    for variable in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(download, "TIMEOUT_SECONDS", 2.0)
    running = Server()
    yield running
    running.close()


@pytest.fixture
def sources(monkeypatch):
    return lambda *entries: monkeypatch.setitem(download.SOURCES, "mnist", entries)


def tar_of(**members):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name.replace("__", "/"))
            if content is None:
                member.type, member.linkname = tarfile.SYMTYPE, "/etc/hostname"
                archive.addfile(member)
            else:
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def files_in(folder):
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def test_a_missing_file_is_fetched_once(tmp_path, server, sources, capsys):
    url, md5 = server.offer("/a/file.gz", gzip.compress(b"content"))
    sources(Source(url, md5, 1, {}))
    folder = tmp_path / "new" / "raw"
    ensure("mnist", folder)
    assert gzip.decompress((folder / "file.gz").read_bytes()) == b"content"
    assert files_in(folder) == ["file.gz"] and server.asked == ["/a/file.gz"]
    assert f"downloading {url} to {folder}" in capsys.readouterr().err
    ensure("mnist", folder)
    assert len(server.asked) == 1


def test_nothing_is_asked_for_when_the_files_are_there(tmp_path, monkeypatch, sources):
    monkeypatch.setattr(download.urllib.request, "urlopen", lambda *_, **__: pytest.fail("opened a connection"))
    sources(Source("http://nowhere.invalid/one.gz", "0", 1, {}), Source("http://nowhere.invalid/two.zip", "0", 1, {"a.gz": "x", "b": "y"}))
    for name in ("one", "a.gz", "b"):  # "one" is the unpacked form of one.gz
        (tmp_path / name).write_bytes(b"anything, right or wrong")
    ensure("mnist", tmp_path)
    ensure("mnist", tmp_path, download=False)


def test_members_of_a_tar_archive_are_taken_by_name(tmp_path, server, sources):
    content = tar_of(folder__one=b"1", folder__two=b"2", folder__other=b"3", **{"..__..__outside": b"4"})
    url, md5 = server.offer("/archive.tar.gz", content)
    sources(Source(url, md5, 1, {"one": "folder/one", "two": "folder/two"}))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "two").write_bytes(b"mine")
    ensure("mnist", tmp_path / "in")
    assert files_in(tmp_path / "in") == ["one", "two"] and files_in(tmp_path) == ["in"]
    assert (tmp_path / "in" / "one").read_bytes() == b"1"
    assert (tmp_path / "in" / "two").read_bytes() == b"mine"  # what was there stays


def test_members_of_a_zip_archive_are_taken_by_name(tmp_path, server, sources):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("gzip/one.gz", b"1")
        archive.writestr("../outside", b"2")
    url, md5 = server.offer("/archive.zip", buffer.getvalue())
    sources(Source(url, md5, 1, {"one.gz": "gzip/one.gz"}))
    ensure("mnist", tmp_path / "in")
    assert files_in(tmp_path / "in") == ["one.gz"] and files_in(tmp_path) == ["in"]


def failing(tmp_path, *words):
    """The ensure that must fail; it leaves nothing, and says what is missing, where, and why."""
    folder = tmp_path / "raw"
    with pytest.raises(DataError) as caught:
        ensure("mnist", folder)
    for word in (str(folder), *words):
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)
    assert files_in(folder) == []


def test_a_wrong_checksum_puts_nothing_in_place(tmp_path, server, sources):
    url, md5 = server.offer("/file.gz", b"content")
    server.files["/file.gz"] = b"harmful"
    sources(Source(url, md5, 1, {}))
    failing(tmp_path, "file.gz", url, f"expected {md5}", hashlib.md5(b"harmful").hexdigest())


def test_a_wrong_archive_is_never_opened(tmp_path, server, sources, monkeypatch):
    url, _ = server.offer("/archive.tar.gz", tar_of(one=b"1"))
    monkeypatch.setattr(download.tarfile, "open", lambda *_, **__: pytest.fail("opened before it was checked"))
    sources(Source(url, "0" * 32, 1, {"one": "one"}))
    failing(tmp_path, "one", url, "MD5")


def test_a_connection_that_breaks_off(tmp_path, server, sources):
    url, md5 = server.offer("/file.gz", bytes(100_000))
    server.cut = True
    sources(Source(url, md5, 1, {}))
    failing(tmp_path, "file.gz", url)


def test_an_answer_too_long_is_cut_off(tmp_path, server, sources):
    url, md5 = server.offer("/file.gz", bytes(3_000_000))
    sources(Source(url, md5, 1, {}))
    failing(tmp_path, "longer than 1 MB")


def test_a_member_too_long_is_cut_off(tmp_path, server, sources):
    url, md5 = server.offer("/archive.tar.gz", tar_of(one=bytes(3_000_000)))
    sources(Source(url, md5, 1, {"one": "one"}))
    failing(tmp_path, "one in the archive is longer than 1 MB")


@pytest.mark.parametrize(("members", "word"), [({"other": b""}, "one"), ({"one": None}, "no regular file")])
def test_an_archive_without_the_file(tmp_path, server, sources, members, word):
    url, md5 = server.offer("/archive.tar.gz", tar_of(**members))
    sources(Source(url, md5, 1, {"one": "one"}))
    failing(tmp_path, url, word)


@pytest.mark.parametrize("suffix", ["zip", "tar.gz"])
def test_an_archive_that_is_none(tmp_path, server, sources, suffix):
    url, md5 = server.offer(f"/archive.{suffix}", b"not an archive")
    sources(Source(url, md5, 1, {"one": "one"}))
    failing(tmp_path, url, f"archive.{suffix}")


def test_no_such_address_and_no_server(tmp_path, server, sources):
    sources(Source(f"{server.address}/missing.gz", "0", 1, {}))
    failing(tmp_path, "missing.gz", "404")
    server.close()
    failing(tmp_path, "missing.gz", "refused")
    server.close = lambda: None


def test_a_server_that_never_answers(tmp_path, server, sources, monkeypatch):
    monkeypatch.setattr(download, "TIMEOUT_SECONDS", 0.1)
    monkeypatch.setattr(download.urllib.request, "urlopen", timed_out)
    sources(Source(f"{server.address}/file.gz", "0", 1, {}))
    failing(tmp_path, "file.gz", "timed out")


def timed_out(request, timeout):
    assert timeout == 0.1
    raise TimeoutError("timed out")


def test_a_full_disk(tmp_path, server, sources, monkeypatch):
    url, md5 = server.offer("/file.gz", b"content")
    sources(Source(url, md5, 1, {}))

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    failing(tmp_path, "file.gz", "No space left on device")


def test_a_file_where_the_folder_should_be(tmp_path, server, sources):
    url, md5 = server.offer("/file.gz", b"content")
    sources(Source(url, md5, 1, {}))
    (tmp_path / "raw").write_bytes(b"")
    with pytest.raises(DataError, match="file.gz not in .*raw.*File exists"):
        ensure("mnist", tmp_path / "raw")


def test_download_switched_off(tmp_path, monkeypatch):
    monkeypatch.setattr(download.urllib.request, "urlopen", lambda *_, **__: pytest.fail("opened a connection"))
    for name, sources in download.SOURCES.items():
        with pytest.raises(DataError) as caught:
            ensure(name, tmp_path / name, download=False)
        assert sources[0].url in str(caught.value) and sources[0].provides()[0] in str(caught.value)
    assert files_in(tmp_path) == []


def test_every_source_is_complete():
    for name, sources in download.SOURCES.items():
        for source in sources:
            assert len(bytes.fromhex(source.md5)) == 16, name
            assert source.url.startswith(("https://", "http://")) and source.megabytes <= 600
            assert all(os.path.basename(file) == file for file in source.provides())
    assert sum(len(source.provides()) for source in download.SOURCES["cifar10"]) == 7


OFFICIAL = os.environ.get("ODN_FAST_DATA")


@pytest.mark.skipif(not OFFICIAL, reason="ODN_FAST_DATA does not name a folder of official data files")
@pytest.mark.parametrize(("name", "folder"), [("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST")])
def test_checksums_of_official_files(name, folder):
    for source in download.SOURCES[name]:
        path = os.path.join(OFFICIAL, folder, "raw", source.provides()[0])
        if not os.path.exists(path):
            pytest.skip(f"{path} is not there, perhaps only its unpacked form")
        with open(path, "rb") as file:
            content = file.read()
        assert hashlib.md5(content).hexdigest() == source.md5 and len(content) <= source.megabytes * 1_000_000
