"""Brings a model from the Hugging Face hub into a folder: complete and verified, or not at all."""

import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event

from filelock import FileLock, Timeout
from huggingface_hub import HfApi, get_session
from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled
from huggingface_hub.hf_api import ModelInfo
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, tqdm

from kimi_vl.errors import Misconfigured
from kimi_vl.model.config_check import read_config
from kimi_vl.model.inspection import missing_files, read_index
from kimi_vl.model.small_files import CONFIG, INDEX, PREPROCESSOR, SINGLE, VOCABULARY
from kimi_vl.model.variants import VARIANTS, Variant, fetchable, locate

NEEDED = (CONFIG, PREPROCESSOR, VOCABULARY)
WANTED = ("generation_config.json", "tokenizer_config.json")  # taken along where a repository has them
FILES_AT_ONCE = 8
CHUNK = 1 << 20  # bytes
TIMEOUT = 20  # seconds without a byte
WAITS = (1, 2, 4, 8)  # seconds before each new try, counted afresh whenever bytes have come
TRANSIENT = (408, 429, 500, 502, 503, 504)
ENDINGS = 2  # times that a file may end with a wrong checksum

Say = Callable[[str], None]


@dataclass(frozen=True)
class File:
    """A file as the hub describes it."""

    name: str
    size: int
    sha256: str | None  # None for a small one that git itself keeps
    blob_id: str | None  # git's checksum, for those

    def matches(self, path: Path) -> bool:
        """Whether a file on the disk is this one, to the last bit."""
        if path.stat().st_size != self.size:
            return False
        if self.sha256:
            with path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest() == self.sha256
        return hashlib.sha1(b"blob %d\0" % self.size + path.read_bytes()).hexdigest() == self.blob_id


def fetch(name: str, weights_dir: str = "", say: Say = lambda line: None) -> Path:
    """Downloads a model, unless its folder is there, in which case nothing is asked of the network.

    Everything lands in a hidden folder beside it, where the next call goes on if this one is interrupted, and which
    gets the real name at once when every file has been verified.

    Args:
        name: thinking, thinking-2506, instruct, or hf://owner/name[@revision].
        weights_dir: the folder to put it in; the project's weights/ if empty.
        say: told, in lines, what is waited for.
    Returns:
        The model's folder.
    Raises:
        Misconfigured: it could not be fetched; the message says why and what to do.
    """
    folder, variant = locate(name, weights_dir)
    if not fetchable(name):
        named = ", ".join(filter(fetchable, VARIANTS))
        raise Misconfigured(f"{name!r} is nothing to fetch; name {named}, or hf://owner/name")
    if not missing_files(folder):
        return folder
    with _explained(name, folder, variant), _only_one(folder, say):
        if not missing_files(folder):
            return folder  # by the one that was waited for
        if os.path.lexists(folder):  # be it as a link to a disk that is not mounted
            raise Misconfigured(f"{folder} is there and not complete; move it away, then run this again")
        partial = folder.with_name(f".{folder.name}.partial")
        _Download(variant, partial, say).run()
        os.rename(partial, folder)
    return folder


