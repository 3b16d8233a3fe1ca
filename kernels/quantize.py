"""How weights are kept in 8 bits: as numbers of a narrow type, and of each row one factor by which they are multiplied.

A row of a weight [out, in] is divided by what makes its largest value the largest of the type. The factor is rounded up
to its dtype first, so that this costs no accuracy. Activations stay as they are: a product multiplies them with
the narrow numbers and its sums with the factors (`headrace.kernels.ops.linear`).

Only the projections of layers are kept so, those of experts too. Embeddings, norms, biases, routers and heads are not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from headrace.errors import ConfigError

__all__ = ["NARROW", "SCHEMES", "Scheme", "find_scheme", "schemes_of", "store"]

_ROWS = 4096  # of a weight that are held in float32 at a time
_BITS = {2: torch.int16, 4: torch.int32}  # of a factor, which is not negative, by its bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """One way.

    Attributes:
        name: int8 or fp8.
        dtype: of the narrow numbers.
        factors: dtype of the factors, None for that of the model.
        capability: the least CUDA compute capability that computes with them.
    """

    name: str
    dtype: torch.dtype
    factors: torch.dtype | None = None
    capability: tuple[int, int] = (0, 0)

    @property
    def largest(self) -> float:
        """Of the narrow numbers, and the least one without its sign: int8's -128 is not used."""
        info = torch.finfo(self.dtype) if self.dtype.is_floating_point else torch.iinfo(self.dtype)
        return float(info.max)

    def quantize(self, rows: Tensor, values: Tensor, scale: Tensor) -> None:
        """Write rows [n, in] as narrow numbers [n, in] and factors [n]; what is no number stays none in its factor."""
        for some, those, theirs in zip(*(torch.split(each, _ROWS) for each in (rows, values, scale)), strict=True):
            wide = some.to(scale.device, torch.float32, copy=True)  # which is changed
            widest = wide.abs().amax(dim=1)
            theirs.copy_(widest / widest.new_tensor(self.largest))  # by a number, a GPU multiplies with its inverse
            rounded_down = theirs.float() * self.largest < widest
            theirs.view(_BITS[scale.element_size()]).add_(rounded_down)  # the next number
            wide /= theirs.float().clamp_(min=torch.finfo(torch.float32).tiny)[:, None]  # of zeros come zeros
            wide.clamp_(-self.largest, self.largest)
            those.copy_(wide if self.dtype.is_floating_point else wide.round_())

    def runs_on(self, device: torch.device) -> bool:
        """Whether a device computes with it."""
        return device.type != "cuda" or torch.cuda.get_device_capability(device) >= self.capability

    def check(self, device: torch.device) -> None:
        """Refuse what cannot be done.

        Raises:
            ConfigError: the device is too old a GPU.
        """
        if self.runs_on(device):
            return
        found = torch.cuda.get_device_capability(device)
        wanted, has = (".".join(map(str, version)) for version in (self.capability, found))
        raise ConfigError(
            f"quantize is {self.name!r}, which takes a GPU of compute capability {wanted}; "
            f"{torch.cuda.get_device_name(device)} has {has}. Use 'int8', which every GPU computes.",
            param="quantize",
        )


SCHEMES: Mapping[str, Scheme] = MappingProxyType(
    {
        scheme.name: scheme
        for scheme in (
            Scheme(name="int8", dtype=torch.int8),
            Scheme(
                name="fp8",
                dtype=torch.float8_e4m3fn,
                factors=torch.float32,
                capability=(8, 9),
            ),
        )
    }
)
_BY_DTYPE = {scheme.dtype: scheme for scheme in SCHEMES.values()}
NARROW = frozenset(_BY_DTYPE)  # what weights are stored in that have factors


def find_scheme(name: str | None, device: torch.device | None = None) -> Scheme | None:
    """The scheme of that name; None for none.

    Args:
        name: of a scheme.
        device: that is to compute with it, if it is known.

    Raises:
        ConfigError: there is no such scheme, or the device is too old for it.
    """
    if name is None:
        return None
    if name not in SCHEMES:
        raise ConfigError(
            f"quantize is {name!r}; give one of {', '.join(SCHEMES)}, or leave it out for weights as they are.",
            param="quantize",
        )
    if device is not None:
        SCHEMES[name].check(device)
    return SCHEMES[name]


def schemes_of(device: torch.device | None) -> list[Scheme]:
    """Those that a device computes with; all, if it is not known."""
    return [scheme for scheme in SCHEMES.values() if device is None or scheme.runs_on(device)]


def store(rows: Tensor, values: Tensor, scale: Tensor | None) -> None:
    """Write rows of a weight [n, in] as they are kept: as they are, or quantized, with the factors of the rows [n]."""
    if scale is None:
        values.copy_(rows)
    else:
        _BY_DTYPE[values.dtype].quantize(rows, values, scale)
