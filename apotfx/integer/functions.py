"""The functions that a program may call: those of torch that compute a value from their arguments alone.

A program names a function by where it lives, such as "torch.cat", "Tensor.view", "functional.gelu" or "operator.add".
Nothing else can be called, so that a program from a stranger runs no code but this.
"""

import math
import operator
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from apotfx.graph import functional as writes
from apotfx.graph.modularize import exchange_last_two
from apotfx.graph.tracing import require_argument, require_as_traced

# Of torch and of tensors; what ends in an underscore is written without it, as no step changes a value.
TORCH = """
    abs absolute acos acosh add addbmm addcdiv addcmul addmm addmv addr all allclose amax amin aminmax angle any arange
    arccos arccosh arcsin arcsinh arctan arctan2 arctanh argmax argmin argsort asin asinh atan atan2 atanh atleast_1d
    atleast_2d atleast_3d baddbmm bfloat16 bitwise_and bitwise_not bitwise_or bitwise_xor bmm bool broadcast_tensors
    broadcast_to bucketize cartesian_prod cat cdist ceil celu chunk clamp clamp_max clamp_min clip clone column_stack
    concat concatenate contiguous conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d copysign cos
    cosh cosine_similarity count_nonzero cross cummax cummin cumprod cumsum deg2rad detach diag diag_embed diagonal diff
    dim dist div divide dot double dsplit dstack einsum elu embedding eq erf erfc exp exp2 expand expand_as expm1 eye
    flatten flip fliplr flipud float floor floor_divide fmax fmin fmod frac full full_like gather ge gelu ger greater
    greater_equal group_norm gt half hardshrink heaviside hsplit hstack hypot index_add index_copy index_fill index_put
    index_select inner int isclose isfinite isin isinf isnan item kron kthvalue layer_norm ldexp le lerp less less_equal
    linspace log log10 log1p log2 log_softmax logaddexp logcumsumexp logical_and logical_not logical_or logical_xor logit
    logsumexp long lt masked_fill masked_scatter masked_select matmul max maximum mean median meshgrid min minimum mish
    mm movedim moveaxis mul multiply mv nan_to_num nanmean nansum narrow ndimension ne neg negative new_full new_ones
    new_tensor new_zeros nonzero norm normalize not_equal numel one_hot ones ones_like outer pad permute pixel_shuffle
    pixel_unshuffle polar positive pow prelu prod quantile rad2deg ravel real reciprocal relu relu6 remainder renorm
    repeat repeat_interleave reshape reshape_as rms_norm roll rot90 round rsqrt rsub scalar_tensor scatter scatter_add
    searchsorted select selu sgn short sigmoid sign silu sin sinc sinh size slice_scatter softmax sort split
    split_with_sizes sqrt square squeeze stack std std_mean sub subtract sum swapaxes swapdims t take take_along_dim tan
    tanh tensor tensor_split tensordot threshold tile to topk trace transpose tril triu true_divide trunc type_as unbind
    unflatten unfold unique unsqueeze var var_mean view view_as view_as_complex view_as_real vsplit vstack where xlogy
    zeros zeros_like
"""
FUNCTIONAL = """
    adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d
    adaptive_max_pool3d avg_pool1d avg_pool2d avg_pool3d bilinear celu channel_shuffle conv1d conv2d conv3d
    conv_transpose1d conv_transpose2d conv_transpose3d cosine_similarity elu embedding fold gelu glu grid_sample
    group_norm hardshrink hardsigmoid hardswish hardtanh instance_norm interpolate layer_norm leaky_relu linear
    local_response_norm log_softmax logsigmoid lp_pool1d lp_pool2d max_pool1d max_pool2d max_pool3d mish normalize one_hot
    pad pairwise_distance pixel_shuffle pixel_unshuffle prelu relu relu6 rms_norm scaled_dot_product_attention selu sigmoid
    silu softmax softmin softplus softshrink softsign tanh tanhshrink threshold unfold upsample
"""
OPERATORS = """
    abs add and_ contains eq floordiv ge getitem gt invert le lt matmul mod mul ne neg not_ or_ pos pow sub truediv xor
"""
ATTRIBUTES = "T mT H mH shape dtype device ndim data real imag layout is_cuda"
MATH = "sqrt exp log log2 floor ceil prod pow"


