"""The ops of fastmask: packed bits in, tensors out. One op, one folder."""

from fastmask.ops.compressed_linear.op import compress, compressed_linear, decompress
from fastmask.ops.learned_conv2d.op import learned_conv2d
from fastmask.ops.learned_linear.op import learned_linear
from fastmask.ops.learned_linear_step_.op import learned_linear_step_
from fastmask.ops.learned_weight.op import learned_weight
from fastmask.ops.learned_weights.op import learned_weights
from fastmask.ops.masked_adamw_.op import masked_adamw_
from fastmask.ops.masked_conv2d.op import masked_conv2d
from fastmask.ops.masked_linear.op import masked_linear
from fastmask.ops.masked_sgd_.op import masked_sgd_
from fastmask.ops.masked_weights.op import masked_weights
from fastmask.ops.pack.op import pack
from fastmask.ops.popcount.op import popcount
from fastmask.ops.restore_frozen_.op import restore_frozen_
from fastmask.ops.sample_mask.op import draw_seed, sample_mask
from fastmask.ops.topk_mask.op import topk_mask
from fastmask.ops.unpack.op import unpack

__all__ = [
    "compress",
    "compressed_linear",
    "decompress",
    "draw_seed",
    "learned_conv2d",
    "learned_linear",
    "learned_linear_step_",
    "learned_weight",
    "learned_weights",
    "masked_adamw_",
    "masked_conv2d",
    "masked_linear",
    "masked_sgd_",
    "masked_weights",
    "pack",
    "popcount",
    "restore_frozen_",
    "sample_mask",
    "topk_mask",
    "unpack",
]
