"""Reads a visitor's picture, in one of FORMATS, as the square that the network sees.

Damaged metadata never refuse a picture: only the orientation (EXIF) and the colour profile (ICC)
are read, and what is damaged of them is ignored.
"""

import base64
import contextlib
import functools
import io
import math
import re
import struct
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path

import gradio as gr
import numpy as np
from gradio.utils import get_upload_folder
from PIL import ExifTags, Image, ImageCms, ImageFile, ImageOps, TiffImagePlugin

FORMATS = ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"]
MAX_BYTES, MAX_PIXELS = 10_000_000, 25_000_000
MAX_SIDE = 65_535  # pixels, as in a JPEG: a few bytes of a compressed BMP fill 255 rows
MAX_SCANS = 30  # of a JPEG; cameras and optimisers write at most a dozen
MAX_MISSING = 0.25  # of the pixels of a truncated file
MAX_EXIF = 100  # parts of EXIF data in a JPEG; Pillow would need minutes for many
PNG, JPEG_END = b"\x89PNG\r\n\x1a\n", b"\xff\xd9"
# The head of a JPEG's scan, with its length and number of channels: a video behind a photograph
# has the marker alone by chance.
SCAN = re.compile(rb"\xff\xda\0[\x08\x0a\x0c\x0e][\x01-\x04]")
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

ONE_AT_A_TIME = threading.Lock()  # for Pillow's setting, and for the memory of large pictures

refusal = functools.partial(gr.Error, print_exception=False)  # for the visitor, not for the log
TOO_MANY_BYTES = "This picture has more than 10 MB; please make it smaller."
NO_LONGER_THERE = "This picture is no longer there, please upload it again."
UPLOAD_FIRST = (
    "Upload a picture first, and send the path that the upload gives: no other file is read."
)


def read_upload(path: str) -> bytes:
    """Return the content of an uploaded file, or raise gr.Error for any other path."""
    try:
        file = Path(path).resolve()
        if file.is_relative_to(Path(get_upload_folder()).resolve()):
            if file.stat().st_size > MAX_BYTES:
                raise refusal(TOO_MANY_BYTES)
            return file.read_bytes()
    except gr.Error:  # it is a ValueError
        raise
    except FileNotFoundError as error:
        raise refusal(NO_LONGER_THERE) from error
    except (OSError, ValueError):  # a folder, or an impossible file name
        pass
    raise refusal(UPLOAD_FIRST)


def content_of(picture: object) -> bytes:
    """Return the bytes of a picture; nothing is ever fetched.

    Args:
        picture: {"path": uploaded file} or {"url": "data:...;base64,..."}.

    Raises:
        gr.Error: for anything else, and for more than MAX_BYTES.
    """
    sent = picture if isinstance(picture, dict) else {}
    path, url = sent.get("path"), sent.get("url")
    if isinstance(path, str) and path:
        return read_upload(path)
    if not (isinstance(url, str) and url.startswith("data:")):
        remark = " Nothing is fetched from an address." if url else ""
        raise refusal(f"Upload a picture or pick an example first.{remark}")
    if len(url) > MAX_BYTES * 4 / 3 + 100:
        raise refusal(TOO_MANY_BYTES)
    return base64.b64decode(url.partition("base64,")[2])


def without_metadata(content: bytes) -> bytes:
    """Return a PNG without its texts, profiles and animation, any other file unchanged."""
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


def without_comments(content: bytes) -> bytes:
    """Return a GIF without the texts before its first frame, any other file unchanged.

    Pillow would need minutes for a text of many parts.
    """
    if not content.startswith(b"GIF8") or len(content) < 13:
        return content
    at = 13 + (3 << (content[10] & 7) + 1 if content[10] & 128 else 0)  # behind the colours
    kept = [content[:at]]
    while at < len(content) and content[at] not in b",;":  # until the first frame, or the end
        if content[at] != ord("!"):  # Pillow skips what it does not know
            at += 1
            continue
        start, at = at, at + 2
        while at < len(content) and content[at]:  # parts, each after its length; 0 is the end
            at += 1 + content[at]
        at += 1
        is_empty = content[start + 2 : start + 3] == b"\0"  # Pillow would read on behind it
        if content[start + 1 : start + 2] == b"\xf9" and not is_empty:  # says what is transparent
            kept.append(content[start:at])
    return b"".join(kept) + content[at:]


def parts_of(image: Image.Image) -> tuple[int, int]:
    """Return into how many parts a picture is divided, and how many pixels all of them have.

    Only a TIFF has more than one: strips of rows, or tiles, which may be larger than the picture.
    """
    (width, height), tags = image.size, getattr(image, "tag_v2", {})
    rows = min(tags.get(TiffImagePlugin.ROWSPERSTRIP, height), height)
    across = tags.get(TiffImagePlugin.TILEWIDTH, width)
    down = tags.get(TiffImagePlugin.TILELENGTH, rows)
    count = math.ceil(width / across) * math.ceil(height / down)
    return count, count * across * down


def open_picture(content: bytes) -> Image.Image:
    """Read the head of a file, not yet its pixels; Pillow may raise nearly any error."""
    if content.count(b"Exif\0\0") > MAX_EXIF:
        raise OSError("too many parts of EXIF data")
    image = Image.open(io.BytesIO(content), formats=FORMATS)
    parts, decoded = parts_of(image)
    too_many = image.width * image.height > MAX_PIXELS or decoded > 4 * MAX_PIXELS
    if too_many or max(image.size) > MAX_SIDE:
        raise Image.DecompressionBombError
    # Each scan passes over all pixels of its part. An MPO is a JPEG, each part of a TIFF may be.
    is_jpeg = image.format in ("JPEG", "MPO") or "jpeg" in str(image.info.get("compression"))
    if is_jpeg and len(SCAN.findall(content)) > MAX_SCANS * parts:
        raise OSError("a JPEG of too many scans")
    for key in ("xmp", "XML:com.adobe.xmp"):  # Pillow takes an orientation from it, browsers do not
        image.info.pop(key, None)
    return image


