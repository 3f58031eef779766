"""The allowlists for names in a pickle: the modules from which classes may come, and the functions and plain objects in a model.

The source of all of these was reviewed, and does no harm with any arguments or attributes.
"""

from __future__ import annotations

import re

import torch

from normswap.models.torch_private import STORAGE_CLASSES

# Where nn.Module classes may come from. Importing one of these modules defines classes and does nothing else: no scripts (the
# convert_* files of transformers), no compilers of code (torch.fx, torch.jit, torch.package), nothing quantised. Of transformers,
# not the four families whose forward fetches compiled kernels from the hub.
PLACES = re.compile(
    r"""torch\.nn\.modules\.[a-z]\w*
    | torchvision\.(models|ops)(\._?[a-z]\w*)*
    | timm\.(models|layers)(\._?[a-z]\w*)*
    | transformers\.(activations|pytorch_utils|modeling_layers|models\.(?!rwkv|yoso|sam3_video|mra\b)\w+\.modeling_\w+)
    | normswap(\.(?!cli)[a-z]\w*)+""",
    re.VERBOSE,
)
CONFIGS = re.compile(r"transformers\.models\.\w+\.configuration_\w+")
# Refused even in packages that the user trusts, as instances of these carry code.
CODE_CARRIERS = re.compile(r"torch\.(jit|fx|package|export|ao|_\w+)(\..*)?")
# Classes that may be values, and so may be called with any arguments: their constructors only make layers.
VALUE_CLASSES = re.compile(
    r"torch\.nn\.modules\.(activation|batchnorm|instancenorm|normalization|linear|conv|dropout|pooling|flatten)\.\w+"
    r"|timm\.layers\.(norm|norm_act|activations|activations_me|frozen_bn|filter_response_norm|evo_norm)\.\w+"
    r"|timm\.models\.nextvit\.Next(Conv|Transformer)Block"
)

# Functions that a model may keep as an attribute and call: tensor mathematics, harmless with any arguments.
_FUNCTIONAL = """
    celu elu gelu glu hardshrink hardsigmoid hardswish hardtanh leaky_relu logsigmoid mish prelu relu relu6 rrelu selu sigmoid silu softmax
    softplus softshrink softsign tanh tanhshrink layer_norm group_norm batch_norm instance_norm rms_norm normalize dropout interpolate
    max_pool2d avg_pool2d adaptive_avg_pool2d adaptive_max_pool2d
"""
FUNCTIONS = frozenset(
    {
        "torch._C._nn.gelu",
        "torch._C._nn.silu",
        "torch.tanh",
        "torch.sigmoid",
        "torch.relu",
        *(f"torch.nn.functional.{name}" for name in _FUNCTIONAL.split()),
        "torchvision.ops.boxes.box_iou",
        "torchvision.models.optical_flow.raft._pass_through_h",
    }
)

# Plain data that models carry: instantiated without a constructor, filled from a dict of data.
OBJECTS = frozenset(
    {
        "torchvision.models.detection._utils.BoxCoder",
        "torchvision.models.detection._utils.BoxLinearCoder",
        "torchvision.models.detection._utils.Matcher",
        "torchvision.models.detection._utils.SSDMatcher",
        "torchvision.models.detection._utils.BalancedPositiveNegativeSampler",
        "torchvision.models.detection.image_list.ImageList",
        "torchvision.ops.poolers.LevelMapper",
        "timm.models._features.FeatureInfo",
        "transformers.generation.configuration_utils.GenerationConfig",
        "normswap.layer.batchless_norm.Source",
        "normswap.layer.hooks.Before",
        "normswap.layer.hooks.After",
        "normswap.layer.rms_norm.CentreInput",
        "normswap.layer.rms_norm.CentreOutput",
    }
)
# The only hooks that a file may contain, by the attribute that holds them: those of a conv or linear that a BatchlessNorm is coupled to,
# and those that centre what a module takes or returns.
HOOKS = {
    "_forward_pre_hooks": frozenset({"normswap.layer.hooks.Before", "normswap.layer.rms_norm.CentreInput"}),
    "_forward_hooks": frozenset({"normswap.layer.hooks.After", "normswap.layer.rms_norm.CentreOutput"}),
}
FLAGS_OF_HOOKS = frozenset({"_forward_pre_hooks_with_kwargs", "_forward_hooks_always_called"})

DTYPES = frozenset(str(value) for value in vars(torch).values() if isinstance(value, torch.dtype))
STORAGES = frozenset(f"{cls.__module__}.{cls.__name__}" for cls in STORAGE_CLASSES)
TENSOR_TYPES = frozenset({"torch.Tensor", "torch.nn.parameter.Parameter"})
