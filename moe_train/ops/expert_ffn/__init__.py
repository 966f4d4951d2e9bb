"""The feed-forward networks of a rank's experts, for tokens that chose them: one function with one gradient.

`networks` what it computes, plainly; `compute` the door and the choice of method; `function` forward and backward;
`segments` the rows in order of experts; `pointwise` what stands between the products. The products themselves are in
`moe_train.ops.grouped_gemm`.
"""

from moe_train.ops.expert_ffn.compute import expert_ffn
from moe_train.ops.expert_ffn.networks import Networks, expert_ffn_reference

__all__ = ["Networks", "expert_ffn", "expert_ffn_reference"]
