"""Several compressed fine-tunes of one base in one forward: each row adds its own delta, the base runs once.

    y = W x + Δ_m x          for a row that belongs to member m

Low rank, whatever its precision, is stacked for all members as adapters are (`adapters.StackedLora`): two products per
layer. Singular vectors of 2 and 3 bits stay packed in four. Signs and sparse deltas are a product per member and layer.
Vectors and embeddings that a member keeps are looked up per row; a head of its own is a product per member.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ensemble_server.ensembles.errors import ModelLoadError
from ensemble_server.server.engines.transformers_engine.adapters import AdapterRows, StackedLora
from ensemble_server.server.engines.transformers_engine.four_bit import GROUP as FOUR_BIT_GROUP
from ensemble_server.server.engines.transformers_engine.four_bit import FourBitMatrix, has_four_bit_products
from ensemble_server.server.weights.deltas import (
    GROUP,
    Delta,
    LowRank,
    MatrixDelta,
    MixedLowRank,
    SignPlanes,
    Sparse,
    check_base,
    read_delta,
)

FEW_BITS = 3  # up to here codes are kept in four bits; components of more are few
NORM_TOLERANCE = 1e-4


def stack_deltas(model: PreTrainedModel, deltas: Mapping[str, Path], rows: AdapterRows, head_rows: AdapterRows) -> None:
    """Wrap, in place, what the deltas change.

    deltas: name -> folder; rows: of all tokens, head_rows: of those that logits are wanted of; both know all names.
    Raises `ModelLoadError` naming the delta if it was made for another base, or changes what rows cannot have of their
    own here.
    """
    wrap_layers(model, {name: _read(name, folder, model) for name, folder in deltas.items()}, rows, head_rows)


def wrap_layers(model: PreTrainedModel, read: Mapping[str, Delta], rows: AdapterRows, head_rows: AdapterRows) -> None:
    """`stack_deltas` for deltas that are read already, and of this base."""
    head: Any = model.get_output_embeddings()
    shared: dict[int, list[str]] = {}  # a parameter -> the modules that have it as their weight: embeddings may be tied
    for path, module in model.named_modules():
        weight: Any = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter):
            shared.setdefault(id(weight), []).append(path)

    kept: dict[str, dict[str, dict[str, torch.Tensor]]] = {}  # module -> weight or bias -> member -> tensor
    parameters = dict(_parameters(model))
    for name, delta in read.items():
        for parameter, tensor in delta.kept.items():
            if parameter not in parameters or parameters[parameter].shape != tensor.shape:
                raise ModelLoadError(
                    f"delta {name!r} keeps {parameter} of shape {tuple(tensor.shape)}, unlike its base"
                )
            path, _, attribute = parameter.rpartition(".")
            places = shared.get(id(parameters[parameter]), [path]) if attribute == "weight" else [path]
            for place in places:
                kept.setdefault(place.removesuffix(".base"), {}).setdefault(attribute, {})[name] = tensor

    for path in sorted({path for delta in read.values() for path in delta.matrices}):
        matrices = {name: delta.matrices[path] for name, delta in read.items() if path in delta.matrices}
        _replace(model, path, _with_matrices(model.get_submodule(path), matrices, rows))
    for path, own in kept.items():
        module = model.get_submodule(path)
        _replace(model, path, _with_kept(path, module, own, head_rows if module is head else rows, model.dtype))


def _read(name: str, folder: Path, model: PreTrainedModel) -> Delta:
    try:
        delta = read_delta(folder)
        layers = {path: model.get_submodule(path) for path in delta.matrices if _has(model, path)}
        check_base(delta.probes, {path: _matrix_of(layer) for path, layer in layers.items()})
        for path, matrix in delta.matrices.items():
            if (shape := _shape_of(matrix)) != tuple(_matrix_of(layers[path]).shape):
                raise ModelLoadError(f"{path} has the shape {shape} in it, unlike in its base")
    except ModelLoadError as exc:
        raise ModelLoadError(f"delta {name!r} at {folder}: {exc}") from exc
    return delta


def _parameters(model: PreTrainedModel) -> Iterator[tuple[str, nn.Parameter]]:
    """By the names that they have in a plain model: an adapter may stand before their layer."""
    for name, parameter in model.named_parameters():
        yield name.replace(".base.", "."), parameter


def _plain(layer: nn.Module) -> Any:
    return layer.base if isinstance(layer, StackedLora) else layer


def _matrix_of(layer: nn.Module) -> torch.Tensor:
    """(out, in)"""
    plain = _plain(layer)
    return plain.weight.T if isinstance(plain, Conv1D) else plain.weight


def _shape_of(matrix: MatrixDelta) -> tuple[int, int]:
    match matrix:
        case LowRank():
            return matrix.b.shape[0], matrix.a.shape[1]
        case MixedLowRank():
            return matrix.b_codes.shape[1], matrix.a_codes.shape[1]
        case SignPlanes():
            return matrix.signs.shape[1], matrix.signs.shape[2]
        case Sparse():
            return matrix.shape
    raise AssertionError(f"an unknown form, {type(matrix).__name__}")


def _has(model: nn.Module, path: str) -> bool:
    try:
        return isinstance(_plain(model.get_submodule(path)), nn.Linear | Conv1D)
    except AttributeError:
        return False


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, attribute = path.rpartition(".")
    setattr(model.get_submodule(parent), attribute, module)


# --- matrices ----------------------------------------------------------------------------------------------------


def _with_matrices(layer: nn.Module, matrices: Mapping[str, MatrixDelta], rows: AdapterRows) -> nn.Module:
    like = _plain(layer).weight
    can_pack = like.device.type == "cpu" and has_four_bit_products()
    mixed = {name: matrix for name, matrix in matrices.items() if isinstance(matrix, MixedLowRank)}
    few = {name: components for name, matrix in mixed.items() if can_pack and (components := _few_bits(matrix))}
    factors: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    products: dict[str, nn.Module] = {}
    for name, matrix in matrices.items():
        match matrix:
            case LowRank():
                factors[name] = matrix.a, matrix.b
            case MixedLowRank():
                num = matrix.bits.gt(FEW_BITS).sum() if name in few else len(matrix.bits)
                if num:
                    factors[name] = matrix.a()[:num], matrix.b()[:, :num]
            case SignPlanes():
                products[name] = FourBitSigns(matrix) if can_pack else PackedSigns(matrix, like)
            case Sparse():
                products[name] = SparseProduct(matrix, like)
    if factors:
        ranks = tuple(len(factors[name][0]) if name in factors else 0 for name in rows.names)
        a, b = zip(*(factors[name] for name in rows.names if name in factors), strict=True)
        layer = StackedLora(layer, [one.to(like) for one in a], [one.to(like) for one in b], ranks, rows)
    if few:
        layer = StackedFewBits(layer, few, rows)
    return RowProducts(layer, products, rows) if products else layer


def _few_bits(matrix: MixedLowRank) -> MixedLowRank | None:
    """The components that are kept in four bits."""
    few = matrix.bits <= FEW_BITS
    if not few.any():
        return None
    return MixedLowRank(
        matrix.bits[few], matrix.a_codes[few], matrix.a_scales[few], matrix.b_codes[few], matrix.b_scales[few]
    )


class StackedFewBits(nn.Module):
    """A layer and the low-rank deltas of all members that touch it, codes of 2 and 3 bits in four.

    A number is (code + 1/2) · scale, so its offset is half its scale. B's scales are one per component: they are put
    on what A gives.
    """

    scales: torch.Tensor

    def __init__(self, base: nn.Module, matrices: Mapping[str, MixedLowRank], rows: AdapterRows) -> None:
        super().__init__()
        self.base, self.rows = base, rows
        self.ranks = tuple(len(matrices[name].bits) if name in matrices else 0 for name in rows.names)
        parts = [matrices[name] for name in rows.names if name in matrices]
        a_scales = (
            torch.cat([part.a_scales for part in parts]).float().repeat_interleave(GROUP // FOUR_BIT_GROUP, dim=1)
        )
        a_codes = torch.cat([part.a_codes for part in parts])
        a_scales = a_scales[:, : -(-a_codes.shape[1] // FOUR_BIT_GROUP)]
        self.a = FourBitMatrix(a_codes, a_scales, a_scales / 2)
        b_codes = torch.cat([part.b_codes for part in parts]).T
        self.b = FourBitMatrix(b_codes, torch.ones(len(b_codes), 1), torch.full((len(b_codes), 1), 0.5))
        self.register_buffer("scales", torch.cat([part.b_scales for part in parts]).float())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.base(x)  # (1, T, out)
        low_rank = self.a(x[0]).mul_(self.scales).mul_(self.rows.mask(self.ranks))
        return y.add_(self.b(low_rank))


class RowProducts(nn.Module):
    """A layer, and to the rows of some members the product with a matrix of their own."""

    def __init__(self, base: nn.Module, products: Mapping[str, nn.Module], rows: AdapterRows) -> None:
        super().__init__()
        self.base, self.rows, self.names = base, rows, tuple(products)
        self.products = nn.ModuleList(products.values())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.base(x)  # (1, T, out)
        for name, product in zip(self.names, self.products, strict=True):
            if (places := self.rows.places(name)) is not None:
                y[0].index_add_(0, places, product(x[0, places]))
        return y


class FourBitSigns(nn.Module):
    """x -> Σ_i s_i · x sign(R_i)ᵀ, a bit in four: there are products with these, and none with single bits."""

    def __init__(self, planes: SignPlanes) -> None:
        super().__init__()
        self.planes = nn.ModuleList()
        self.scales = planes.scales.tolist()
        num_out = planes.signs.shape[1]
        for signs in planes.signs:
            codes = signs.to(torch.int8) * 2 - 1
            self.planes.append(FourBitMatrix(codes, torch.ones(num_out, 1), torch.zeros(num_out, 1)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.planes[0](x).mul_(self.scales[0])
        for plane, scale in zip(list(self.planes)[1:], self.scales[1:], strict=True):
            y = y.add_(plane(x), alpha=scale)
        return y


class PackedSigns(nn.Module):
    """The same from single bits, unpacked at each use: for devices that are quick at that."""

    bits: torch.Tensor
    scales: torch.Tensor

    def __init__(self, planes: SignPlanes, like: torch.Tensor) -> None:
        super().__init__()
        self.shape = tuple(planes.signs.shape)
        self.register_buffer("bits", planes.tensors()["signs"].to(like.device))  # (planes, bytes)
        self.register_buffer("scales", planes.scales.to(like))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        num_planes, num_out, num_in = self.shape
        shifts = torch.arange(7, -1, -1, device=self.bits.device, dtype=torch.uint8)
        ones = (self.bits[:, :, None] >> shifts & 1).flatten(1)[:, : num_out * num_in]
        signs = ones.to(x.dtype).mul_(2).sub_(1).view(num_planes, num_out, num_in)
        return x @ torch.einsum("poi,p->oi", signs, self.scales).T


class SparseProduct(nn.Module):
    """x -> x Δᵀ, rows of Δ as lists of what is not zero."""

    matrix: torch.Tensor

    def __init__(self, delta: Sparse, like: torch.Tensor) -> None:
        super().__init__()
        num_out, num_in = delta.shape
        counts = torch.bincount(delta.places // num_in, minlength=num_out)
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch calls sparse rows a beta
            matrix = torch.sparse_csr_tensor(
                starts.int(),
                (delta.places % num_in).int(),
                delta.values.float(),
                size=delta.shape,
                device=like.device,
                check_invariants=True,
            )
        self.register_buffer("matrix", matrix)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.matrix @ x.float().T.contiguous()).T.to(x.dtype)


# --- what members keep as it is ----------------------------------------------------------------------------------


def _with_kept(
    path: str,
    module: Any,
    own: Mapping[str, Mapping[str, torch.Tensor]],
    rows: AdapterRows,
    dtype: torch.dtype,
) -> nn.Module:
    """own: "weight" or "bias" -> member -> tensor."""
    like = next(module.parameters())
    own = {
        attribute: {name: tensor.to(like.device, dtype) for name, tensor in tensors.items()}
        for attribute, tensors in own.items()
    }
    if isinstance(module, nn.Embedding):
        return RowEmbeddings(module, own["weight"], rows)
    if isinstance(module, nn.Linear) and "weight" in own:  # those of the blocks have deltas
        return RowHeads(module, own["weight"], own.get("bias", {}), rows)
    if hasattr(module, "base") or isinstance(module, nn.Linear | Conv1D):
        return RowBiases(module, own["bias"], rows)
    return RowNorms(path, module, own, rows)


class RowEmbeddings(nn.Module):
    """An embedding of which some members have one of their own."""

    def __init__(self, base: nn.Embedding, tables: Mapping[str, torch.Tensor], rows: AdapterRows) -> None:
        super().__init__()
        self.base, self.rows, self.names = base, rows, tuple(tables)
        self.tables = nn.ModuleList(_with_weight(base, table) for table in tables.values())

    @property
    def weight(self) -> torch.Tensor:
        return cast("torch.Tensor", self.base.weight)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        y = self.base(ids)  # (1, T, width)
        for name, table in zip(self.names, self.tables, strict=True):
            if (places := self.rows.places(name)) is not None:
                y[0, places] = table(ids[0, places])
        return y


class RowHeads(nn.Module):
    """An output head of which some members have one of their own."""

    def __init__(
        self,
        base: nn.Module,
        weights: Mapping[str, torch.Tensor],
        biases: Mapping[str, torch.Tensor],
        rows: AdapterRows,
    ) -> None:
        super().__init__()
        self.base, self.rows, self.names = base, rows, tuple(weights)
        self.heads = nn.ModuleList(_with_weight(base, weight, biases.get(name)) for name, weight in weights.items())

    @property
    def weight(self) -> torch.Tensor:
        return cast("torch.Tensor", self.base.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        own = [
            (head, at)
            for name, head in zip(self.names, self.heads, strict=True)
            if (at := self.rows.places(name)) is not None
        ]
        if sum(len(at) for _, at in own) == x.shape[1] > 0:  # the base's is not needed
            y = x.new_empty(1, x.shape[1], self.weight.shape[0])
        else:
            y = self.base(x)
        for head, at in own:
            y[0, at] = head(x[:, at])[0]
        return y


def _with_weight(module: nn.Module, weight: torch.Tensor, bias: torch.Tensor | None = None) -> nn.Module:
    """A module like this one with another weight."""
    own = copy.copy(module)
    own._parameters = dict(module._parameters)
    own.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        own.bias = nn.Parameter(bias, requires_grad=False)
    return own


class RowBiases(nn.Module):
    """A linear layer of which some members have another bias."""

    differences: torch.Tensor

    def __init__(self, base: Any, biases: Mapping[str, torch.Tensor], rows: AdapterRows) -> None:
        super().__init__()
        self.base, self.rows = base, rows
        plain = base
        while hasattr(plain, "base"):
            plain = plain.base
        own = [biases.get(name, plain.bias.detach()) - plain.bias.detach() for name in rows.names]
        self.register_buffer("differences", torch.stack([torch.zeros_like(own[0]), *own]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.base(x)
        y += self.differences[self.rows.owners]
        return y


class RowNorms(nn.Module):
    """A norm of which some members have other weights: normalised once, each row multiplied by its own.

    Raises `ModelLoadError` for a norm that is not normalised(x) · (weight or 1 + weight) + bias.
    """

    gains: torch.Tensor
    biases: torch.Tensor | None

    def __init__(self, path: str, base: Any, own: Mapping[str, Mapping[str, torch.Tensor]], rows: AdapterRows) -> None:
        super().__init__()
        self.rows = rows
        self.token_axis = 1
        weight, bias = base.weight.detach(), getattr(base, "bias", None)
        x = torch.linspace(-1, 2, weight.numel(), dtype=weight.dtype, device=weight.device)[None, None]
        unit = copy.deepcopy(base).requires_grad_(False)
        if bias is not None:
            unit.bias.zero_()
        unit.weight.zero_()
        adds_one = bool(unit(x).abs().max() > 0)  # Gemma's
        unit.weight.fill_(0 if adds_one else 1)
        self.unit = unit
        weights = [own.get("weight", {}).get(name, weight) for name in rows.names]
        self.register_buffer("gains", torch.stack([weight, *weights]) + int(adds_one))
        if bias is None:
            self.biases = None
        else:
            biases = [own.get("bias", {}).get(name, bias.detach()) for name in rows.names]
            self.register_buffer("biases", torch.stack([bias.detach(), *biases]))
        found = unit(x) * self.gains[0] + (0 if self.biases is None else self.biases[0])
        tolerance = NORM_TOLERANCE if weight.dtype == torch.float32 else 100 * NORM_TOLERANCE
        if not (found - base(x)).abs().max() <= tolerance * base(x).abs().max():
            raise ModelLoadError(
                f"{path}, a {type(base).__name__}, has other weights in a delta and cannot have them row by row; "
                "compress with --vectors base"
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        owners = self.rows.owners
        num_tokens = len(owners)
        if x.ndim == 4 and x.shape[1] != x.shape[2]:  # (1, T, heads, width) or (1, heads, T, width)
            self.token_axis = 1 if x.shape[1] == num_tokens else 2
        gains = self.gains[owners]
        biases = None if self.biases is None else self.biases[owners]
        if x.ndim == 4 and self.token_axis == 1:
            gains, biases = gains[:, None], None if biases is None else biases[:, None]
        y = self.unit(x) * gains
        return y if biases is None else y + biases