def _setitem(x: Tensor, key: object, value: object) -> Tensor:
    x = x.clone()
    x[key] = value
    return x


def _view(x: Tensor, *shape: object) -> Tensor:
    """However x lies in memory, which is no part of a program."""
    return x.view(*shape) if isinstance(shape[0], torch.dtype) else x.reshape(*shape)


def _named(prefix: str, owner: object, names: str) -> dict[str, Callable]:
    return {f"{prefix}.{name}": getattr(owner, name) for name in names.split() if hasattr(owner, name)}


FUNCTIONS: dict[str, Callable] = {
    **_named("torch", torch, TORCH),
    **_named("Tensor", Tensor, TORCH),
    **_named("functional", functional, FUNCTIONAL),
    **_named("operator", operator, OPERATORS),
    **_named("math", math, MATH),
    **{f"attribute.{name}": operator.attrgetter(name) for name in ATTRIBUTES.split()},
    "Tensor.view": _view,
    "setitem": _setitem,
    "store": writes.store,
    "see": writes.see,
    "exchange_last_two": exchange_last_two,
    "require_argument": require_argument,
    "require_as_traced": require_as_traced,
    "torch._assert": torch._assert,
    "dict": dict,
}

# Modules of torch that call one function on their input: which, and the attributes that they pass, by its parameters.
MODULES: dict[type[nn.Module], tuple[str, dict[str, str]]] = {
    cls: (f"functional.{name}", {x.partition(":")[0]: x.rpartition(":")[2] for x in arguments.split()})
    for cls, name, arguments in (
        (nn.GELU, "gelu", "approximate"), (nn.SiLU, "silu", ""), (nn.Mish, "mish", ""), (nn.Hardswish, "hardswish", ""),
        (nn.Hardsigmoid, "hardsigmoid", ""), (nn.Sigmoid, "sigmoid", ""), (nn.Tanh, "tanh", ""), (nn.ELU, "elu", "alpha"),
        (nn.CELU, "celu", "alpha"), (nn.SELU, "selu", ""), (nn.LeakyReLU, "leaky_relu", "negative_slope"),
        (nn.PReLU, "prelu", "weight"), (nn.Softplus, "softplus", "beta threshold"), (nn.Softsign, "softsign", ""),
        (nn.Hardtanh, "hardtanh", "min_val max_val"), (nn.ReLU, "relu", ""), (nn.ReLU6, "relu6", ""),
        (nn.LogSigmoid, "logsigmoid", ""), (nn.Softmax, "softmax", "dim"), (nn.LogSoftmax, "log_softmax", "dim"),
        (nn.GLU, "glu", "dim"), (nn.Threshold, "threshold", "threshold value"), (nn.Tanhshrink, "tanhshrink", ""),
        (nn.LayerNorm, "layer_norm", "normalized_shape weight bias eps"), (nn.RMSNorm, "rms_norm", "normalized_shape weight eps"),
        (nn.GroupNorm, "group_norm", "num_groups weight bias eps"), (nn.Embedding, "embedding", "weight padding_idx"),
        (nn.LocalResponseNorm, "local_response_norm", "size alpha beta k"),
        (nn.Upsample, "interpolate", "size scale_factor mode align_corners recompute_scale_factor"),
        (nn.PixelShuffle, "pixel_shuffle", "upscale_factor"), (nn.PixelUnshuffle, "pixel_unshuffle", "downscale_factor"),
        (nn.ChannelShuffle, "channel_shuffle", "groups"), (nn.Flatten, "", ""),
        (nn.AdaptiveMaxPool1d, "adaptive_max_pool1d", "output_size"),
        (nn.AdaptiveMaxPool2d, "adaptive_max_pool2d", "output_size"),
        (nn.ZeroPad2d, "pad", "pad:padding value"), (nn.ConstantPad1d, "pad", "pad:padding value"),
        (nn.ConstantPad2d, "pad", "pad:padding value"), (nn.ConstantPad3d, "pad", "pad:padding value"),
    )
}  # fmt: skip
MODULES[nn.Flatten] = ("torch.flatten", {"start_dim": "start_dim", "end_dim": "end_dim"})
