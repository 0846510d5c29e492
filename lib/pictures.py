"""Find picture files and open them."""

import contextlib
import warnings
from functools import cache
from pathlib import Path
from typing import BinaryIO

from PIL import Image, ImageOps

# Formats that Pillow cannot decode by itself: films, scientific data; PostScript, for which it
# starts Ghostscript, a program that would execute a stranger's file.
NO_PICTURES = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG"}
HEIC = {".heic", ".heif", ".hif"}  # phones' format, which the package pillow-heif decodes
HEIC_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}


def in_folder(folder: Path) -> list[Path]:
    """Return the pictures in a folder and its subfolders, by their names' endings and in order.

    Files and folders whose names begin with a dot are left out: thumbnails, and the companions
    (`._x.jpg`) that macOS writes beside files.
    """
    return [path for path in all_in_folder(folder) if is_picture(path)]


def is_picture(path: Path) -> bool:
    """Return whether a file's name ends as that of a picture."""
    return path.suffix.lower() in _endings()


def all_in_folder(folder: Path) -> list[Path]:
    """Return the files in a folder and its subfolders, in order, as `in_folder`, of any ending."""
    return sorted(
        path for path in folder.rglob("*")
        if not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and path.is_file()
    )  # fmt: skip


@cache
def _endings() -> set[str]:
    """Return the endings of picture files: those that Pillow decodes, and HEIC's."""
    readable = {"MPO", *_formats()}
    kinds = Image.registered_extensions()  # of what is only written too, such as PDF
    return {ending for ending, kind in kinds.items() if kind in readable} | HEIC


def _formats() -> list[str]:
    """Return the formats that are opened, in Pillow's order: a file's content says which it has."""
    _register_heic()
    Image.init()
    return [kind for kind in Image.ID if kind not in NO_PICTURES]


@cache
def _register_heic() -> bool:
    """Let Pillow open HEIC files, if the package pillow-heif is there; return whether it is."""
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return False
    register_heif_opener()
    return True


@contextlib.contextmanager
def pixel_limit(pixels: int):
    """Let Pillow refuse images of more pixels than that, as a context manager."""
    before = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = pixels // 2  # Pillow warns here, and refuses at twice as many
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def open_image(source: Path | BinaryIO) -> Image.Image:
    """Open a picture, as Image.open does, of any format but NO_PICTURES.

    Raises ValueError, with what to install, for a HEIC file that Pillow cannot open.
    """
    try:
        return Image.open(source, formats=_formats())
    except Image.UnidentifiedImageError:
        if not _register_heic() and _is_heic(source):
            raise ValueError("a HEIC picture: `pip install pillow-heif` lets it be read") from None
        raise


def turned(image: Image.Image) -> Image.Image:
    """Return a picture turned as its EXIF data say; as it is, if they are damaged."""
    try:
        with warnings.catch_warnings(action="ignore"):
            return ImageOps.exif_transpose(image)
    except Exception:  # Pillow's parsers raise whatever they please
        return image


def _is_heic(source: Path | BinaryIO) -> bool:
    """Say whether a file begins as HEIC files do, whatever its name is."""
    with source.open("rb") if isinstance(source, Path) else contextlib.nullcontext(source) as file:
        file.seek(0)
        head = file.read(12)
    return head[4:8] == b"ftyp" and head[8:] in HEIC_BRANDS
