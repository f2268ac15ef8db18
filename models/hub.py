"""The Hugging Face hub: what a repo id means, access, disk space, downloads, and damaged files.

A source is `org/name` or `org/name@revision`, followed by `/file` for a single file of the repository. Files go to
the hub's own cache (HF_HOME); cached files need no network access. HF_HUB_OFFLINE is honoured.
"""

import errno
import os
import re
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from utils.cli import InputError
from utils.files import file_sha256, known_sha256, show_bytes

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

SPARE = 2**30  # bytes to leave free on the cache's disk
RENAMED = ("THUDM/", "zai-org/")  # one organisation under its old and its new name
SOURCE = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w.-]+))?(/(?P<file>.+))?")


@dataclass(frozen=True)
class Source:
    """A repository, or one file of it, at a revision: a branch, a tag or a commit."""

    repo: str
    revision: str
    file: str | None

    @property
    def names(self) -> list[str]:
        """All names under which the cache may hold the repository, its own first."""
        others = [name for name in RENAMED if self.repo.startswith(RENAMED) and not self.repo.startswith(name)]
        return [self.repo, *(name + self.repo.partition("/")[2] for name in others)]

    @property
    def url(self) -> str:
        return f"https://huggingface.co/{self.repo}"

    def patterns(self, wanted: Sequence[str]) -> list[str]:
        """Glob patterns of the files to fetch: the named file, or all of `wanted`."""
        return [self.file] if self.file else list(wanted)


def parse_source(text: str) -> Source | None:
    """Parse `org/name[@revision][/file]`; None if the text can only be a local path."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    match = SOURCE.fullmatch(text)
    if match is None or text.startswith("."):
        return None
    try:
        validate_repo_id(match["repo"])
    except HFValidationError:
        return None
    return Source(match["repo"], match["revision"] or "main", match["file"])


def find_cached(source: Source, patterns: Sequence[str]) -> Path | None:
    """Folder, or file, of a source in the local cache; it may be incomplete. Under any of the repository's names."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    wanted = source.patterns(patterns)
    for repo in source.names:
        try:
            folder = snapshot_download(repo, revision=source.revision, local_files_only=True, allow_patterns=wanted)
        except LocalEntryNotFoundError:
            continue
        path = Path(folder, source.file or "")
        if path.exists():
            return path
    return None


def other_commits(source: Source) -> list[str]:
    """`name@commit` of the snapshots that the local cache holds of a repository, whatever revision is asked for."""
    from huggingface_hub import constants

    found = []
    for repo in source.names:
        snapshots = Path(constants.HF_HUB_CACHE, f"models--{repo.replace('/', '--')}", "snapshots")
        suffix = f"/{source.file}" if source.file else ""
        found += [f"{repo}@{path.name}{suffix}" for path in sorted(snapshots.glob("*"))]
    return found


def check_access(name: str, source: Source, lack: str, instead: str = "") -> None:
    """Raise InputError unless this user can download the repository now.

    name: the flag that names another source. lack: what is to be downloaded. instead: other ways out, for the message.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    instead = f"or pass a local copy with --{name}{instead}"
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
        raise InputError(f"{name}: {lack} and HF_HUB_OFFLINE is set; unset it, {instead}")
    try:
        HfApi().auth_check(source.repo)
    except GatedRepoError as error:
        raise InputError(
            f"{name}: {source.repo} is gated: accept its licence at {source.url}, run `hf auth login`, then try "
            f"again, {instead}{_quoted(error)}"
        ) from error
    except RepositoryNotFoundError as error:
        raise InputError(
            f"{name}: there is no repository {source.repo} on the hub, nor a local path; check the spelling"
        ) from error
    except HfHubHTTPError as error:  # an expired or narrow token, too many requests, a server error
        raise InputError(f"{name}: the hub does not give {source.repo}: {error}; mend that, {instead}") from error
    except Exception as error:  # any exception of the HTTP library: no network, proxy
        raise InputError(f"{name}: {lack} and {source.url} cannot be reached; go online, {instead}") from error


def _quoted(error: "HfHubHTTPError") -> str:
    """The hub's own words on a refusal, such as a token that lacks a right."""
    return f" (the hub: {error.server_message})" if getattr(error, "server_message", None) else ""


def list_missing(name: str, source: Source, patterns: Sequence[str]) -> dict[Path, int]:
    """{path in the cache: bytes} of what a download would fetch. Raises InputError when the hub does not say."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import RevisionNotFoundError
    from huggingface_hub.utils import tqdm

    class Silent(tqdm):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options | {"disable": True})

    where = {"revision": source.revision, "allow_patterns": source.patterns(patterns)}
    try:
        files = snapshot_download(source.repo, **where, dry_run=True, tqdm_class=Silent)
    except RevisionNotFoundError as error:
        raise InputError(f"{name}: {source.repo} has no revision {source.revision}") from error
    except Exception as error:
        raise _failed(name, source, error) from error
    if source.file and source.file not in {file.filename for file in files}:
        raise InputError(f"{name}: {source.repo} has no file {source.file} at revision {source.revision}")
    return {Path(file.local_path): file.file_size or 0 for file in files if file.will_download}


def require_space(missing: Iterable[int]) -> None:
    """Raise OSError (ENOSPC) unless downloads of these sizes (bytes) fit on the cache's disk and leave SPARE free."""
    from huggingface_hub import constants

    cache, needed = Path(constants.HF_HUB_CACHE), sum(missing)
    disk = next(path for path in (cache, *cache.parents) if path.exists())
    free = shutil.disk_usage(disk).free
    if needed and free < needed + SPARE:
        raise OSError(
            errno.ENOSPC,
            f"{show_bytes(needed)} to download, {show_bytes(free)} free (HF_HOME puts it on another disk)",
            str(cache),
        )


def download(name: str, source: Source, patterns: Sequence[str], missing: Iterable[Path]) -> Path:
    """Fetch the files of a source that are not in the cache yet, and return its folder or file.

    missing: paths from `list_missing`, checked against their hashes; damaged files are removed. Raises InputError for
    damaged files, and when the network fails.
    """
    from huggingface_hub import snapshot_download

    where = {"revision": source.revision, "allow_patterns": source.patterns(patterns)}
    try:
        folder = Path(snapshot_download(source.repo, **where))
    except Exception as error:  # the HTTP library's exceptions, and OSError
        if getattr(error, "errno", None) == errno.ENOSPC:
            raise
        raise _failed(name, source, error) from error
    if damaged := find_damaged(missing):
        for path in damaged:
            path.resolve().unlink(missing_ok=True)
            path.unlink(missing_ok=True)
        raise InputError(f"{name}: {damaged[0].name} arrived damaged and was removed; run the same command again")
    return folder / source.file if source.file else folder


def _failed(name: str, source: Source, error: Exception) -> InputError:
    return InputError(
        f"{name}: the download of {source.repo} failed ({error}); run the same command again: "
        "files that arrived are kept"
    )


def find_damaged(paths: Iterable[Path]) -> list[Path]:
    """Files whose bytes do not match the hub's cache, which names large files by their SHA-256."""
    return [path for path in paths if (known := known_sha256(path)) and file_sha256(path, trust=False) != known]
