"""Where files are: a local folder, the hub's cache, or the hub itself.

A name that is a folder is used as it is. Any other name is a hub repository, fetched through ``huggingface_hub``, which keeps
the cache, resumes downloads and honours ``HF_HUB_OFFLINE``. Files that are in the cache are found without a network.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from .errors import HubError

PathLike = str | os.PathLike


@dataclass(frozen=True)
class Source:
    """A checkpoint's place: a folder, or a repository with the revision and access options to fetch it.

    Attributes:
        name: Local folder or ``owner/repository``.
        revision: Branch, tag or commit of a repository.
        token: Access token, ``True`` for the stored one, ``None`` for the default.
        cache_dir: Folder of the hub cache, ``None`` for the default.
        local_files_only: Never use the network.
        force_download: Fetch again what is cached.
    """

    name: PathLike
    revision: str | None = None
    token: str | bool | None = None
    cache_dir: PathLike | None = None
    local_files_only: bool = False
    force_download: bool = False

    @property
    def is_local(self) -> bool:
        """Whether the name is a folder here."""
        return self.name != "" and Path(self.name).is_dir()

    def fetch(self, patterns: list[str], subfolder: str = "") -> Path:
        """Makes the files that match ``patterns`` (below ``subfolder``) present and returns their folder.

        Raises:
            HubError: The name is neither a folder nor a reachable repository, or the network is down and the files are
                not in the cache.
        """
        if self.is_local:
            folder = Path(self.name) / subfolder
            if not folder.is_dir():
                present = ", ".join(sorted(p.name for p in Path(self.name).iterdir() if p.is_dir()))
                raise HubError(f"{self.name} has no subfolder {subfolder!r}; it has: {present or 'none'}")
            return folder
        self._check_name()
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

        wanted = [f"{subfolder}/{p}" if subfolder else p for p in patterns]
        try:
            root = snapshot_download(
                str(self.name),
                revision=self.revision,
                token=self.token,
                cache_dir=None if self.cache_dir is None else os.fspath(self.cache_dir),
                local_files_only=self.local_files_only,
                force_download=self.force_download,
                allow_patterns=wanted,
            )
        except LocalEntryNotFoundError as error:
            raise HubError(
                f"{self.name!r} is not in the cache and the hub cannot be reached (no network, or offline mode is on): "
                "connect once to download it, or pass the path of a local folder"
            ) from error
        except RepositoryNotFoundError as error:
            raise HubError(
                f"there is no folder and no hub repository {self.name!r} that your token may read; check the spelling, "
                "accept the licence on its page if it is gated, and log in with `hf auth login`"
            ) from error
        except RevisionNotFoundError as error:
            raise HubError(f"repository {self.name!r} has no revision {self.revision!r}: see the branches on its page") from error
        except Exception as error:  # whichever transport the hub client uses, and a full disk
            raise HubError(f"{self.name!r} cannot be fetched from the hub ({error}): check the name and the network") from error
        return Path(root) / subfolder

    def _check_name(self) -> None:
        name = str(self.name)
        parts = name.split("/")
        if len(parts) > 2 or name.startswith((".", "/", "~")) or "\\" in name or not name:
            raise HubError(f"{name!r} is not a folder here, and cannot be a hub repository ('owner/name'): check the path")

    def file(self, filename: str, subfolder: str = "") -> Path:
        """Returns the path of one file.

        Raises:
            HubError: The file does not exist.
        """
        path = self.fetch([filename], subfolder) / filename
        if not path.is_file():
            where = f"{self.name}/{subfolder}" if subfolder else str(self.name)
            raise HubError(f"{where} has no file {filename!r}: is it a checkpoint of the expected kind, and wholly downloaded?")
        return path


def locate_config(
    name_or_path: PathLike,
    filename: str,
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: PathLike | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
) -> Path:
    """Returns the path of one configuration file of a checkpoint (see :class:`Source` for the options)."""
    source = Source(name_or_path, revision, token, cache_dir, local_files_only, force_download)
    return source.file(filename, subfolder or "")


EMBEDDED_MODEL = Path(__file__).parent / "assets" / "emoji-64"
"""The small text-to-image model that ships inside the package."""