class _Download:
    """All files of one model, into a folder that may hold some of them, or parts of them, already."""

    def __init__(self, variant: Variant, folder: Path, say: Say) -> None:
        self._variant = variant
        self._folder = folder
        self._say = say
        self._stopping = Event()
        self._endpoint = HfApi().endpoint
        try:
            get_session()
        except (ImportError, OSError, ValueError) as error:
            raise Misconfigured(
                f"no connection can be made ready: {error}; check the variables that name a proxy (HTTPS_PROXY, "
                "ALL_PROXY) or certificates (SSL_CERT_FILE)"
            ) from None

    def run(self) -> None:
        """Returns when every file is there and verified, and no other."""
        info = self._info()
        hub = {file.name: file for file in _files(info)}
        self._folder.mkdir(parents=True, exist_ok=True)
        weights = INDEX if INDEX in hub else SINGLE
        small = [*NEEDED, *(name for name in WANTED if name in hub), *([INDEX] if INDEX in hub else [])]
        self._get(self._pick(hub, [*small, weights])[: len(small)], info.sha)
        read_config(self._folder)  # whatever is not Kimi-VL is refused before gigabytes of it have come
        shards = sorted(set(read_index(self._folder).values())) if INDEX in hub else [SINGLE]
        weights_files = self._pick(hub, shards)
        size = sum(file.size for file in weights_files)
        self._say(f"Fetching {_title(self._variant)}, {size / 1e9:.1f} GB, into {self._folder.parent}")
        self._get(weights_files, info.sha)
        for path in self._folder.iterdir():  # another revision's
            if path.name not in (*small, *shards):
                path.unlink()

    def _info(self) -> ModelInfo:
        waits = iter(WAITS)
        while True:
            try:
                return HfApi().model_info(
                    self._variant.repository, revision=self._variant.revision, files_metadata=True, timeout=TIMEOUT
                )
            except HTTPError as error:
                self._wait(error, waits)
            except UnicodeEncodeError:
                raise Misconfigured(
                    "HF_TOKEN holds more than ASCII, so it is no token; set the hub's, or unset it"
                ) from None
            except (ValueError, KeyError, TypeError):
                raise Misconfigured(
                    f"{self._endpoint} does not answer as the hub does; check HF_ENDPOINT and any proxy, then try again"
                ) from None

    def _pick(self, hub: dict[str, File], names: Iterable[str]) -> list[File]:
        lacking = [name for name in names if name not in hub]
        if lacking:
            hint = "; weights in a .bin are never loaded" if any(name.endswith(".bin") for name in hub) else ""
            raise Misconfigured(
                f"{_title(self._variant)} is no Kimi-VL checkpoint in safetensors: it has no {lacking[0]}{hint}"
            )
        return [hub[name] for name in names]

    def _get(self, files: list[File], commit: str | None) -> None:
        """Downloads and verifies files, several at a time; the first failure ends them all."""
        total, here = sum(file.size for file in files), sum(min(self._have(file), file.size) for file in files)
        free = shutil.disk_usage(self._folder).free
        if total - here > free:
            raise Misconfigured(
                f"{_title(self._variant)} needs {(total - here) / 1e9:.1f} GB more and {self._folder.parent} has "
                f"{free / 1e9:.1f} GB free; free some, or set KIMI_VL_WEIGHTS_DIR to a folder on a larger disk"
            )
        url = f"{self._endpoint}/{self._variant.repository}/resolve/{commit}"
        bar = tqdm(total=total, initial=here, unit="B", unit_scale=True, desc=self._variant.repository, disable=None)
        with bar, ThreadPoolExecutor(FILES_AT_ONCE) as pool:
            downloads = [pool.submit(self._complete, file, f"{url}/{file.name}", bar) for file in files]
            try:
                for download in as_completed(downloads):
                    download.result()
            except BaseException:
                self._stopping.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _complete(self, file: File, url: str, bar: tqdm) -> None:
        """Downloads what is missing of a file, and all of it once more if the result is wrong."""
        path = self._folder / file.name
        for _ in range(ENDINGS):
            waits = iter(WAITS)
            while (have := self._have(file)) < file.size:
                try:
                    self._append(file, url, bar)
                except HTTPError as error:
                    if self._have(file) > have:
                        waits = iter(WAITS)
                    self._wait(error, waits)
            path.touch()  # an empty file
            if file.matches(path):
                return
            bar.update(-path.stat().st_size)
            path.unlink()
        raise Misconfigured(
            f"{file.name} of {_title(self._variant)} came {ENDINGS} times with another size or checksum than the hub "
            "says; something on the way changes it: try another network, or later"
        )

    def _append(self, file: File, url: str, bar: tqdm) -> None:
        with (self._folder / file.name).open("ab") as out:
            have = out.tell()
            # identity: a range of what is compressed on the way is no range of the file
            headers = {**build_hf_headers(), "Range": f"bytes={have}-", "Accept-Encoding": "identity"}
            with get_session().stream("GET", url, headers=headers, timeout=TIMEOUT) as response:
                hf_raise_for_status(response)
                if response.status_code != 206:  # the whole file
                    out.truncate(0)
                    bar.update(-have)
                for chunk in response.iter_bytes(CHUNK):
                    if self._stopping.is_set():
                        raise CancelledError
                    bar.update(out.write(chunk))
                    if out.tell() > file.size:
                        return
            if out.tell() < file.size:
                raise HTTPError("the connection ended early")
            os.fsync(out.fileno())

    def _have(self, file: File) -> int:
        path = self._folder / file.name
        return path.stat().st_size if path.exists() else 0

    def _wait(self, error: HTTPError, waits: Iterator[int]) -> None:
        """Waits before another try; raises the error instead if it will not go away, or has come too often."""
        final = isinstance(error, HfHubHTTPError) and error.response.status_code not in TRANSIENT
        seconds = None if final else next(waits, None)
        if seconds is None:
            raise error
        self._say(f"{_reason(error)}; trying again in {seconds} s")
        if self._stopping.wait(seconds):
            raise CancelledError


