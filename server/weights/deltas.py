"""Deltas as they are stored: what to add to a matrix of the base, W + Δ, in four compressed forms.

    LowRank        Δ = B A                       singular vectors in 16 bits (a PEFT adapter on disk)
    MixedLowRank   Δ = B A                       singular vectors in 8, 3 and 2 bits
                                                 Ping et al., "Delta-CoMe", 2024 (https://arxiv.org/abs/2406.08903)
    SignPlanes     Δ = Σ_i s_i · sign(R_i)       Liu et al., "BitDelta", 2024 (https://arxiv.org/abs/2402.10193)
    Sparse         Δ_ij = d_ij or 0              what is left by DARE: Yu et al., 2024 (https://arxiv.org/abs/2311.03099)

All matrices are (out, in), whatever way round a layer holds its weight. `tensors()` and `from_tensors()` are each
other's inverse: the parts of a matrix as they lie in a file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from ensemble_server.ensembles.errors import ModelLoadError
from ensemble_server.server.weights.delta_folder import KEPT, PACKED, DeltaCard, read_card

GROUP = 128  # numbers of a right singular vector that share a scale
PROBES = 4  # weights of the base per matrix by which it is recognised
MAX_PROBE_DIFFERENCE = 0.02  # relative: bfloat16 rounds by 0.004

Tensors = dict[str, torch.Tensor]


class MatrixDelta(Protocol):
    """What is added to one matrix."""

    @property
    def num_bytes(self) -> int:
        """As stored."""
        ...

    def dense(self) -> torch.Tensor:
        """(out, in) float32"""
        ...

    def tensors(self) -> Tensors: ...


@dataclass(frozen=True, eq=False)
class LowRank:
    """`a`: (rank, in), `b`: (out, rank), float16."""

    a: torch.Tensor
    b: torch.Tensor

    @property
    def num_bytes(self) -> int:
        return 2 * (self.a.numel() + self.b.numel())

    def dense(self) -> torch.Tensor:
        return self.b.float() @ self.a.float()

    def tensors(self) -> Tensors:
        return {"a": self.a, "b": self.b}


@dataclass(frozen=True, eq=False)
class MixedLowRank:
    """Components in falling order of importance, the bits of each falling, too.

    A number is (code + 1/2) · scale with codes from -2^(bits-1) to 2^(bits-1) - 1.

    bits: (rank,) uint8; a_codes: (rank, in) int8, b_codes: (rank, out) int8; a_scales: (rank, groups of 128 inputs),
    b_scales: (rank,), float16
    """

    bits: torch.Tensor
    a_codes: torch.Tensor
    a_scales: torch.Tensor
    b_codes: torch.Tensor
    b_scales: torch.Tensor

    @property
    def num_bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors().values())

    def a(self) -> torch.Tensor:
        """(rank, in) float32"""
        scales = self.a_scales.float().repeat_interleave(GROUP, dim=1)[:, : self.a_codes.shape[1]]
        return (self.a_codes.float() + 0.5) * scales

    def b(self) -> torch.Tensor:
        """(out, rank) float32"""
        return ((self.b_codes.float() + 0.5) * self.b_scales.float()[:, None]).T

    def dense(self) -> torch.Tensor:
        return self.b() @ self.a()

    def tensors(self) -> Tensors:
        return {
            "bits": self.bits,
            "a_codes": pack_codes(self.a_codes, self.bits),
            "a_scales": self.a_scales,
            "b_codes": pack_codes(self.b_codes, self.bits),
            "b_scales": self.b_scales,
        }

    @classmethod
    def from_tensors(cls, parts: Tensors, shape: tuple[int, int]) -> MixedLowRank:
        num_out, num_in = shape
        return cls(
            parts["bits"],
            unpack_codes(parts["a_codes"], parts["bits"], num_in),
            parts["a_scales"],
            unpack_codes(parts["b_codes"], parts["bits"], num_out),
            parts["b_scales"],
        )


@dataclass(frozen=True, eq=False)
class SignPlanes:
    """`signs`: (planes, out, in) bool, true for +; `scales`: (planes,) float32."""

    signs: torch.Tensor
    scales: torch.Tensor

    @property
    def num_bytes(self) -> int:
        return len(self.signs) * (-(-self.signs[0].numel() // 8) + 4)

    def dense(self) -> torch.Tensor:
        return ((self.signs.float() * 2 - 1) * self.scales[:, None, None]).sum(0)

    def tensors(self) -> Tensors:
        packed = np.packbits(self.signs.flatten(1).numpy(), axis=1)
        return {"signs": torch.from_numpy(packed), "scales": self.scales}

    @classmethod
    def from_tensors(cls, parts: Tensors, shape: tuple[int, int]) -> SignPlanes:
        bits = np.unpackbits(parts["signs"].numpy(), axis=1, count=shape[0] * shape[1])
        return cls(torch.from_numpy(bits).bool().view(-1, *shape), parts["scales"])


@dataclass(frozen=True, eq=False)
class Sparse:
    """`places`: (n,) int64, rising, in the matrix read row by row; `values`: (n,) float16. All others are zero."""

    shape: tuple[int, int]
    places: torch.Tensor
    values: torch.Tensor

    @property
    def num_bytes(self) -> int:
        return len(gaps_of(self.places)) + 2 * len(self.values)

    def dense(self) -> torch.Tensor:
        flat = torch.zeros(self.shape[0] * self.shape[1])
        flat[self.places] = self.values.float()
        return flat.view(self.shape)

    def tensors(self) -> Tensors:
        return {"gaps": gaps_of(self.places), "values": self.values}

    @classmethod
    def from_tensors(cls, parts: Tensors, shape: tuple[int, int]) -> Sparse:
        return cls(shape, places_of(parts["gaps"]), parts["values"])


_PACKED_FORMS: Mapping[str, type[MixedLowRank | SignPlanes | Sparse]] = {
    "delta-come": MixedLowRank,
    "bitdelta": SignPlanes,
    "dare": Sparse,
}


@dataclass(frozen=True, eq=False)
class Delta:
    """A compressed fine-tune. `matrices`: path of a linear layer -> what is added to its weight. `kept`: name of a
    parameter -> the fine-tune's. `probes`: path of a linear layer -> (4,) float32, weights of the base there."""

    matrices: Mapping[str, MatrixDelta]
    kept: Mapping[str, torch.Tensor]
    probes: Mapping[str, torch.Tensor]


