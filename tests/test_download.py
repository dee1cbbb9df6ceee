"""Downloads from a server on 127.0.0.1 that serves a small archive and misbehaves as planned."""

import hashlib
import io
import os
import pickle
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tarfile
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from torchvision.datasets import CIFAR10

from cifar10 import download
from cifar10.download import (
    FOLDER,
    TEST_FILE,
    TRAIN_FILES,
    DataUnavailable,
    prepare_cifar10,
    read_batch,
    read_cifar10,
    verify,
)
from models.errors import StorageError
from tests.conftest import PROJECT

PART = "cifar-10-python.tar.gz.part"


def batch(labels: list, data: np.ndarray) -> bytes:
    """A batch as the real files have it.

    Bytes keys, and NumPy's old module name (in protocol 3 it is plain text).
    """
    content = {
        b"batch_label": b"made up",
        b"labels": labels,
        b"data": data,
        b"filenames": [b"x.png"] * len(labels),
    }
    return pickle.dumps(content, protocol=3).replace(b"numpy._core", b"numpy.core")


def noise(seed: int) -> np.ndarray:
    """Five rows of random pixels, uint8 (5, 3072).

    They do not compress, so half of the archive is half of the data.
    """
    return np.random.default_rng(seed).integers(0, 256, (5, 3072), dtype=np.uint8)


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


