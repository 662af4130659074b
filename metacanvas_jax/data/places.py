"""Where a picture, a video or a text lies: a file, or a part of one that is read in place."""

import dataclasses
import io
import pathlib
import tarfile
from typing import BinaryIO, Protocol

from metacanvas_jax.types import InputError


class Place(Protocol):
    """A `Part`, or a cell of a table (parquet.Cell)."""

    def open(self) -> BinaryIO: ...

    def texts(self) -> list[str]:
        """That say the same."""
        ...


@dataclasses.dataclass(frozen=True, slots=True)
class Part:
    """Some bytes of a file; all of them without a size."""

    file: pathlib.Path
    offset: int = 0
    size: int = -1

    def open(self) -> BinaryIO:
        # Opened each time: no file is shared by threads, and shards may be many.
        return open(self.file, 'rb') if self.size < 0 else io.BytesIO(self.read())

    def read(self) -> bytes:
        with open(self.file, 'rb') as file:
            file.seek(self.offset)
            return file.read(self.size)

    def texts(self) -> list[str]:
        return [self.read().decode()]


def list_tar(path: pathlib.Path) -> dict[str, Part]:
    """{member: its place}; of two with one name the later counts, as in tar itself."""
    members = {}
    try:
        with tarfile.open(path, 'r:') as tar:
            for member in tar:
                if member.isreg():
                    members[member.name] = Part(path, member.offset_data, member.size)
    except (tarfile.TarError, OSError) as error:
        reason = getattr(error, 'strerror', None) or error
        raise InputError(f'{path} is no tar that can be read in place: {reason}') from error
    return members