def read_delta(folder: Path) -> Delta:
    """Raises `ModelLoadError` if the folder is no whole delta."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    card = read_card(folder)
    try:
        kept = load_file(folder / KEPT) if card.kept else {}
        matrices = _adapter_matrices(folder) if card.method == "svd" else _packed_matrices(folder, card)
        probes = {path: torch.tensor(values) for path, values in card.facts["probes"].items()}
    except ModelLoadError:
        raise
    except (SafetensorError, OSError, KeyError, ValueError, TypeError, RuntimeError, IndexError) as exc:
        raise ModelLoadError(
            f"{folder} is no whole delta ({type(exc).__name__}: {exc}); compress the fine-tune again"
        ) from exc
    return Delta(matrices, kept, probes)


def probe(weight: torch.Tensor) -> torch.Tensor:
    """(4,) float32: numbers of a matrix (out, in) at fixed places."""
    flat = weight.flatten()
    places = torch.arange(1, PROBES + 1, device=flat.device) * len(flat) // (PROBES + 1)
    return flat[places].float().cpu()


def check_base(probes: Mapping[str, torch.Tensor], weights: Mapping[str, torch.Tensor]) -> None:
    """weights: path of a linear layer -> its matrix (out, in). Raises `ModelLoadError` if they are not a delta's."""
    for path in probes:
        if path not in weights:
            raise ModelLoadError(f"it was made for a base with a layer {path}, which this one lacks")
    expected = torch.cat(list(probes.values()))
    found = torch.cat([probe(weights[path]) for path in probes])
    if not (difference := float((found - expected).norm() / expected.norm())) <= MAX_PROBE_DIFFERENCE:
        raise ModelLoadError(
            f"it was made for other weights than those of its base (they differ by {difference:.0%} where they were "
            "looked at); give it the base that it was made for, or compress the fine-tune against this one"
        )


def _adapter_matrices(folder: Path) -> dict[str, MatrixDelta]:
    from safetensors.torch import load_file

    weights = load_file(folder / "adapter_model.safetensors")
    ending = ".lora_A.weight"
    paths = [name.removesuffix(ending) for name in weights if name.endswith(ending)]
    return {
        path.removeprefix("base_model.model."): LowRank(weights[f"{path}{ending}"], weights[f"{path}.lora_B.weight"])
        for path in paths
    }


def _packed_matrices(folder: Path, card: DeltaCard) -> dict[str, MatrixDelta]:
    from safetensors.torch import load_file

    parts: dict[str, Tensors] = {}
    for name, tensor in load_file(folder / PACKED).items():
        path, _, part = name.rpartition(".")
        parts.setdefault(path, {})[part] = tensor
    shapes = card.facts["shapes"]
    form = _PACKED_FORMS[card.method]
    return {path: form.from_tensors(tensors, (shapes[path][0], shapes[path][1])) for path, tensors in parts.items()}


# --- bits ---


def pack_codes(codes: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    """codes: (rows, n) int8, a row of b bits from -2^(b-1) up; -> uint8, row after row, each from a new byte on."""
    rows = [_packed_row(row, int(count)) for row, count in zip(codes.numpy(), bits.tolist(), strict=True)]
    return torch.from_numpy(np.concatenate(rows)) if rows else torch.zeros(0, dtype=torch.uint8)


def unpack_codes(packed: torch.Tensor, bits: torch.Tensor, length: int) -> torch.Tensor:
    """-> (rows, length) int8"""
    codes = np.zeros((len(bits), length), dtype=np.int8)
    data, begin = packed.numpy(), 0
    for row, count in enumerate(bits.tolist()):
        end = begin + -(-length * count // 8)
        digits = np.unpackbits(data[begin:end], count=length * count).reshape(length, count)
        codes[row] = (digits @ (1 << np.arange(count)[::-1])).astype(np.int16) - (1 << (count - 1))
        begin = end
    return torch.from_numpy(codes)


def _packed_row(codes: np.ndarray, count: int) -> np.ndarray:
    unsigned = codes.astype(np.int16) + (1 << (count - 1))
    return np.packbits((unsigned[:, None] >> np.arange(count)[::-1] & 1).astype(np.uint8))


def gaps_of(places: torch.Tensor) -> torch.Tensor:
    """Rising places as a byte each: how many are left out before it; 255 leaves out 255 and names none.

    [0, 2, 600] -> [0, 1, 255, 255, 87]
    """
    gaps = np.diff(places.numpy(), prepend=-1) - 1
    skips = gaps // 255
    coded = np.full(len(gaps) + int(skips.sum()), 255, dtype=np.uint8)
    coded[np.arange(len(gaps)) + np.cumsum(skips)] = gaps % 255
    return torch.from_numpy(coded)


def places_of(gaps: torch.Tensor) -> torch.Tensor:
    """The inverse of `gaps_of`."""
    coded = gaps.numpy().astype(np.int64)
    is_place = coded < 255
    return torch.from_numpy((np.cumsum(coded + is_place) - 1)[is_place])