def load(content: bytes) -> Image.Image:
    """Decode the first frame; Pillow may raise nearly any error."""
    image = open_picture(content)
    image.load()
    return image


def decode(content: bytes) -> Image.Image:
    """Decode the first frame, of a truncated file as well if most of its pixels are there."""
    content = without_metadata(content)
    try:
        return load(content)
    except (OSError, SyntaxError, ValueError):
        return load_truncated(content)


def load_truncated(content: bytes) -> Image.Image:
    """Decode the first frame of a truncated file, or raise OSError if too much is missing."""
    with truncation_allowed():
        if content.startswith(PNG):
            image, missing = load(content), missing_of_png(content)
        else:  # pixels that depend on a filler behind the end of the file are missing in it
            content = content.rstrip(b"\xff")  # half of a JPEG's marker
            width, height = open_picture(content).size
            length = max(1 << 20, 8 * width * height)  # bytes: no pixel has more
            ends = (content + JPEG_END.rjust(length, filler) for filler in (b"\0", b"\xaa"))
            image, other = (load(content) for content in ends)
            missing = np.mean(np.asarray(image) != np.asarray(other))
    if missing > MAX_MISSING:
        raise OSError(f"{missing:.0%} of the picture is missing")
    return image


@contextlib.contextmanager
def truncation_allowed() -> Iterator[None]:
    """Let Pillow fill missing pixels within the block.

    The setting holds for the whole process: hold ONE_AT_A_TIME.
    """
    ImageFile.LOAD_TRUNCATED_IMAGES = True
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = False


def missing_of_png(content: bytes) -> float:
    """Return the fraction of a PNG's pixels that are not in the file."""
    width, height, depth, colour = struct.unpack(">IIBB", content[16:26])
    row = 1 + -(-width * depth * PNG_CHANNELS[colour] // 8)  # bytes, with the number of its filter
    whole = height * row  # interlacing adds a few
    pixels, at = zlib.decompressobj(), content.index(b"IDAT") - 4
    there = 0
    while at + 8 < len(content) and there < whole:
        length = int.from_bytes(content[at : at + 4])
        if content[at + 4 : at + 8] == b"IDAT":
            # A few bytes can hold gigabytes: no more is unpacked than the picture has.
            there += len(pixels.decompress(content[at + 8 : at + 8 + length], whole - there))
        at += 12 + length
    return 1 - there / whole


def upright(image: Image.Image) -> Image.Image:
    """Return the image, rotated or flipped by its EXIF orientation."""
    try:
        turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged EXIF makes Pillow raise nearly anything
        turn = None
    return image if turn is None else image.transpose(turn)


def white_level(values: np.ndarray) -> float:
    """Guess the value of white, from the values: 1, or that of 8, 10, 12 or 16 bits."""
    finite = values[np.isfinite(values)]
    # A single hot pixel does not make all others black.
    highest = float(np.percentile(finite, 99.9)) if finite.size else 0.0
    # Resampling may exceed white a little.
    levels = (1.0, 255.0, 1023.0, 4095.0, 65535.0)
    return next((level for level in levels if highest <= 1.5 * level), highest)


def to_8_bits(image: Image.Image) -> Image.Image:
    """Return grey of more than 8 bits, or of floats, as 8 bits: Pillow would clip it to white."""
    values = np.asarray(image, dtype=np.float32)
    white = 65535.0 if image.mode.startswith("I;16") else white_level(values)
    values = np.nan_to_num(values, nan=0, posinf=white, neginf=0)
    return Image.fromarray((255 / white * np.clip(values, 0, white)).astype(np.uint8))


def to_srgb(image: Image.Image, content: bytes) -> Image.Image:
    """Convert the colours of an image to sRGB.

    Args:
        image: RGBA.
        content: the file that it was read from. A colour profile in it that is broken, or one for
            grey or CMYK, is ignored.
    """
    with contextlib.suppress(Exception):  # a damaged file makes Pillow raise nearly anything
        profile = open_picture(content).info["icc_profile"]
        srgb = ImageCms.createProfile("sRGB")
        return ImageCms.profileToProfile(image, io.BytesIO(profile), srgb) or image
    return image


def to_rgb(image: Image.Image, content: bytes) -> Image.Image:
    """Return an image as sRGB of 8 bits, upright, on white where it is transparent.

    Args:
        image: in any mode.
        content: the file that it was read from.
    """
    image = upright(image)
    if image.mode.startswith(("I", "F")):
        return to_8_bits(image).convert("RGB")
    image = to_srgb(image.convert("RGBA"), content)
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def preprocess(picture: object, size: int) -> np.ndarray:
    """Read a picture as the network sees it: the square in its middle.

    Args:
        picture: {"path": uploaded file} or {"url": "data:...;base64,..."}.
        size: height and width of the result.

    Returns:
        uint8 RGB (size, size, 3).

    Raises:
        gr.Error: with a message for the visitor.
    """
    try:
        with ONE_AT_A_TIME:
            content = without_comments(content_of(picture))
            image = to_rgb(decode(content), content)
            return np.asarray(ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS))
    except gr.Error:
        raise
    except Image.DecompressionBombError as error:
        raise refusal(
            "This picture has more than 25 million pixels, or more than 65,535 in a row or column;"
            " please make it smaller."
        ) from error
    except Exception as error:  # a broken file makes Pillow raise nearly anything
        raise refusal(
            f"This file is not a picture that can be read ({', '.join(FORMATS)})."
        ) from error
