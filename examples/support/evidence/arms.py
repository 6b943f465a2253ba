"""What is compared: the parts of the evidence and the arms of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

from torch import Tensor, nn

from lean_fx import leanify
from lean_fx.errors import ArgumentError
from lean_fx.measure.costs import count_parameters
from lean_fx.reduction.registry import ReductionFactory, reduction_factory
from support.evidence.nets import (
    DENSENET_SKIP,
    RESNET_SKIP,
    DenseNet,
    ResNet,
    narrow_densenet,
    narrow_resnet,
    nearest_densenet,
    nearest_net,
)
from support.evidence.plain_nets import MIXER_SKIP, VGG_SKIP, Mixer, Vgg
from support.models import PAPER_WIDTHS, PaperNet, narrow_widths, scaled_widths

# Learning rates that are tried, four for each arm. The literal forms need higher ones: their
# outputs are small whatever they read.
USUAL_RATES = (3e-4, 1e-3, 3e-3, 1e-2)
LITERAL_RATES = (1e-3, 3e-3, 1e-2, 3e-2)
#: The size that the paper's net may have to count as a tenth of the baseline.
LIMIT = 40_000

#: The arms of a part's ``baseline`` that stand beside its own.
BESIDE = ("baseline", "narrow")


@dataclass(frozen=True)
class Arm:
    """One row of a table.

    Args:
        name: in tables and file names.
        reduction: a registered name, ``"+matrix"`` behind it for a seed value a channel; empty
            for a net without reductions.
        channels: C' as :func:`lean_fx.leanify` takes it; a tuple is one number for each layer
            behind the first.
        control: ``"narrow"`` or ``"bottleneck"``, of as many parameters as the literal LEAN net,
            or ``"as_fast"``, of the latency of the ``lean_damped`` net.
        rates: learning rates to try.
    """

    name: str
    reduction: str = ""
    channels: int | float | tuple[int, ...] = 10
    control: str = ""
    rates: tuple[float, ...] = USUAL_RATES


@dataclass(frozen=True)
class Part:
    """A net, the pictures it sees, and the arms that are compared there.

    Args:
        name: in tables and file names.
        net: a name in :data:`NETS`.
        pixels: height and width of the pictures, by means of squares of those of 96.
        epochs: of a run that counts.
        search_epochs: of a run that chooses the learning rate.
        arms: the rows, the baseline first if there is one.
        augment: flips and shifts of the training pictures.
        best: train no more arms than so many to the end, the best in validation; None for all.
        baseline: the part whose arms :data:`BESIDE` stand beside these.
        seconds: rough time of an epoch of a usual arm, for the expected end alone.
        heavy: how many times that an epoch of the baseline takes.
    """

    name: str
    net: str
    pixels: int
    epochs: int
    search_epochs: int
    arms: tuple[Arm, ...]
    augment: bool = False
    best: int | None = None
    baseline: str = ""
    seconds: float = 0.17
    heavy: float = 2.4


def _forms(channels: int | float) -> tuple[Arm, ...]:
    """The LEAN forms at one C'."""
    return (
        Arm("lean", "lean", channels, rates=LITERAL_RATES),
        Arm("lean_damped", "lean_damped", channels),
        Arm("lean_gated", "lean_gated", channels),
        Arm("lean_simplex", "lean_simplex", channels),
    )


def _plain(channels: int | float, *names: str) -> tuple[Arm, ...]:
    return tuple(Arm(name, name, channels) for name in names)


_BASELINE = Arm("baseline")
_NARROW = Arm("narrow", control="narrow")
_AS_FAST = Arm("as_fast", control="as_fast")


def _arms(channels: int | float, *controls: str) -> tuple[Arm, ...]:
    """The baseline, the LEAN forms and plain controls at one C', and the narrower nets."""
    return (_BASELINE, *_forms(channels), *_plain(channels, *controls), _NARROW, _AS_FAST)


_PAPER_ARMS = _arms(10, "slice", "grouped_sum")
_PLAIN_ARMS = _arms(0.25, "slice", "mean", "grouped_sum")
_DEEP_ARMS = (
    *_arms(0.25, "slice", "mean", "grouped_sum", "projection"),
    Arm("bottleneck", control="bottleneck"),
)
_SEARCHED = tuple(
    Arm(f"{form} {'/'.join(map(str, channels))}", form, channels, rates=(1e-3, 3e-3))
    for form, channels in (
        ("lean_gated", (10, 5, 15)),
        ("lean_gated", (25, 5, 5)),
        ("lean_gated", (5, 20, 3)),
        ("lean_gated", (5, 5, 5)),
        ("lean_simplex", (10, 5, 15)),
        ("lean_simplex", (25, 5, 5)),
        ("lean_damped", (25, 5, 5)),
        ("lean_damped", (5, 5, 5)),
        ("lean_damped+matrix", (10, 10, 10)),
        ("lean_matrix", (10, 10, 10)),
        ("lean_magnitude", (10, 10, 10)),
        ("lean_gated", (25, 25, 25)),
    )
)
_AUGMENTED_ARMS = (_BASELINE, *_forms(10), *_plain(10, "grouped_sum"), _NARROW)

