"""A copy of a run at a URL (S3, GCS, another file system), which outlives the host that the run is on."""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import Any

from rookery.runs.files import reason
from rookery.runs.folder import CONFIG, METRICS, SUMMARY, RunFolderError

__all__ = ["Mirror", "fetched", "is_url"]

log = logging.getLogger("rookery")

CHECKPOINTS, MARK = "checkpoints", "state.json"  # what completes a checkpoint
PATIENCE = 60.0  # seconds that the end of a run waits for the last copy


def is_url(path: str | Path) -> bool:
    """Whether it names a file system of fsspec's (`s3://bucket/run`), rather than a local path."""
    return "://" in str(path)


class Mirror:
    """Copies a run folder's config, metrics, summary and checkpoints, in a thread, whenever it is told to.

    What cannot be copied is told in the log and tried again with the next checkpoint: it does not end the run.

    Args:
        goes_on: whether what is there is to be brought up to date, rather than refused.

    Raises:
        RunFolderError: when it is made, if nothing can be written there, or there is another run.
    """

    def __init__(self, url: str, folder: Path, goes_on: bool = False) -> None:
        self.url, self.folder = url, folder
        self._there, self._root = _opened(url)
        try:
            self._there.makedirs(self._root, exist_ok=True)
            self._there.pipe_file(f"{self._root}/.probe", b"")
            self._there.rm_file(f"{self._root}/.probe")
            taken = not goes_on and self._there.exists(f"{self._root}/{CONFIG}")
        except Exception as error:  # of any file system there is
            raise RunFolderError(f"{url} cannot be written: {reason(error)}; name a URL that can.") from error
        if taken:
            raise RunFolderError(
                f"{url} holds another run; go on with it by `rookery resume {url}`, or name another URL."
            )
        self._due, self._closed = threading.Event(), False
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def copy(self) -> None:
        """Let what is new be copied soon; returns at once."""
        self._due.set()

    def close(self) -> None:
        """Wait for the last copy."""
        self._closed = True
        self._due.set()
        self._thread.join(PATIENCE)
        if self._thread.is_alive():
            log.warning("%s is not complete: the last copy took more than %g s", self.url, PATIENCE)

    def _work(self) -> None:
        last = False
        while not last:
            self._due.wait()
            last = self._closed
            self._due.clear()
            try:
                self._copy()
            except Exception as error:  # of any file system there is
                log.warning("%s could not be brought up to date: %s", self.url, reason(error))

    def _copy(self) -> None:
        local = {path.parent.name: path.parent for path in (self.folder / CHECKPOINTS).glob(f"*/{MARK}")}
        there = _checkpoints(self._there, self._root)
        for name in sorted(local.keys() - there):
            files = [path for path in local[name].rglob("*") if path.is_file()]
            for path in sorted(files, key=lambda path: path.name == MARK):  # what completes it comes last
                self._put(path)
        for name in (CONFIG, METRICS, SUMMARY, f"{CHECKPOINTS}/index.json"):
            if (self.folder / name).exists():
                self._put(self.folder / name)
        for name in there - local.keys():  # as the run itself keeps a few
            self._there.rm(f"{self._root}/{CHECKPOINTS}/{name}", recursive=True)

    def _put(self, path: Path) -> None:
        where = f"{self._root}/{path.relative_to(self.folder).as_posix()}"
        self._there.makedirs(where.rpartition("/")[0], exist_ok=True)
        self._there.put_file(str(path), where)


def fetched(url: str, folder: Path) -> Path:
    """The folder, with the run that was copied to a URL.

    Raises:
        RunFolderError: if there is none, or the folder is not empty.
    """
    there, root = _opened(url)
    if folder.exists() and any(folder.iterdir()):
        raise RunFolderError(f"{folder} is not empty; name another folder for the copy of {url} (--run-dir).")
    try:
        if not there.exists(f"{root}/{CONFIG}"):
            raise RunFolderError(f"{url} holds no run ({CONFIG} is missing); name what a run was copied to.")
        complete = _checkpoints(there, root)
        for found in there.find(root):
            name = found.removeprefix(root).lstrip("/")
            parts = name.split("/")
            if parts[0] == CHECKPOINTS and len(parts) > 2 and parts[1] not in complete:
                continue
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            there.get_file(found, str(folder / name))
    except RunFolderError:
        raise
    except Exception as error:  # of any file system there is
        raise RunFolderError(f"{url} cannot be read: {reason(error)}.") from error
    return folder


def _checkpoints(there: Any, root: str) -> set[str]:
    """The names of complete ones."""
    found = there.find(f"{root}/{CHECKPOINTS}") if there.exists(f"{root}/{CHECKPOINTS}") else []
    return {path.split("/")[-2] for path in found if path.endswith(f"/{MARK}")}


def _opened(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the path in it."""
    import fsspec

    try:
        there, root = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise RunFolderError(f"{url} cannot be opened: {reason(error)}.") from error
    return there, str(root).rstrip("/")
