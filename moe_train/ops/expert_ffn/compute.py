"""The door to the experts of a rank: picks the method and lays out the rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_train.config.model import Compute
from moe_train.ops.expert_ffn.function import ExpertFFN, How
from moe_train.ops.expert_ffn.networks import Networks, expert_ffn_reference
from moe_train.ops.expert_ffn.segments import Segments, counts_of, exact_segments, filled_up, round_up
from moe_train.ops.grouped_gemm import BatchedProducts, GroupedProducts, LoopProducts, Products

BLOCK_ROWS = 8192
"""Rows after which a block of the loop ends on a CPU: measured; smaller ones lose up to a tenth, larger ones gain
nothing and need more memory (docs/performance.md)."""
WORTH_PADDING = 1.3
"""On a CPU one batched product of halves beats a loop of small ones by up to as much (docs/performance.md): it may have
so many times the experts' rows."""
FEW_ROWS = 384
"""Rows of the fullest expert up to which products are small; with 465 and with 1,100 a batch was no quicker."""
HALVES = (torch.bfloat16, torch.float16)
"""Dtypes for which accelerators have a product for groups."""
BUILT_BY_SHAPE = HALVES
"""Dtypes for whose products a kernel is built for each shape, on a CPU: rows are filled up to sizes that recur."""


def expert_ffn(
    rows_RD: Tensor,
    experts_RK: Tensor,
    weights_RK: Tensor,
    num_assignments: int,
    networks: Networks,
    compute: Compute = "auto",
) -> Tensor:
    """Return for each token the sum over its experts of weight · (down(activation(up(x)))).

    The methods of ``compute`` are equal but for rounding. All but the reference can be differentiated once, write the
    gradient of each parameter once in the parameter's dtype, and give zeros to experts without rows.

    Args:
        rows_RD: [R, D] tokens; their dtype is that of all products.
        experts_RK: [R, K] int64, expert of each choice among the L of the networks, or L for none.
        weights_RK: [R, K] weight of each choice; means nothing, and gets no gradient, where there is no expert.
        num_assignments: number of entries of ``experts_RK`` below L.
        networks: the experts; each parameter may be kept in a wider dtype than that of the rows, and is cast in use.
        compute: the method.

    Returns:
        [R, D] in the dtype of the rows.
    """
    method = choose(rows_RD, compute)
    if method == "reference":
        return expert_ffn_reference(rows_RD, experts_RK, weights_RK, networks)
    counts_L = counts_of(experts_RK, networks.num_held)
    segments = exact_segments(experts_RK, networks.num_held, num_assignments)
    segments, products = lay_out(segments, counts_L, method, rows_RD, experts_RK.numel(), compute == "auto")
    parameters = (networks.up_LDF, networks.down_LFD, networks.up_bias_LF, networks.down_bias_LD)
    how = How(networks.activation, products)
    sums_RD: Tensor = ExpertFFN.apply(rows_RD, weights_RK, *parameters, segments, how)  # type: ignore[no-untyped-call]
    return sums_RD


def choose(rows_RD: Tensor, compute: Compute) -> Compute:
    """Return the method for these rows, given what is asked for.

    auto: groups where torch has a kernel for them, else the loop, for which `lay_out` may take a batch when it knows
    the load. Where torch's product for groups does not know the dtype, those who ask for it get the loop too.
    """
    on_cpu, is_half = rows_RD.device.type == "cpu", rows_RD.dtype in HALVES
    if compute == "auto":
        return "grouped_mm" if is_half and not on_cpu else "loop"
    can_group = is_half or (on_cpu and rows_RD.dtype == torch.float32)
    return "loop" if compute == "grouped_mm" and not can_group else compute


def is_even(counts: Sequence[int], size: int) -> bool:
    """Return whether all experts are better padded to one size; one that is idle would copy another's token."""
    return min(counts) > 0 and size <= FEW_ROWS and len(counts) * size <= WORTH_PADDING * sum(counts)


def lay_out(
    segments: Segments, counts_L: Tensor, method: Compute, rows_RD: Tensor, num_choices: int, by_load: bool = False
) -> tuple[Segments, Products]:
    """Return the rows as a method wants them, and the method.

    Args:
        segments: exact ones.
        counts_L: [L] int64, their rows.
        method: loop, bmm or grouped_mm.
        rows_RD: [R, D] tokens.
        num_choices: R · K.
        by_load: whether the loop may become a batch.
    """
    if method == "grouped_mm":
        return segments, GroupedProducts(counts_L, segments.num_rows)
    on_cpu = rows_RD.device.type == "cpu"
    counts = counts_L.tolist()
    sizes = [round_up(n) for n in counts] if on_cpu and rows_RD.dtype in BUILT_BY_SHAPE else counts
    if by_load and on_cpu and rows_RD.dtype in HALVES and is_even(counts, max(sizes)):
        method = "bmm"
    if method == "bmm":
        sizes = [max(sizes)] * len(sizes)
    if sizes != counts:
        segments = filled_up(segments, counts_L, sizes, num_choices)
    if method == "bmm":
        return segments, BatchedProducts(len(sizes), sizes[0], block_rows=max(1, segments.num_rows))
    return segments, LoopProducts(sizes, BLOCK_ROWS if on_cpu else max(1, segments.num_rows))