#: In order of worth.
PARTS = (
    Part("paper", "paper", 96, 50, 15, _PAPER_ARMS),
    Part("resnet", "resnet", 32, 20, 8, _DEEP_ARMS, seconds=0.07, heavy=1.3),
    Part("densenet", "densenet", 32, 12, 6, _DEEP_ARMS, seconds=0.08, heavy=1.3),
    Part("settings", "paper", 96, 50, 15, _SEARCHED, best=2, baseline="paper"),
    Part("vgg", "vgg", 24, 20, 8, _PLAIN_ARMS, seconds=3, heavy=1.5),
    Part("mixer", "mixer", 24, 20, 8, _PLAIN_ARMS, seconds=3, heavy=1.5),
    Part("augmented", "paper", 96, 50, 15, _AUGMENTED_ARMS, augment=True),
)


def smoke_parts() -> tuple[Part, ...]:
    """The same parts for a try: pictures of 16 pixels, two epochs, two rates an arm."""
    return tuple(
        replace(
            part,
            pixels=16,
            epochs=2,
            search_epochs=1,
            arms=tuple(replace(arm, rates=arm.rates[:2]) for arm in part.arms),
        )
        for part in PARTS
    )


@dataclass(frozen=True)
class Net:
    """A net of the evidence.

    Args:
        make: makes it with all widths times a factor, for pictures of so many pixels.
        channels: C' of the LEAN nets that the controls are as large or as fast as.
        skip: layers that are left alone.
        as_fast: the greatest factor at which it is no slower than the ``lean_damped`` net, by
            ``evidence.py --as-fast`` on an Intel Xeon with AVX-512; other machines differ.
        controls: makes of a control a net of about so many parameters; ``"narrow"`` is the net
            of the nearest factor unless it stands here.
    """

    make: Callable[[float, int], nn.Module]
    channels: int | float
    skip: tuple[str, ...] = ()
    as_fast: float = 1.0
    controls: Mapping[str, Callable[[int, int], nn.Module]] = field(default_factory=dict)


def _narrow_paper(budget: int, pixels: int) -> nn.Module:
    widths = narrow_widths(budget, widths=PAPER_WIDTHS, image_size=pixels)
    return PaperNet(widths, image_size=pixels)


NETS = {
    "paper": Net(
        lambda factor, pixels: PaperNet(scaled_widths(PAPER_WIDTHS, factor), image_size=pixels),
        channels=10,
        as_fast=0.64,
        controls={"narrow": _narrow_paper},
    ),
    "resnet": Net(
        lambda factor, _: narrow_resnet(factor),
        channels=0.25,
        skip=RESNET_SKIP,
        as_fast=0.5,
        controls={
            "bottleneck": lambda budget, _: nearest_net(budget, lambda part: ResNet(inner=part))
        },
    ),
    "densenet": Net(
        lambda factor, _: narrow_densenet(factor),
        channels=0.25,
        skip=DENSENET_SKIP,
        as_fast=0.5,
        controls={
            "narrow": lambda budget, _: nearest_densenet(budget),
            "bottleneck": lambda budget, _: nearest_net(
                budget, lambda part: DenseNet(inner=max(1, round(64 * part)))
            ),
        },
    ),
    "vgg": Net(lambda factor, _: Vgg(factor), channels=0.25, skip=VGG_SKIP, as_fast=0.5),
    "mixer": Net(
        lambda factor, pixels: Mixer(pixels, max(1, round(64 * factor))),
        channels=0.25,
        skip=MIXER_SKIP,
        as_fast=1.0,
    ),
}


def make_net(part: Part, arm: Arm, example: Tensor) -> nn.Module:
    """Build the net of an arm, its weights drawn from torch's global random numbers.

    Args:
        part: which net and pictures.
        arm: what is done to the net.
        example: normalised pictures, for :func:`lean_fx.leanify`.

    Raises:
        LeanError: the reduction is unknown, or cannot be made so.
    """
    net = NETS[part.net]
    if arm.reduction:
        return _reduced(part, arm, example)
    if not arm.control:
        return net.make(1.0, part.pixels)
    if arm.control == "as_fast":
        return net.make(net.as_fast, part.pixels)
    literal = _reduced(part, Arm("lean", "lean", net.channels), example)
    budget = count_parameters(literal)
    if arm.control in net.controls:
        return net.controls[arm.control](budget, part.pixels)
    if arm.control == "narrow":
        return nearest_net(budget, lambda factor: net.make(factor, part.pixels))
    raise ArgumentError(f"arm {arm.name}: {part.net} has no control {arm.control!r}")


def _reduced(part: Part, arm: Arm, example: Tensor) -> nn.Module:
    channels: int | float | Mapping[str, int]
    if isinstance(arm.channels, tuple):
        channels = dict(zip(("conv2", "conv3", "linear"), arm.channels, strict=True))
    else:
        channels = arm.channels
    name, _, seed = arm.reduction.partition("+")
    reduction: str | ReductionFactory = name
    if seed:
        reduction = partial(reduction_factory(name), seed=seed)
    net = NETS[part.net]
    whole = net.make(1.0, part.pixels)
    return leanify(whole, example, channels=channels, reduction=reduction, skip=net.skip)
