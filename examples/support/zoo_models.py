"""The models of the zoo: torchvision's, one of each module of timm, and any of one's own.

A model is named ``torchvision/resnet18``, ``torchvision.segmentation/fcn_resnet50``,
``timm/vit_tiny_patch16_224``, or ``package.module:function`` for a function that returns one.
"""

from __future__ import annotations

import copy
import fnmatch
import importlib
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from lean_fx.errors import ArgumentError, one_line, require
from support.zoo_timm import SMALLEST

#: Pixels a side that are tried for a model, in order.
SIZES = (64, 96, 128, 224, 256, 299, 384, 448, 512)
_OPERATORS: list[torch.library.Library] = []  # a library's operators last as long as it does


def torchvision_models() -> ModuleType:
    """Import torchvision.models, also where torchvision's C extension does not load.

    Raises:
        MissingDependencyError: torchvision is not installed.
    """
    if not _OPERATORS:
        library: Any = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
        for operator in ("nms", "qnms"):  # its import asks for them
            if not hasattr(torch.ops.torchvision, operator):
                library.define(f"{operator}(Tensor dets, Tensor scores, float threshold) -> Tensor")
        _OPERATORS.append(library)
    return require("torchvision.models", purpose="the zoo")


def catalogue() -> list[str]:
    """The names of the whole zoo.

    Of timm it has the smallest variant of each module, of modules unknown to
    :mod:`~support.zoo_timm` the first.

    Raises:
        MissingDependencyError: torchvision or timm is not installed.
    """
    models = torchvision_models()
    timm = require("timm", purpose="the zoo")
    segmentation = importlib.import_module("torchvision.models.segmentation")
    names = [f"torchvision/{name}" for name in models.list_models(module=models)]
    names += [
        f"torchvision.segmentation/{name}" for name in models.list_models(module=segmentation)
    ]
    for module in timm.list_modules():
        every = timm.list_models(module=module)
        variants = [name for name in every if not name.startswith("test_")]
        known = [name for name in variants if name in SMALLEST]
        names += [f"timm/{name}" for name in known or variants[:1]]
    return names


def choose(patterns: str, names: Sequence[str]) -> list[str]:
    """The names that match a list of names and glob patterns, separated by commas.

    A name outside ``names`` is taken as it is.

    Raises:
        ArgumentError: a glob pattern matches none, or there is no name.

    Example:
        >>> choose("torchvision/res*,timm/vit", ["torchvision/resnet18", "torchvision/vgg11"])
        ['torchvision/resnet18', 'timm/vit']
    """
    chosen: list[str] = []
    for pattern in filter(None, map(str.strip, patterns.split(","))):
        found = fnmatch.filter(names, pattern)
        if not found and set(pattern) & set("*?["):
            raise ArgumentError(f"models: {pattern!r} matches no name; use torchvision/*, timm/*")
        chosen += found or [pattern]
    if not chosen:
        raise ArgumentError(f"models: {patterns!r} names none; use torchvision/*, timm/*")
    return list(dict.fromkeys(chosen))


def build(name: str) -> nn.Module:
    """Make a model by name, with random weights, in eval mode.

    Raises:
        ArgumentError: it has none of the forms above.
        MissingDependencyError: its package is not installed.

    Example:
        >>> type(build("support.models:PaperNet")).__name__
        'PaperNet'
    """
    source, slash, variant = name.partition("/")
    if slash and source in ("torchvision", "torchvision.segmentation"):
        models = torchvision_models()
        more: dict[str, Any] = {}
        if variant in ("googlenet", "inception_v3"):
            more = {"init_weights": False}  # which takes a minute, by SciPy
        elif source != "torchvision":
            more = {"weights_backbone": None}
        model = models.get_model(variant, weights=None, **more)
    elif slash and source == "timm":
        torchvision_models()
        model = require("timm", purpose="the zoo").create_model(variant, pretrained=False)
    elif ":" in name:
        module, _, function = name.partition(":")
        model = getattr(importlib.import_module(module), function)()
    else:
        raise ArgumentError(
            f"model {name!r} is not known; use torchvision/NAME, torchvision.segmentation/NAME, "
            "timm/NAME or MODULE:FUNCTION"
        )
    made: nn.Module = model.eval()
    return made


def models_at_sizes(text: str, batch: int = 1) -> Iterator[tuple[str, nn.Module, Tensor]]:
    """Models with random images, of names with the pixels a side behind an @ that commas separate.

    Raises:
        ArgumentError: as :func:`build`, or a size is missing.

    Example:
        >>> [(name, len(x)) for name, _, x in models_at_sizes("support.models:PaperNet@96", 2)]
        [('support.models:PaperNet@96', 2)]
    """
    for each in filter(None, map(str.strip, text.split(","))):
        name, _, size = each.partition("@")
        if not size.isdecimal():
            raise ArgumentError(f"model {each!r} has no size; use torchvision/resnet18@96")
        yield each, build(name), torch.rand(batch, 3, int(size), int(size))


def fitting_images(model: nn.Module, batch: int = 2) -> Tensor:
    """Random images ``[batch, 3, size, size]`` of the smallest of ``SIZES`` that a model takes.

    It is to take them in training too, unless it takes no size in training.

    Raises:
        ArgumentError: it takes none.

    Example:
        >>> fitting_images(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 2)))
        Traceback (most recent call last):
        ...
        lean_fx.errors.ArgumentError: Sequential: takes no images of 64 to 512 pixels a side (mat1 \
and mat2 shapes cannot be multiplied (2x2080800 and 8x2))
    """
    taken: list[Tensor] = []
    reason = ""
    for size in SIZES:
        images = torch.rand(batch, 3, size, size)
        reason = why_not(model, images)
        if not reason:
            taken.append(images)
            # A copy, as batch norm changes its statistics.
            if not why_not(copy.deepcopy(model).train(), images):
                return images
    if taken:
        return taken[0]
    raise ArgumentError(
        f"{type(model).__name__}: takes no images of {SIZES[0]} to {SIZES[-1]} pixels a side "
        f"({reason})"
    )


def why_not(model: nn.Module, images: Any) -> str:
    """Why a model cannot run on images, in one line; empty if it can."""
    try:
        with torch.no_grad():
            model(images)
    except Exception as error:  # a model's own code may raise anything
        return one_line(error, 200)
    return ""
