"""Where a picture, a video or a text lies: a file, or a part of one that is read in place."""

import dataclasses
import io
import pathlib
import tarfile
from typing import Any, BinaryIO, Protocol

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
        file = open(self.file, 'rb')  # noqa: SIM115  (who asks closes it)
        return file if self.size < 0 else io.BufferedReader(_Slice(file, self.offset, self.size))

    def read(self) -> bytes:
        with self.open() as file:
            return file.read()

    def texts(self) -> list[str]:
        return [self.read().decode()]


class _Slice(io.RawIOBase):
    """A part of an open file as a file: of a picture often the header is enough."""

    def __init__(self, file: BinaryIO, offset: int, size: int):
        self._file, self._offset, self._size, self._at = file, offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        begin = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = max(0, begin + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._offset + self._at)
        data = self._file.read(max(0, min(len(buffer), self._size - self._at)))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()


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