def _files(info: ModelInfo) -> Iterator[File]:
    for entry in info.siblings or []:
        size = entry.lfs.size if entry.lfs else entry.size
        sha256 = entry.lfs.sha256 if entry.lfs else None
        if size is None or not (sha256 or entry.blob_id):
            raise Misconfigured(f"the hub tells no size or checksum of {entry.rfilename}; check HF_ENDPOINT, try later")
        yield File(entry.rfilename, size, sha256, entry.blob_id)


@contextmanager
def _only_one(folder: Path, say: Say) -> Iterator[None]:
    """Lets one process at a time fetch a model."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.with_name(f".{folder.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say(f"Another process is fetching {folder.name}; waiting for it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _explained(name: str, folder: Path, variant: Variant) -> Iterator[None]:
    """Turns what can go wrong on the network and the disk into one sentence."""
    command = f"python scripts/download_weights.py {name}"
    try:
        yield
    except OfflineModeIsEnabled:
        raise Misconfigured(
            f"{folder} is not there and HF_HUB_OFFLINE forbids to fetch it; unset that and run: {command}"
        ) from None
    except HfHubHTTPError as error:
        raise Misconfigured(_refused(error.response.status_code, variant, command)) from None
    except HTTPError as error:
        raise Misconfigured(
            f"{_title(variant)} cannot be fetched from {HfApi().endpoint}: {_reason(error)}; check the network and go "
            f"on where it stopped with: {command}"
        ) from None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise Misconfigured(
                f"the disk of {folder.parent} is full; free some space and go on where it stopped with: {command}"
            ) from None
        raise Misconfigured(f"{folder.parent} cannot be written: {error.strerror or error}") from None


def _refused(status: int, variant: Variant, command: str) -> str:
    title, page = _title(variant), f"{HfApi().endpoint}/{variant.repository}"
    match status:
        case 401:
            return f"{title} does not exist or is not open to everyone (401); check its name, or log in: hf auth login"
        case 403:
            return f"{title} is not open to you (403); ask for access at {page}, then log in: hf auth login"
        case 404:
            return f"{title} is not on the hub (404); check owner, name and revision at {page}"
    return f"the hub does not deliver {title} (status {status}); later, go on where it stopped with: {command}"


def _title(variant: Variant) -> str:
    return f"{variant.repository} at revision {variant.revision}"


def _reason(error: HTTPError) -> str:
    if isinstance(error, HfHubHTTPError):
        return f"the hub answered with status {error.response.status_code}"
    return (str(error) or type(error).__name__).splitlines()[0]
