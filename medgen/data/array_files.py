"""Arrays of the slice cache: .npy files that grow while they are written and are memory-mapped to be read. Used by build.py, store.py and maps.py."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np

from medgen.errors import MedgenError


class ArrayFile:
    """A .npy file [n, ...] that grows by whole blocks; n is written into the header at the end.

    Plain writes, not a memory map: on a full disk a write raises OSError, a memory map kills the process."""

    def __init__(self, path: Path, tail: tuple[int, ...], dtype: type):
        self.tail, self.dtype, self.count = tail, np.dtype(dtype), 0
        self.handle = open(path, "w+b")  # noqa: SIM115  (build closes it)
        self._header()
        self.start = self.handle.tell()

    def _header(self) -> None:
        shape = (self.count, *self.tail)
        description = np.lib.format.dtype_to_descr(self.dtype)
        np.lib.format.write_array_header_1_0(self.handle, {"descr": description, "fortran_order": False, "shape": shape})

    def append(self, block: np.ndarray) -> None:
        assert block.shape[1:] == self.tail
        self.handle.write(np.ascontiguousarray(block, self.dtype).data)
        self.count += len(block)

    def finish(self) -> None:
        self.handle.seek(0)
        self._header()
        assert self.handle.tell() == self.start, "numpy leaves room in the header for the first axis to grow"


def mapped(folder: Path, name: str) -> np.ndarray:
    """An array of the cache, read from disk page by page; processes on one machine share the pages."""
    return _mapped(str(folder / f"{name}.npy"))


def forget_maps() -> None:
    """Open arrays anew: their files were replaced."""
    _mapped.cache_clear()


@lru_cache(maxsize=64)
def _mapped(path: str) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise MedgenError(f"{path}: this part of the slice cache is damaged ({error}); delete {Path(path).parent}, it is built again") from None
