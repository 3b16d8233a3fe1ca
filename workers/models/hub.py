"""The Hugging Face hub as a source, over plain HTTPS: which files a model needs, and their download.

Only config, tokenizer and safetensors files are taken: never pickled weights, never code. The hub states a hash for
every file of a commit, and each file is checked against it.
"""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.parse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from headrace.errors import HeadraceError, ModelFilesError, ModelNotFoundError
from headrace.workers.models.check import INDEX, WEIGHTS, no_safetensors, read_json, shard_names
from headrace.workers.models.download import RemoteFile, download, open_url
from headrace.workers.models.progress import Progress
from headrace.workers.models.sources import Fetched
from headrace.workers.models.space import require_space

__all__ = ["HubSource", "endpoint", "is_offline", "token"]

_MAX_LISTING = 32 << 20
_TEXT_FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "chat_template.jinja", "chat_template.json", "modules.json",
)  # fmt: skip
_POOLING = "1_Pooling/config.json"  # where sentence-transformers keeps it
_OLD_TOKENIZERS = ("tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "merges.txt")


class HubSource:
    """A model of the hub.

    Args:
        repo: its id.
        revision: branch, tag or commit; None is the main branch.
    """

    def __init__(self, repo: str, revision: str | None) -> None:
        self.name = f"Hugging Face hub ({urllib.parse.urlsplit(endpoint()).netloc})"
        self._repo = repo
        self._revision = revision

    def fetch(self, work: Path, progress: Progress) -> Fetched:
        """Download the model into a folder in `work`."""
        if is_offline():
            raise ModelNotFoundError("not asked, because HF_HUB_OFFLINE is set")
        progress(f"asking {urllib.parse.urlsplit(endpoint()).netloc} for {self._repo}", 0, None)
        listing = self._listing()
        commit = str(listing["sha"])
        folder = work / f"hub-{commit}"
        folder.mkdir(parents=True, exist_ok=True)
        files = self._remote_files(listing, commit)
        digests = self._fetch_texts(files, folder, progress)
        _check_architecture(folder / "config.json")
        weights = self._weights(files, folder)
        total = sum(file.size for file in weights)
        present = sum(path.stat().st_size for path in folder.iterdir() if ".safetensors" in path.name)
        require_space(folder, total - present, f"The model {self._repo}")
        done = 0
        for file in weights:

            def report(count: int, before: int = done) -> None:
                progress(f"downloading from {urllib.parse.urlsplit(endpoint()).netloc}", before + count, total)

            digests[file.name] = download(file, folder, headers=_authorization(), progress=report)
            done += file.size
        facts = {"source": f"{endpoint()}/{self._repo}", "revision": commit}
        return Fetched(folder=folder, facts=facts, digests=digests)

    def _fetch_texts(self, files: Mapping[str, RemoteFile], folder: Path, progress: Progress) -> dict[str, str]:
        if "config.json" not in files:
            raise ModelFilesError(f"{self._repo} has no config.json on the hub, so it is no model that can be served.")
        names = [name for name in (*_TEXT_FILES, _POOLING, INDEX) if name in files]
        if "tokenizer.json" not in files:
            names += [name for name in _OLD_TOKENIZERS if name in files]
        progress("downloading settings and tokenizer", 0, None)
        digests = {name: download(files[name], folder, headers=_authorization()) for name in names}
        if INDEX not in digests and WEIGHTS not in files:
            raise no_safetensors(sorted(files), f"{self._repo} on the hub")
        return digests

    def _weights(self, files: Mapping[str, RemoteFile], folder: Path) -> list[RemoteFile]:
        if INDEX not in files:
            return [files[WEIGHTS]]
        index = read_json(folder / INDEX)
        names = shard_names(index.get("weight_map"), f"{self._repo}: {INDEX}")
        missing = [name for name in names if name not in files]
        if missing:
            raise ModelFilesError(f"{self._repo} lacks {', '.join(missing)} on the hub, which its {INDEX} names.")
        return [files[name] for name in names]

    def _listing(self) -> dict[str, Any]:
        """The commit and its files, as the hub tells them."""
        revision = urllib.parse.quote(self._revision or "main", safe="")
        url = f"{endpoint()}/api/models/{self._repo}/revision/{revision}?blobs=true"
        try:
            with open_url(url, _authorization()) as answer:
                listing: dict[str, Any] = json.loads(answer.read(_MAX_LISTING))
        except urllib.error.HTTPError as error:
            error.close()
            raise self._refused(error) from error
        except ValueError as error:
            raise ModelNotFoundError(f"{url} did not answer with JSON; is HF_ENDPOINT right?") from error
        commit = listing.get("sha") if isinstance(listing, dict) else None
        if not isinstance(commit, str) or not commit.isalnum() or not isinstance(listing.get("siblings"), list):
            raise ModelNotFoundError(f"{url} did not answer as a hub does; is HF_ENDPOINT right?")
        return listing

    def _refused(self, error: urllib.error.HTTPError) -> HeadraceError:
        code = error.headers.get("X-Error-Code", "")
        if code == "GatedRepo" or error.code == 403:
            return ModelNotFoundError(
                f"{self._repo} is open only to people who accepted its terms: do so at {endpoint()}/{self._repo}, "
                "then set HF_TOKEN to a token of your account"
            )
        if code == "RevisionNotFound":
            return ModelNotFoundError(f"{self._repo} has no revision {self._revision!r}")
        if error.code in (401, 404):
            own = "the token given by HF_TOKEN may not see it" if token() else "it is private, which needs HF_TOKEN"
            return ModelNotFoundError(f"there is no model {self._repo}, or {own}")
        return ModelNotFoundError(f"answered {error.code} {error.reason}; try again later")

    def _remote_files(self, listing: Mapping[str, Any], commit: str) -> dict[str, RemoteFile]:
        """Files at the top of the repository by name; of what lies in folders only one is of use here."""
        files = {}
        for entry in listing["siblings"]:
            name = entry.get("rfilename")
            if not isinstance(name, str) or (Path(name).name != name and name != _POOLING) or name.startswith("."):
                continue
            lfs = entry.get("lfs") or {}
            files[name] = RemoteFile(
                name=name,
                url=f"{endpoint()}/{self._repo}/resolve/{commit}/{urllib.parse.quote(name)}",
                size=int(lfs.get("size") or entry.get("size") or 0),
                sha256=lfs.get("sha256"),
                git_sha1=None if lfs else entry.get("blobId"),
            )
        return files


def _check_architecture(config: Path) -> None:
    """Refuse a model that we cannot run before gigabytes of it are downloaded."""
    names = read_json(config).get("architectures")
    try:
        from headrace.kernels.policies import find_policy
    except ModuleNotFoundError:  # fetching needs no torch; serving will judge
        return
    find_policy(str(names[0]) if isinstance(names, list) and names else "")


def endpoint() -> str:
    """The hub's address: $HF_ENDPOINT for mirrors."""
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def is_offline() -> bool:
    """Whether the hub must not be asked."""
    values = (os.environ.get(name, "") for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))
    return any(value.upper() in ("1", "ON", "YES", "TRUE") for value in values)


def token() -> str | None:
    """The user's token: $HF_TOKEN, else what `hf auth login` stored."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if value := os.environ.get(name, "").strip():
            return value
    if os.environ.get("HF_HUB_DISABLE_IMPLICIT_TOKEN"):
        return None
    path = Path(os.environ.get("HF_TOKEN_PATH", hugging_face_home() / "token"))
    try:
        return path.read_text(encoding="utf-8").strip() or None
    except OSError:
        return None


def hugging_face_home() -> Path:
    """Where Hugging Face's own programs keep their files."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return Path(os.environ.get("HF_HOME", cache / "huggingface")).expanduser()


def _authorization() -> dict[str, str]:
    found = token()
    return {"Authorization": f"Bearer {found}"} if found else {}
