"""Reads a picture that a visitor sent: any that a browser shows, as the square of pixels that the network sees.

Metadata never refuse a picture: of EXIF only the orientation is read, of a PNG only the chunks with pixels.
"""

import base64
import contextlib
import functools
import io
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import gradio as gr
import numpy as np
from gradio.utils import get_upload_folder
from PIL import ExifTags, Image, ImageFile, ImageOps

FORMATS = ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"]
MAX_BYTES, MAX_PIXELS = 10_000_000, 25_000_000
MAX_MISSING = 0.25  # of the pixels of a file that is broken off
PNG, JPEG_END = b"\x89PNG\r\n\x1a\n", b"\xff\xd9"
PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by colour type
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

refusal = functools.partial(gr.Error, print_exception=False)  # for the visitor, not for the log


def uploaded(path: str) -> bytes:
    """The content of an uploaded file, and of no other."""
    try:
        file = Path(path).resolve()
        if file.is_relative_to(Path(get_upload_folder()).resolve()):
            return file.read_bytes()
    except FileNotFoundError as error:
        raise refusal("This picture is no longer there, please upload it again.") from error
    except (OSError, ValueError):  # a folder, or no name that a file can have
        pass
    raise refusal(
        "Upload a picture first, and send the path that the upload gives: no other file is read."
    )


def content_of(picture: object) -> bytes:
    """The bytes of {"path".

    Uploaded file} or {"url": "data:...;base64,..."}. Nothing is ever fetched.
    """
    sent = picture if isinstance(picture, dict) else {}
    path, url = sent.get("path"), sent.get("url")
    if isinstance(path, str) and path:
        return uploaded(path)
    if not (isinstance(url, str) and url.startswith("data:")):
        remark = " Nothing is fetched from an address." if url else ""
        raise refusal(f"Upload a picture or pick an example first.{remark}")
    if len(url) > MAX_BYTES * 4 / 3 + 100:
        raise refusal("This picture has more than 10 MB; please make it smaller.")
    return base64.b64decode(url.partition("base64,")[2])


def without_metadata(content: bytes) -> bytes:
    """A PNG without its texts, profiles and animation, whatever is wrong with them.

    Other files as they are.
    """
    if not content.startswith(PNG):
        return content
    kept, at = [content[:8]], 8
    while at < len(content):
        end = at + 12 + int.from_bytes(content[at : at + 4], "big")
        name, checksum = content[at + 4 : at + 8], content[end - 4 : end]
        is_whole = zlib.crc32(content[at + 4 : end - 4]) == int.from_bytes(checksum, "big")
        if name in (b"IHDR", b"PLTE", b"IDAT", b"IEND") or name in (b"tRNS", b"eXIf") and is_whole:
            kept.append(content[at:end])
        at = end
    return b"".join(kept)


def load(content: bytes) -> Image.Image:
    """The first frame, decoded. Raises nearly anything where it cannot be."""
    image = Image.open(io.BytesIO(content), formats=FORMATS)
    if image.width * image.height > MAX_PIXELS:
        raise Image.DecompressionBombError
    image.load()
    return image


def decode(content: bytes) -> Image.Image:
    """The first frame, also of a file whose end is missing, if most of its pixels are there."""
    content = without_metadata(content)
    try:
        return load(content)
    except (OSError, SyntaxError, ValueError):
        return load_broken(content)


def load_broken(content: bytes) -> Image.Image:
    """The first frame of a file that ends too early.

    Raises OSError if too much of it is missing.
    """
    with tolerance():
        if content.startswith(PNG):
            image, missing = load(content), missing_of_png(content)
        else:  # what changes with that which follows the end of the file is not in the file
            content = content.rstrip(b"\xff")  # half of a JPEG's marker
            ends = (content + JPEG_END.rjust(1 << 20, filler) for filler in (b"\0", b"\xaa"))
            image, other = (load(content) for content in ends)
            missing = np.mean(np.asarray(image) != np.asarray(other))
    if missing > MAX_MISSING:
        raise OSError(f"{missing:.0%} of the picture is missing")
    return image


@contextlib.contextmanager
def tolerance() -> Iterator[None]:
    """Let Pillow fill what is missing, meanwhile.

    A switch of the process: the app reads one picture at a time.
    """
    ImageFile.LOAD_TRUNCATED_IMAGES = True
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = False


def missing_of_png(content: bytes) -> float:
    """The fraction of a PNG's pixels that are not in the file."""
    width, height, depth, colour = struct.unpack(">IIBB", content[16:26])
    whole = height * (
        1 + -(-width * depth * PNG_CHANNELS[colour] // 8)
    )  # bytes; interlacing adds a few
    pixels, at = zlib.decompressobj(), content.index(b"IDAT") - 4
    there = 0
    while at + 8 < len(content) and there < whole:
        length = int.from_bytes(content[at : at + 4])
        if content[at + 4 : at + 8] == b"IDAT":
            there += len(pixels.decompress(content[at + 8 : at + 8 + length]))
        at += 12 + length
    return 1 - there / whole


def upright(image: Image.Image) -> Image.Image:
    """The image, turned as its EXIF orientation says."""
    try:
        turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # damaged EXIF makes Pillow raise nearly anything
        turn = None
    return image if turn is None else image.transpose(turn)


def to_8_bits(image: Image.Image) -> Image.Image:
    """Grey of more than 8 bits, or of floats, as 8 bits: Pillow would clip it to white."""
    values = np.asarray(image, dtype=np.float32)
    if image.mode.startswith("I;16"):
        full = 65535.0
    else:  # nobody says what white is: 1, 255 or more bits, exceeded a little where the picture was resampled
        finite = values[np.isfinite(values)]
        highest = (
            np.percentile(finite, 99.9) if finite.size else 0
        )  # one hot pixel does not make the others black
        full = next(
            (full for full in (1, 255, 1023, 4095, 65535) if highest <= 1.5 * full), highest
        )
    values = np.nan_to_num(values, nan=0, posinf=full, neginf=0)
    return Image.fromarray(np.uint8(255 / full * np.clip(values, 0, full)))


def to_rgb(image: Image.Image) -> Image.Image:
    """8 bits, upright, transparency on white."""
    image = upright(image)
    if image.mode.startswith(("I", "F")):
        return to_8_bits(image).convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def preprocess(picture: object, size: int) -> np.ndarray:
    """What the network sees of a picture: the square in its middle, as uint8 RGB (size, size, 3).

    picture: {"path": uploaded file} or {"url": "data:...;base64,..."}. Raises gr.Error, in words
    for the visitor.
    """
    content = content_of(picture)
    try:
        return np.asarray(
            ImageOps.fit(to_rgb(decode(content)), (size, size), Image.Resampling.LANCZOS)
        )
    except Image.DecompressionBombError as error:
        raise refusal(
            "This picture has more than 25 million pixels; please make it smaller."
        ) from error
    except Exception as error:  # a broken file makes Pillow raise nearly anything
        raise refusal(
            f"This file is not a picture that can be read ({', '.join(FORMATS)})."
        ) from error
