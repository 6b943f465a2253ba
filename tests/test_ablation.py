import dataclasses

import pytest

from lean_fx.checks import whole_numbers
from lean_fx.errors import ArgumentError, DataError
from lean_fx.experiment import ablation
from lean_fx.experiment.ablation import (
    Row,
    Setting,
    grid,
    read_rows,
    run_grid,
    write_rows,
)
from lean_fx.experiment.datasets import digits
from lean_fx.measure.costs import count_parameters
from lean_fx.transform import leanify
from support.models import PAPER_WIDTHS, PaperNet, narrow_widths


def ablated_net(setting, data):
    """The paper's net as a setting says."""
    _, channels, size, _ = data.train_x.shape
    shape = {"in_channels": channels, "image_size": size, "classes": data.classes}
    net = PaperNet(PAPER_WIDTHS, **shape)
    if setting.reduction == "baseline":
        return net
    reduction = "lean" if setting.reduction == "narrow" else setting.reduction
    example = data.train_x[:2].float()
    lean = leanify(net, example, channels=setting.channels, reduction=reduction)
    if setting.reduction != "narrow":
        return lean
    return PaperNet(narrow_widths(count_parameters(lean), widths=PAPER_WIDTHS, **shape), **shape)


def run(settings, data, folder):
    return run_grid(settings, data, folder, lambda setting: ablated_net(setting, data))


ROW = Row("lean", 10, 0, 2, 0.1234567890123, 23_390, 242_500, 0.1, 0.09, 0.11, 1 / 3, "kernel")


def small_digits():
    data = digits()
    cut = {"train_x": data.train_x[:128], "train_y": data.train_y[:128]}
    return dataclasses.replace(data, **cut, test_x=data.test_x[:64], test_y=data.test_y[:64])


def test_rows_round_trip(tmp_path):
    rows = [ROW, dataclasses.replace(ROW, reduction="slice", accuracy=1.0)]
    write_rows(tmp_path / "a.csv", rows)
    assert read_rows(tmp_path / "a.csv") == rows


@pytest.mark.parametrize("text", ["", "reduction,channels\nlean,4\n", "\0", "lean\n"])
def test_a_damaged_table_is_refused_and_kept(tmp_path, text):
    file = tmp_path / "ablation.csv"
    write_rows(file, [ROW])
    broken = text or file.read_text().replace("0.1234567890123", "x")
    file.write_text(broken)
    with pytest.raises(DataError, match="ablation.csv: is not a table of this ablation"):
        run(grid([4], [], [0], 1), small_digits(), tmp_path)
    assert file.read_text() == broken


def test_grid_has_no_setting_twice():
    settings = grid([4, 8], ["slice", "slice", "lean"], [0, 1], 3)
    assert len(settings) == len(set(settings)) == 2 * (1 + 2 * 2)
    assert settings[0] == Setting("baseline", 0, 0, 3)


def test_errors():
    with pytest.raises(ArgumentError) as caught:
        grid([4], ["slize"], [0], epochs=1)
    known = "control='slize' is not known; use lean, lean_row, lean_mean, "
    assert str(caught.value).startswith(known)
    with pytest.raises(ArgumentError, match="channels=.0. is not a list of ints of 1 or more"):
        grid([0], [], [0], epochs=1)


@pytest.mark.parametrize(
    ("text", "least", "message"),
    [
        ("0", 1, "channels: '0' is not an int of 1 or more"),
        ("4,", 1, "channels: '' is not an int of 1 or more"),
        ("-1", 0, "channels: '-1' is not an int of 0 or more"),
    ],
)
def test_numbers_of_the_command_line(text, least, message):
    with pytest.raises(ArgumentError) as caught:
        whole_numbers("channels", text, least)
    assert str(caught.value) == message


def test_text_and_lists_give_the_same_grid():
    assert grid("4, 8", "slice,,narrow", "0,1", 2) == grid([4, 8], ["slice", "narrow"], [0, 1], 2)


def test_without_a_net_of_ones_own_there_is_a_small_one(tmp_path, monkeypatch):
    def untrained(setting, data, folder, make):
        parameters = count_parameters(make(setting))
        return dataclasses.replace(ROW, **dataclasses.asdict(setting), parameters=parameters)

    monkeypatch.setattr(ablation, "_measured", untrained)
    rows = run_grid(grid("8", "narrow", "0", 1), small_digits(), tmp_path)
    baseline, lean, narrow = (row.parameters for row in rows)
    assert baseline > 2 * lean
    assert abs(narrow - lean) < 0.1 * lean


def test_what_cannot_be_made_is_told_before_anything_is_trained(tmp_path):
    with pytest.raises(ArgumentError, match="channels of conv2: 60 is above its 50 input channels"):
        run(grid([60], [], [0], 1), small_digits(), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_rows_that_are_there_are_not_run_again(tmp_path, monkeypatch):
    data, settings = small_digits(), grid([10], ["slice", "narrow"], [0], 1)
    rows = run(settings, data, tmp_path)
    assert [row.setting for row in rows] == settings
    assert [row.parameters for row in rows[:3]] == [182_260, 23_390, 23_360]
    assert abs(rows[3].parameters - rows[1].parameters) < 0.02 * rows[1].parameters
    assert rows[1].macs > rows[2].macs
    assert all(0 <= row.accuracy <= 1 and row.latency_ratio > 0 for row in rows)

    measured = []

    def count(setting, data, folder, make):
        measured.append(setting)
        return dataclasses.replace(ROW, **dataclasses.asdict(setting))

    monkeypatch.setattr(ablation, "_measured", count)
    more = grid([10, 5], ["slice", "narrow"], [0], 1)
    again = run(more, data, tmp_path)
    assert measured == [setting for setting in more if setting not in settings]
    assert set(rows) < set(again) == set(read_rows(tmp_path / "ablation.csv"))
