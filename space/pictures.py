"""Read whatever a browser would show: any picture file becomes 8-bit RGB, upright, on white.

What stands beside the pixels (text, colour profiles, EXIF) never refuses a picture: of all of it only the
orientation is read.
"""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile

FORMATS = ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"]
MEGAPIXELS = 25
MISSING = 0.25  # of its pixels: a broken file that lacks more of them is refused
PNG, END_OF_JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd9"
PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by colour type
FLIP, TURN = Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose
UPRIGHT = {  # EXIF orientation -> what turns the picture back
    2: FLIP,
    3: TURN.ROTATE_180,
    4: TURN.FLIP_TOP_BOTTOM,
    5: TURN.TRANSPOSE,
    6: TURN.ROTATE_270,
    7: TURN.TRANSVERSE,
    8: TURN.ROTATE_90,
}
Image.MAX_IMAGE_PIXELS = MEGAPIXELS * 500_000  # Pillow refuses twice as many, before it decodes them


class Unreadable(ValueError):
    """What is wrong with a file, as a sentence for who sent it."""


def read_picture(path: str | Path) -> Image.Image:
    """Read the first frame of a picture file as RGB.

    Raises:
        Unreadable: if it is no picture, has too many pixels, or more than a quarter of it is missing.
        FileNotFoundError: if the file is not there.
    """
    content = Path(path).read_bytes()
    try:
        try:
            return decode(content)
        except (OSError, SyntaxError, ValueError):  # cut off, or wrong beside the pixels: take what is there
            return decode_broken(content)
    except Image.DecompressionBombError as error:
        raise Unreadable(f"This picture has more than {MEGAPIXELS} million pixels; please make it smaller.") from error
    except Exception as error:  # a broken file makes Pillow raise nearly anything
        raise Unreadable(f"This file is not a picture that can be read ({', '.join(FORMATS)}).") from error


def decode(content: bytes, tolerant: bool = False) -> Image.Image:
    """Read a picture file; tolerant: fill what is missing with one colour, and pass over errors beside the pixels.

    Pillow has this as a switch for the whole process: one thread at a time may read.
    """
    ImageFile.LOAD_TRUNCATED_IMAGES = tolerant
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            image.load()  # a TIFF is upright after it, and says so
            turn = UPRIGHT.get(orientation(image))
            image = to_rgb(image)
            return image.transpose(turn) if turn else image
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = False


def decode_broken(content: bytes) -> Image.Image:
    """Read a broken file. ValueError if too much of it is missing."""
    if content.startswith(PNG):
        content, missing = mend_png(content)
        image = decode(content, tolerant=True)
    else:  # what changes with that which follows the end of the file is not in the file
        content = content.rstrip(b"\xff")  # half of a marker
        image, other = (decode(content + END_OF_JPEG.rjust(1 << 20, filler), True) for filler in (b"\0", b"\xaa"))
        missing = (np.asarray(image) != np.asarray(other)).any(2).mean()
    if missing > MISSING:
        raise ValueError(f"{missing:.0%} of the picture is missing")
    return image


def mend_png(content: bytes) -> tuple[bytes, float]:
    """Leave out of a PNG all that is beside the pixels, and end it; tell which fraction of them is missing."""
    chunks, at = {}, len(PNG)
    while at + 8 <= len(content):
        end = at + 12 + int.from_bytes(content[at : at + 4])
        chunks.setdefault(content[at + 4 : at + 8], []).append(content[at:end])
        at = end
    chunks[b"IEND"] = [bytes(4) + b"IEND" + zlib.crc32(b"IEND").to_bytes(4)]
    kept = [chunk for kind in (b"IHDR", b"PLTE", b"tRNS", b"eXIf", b"IDAT", b"IEND") for chunk in chunks.get(kind, [])]
    width, height, depth, colour = struct.unpack(">IIBB", chunks[b"IHDR"][0][8:18])
    whole = height * (1 + -(-width * depth * PNG_CHANNELS[colour] // 8))  # bytes; interlacing adds a few
    pixels = b"".join(chunk[8 : 8 + int.from_bytes(chunk[:4])] for chunk in chunks[b"IDAT"])
    there = len(zlib.decompressobj().decompress(pixels, whole))
    return PNG + b"".join(kept), 1 - there / whole


def orientation(image: Image.Image) -> object:
    """The EXIF orientation, or whatever stands in its place; 1, upright, where nothing can be read."""
    try:
        value = image.getexif().get(0x0112, 1)
        hash(value)
        return value
    except Exception:  # broken metadata make Pillow raise nearly anything
        return 1


def to_rgb(image: Image.Image) -> Image.Image:
    """Scale to 8 bits, and put transparency on white."""
    if image.mode.startswith(("I", "F")):  # more than 8 bits: Pillow would clip them to white
        return Image.fromarray(to_8_bits(np.asarray(image, dtype=np.float32), image.mode)).convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def to_8_bits(values: np.ndarray, mode: str) -> np.ndarray:
    """Scale grey values of 16 bits (I;16), 32 bits (I) or as floats (F), (H, W), to uint8.

    The last two do not say what white is: it is the first of 1, 255 and 65535 that the values do not exceed by
    more than half, for resampling overshoots. Values that are no finite numbers, and a few that stick out, do not
    count.
    """
    finite = values[np.isfinite(values)]
    top = float(np.quantile(finite, 0.999)) if finite.size else 0.0
    white = 65535 if mode.startswith("I;16") else next((w for w in (1, 255, 65535) if top <= 1.5 * w), top)
    values = np.nan_to_num(values, nan=0, posinf=white, neginf=0)
    return np.uint8(np.clip(255 / white * values, 0, 255))
