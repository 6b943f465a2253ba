"""The models of an experiment: a baseline, the same leanified, and controls of equal budget."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from lean_fx.checks import check_choice
from lean_fx.experiment.budget import equal_budget
from lean_fx.experiment.datasets import Dataset
from lean_fx.files import make_folder, write_text
from lean_fx.measure.costs import count_parameters
from lean_fx.planning.policy import ChannelsPolicy, Skip
from lean_fx.reduction.registry import reduction_name
from lean_fx.transform import leanify
from support.models import PAPER_WIDTHS, PaperNet, nearest_widths, scaled_widths
from support.sequence_nets import SEQUENCE_WIDTHS, sequence_net


def paper_arms(
    data: Dataset, channels: ChannelsPolicy = 10, reduction: str = "lean", seed: int = 0
) -> dict[str, nn.Module]:
    """The three models of the paper's experiment: baseline, LEAN, and a narrower net.

    Args:
        data: gives the size of the pictures and the number of classes.
        channels: see :func:`lean_fx.leanify`.
        reduction: see :func:`lean_fx.leanify`.
        seed: of the first weights of each.

    Returns:
        The models by name, the baseline first.
    """
    _, in_channels, size, _ = data.train_x.shape
    return three_arms(
        lambda widths: PaperNet(widths, in_channels, size, data.classes),
        PAPER_WIDTHS,
        data.train_x[:2].float(),
        channels=channels,
        reduction=reduction,
        seed=seed,
    )


def as_fast_arm(data: Dataset, lean: nn.Module, folder: str | Path, seed: int = 0) -> PaperNet:
    """The paper's net made narrower to the latency of a reduced one, by timing both in turn.

    The widths are found once for each reduced net, and kept in ``as_fast.json``: a run that was
    stopped goes on with the same net.

    Args:
        data: as for :func:`paper_arms`.
        lean: the reduced net.
        folder: of the file; made if it is missing.
        seed: of the first weights.
    """
    _, in_channels, size, _ = data.train_x.shape
    shape = (in_channels, size, data.classes)
    file = make_folder(folder) / "as_fast.json"
    known = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    if known.get("of") != repr(lean):
        found = equal_budget(
            lambda width: PaperNet(scaled_widths(PAPER_WIDTHS, width), *shape),
            data.train_x[:2].float(),
            of=lean,
            by="latency",
            steps=25,
        )
        known = {"of": repr(lean), "widths": found.widths}
        write_text(file, json.dumps(known))
    torch.manual_seed(seed)
    return PaperNet(known["widths"], *shape)


def sequence_arms(
    data: Dataset,
    net: str = "gru",
    channels: ChannelsPolicy = 16,
    reduction: str = "lean",
    skip: Skip = ("linear",),
    seed: int = 0,
) -> dict[str, nn.Module]:
    """Baseline, LEAN and a narrower net for sequences.

    The first layer, which reads the sequences themselves, is left as it is, and so is the last:
    it reads a single position, of which LEAN would leave C' numbers whose absolute values sum
    to 1, too few and too small to tell the classes apart, and it holds few parameters.

    Args:
        data: gives the size of the sequences and the number of classes.
        net: see :func:`~support.sequence_nets.sequence_net`.
        channels: see :func:`lean_fx.leanify`, like the next two.
        reduction: a registered name.
        skip: layers to leave alone.
        seed: of the first weights of each.

    Returns:
        The models by name, the baseline first.

    Raises:
        ArgumentError: there is no such net.
    """
    check_choice("net", net, SEQUENCE_WIDTHS)
    _, in_channels, frames = data.train_x.shape
    return three_arms(
        lambda widths: sequence_net(net, widths, in_channels, frames, data.classes),
        SEQUENCE_WIDTHS[net],
        data.normalised(data.train_x[:64]),
        channels=channels,
        reduction=reduction,
        min_channels=in_channels + 1,
        skip=skip,
        seed=seed,
    )


def three_arms(
    make: Callable[[tuple[int, ...]], nn.Module],
    widths: tuple[int, ...],
    inputs: Tensor,
    *,
    channels: ChannelsPolicy,
    reduction: str = "lean",
    min_channels: int = 16,
    skip: Skip = (),
    seed: int = 0,
) -> dict[str, nn.Module]:
    """A net, the same leanified, and the same made narrower to the count of the leanified one.

    Args:
        make: builds the net from its widths.
        widths: of the baseline.
        inputs: example inputs.
        channels: see :func:`lean_fx.leanify`, like the next three.
        reduction: a registered name.
        min_channels: layers that read fewer are left alone.
        skip: layers to leave alone.
        seed: of the first weights of each.

    Returns:
        The models by name, the baseline first.

    Example:
        >>> arms = three_arms(
        ...     lambda widths: PaperNet(widths, image_size=8), (32, 64), torch.rand(2, 3, 8, 8),
        ...     channels=8,
        ... )
        >>> {name: count_parameters(model) for name, model in arms.items()}
        {'baseline': 21962, 'lean': 5914, 'narrow 15/31': 5886}
    """
    torch.manual_seed(seed)
    baseline = make(widths)
    torch.manual_seed(seed)
    lean = leanify(
        make(widths),
        inputs,
        channels=channels,
        reduction=reduction,
        min_channels=min_channels,
        skip=skip,
    )

    def count(some: tuple[int, ...]) -> int:
        with torch.device("meta"):
            return count_parameters(make(some))

    narrow = nearest_widths(count_parameters(lean), widths, count)
    torch.manual_seed(seed)
    names = ("baseline", reduction_name(reduction), f"narrow {'/'.join(map(str, narrow))}")
    return dict(zip(names, (baseline, lean, make(narrow)), strict=True))
