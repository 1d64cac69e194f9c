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
    """A checkpoint's place: a folder, or a repository with the options that every ``from_pretrained`` takes to fetch it.

    Two options more are the same everywhere: ``variant`` chooses among files (``"fp16"`` reads ``model.fp16.safetensors``), and
    ``use_safetensors`` must be true, since pickle files are not read.

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
            HubError: No folder and no reachable repository has the name; or there is no network, and the cache lacks the files.
        """
        if self.is_local:
            folder = Path(self.name) / subfolder
            if not folder.is_dir():
                present = ", ".join(sorted(p.name for p in Path(self.name).iterdir() if p.is_dir()))
                raise HubError(f"{self.name} has no subfolder {subfolder!r}; it has: {present or 'none'}")
            return folder
        name = str(self.name)
        if name.count("/") > 1 or name.startswith((".", "/", "~")) or "\\" in name or not name:
            raise HubError(f"{name!r} is not a folder here, and cannot be a hub repository ('owner/name'): check the path")
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

        wanted = [f"{subfolder}/{p}" if subfolder else p for p in patterns]
        try:
            root = snapshot_download(
                name,
                revision=self.revision,
                token=self.token,
                cache_dir=None if self.cache_dir is None else os.fspath(self.cache_dir),
                local_files_only=self.local_files_only,
                force_download=self.force_download,
                allow_patterns=wanted,
            )
        except LocalEntryNotFoundError as error:
            remedy = "connect once to download it, or pass the path of a local folder"
            cause = "the hub cannot be reached (no network, or offline mode is on)"
            raise HubError(f"{self.name!r} is not in the cache and {cause}: {remedy}") from error
        except RepositoryNotFoundError as error:
            remedy = "check the spelling, accept the licence on its page if it is gated, and log in with `hf auth login`"
            raise HubError(f"there is no folder and no hub repository {self.name!r} that your token may read; {remedy}") from error
        except RevisionNotFoundError as error:
            raise HubError(f"repository {self.name!r} has no revision {self.revision!r}: see the branches on its page") from error
        except Exception as error:  # whichever transport the hub client uses, and a full disk
            raise HubError(f"{self.name!r} cannot be fetched from the hub ({error}): check the name and the network") from error
        return Path(root) / subfolder

    def file(self, filename: str, subfolder: str = "") -> Path:
        """Returns the path of one file; a :class:`HubError` if there is none."""
        path = self.fetch([filename], subfolder) / filename
        if not path.is_file():
            where = f"{self.name}/{subfolder}" if subfolder else str(self.name)
            raise HubError(f"{where} has no file {filename!r}: is it a checkpoint of the expected kind, and wholly downloaded?")
        return path


EMBEDDED_MODEL = Path(__file__).parent / "assets" / "emoji-64"
"""The small text-to-image model that ships inside the package."""
