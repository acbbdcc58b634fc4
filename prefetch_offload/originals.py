"""Where the weights lie that a program sees while what travels in their place is in memory: in a file, not in memory.

# [Note: originals]
A unit that travels encoded needs its masters only when somebody looks at them: `state_dict`, a LoRA fuse, `disable`, and
encoding anew what was written. So that a host does not hold them beside what was encoded, they lie in a mapping of a file
without a name, which the kernel writes out and drops from memory by itself. The tensors stay what they are: an address, read
and written by anyone and in any way. (A tensor subclass that decodes on access would save the disk, but whatever goes by
`data_ptr`, storages, aliases or `.data` would have to be caught, and what is missed is wrong without a sign; and what fp8
leaves would be all there is to give back.)

Who wrote to a mapping of a file is told exactly: the mapping's pages are let go of and the file's time is set to a mark;
the next write to any page takes a fault, and that sets the time. Looking costs one `fstat`, and reads nothing from the disk.
It needs a descriptor. Where the process has few of these, later files go without: their mappings hold them, and fingerprints
tell of writes, as for weights in memory.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import sys
import tempfile
import warnings
import weakref
from pathlib import Path
from typing import Any

from .config import GIB
from .errors import OffloadWarning
from .host import Slab, tensor_over

# Of file systems on a disk. Others are memory (tmpfs), far away, or make no promise that space once taken is there.
_ON_DISK = frozenset({"ext2", "ext3", "ext4", "xfs", "btrfs", "f2fs", "overlay", "bcachefs"})
# What a file that lies here leaves of its file system's free space.
_SPARED = GIB
_MARK = 10**9  # nanoseconds: no file that is written today gets this time by itself
# Of the descriptors that a process may have. Units are many, and the program wants to open files of its own.
_SHARE = 1 / 4
_warned: set[str] = set()
_kept: set[int] = set()  # descriptors


class FileSlab(Slab):
    """A slab behind which a file stands that has no name: it is gone with the slab, and with the process.

    Raises:
        OSError: there is no room for it, or no more files may be open.
    """

    def __init__(self, nbytes: int, folder: str) -> None:
        fd = _unnamed(folder)
        try:
            length = -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
            free = os.statvfs(folder)
            if free.f_bavail * free.f_frsize < length + _SPARED:
                raise OSError(f"{folder} has {free.f_bavail * free.f_frsize / GIB:.1f} GiB free")
            os.posix_fallocate(fd, 0, length)  # writing to a page for which the disk has no room would kill the process
            memory = _mapped(fd, length)
        except BaseException:
            os.close(fd)
            raise
        self._fd: int | None = fd
        if _may_keep(fd):
            _kept.add(fd)
            weakref.finalize(self, _close, fd)
        else:
            os.close(fd)
            self._fd = None
        self.nbytes = nbytes
        self._memory = memory
        self.bytes = tensor_over(memory, nbytes)
        self.pinned = False
        self._unpin = None
        self._watched = self._fd is not None and _tells_writes(folder)

    def mark(self) -> None:
        """From here on `touched` tells of writes. The mark comes first: a write in between is then seen."""
        if self._fd is not None:
            os.utime(self._fd, ns=(_MARK, _MARK))
        self.let_go()

    def let_go(self) -> None:
        """Keep no page of it in this process. The kernel begins to write it out, and drops what it has written."""
        _libc().madvise(ctypes.addressof(self._memory), ctypes.sizeof(self._memory), mmap.MADV_DONTNEED)
        if self._fd is not None:
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)

    @property
    def touched(self) -> bool | None:
        """It was written to since it was marked; None: the file system does not tell, or there is nothing to ask it by."""
        return os.fstat(self._fd).st_mtime_ns != _MARK if self._watched and self._fd is not None else None


@functools.cache
def _libc() -> Any:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
    libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return libc


def _mapped(fd: int, length: int) -> Any:
    """A buffer over a file, unmapped with its last user. Python's own mapping would keep a second descriptor.

    Raises:
        OSError: it cannot be mapped.
    """
    libc = _libc()
    address = libc.mmap(None, length, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, fd, 0)
    if address is None or address == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    buffer = (ctypes.c_char * length).from_address(address)
    weakref.finalize(buffer, libc.munmap, address, length).atexit = False
    return buffer


def _may_keep(fd: int) -> bool:
    """Whether there are descriptors to spare. The kernel gives the lowest free number: a high one says how many are open."""
    import resource  # not on Windows

    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return limit == resource.RLIM_INFINITY or (len(_kept) < limit * _SHARE and fd < limit // 2)


def _close(fd: int) -> None:
    _kept.discard(fd)
    os.close(fd)


def file_slab(nbytes: int, where: str) -> FileSlab | None:
    """A slab in a file, or None where there can be none, with one warning that says what that costs.

    Args:
        where: as the setting `originals` has it.
    """
    if where == "memory":
        return None
    folder = folder_for(where)
    why = "no directory on a disk was found for them"
    if folder is not None:
        try:
            return FileSlab(nbytes, folder)
        except OSError as error:
            why = str(error)
    if why not in _warned:
        _warned.add(why)
        warnings.warn(
            "prefetch_offload keeps weights in memory beside what they are encoded to for transport, so that the host holds "
            f"both: {why}. To have them in a file instead, make room there, or name a directory on a disk "
            "(`originals='/path'`). `originals='memory'` accepts it without this warning.",
            OffloadWarning,
            stacklevel=2,
        )
    return None


@functools.cache
def folder_for(where: str) -> str | None:
    """The directory in which originals lie: `where`, or for ``"file"`` the first on a disk that there is; None: nowhere."""
    if sys.platform != "linux":
        return None
    candidates = [where]
    if where == "file":
        candidates = [tempfile.gettempdir(), "/var/tmp", str(Path.home() / ".cache")]
    return next((f for f in candidates if why_not(f) is None), None)


def why_not(folder: str) -> str | None:
    """Why originals cannot lie in `folder`, or None."""
    if sys.platform != "linux":
        return "originals lie in files on Linux only"
    if not os.path.isdir(folder):
        return "it is no directory"
    if not os.access(folder, os.W_OK | os.X_OK):
        return "it cannot be written to"
    kind = _file_system(folder)
    if kind not in _ON_DISK:
        return f"it is on {kind or 'an unknown file system'}, which is not one on a disk that is known to serve"
    return None


def _file_system(folder: str) -> str:
    """The type of the file system that `folder` is on, as the kernel calls it."""
    path = os.path.realpath(folder)
    best, found = "", ""
    try:
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return ""
    for line in lines:
        fields, _, rest = line.partition(" - ")
        point = fields.split()[4].encode().decode("unicode_escape")  # blanks are written as \040
        inside = path == point or path.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(best):
            best, found = point, rest.split()[0]
    return found


def _unnamed(folder: str) -> int:
    """A descriptor of a new file in `folder` that no directory lists."""
    try:
        return os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError:  # not every file system can
        fd, path = tempfile.mkstemp(prefix="prefetch_offload-", dir=folder)
        os.unlink(path)
        return fd


@functools.cache
def _tells_writes(folder: str) -> bool:
    """Whether a file's time tells of writes to its mapping, found out by one read and one write."""
    fd = _unnamed(folder)
    try:
        os.posix_fallocate(fd, 0, mmap.PAGESIZE)
        with mmap.mmap(fd, mmap.PAGESIZE) as memory:
            memory[0] = 1
            os.utime(fd, ns=(_MARK, _MARK))
            memory.madvise(mmap.MADV_DONTNEED)
            if memory[0] != 1 or os.fstat(fd).st_mtime_ns != _MARK:
                return False
            memory[0] = 2
            return os.fstat(fd).st_mtime_ns != _MARK
    except OSError:
        return False
    finally:
        os.close(fd)