def packed(files: dict[str, bytes], *more: tarfile.TarInfo) -> bytes:
    """A .tar.gz of the files in FOLDER, and of empty members as described by `more`."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(f"{FOLDER}/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        for member in more:
            tar.addfile(member)
    return archive.getvalue()


FILES = {name: batch([i] * 5, noise(i)) for i, name in enumerate([*TRAIN_FILES, TEST_FILE])} | {
    "batches.meta": b"meta"
}
CHECKSUMS = {name: md5(content) for name, content in FILES.items()}
ARCHIVE = packed(FILES)
HALF = len(ARCHIVE) // 2


class Mirror(BaseHTTPRequestHandler):
    """Answers each path by the next of the functions planned for it.

    The last of them answers from then on.
    """

    def do_GET(self):
        self.server.asked.append((self.path, self.headers["Range"]))
        plan = self.server.plan[self.path]
        (plan.pop(0) if len(plan) > 1 else plan[0])(self)

    def reply(self, body: bytes, status: int = 200, length: int | None = None, **headers: str):
        self.send_response(status)
        for name, value in {
            "Content-Length": str(len(body) if length is None else length),
            **headers,
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def sends(body: bytes, status: int = 200, **details):
    return lambda mirror: mirror.reply(body, status, **details)


def ranges(mirror):
    asked = mirror.headers["Range"]
    mirror.reply(ARCHIVE[int(asked[6:-1]) :], 206) if asked else mirror.reply(ARCHIVE)


def stalls(mirror):
    if not mirror.server.over.wait(30):
        mirror.server.outlasted.append(mirror.path)


def stalls_half_way(mirror):
    mirror.reply(ARCHIVE[:HALF], length=len(ARCHIVE))
    stalls(mirror)


whole, wrong = sends(ARCHIVE), sends(bytes(len(ARCHIVE)))
breaks = sends(ARCHIVE[:HALF], length=len(ARCHIVE))
missing, page = sends(b"", 404), sends(b"<html>Please log in</html>")


@pytest.fixture
def server():
    """A server for mirrors.

    plan: path -> functions that answer it. asked: (path, Range) of each request so far. outlasted:
    paths whose stall was waited for to its end.
    """
    with ThreadingHTTPServer(("127.0.0.1", 0), Mirror) as server:
        server.plan, server.asked, server.outlasted = {}, [], []
        server.over = threading.Event()
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.over.set()
        server.shutdown()


def prepare(server, folder: Path, timeout: float = 10, archive: bytes = ARCHIVE, **plan) -> Path:
    """Call prepare_cifar10 with a mirror per keyword, /a, /b, ..., that answers as planned."""
    server.plan |= {f"/{name}": list(answers) for name, answers in plan.items()}
    mirrors = tuple(f"http://127.0.0.1:{server.server_port}/{name}" for name in plan)
    return prepare_cifar10(folder, CHECKSUMS, mirrors, md5(archive), len(archive), timeout)


def kept(asked: tuple[str, str | None]) -> int:
    """The bytes of an earlier attempt that this request does not ask for again."""
    return int(asked[1].removeprefix("bytes=").rstrip("-")) if asked[1] else 0


def names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def holds_only_the_right_files(data_dir: Path) -> bool:
    there = {path.name: path.read_bytes() for path in (data_dir / FOLDER).iterdir()}
    return names(data_dir) == [FOLDER] and there == FILES


# ---- download ------------------------------------------------------------------------------------


def test_a_download_ends_in_place_with_nothing_left_over(server, tmp_path):
    assert (
        prepare(server, tmp_path / "new" / "data", a=[whole]) == tmp_path / "new" / "data" / FOLDER
    )
    assert holds_only_the_right_files(tmp_path / "new" / "data")


def test_a_second_call_downloads_nothing(server, tmp_path):
    for _ in range(2):
        prepare(server, tmp_path, a=[whole])
    assert server.asked == [("/a", None)]


def test_a_download_that_broke_off_is_continued(server, tmp_path, faults):
    prepare(server, tmp_path, a=[breaks, ranges])
    assert server.asked == [("/a", None), ("/a", f"bytes={HALF}-")]
    assert holds_only_the_right_files(tmp_path)
    faults("download: cut off", 1, HALF, kept(server.asked[-1]), "bytes")


def test_a_server_that_cannot_continue_sends_everything_again(server, tmp_path, faults):
    prepare(server, tmp_path, a=[breaks, whole])
    assert [path for path, _ in server.asked] == ["/a", "/a"]
    assert holds_only_the_right_files(tmp_path)
    faults(
        "download: server ignores ranges",
        1,
        len(FILES),
        len(names(tmp_path / FOLDER)),
        "files",
    )


@pytest.mark.parametrize(
    "trouble", [missing, page, breaks], ids=["404", "login page", "breaks again"]
)
def test_the_next_mirror_continues_what_the_first_began(server, tmp_path, trouble, faults):
    prepare(server, tmp_path, a=[breaks, trouble], b=[ranges])
    assert server.asked[2:] == [("/b", f"bytes={HALF}-")]
    assert holds_only_the_right_files(tmp_path)
    faults("download: first mirror fails half way", 1, HALF, kept(server.asked[-1]), "bytes")


def test_the_next_call_continues_what_the_last_began(server, tmp_path):
    with pytest.raises(DataUnavailable, match="broke off after"):
        prepare(server, tmp_path, a=[breaks])
    assert names(tmp_path) == [PART]
    prepare(server, tmp_path, b=[ranges])
    assert server.asked[-1] == ("/b", f"bytes={HALF}-")
    assert holds_only_the_right_files(tmp_path)


def test_wrong_bytes_are_dropped_for_the_next_mirror(server, tmp_path, faults):
    prepare(server, tmp_path, a=[wrong], b=[ranges])
    assert server.asked == [("/a", None), ("/b", None)]
    assert holds_only_the_right_files(tmp_path)
    faults("download: wrong bytes", 1, len(FILES), len(names(tmp_path / FOLDER)), "files")


def test_one_mirror_is_enough_after_wrong_bytes_and_a_break(server, tmp_path):
    prepare(server, tmp_path, a=[sends(bytes(HALF), length=len(ARCHIVE)), ranges])
    assert [asked for _, asked in server.asked] == [None, f"bytes={HALF}-", None]
    assert holds_only_the_right_files(tmp_path)


@pytest.mark.parametrize(
    "size", [HALF, len(ARCHIVE), len(ARCHIVE) + 1], ids=["half", "all", "too long"]
)
def test_wrong_bytes_of_an_earlier_time_are_replaced(server, tmp_path, size, faults):
    (tmp_path / PART).write_bytes(bytes(size))
    prepare(server, tmp_path, a=[ranges])
    assert server.asked[-1] == ("/a", None)
    assert holds_only_the_right_files(tmp_path)
    faults(
        "download: wrong bytes of an earlier time",
        1,
        len(FILES),
        len(names(tmp_path / FOLDER)),
        "files",
    )


@pytest.mark.parametrize("status", [404, 500])
def test_an_http_error_leads_to_the_next_mirror(server, tmp_path, status, faults):
    prepare(server, tmp_path, a=[sends(b"", status)], b=[whole])
    assert [path for path, _ in server.asked] == ["/a", "/b"]
    assert holds_only_the_right_files(tmp_path)
    faults("download: HTTP 404, 500", 1, len(FILES), len(names(tmp_path / FOLDER)), "files")


def test_a_redirect_is_followed(server, tmp_path, faults):
    server.plan["/elsewhere"] = [whole]
    prepare(server, tmp_path, a=[sends(b"", 302, Location="/elsewhere")])
    assert holds_only_the_right_files(tmp_path)
    faults("download: redirected", 1, len(FILES), len(names(tmp_path / FOLDER)), "files")


@pytest.mark.parametrize("stall", [stalls, stalls_half_way])
def test_a_stalled_host_leads_to_the_next_mirror(server, tmp_path, stall, faults):
    prepare(server, tmp_path, timeout=1, a=[stall], b=[whole])
    asked = [path for path, _ in server.asked]
    assert asked[0] == "/a" and asked[-1] == "/b" and server.outlasted == []
    assert holds_only_the_right_files(tmp_path)
    faults("download: server stalls", 1, len(FILES), len(names(tmp_path / FOLDER)), "files")


def test_the_error_names_each_mirror_its_problem_and_what_to_do(server, tmp_path):
    with pytest.raises(DataUnavailable) as error:
        prepare(server, tmp_path, a=[missing], b=[wrong], c=[page])
    for name, problem in {
        "a": "HTTP Error 404",
        "b": "wrong content",
        "c": "offers 26 bytes",
    }.items():
        assert f"http://127.0.0.1:{server.server_port}/{name}: {problem}" in str(error.value)
    assert f"put the seven files of {FOLDER} into {tmp_path / FOLDER}" in str(error.value)
    assert names(tmp_path) == []


def test_a_folder_that_cannot_be_written_is_named_before_anything_is_asked_for(tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "data"):
        with pytest.raises(StorageError, match=f"cannot write into {folder}: .*DATA_DIR"):
            prepare_cifar10(folder, CHECKSUMS, ("http://127.0.0.1:1/a",))


def test_a_disk_without_room_is_named_before_anything_is_asked_for(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=2_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    told = rf"{tmp_path} has 2 MB left, CIFAR-10 may need 375 MB; .*DATA_DIR"  # 2.2 x 170.5
    with pytest.raises(StorageError, match=told):
        prepare_cifar10(tmp_path, mirrors=("http://127.0.0.1:1/a",))
    assert names(tmp_path) == []


def test_without_a_connection_the_data_are_unavailable(tmp_path, faults):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        closed = f"http://127.0.0.1:{listener.getsockname()[1]}/a"
    with pytest.raises(DataUnavailable, match=f"{closed}: .*refused"):
        prepare_cifar10(tmp_path, CHECKSUMS, (closed,), md5(ARCHIVE), len(ARCHIVE), 10)
    faults("download: no connection", 1)


def test_two_at_a_time_both_get_the_files(server, tmp_path, faults):
    def to_both_at_once(mirror):
        if len(server.asked) <= 2:
            both.wait(10)
        whole(mirror)

    both = threading.Barrier(2)
    with ThreadPoolExecutor(2) as pool:
        calls = [pool.submit(prepare, server, tmp_path, a=[to_both_at_once]) for _ in range(2)]
    assert [call.result() for call in calls] == [tmp_path / FOLDER] * 2
    assert holds_only_the_right_files(tmp_path)
    faults(
        "download: two processes at once",
        1,
        len(FILES),
        len(names(tmp_path / FOLDER)),
        "files",
    )


def test_files_that_another_process_put_there_meanwhile_are_taken(server, tmp_path):
    def other_process_is_faster(mirror):
        download.unpack(tmp_path / "other", tmp_path / FOLDER, CHECKSUMS)
        (tmp_path / "other").unlink()
        whole(mirror)

    (tmp_path / "other").write_bytes(ARCHIVE)
    assert prepare(server, tmp_path, a=[other_process_is_faster]) == tmp_path / FOLDER
    assert holds_only_the_right_files(tmp_path)


def test_two_that_write_to_one_file_do_not_corrupt_it(server, tmp_path):
    def other_process_writes_too(mirror):
        (tmp_path / PART).write_bytes(ARCHIVE[: HALF + 1000])
        ranges(mirror)

    (tmp_path / PART).write_bytes(ARCHIVE[:HALF])
    server.plan["/a"] = [other_process_writes_too]
    download.fetch(f"http://127.0.0.1:{server.server_port}/a", tmp_path / PART, 10, len(ARCHIVE))
    assert (tmp_path / PART).read_bytes() == ARCHIVE


# Says where its file is, downloads in small pieces, and is interrupted from outside.
CHILD = """
import sys
from cifar10 import download
from tests.test_download import ARCHIVE, CHECKSUMS, md5
download.CHUNK = 16384
download.prepare_cifar10(sys.argv[1], CHECKSUMS, (sys.argv[2],), md5(ARCHIVE), len(ARCHIVE), 60)
"""


def test_the_checksums_are_those_that_torchvision_knows():
    known = dict([*CIFAR10.train_list, *CIFAR10.test_list])
    known[CIFAR10.meta["filename"]] = CIFAR10.meta["md5"]
    assert (known, CIFAR10.base_folder) == (download.CHECKSUMS, FOLDER)
    assert CIFAR10.tgz_md5 == download.ARCHIVE_MD5


def test_where_python_has_no_certificates_those_of_certifi_serve(monkeypatch):
    """As the Python of python.org on macOS."""
    answers, refused = [], urllib.error.URLError(ssl.SSLCertVerificationError("no issuer"))

    def urlopen(_, timeout, context=None):
        if context is None:
            raise refused
        answers.append(context.cert_store_stats()["x509_ca"])

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    download.open_url(urllib.request.Request("https://localhost"), 1)
    assert answers[0] > 100
    refused.reason = ConnectionRefusedError()
    with pytest.raises(urllib.error.URLError):
        download.open_url(urllib.request.Request("https://localhost"), 1)


def test_ctrl_c_half_way_leaves_what_came_and_the_next_call_continues(server, tmp_path, faults):
    server.plan["/a"] = [stalls_half_way]
    url = f"http://127.0.0.1:{server.server_port}/a"
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(tmp_path), url],
        cwd=PROJECT,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        while child.poll() is None and download.size_of(tmp_path / PART) < 32768:
            time.sleep(0.05)
        child.send_signal(signal.SIGINT)
        assert "KeyboardInterrupt" in child.communicate(timeout=20)[1]
    finally:
        child.kill()
    came = download.size_of(tmp_path / PART)
    assert 32768 <= came <= HALF and names(tmp_path) == [PART]
    prepare(server, tmp_path, a=[ranges])
    assert server.asked[1:] == [("/a", f"bytes={came}-")] and holds_only_the_right_files(tmp_path)
    faults("download: Ctrl-C half way", 1, came, kept(server.asked[-1]), "bytes")


# ---- verify and unpack ---------------------------------------------------------------------------


def test_a_wrong_md5_is_named_with_the_file_and_the_md5_expected(tmp_path):
    (tmp_path / "one").write_bytes(b"abc")  # its md5 is in RFC 1321
    with pytest.raises(
        ValueError, match="one has md5 900150983cd24fb0d6963f7d28e17f72, expected 0123"
    ):
        verify(tmp_path, {"one": "0123"})


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="one is missing"):
        verify(tmp_path, {"one": "0123"})


def test_a_damaged_folder_is_reported_and_left_alone(server, tmp_path, faults):
    prepare(server, tmp_path, a=[whole])
    (tmp_path / FOLDER / TEST_FILE).write_bytes(b"abc")
    with pytest.raises(
        ValueError, match=f"{TEST_FILE} has md5 .*; remove .*{FOLDER} to have it downloaded again"
    ):
        prepare(server, tmp_path, a=[whole])
    assert (tmp_path / FOLDER / TEST_FILE).read_bytes() == b"abc"
    assert len(server.asked) == 1
    faults("a damaged file of CIFAR-10", 1, len(FILES), len(names(tmp_path / FOLDER)), "files")


ALL_BUT_ONE = {name: content for name, content in FILES.items() if name != TEST_FILE}


@pytest.mark.parametrize(
    ("archive", "problem"),
    [
        (packed(ALL_BUT_ONE), "test_batch' not found"),
        (
            packed(FILES | {TEST_FILE: b"abc"}),
            "test_batch has md5 900150983cd24fb0d6963f7d28e17f72",
        ),
        (ARCHIVE[:HALF], "is no CIFAR-10 archive"),
        (b"garbage", "is no CIFAR-10 archive"),
    ],
    ids=["missing member", "wrong member", "truncated", "garbage"],
)
def test_a_bad_archive_is_refused_and_nothing_of_it_stays(
    server, tmp_path, archive, problem, faults
):
    with pytest.raises(ValueError, match=problem):
        prepare(server, tmp_path / "data", archive=archive, a=[sends(archive)])
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "data", tmp_path / "data" / PART]
    faults("a hostile or damaged archive", 1)


# ---- read ----------------------------------------------------------------------------------------


@pytest.fixture
def read(tmp_path):
    """Function: bytes -> what read_batch returns for a file of them."""

    def read(content: bytes):
        (tmp_path / "batch").write_bytes(content)
        return read_batch(tmp_path / "batch")

    return read


def test_a_row_is_red_green_blue_line_by_line(read):
    row = np.zeros((1, 3072), dtype=np.uint8)
    row[0, [0, 1, 32, 1024, 3071]] = 1, 2, 3, 4, 5
    images, labels = read(batch([9], row))
    assert images.shape == (1, 32, 32, 3) and images.flags.c_contiguous
    assert images[0, 0, 0].tolist() == [1, 4, 0]  # top left: red 1, green 4
    assert images[0, 0, 1].tolist() == [2, 0, 0]  # to its right
    assert images[0, 1, 0].tolist() == [3, 0, 0]  # below it
    assert images[0, 31, 31].tolist() == [0, 0, 5]  # bottom right: the last blue
    assert images.sum() == 15
    assert labels.tolist() == [9] and labels.dtype == np.int64


def test_the_five_training_files_are_joined_in_order(tmp_path):
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content)
    (images, labels), (test_images, test_labels) = read_cifar10(tmp_path)
    assert (
        labels.tolist() == [0] * 5 + [1] * 5 + [2] * 5 + [3] * 5 + [4] * 5
        and test_labels.tolist() == [5] * 5
    )
    assert images[24, 0, 0, 0] == noise(4)[4, 0] and test_images[4, 0, 0, 0] == noise(5)[4, 0]
    assert images.shape == (25, 32, 32, 3) and images.flags.c_contiguous


def test_a_python_2_pickle_with_numpys_old_names_is_read(read):
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
    dtype = (
        b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNN"
        + 2 * b"J\xff\xff\xff\xff"
        + b"K\x00tb"
    )
    state = (
        b"(K\x01K\x01M\x00\x0c\x86" + dtype + b"\x89T\x00\x0c\x00\x00" + b"\x07" * 3072 + b"tb"
    )  # 0x0c00 = 3072
    images, labels = read(b"\x80\x02}(U\x06labels]K\x03aU\x04data" + array + state + b"u.")
    assert images.shape == (1, 32, 32, 3) and (images == 7).all() and labels.tolist() == [3]


@pytest.mark.parametrize(
    "labels", [[0, 1, 2, 3, 10], [-1, 0, 0, 0, 0], [0.5] * 5, ["0"] * 5, [[0]] * 5, [0] * 4, []]
)
def test_labels_other_than_one_of_ten_per_image_are_refused(read, labels):
    with pytest.raises(ValueError, match="batch: expected"):
        read(batch(labels, noise(0)))


@pytest.mark.parametrize(
    "data", [noise(0)[:, 1:], noise(0).reshape(5, 3, 32, 32), noise(0).astype(np.int64)]
)
def test_images_other_than_rows_of_3072_bytes_are_refused(read, data):
    with pytest.raises(ValueError, match=r"expected uint8 \(5, 3072\)"):
        read(batch([0] * 5, data))


class Call:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def test_a_pickle_that_calls_something_is_refused_before_it_is_unpickled(server, tmp_path):
    prepare(server, tmp_path, a=[whole])
    proof = tmp_path / "executed"
    (tmp_path / FOLDER / TEST_FILE).write_bytes(pickle.dumps(Call(os.mkdir, str(proof))))
    with pytest.raises(ValueError, match=f"{TEST_FILE} has md5"):
        read_cifar10(prepare(server, tmp_path, a=[whole]))
    assert not proof.exists()


def test_an_archive_of_another_md5_is_never_opened(server, tmp_path, monkeypatch):
    hostile = packed(FILES, tarfile.TarInfo(f"{FOLDER}/../../outside"))
    monkeypatch.setattr(download.tarfile, "open", lambda *_: pytest.fail("it was opened"))
    server.plan["/a"] = [sends(hostile)]
    with pytest.raises(DataUnavailable, match="wrong content"):
        mirror = f"http://127.0.0.1:{server.server_port}/a"
        prepare_cifar10(tmp_path, CHECKSUMS, (mirror,), md5(ARCHIVE), len(hostile), 10)
    assert names(tmp_path) == []


BATCH = batch([0] * 5, noise(0))
NO_BATCHES = {
    "empty": b"",
    "first bytes": BATCH[:40],
    "half": BATCH[: len(BATCH) // 2],
    "all but the last byte": BATCH[:-1],
    "text": b"garbage",
    "zeros": bytes(1000),
    "unknown memo": b"\x80\x04h\x07.",
    "a list": pickle.dumps([1]),
    "no images": pickle.dumps({b"labels": [1]}),
}


@pytest.mark.parametrize("content", NO_BATCHES.values(), ids=NO_BATCHES.keys())
def test_a_file_that_holds_no_batch_is_named(read, content):
    with pytest.raises(ValueError, match="batch is no CIFAR-10 batch"):
        read(content)
