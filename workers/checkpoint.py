"""A model folder as transformers writes it: config, weights in safetensors, text files. Reads headers, checks, finds.

It loads no weights (`headrace.workers.loader` does) and fetches nothing (`headrace.workers.models` does).
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from headrace.errors import ConfigError, ModelFilesError, ModelNotFoundError, UnsupportedModelError
from headrace.kernels.module_weights import quantization_of
from headrace.kernels.policies import POLICIES, find_policy
from headrace.kernels.policies.base import Policy
from headrace.kernels.spec import ModelSpec
from headrace.workers.facts import Facts, kept_facts

__all__ = ["DTYPES", "Checkpoint", "Place"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# As safetensors writes them. What is not here is packed in some way, and is told apart by its bytes alone.
_STORED = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_PICKLED = ("*.bin", "*.ckpt", "*.pkl", "*.pt", "*.pth")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor is.

    Attributes:
        path: its file.
        start: its first byte there.
        num_bytes: how many it has.
        dtype: of its values; uint8 if that is none of torch's.
        shape: row by row.
    """

    path: Path
    start: int
    num_bytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class Checkpoint:
    """A folder with a model; `policy` overrides the one that its architecture has.

    Attributes:
        folder: where it is.
        architecture: Hugging Face class name.
        policy: of its family.
        files: the safetensors files.

    Raises:
        ModelNotFoundError: there is no such folder.
        ModelFilesError: files are missing or damaged; names them.
        UnsupportedModelError: its family is not covered, or its weights are quantized.
    """

    def __init__(self, folder: Path, *, policy: Policy | None = None) -> None:
        self.folder = folder
        if not folder.is_dir():
            raise ModelNotFoundError(f"There is no folder {str(folder)!r}; check the path.", param="model")
        raw = self.read_json("config.json", required=True)
        self.architecture = next(iter(raw.get("architectures") or ()), "")
        if not self.architecture:
            raise ModelFilesError(
                f"{folder / 'config.json'} names no architecture, so nobody can tell what model it is; "
                'add for example "architectures": ["LlamaForCausalLM"].',
                param="model",
            )
        self.policy: Policy = find_policy(self.architecture) if policy is None else policy
        if (method := quantization_of(SimpleNamespace(**raw))) is not None:
            raise UnsupportedModelError(
                f"The weights in {str(folder)!r} are quantized ({method}), which is not supported. Choose a checkpoint "
                "in float32, bfloat16 or float16, or a .gguf file.",
                param="model",
            )
        self.files = self._find_files()

    def read_json(self, name: str, *, required: bool = False) -> dict[str, Any]:
        """A JSON object of the folder; empty if the file is missing and not required.

        Raises:
            ModelFilesError: it is required and missing, or is no JSON object.
        """
        path = self.folder / name
        if not path.is_file():
            if not required:
                return {}
            raise ModelFilesError(
                f"{str(self.folder)!r} has no {name}, so it is no model folder; give the folder that "
                "save_pretrained wrote or a download put there.",
                param="model",
            )
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, OSError) as error:
            raise ModelFilesError(
                f"{str(path)!r} cannot be read: {error}. Fetch the model again.", param="model"
            ) from None
        if not isinstance(content, dict):
            raise ModelFilesError(f"{str(path)!r} is no JSON object. Fetch the model again.", param="model")
        return content

    def dtype(self, wanted: str) -> torch.dtype:
        """The dtype that a setting means for this model; "auto" is the checkpoint's own.

        Raises:
            ConfigError: there is no such dtype.
        """
        if wanted in DTYPES:
            return DTYPES[wanted]
        if wanted != "auto":
            raise ConfigError(f"dtype is {wanted!r}; give auto, {', '.join(DTYPES)}.", param="dtype")
        return DTYPES.get(self.facts.dtype, torch.float32)

    @functools.cached_property
    def config(self) -> Any:
        """config.json as transformers understands it; imports transformers.

        Raises:
            ModelFilesError: it cannot be used.
        """
        return self._load_config()

    @functools.cached_property
    def facts(self) -> Facts:
        """What the config says of the model, without transformers if it was asked before.

        Raises:
            ModelFilesError: the config cannot be used.
            UnsupportedModelError: the family is not covered as it is configured.
        """
        if any(self.policy is policy for policy in POLICIES):
            return kept_facts((self.folder / "config.json").read_bytes(), self.policy, self._make_facts)
        return self._make_facts()

    @property
    def spec(self) -> ModelSpec:
        """What the policy makes of the config."""
        return self.facts.spec

    def _make_facts(self) -> Facts:
        config = self.config
        ids = getattr(config, "eos_token_id", None)
        listed = ids if isinstance(ids, list) else [] if ids is None else [ids]
        return Facts(
            spec=self.policy.spec(config),
            dtype=str(config.dtype or "").removeprefix("torch."),
            eos_token_ids=tuple(int(id) for id in listed),
        )

    @functools.cached_property
    def tensors(self) -> dict[str, Place]:
        """The place of each tensor; reading all headers also finds damaged files before anything is loaded."""
        found: dict[str, Place] = {}
        for path in self.files:
            with self.open(path), path.open("rb") as file:  # which checks that the header is right
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            for name, entry in header.items():
                first, end = entry["data_offsets"]
                dtype = _STORED.get(entry["dtype"], torch.uint8)
                found[name] = Place(path, 8 + length + first, end - first, dtype, tuple(entry["shape"]))
        return found

    @staticmethod
    def open(path: Path) -> Any:
        """A safetensors file for reading, as a context manager.

        Raises:
            ModelFilesError: it is damaged.
        """
        try:
            return safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise ModelFilesError(
                f"The weights file {str(path)!r} ({path.stat().st_size:,} bytes) is damaged: {error}. "
                "Its download was probably cut off; fetch it again.",
                param="model",
            ) from None

    def _load_config(self) -> Any:
        from transformers import AutoConfig

        try:
            return AutoConfig.from_pretrained(self.folder, trust_remote_code=False, local_files_only=True)
        except Exception as error:  # transformers raises many kinds for a bad config
            raise ModelFilesError(
                f"{str(self.folder / 'config.json')!r} cannot be used: {error}.", param="model"
            ) from error

    def _find_files(self) -> list[Path]:
        if (self.folder / _INDEX).is_file():
            weight_map = self.read_json(_INDEX).get("weight_map")
            names = sorted(set(weight_map.values())) if isinstance(weight_map, dict) else []
            if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
                raise ModelFilesError(
                    f"{str(self.folder / _INDEX)!r} lists no weights. Fetch the model again.", param="model"
                )
            if missing := [name for name in names if not (self.folder / name).is_file()]:
                raise ModelFilesError(
                    f"{str(self.folder)!r} lacks {', '.join(missing)} of its {len(names)} weights files. "
                    "Fetch the model again.",
                    param="model",
                )
            return [self.folder / name for name in names]
        single = self.folder / _SINGLE
        if single.is_file():
            return [single]
        others = [path.name for pattern in _PICKLED for path in self.folder.glob(pattern)]
        hint = (
            f"it has {', '.join(sorted(others)[:3])}, but such files can run code when they are read; "
            "convert them with transformers' save_pretrained"
            if others
            else "copy them there, or fetch the model again"
        )
        raise ModelFilesError(f"{str(self.folder)!r} has no weights ({_SINGLE} or {_INDEX}): {hint}.", param="model")
