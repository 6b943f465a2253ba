import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import lean_fx
from lean_fx import LeanError
from lean_fx.passes import Consumer, Site
from lean_fx.planning.policy import (
    check_channels_policy,
    check_names,
    check_skip,
    nearest_divisor,
    skipped_by,
    wanted_channels,
)

SITE = Site("pool", 1, 50, (Consumer("conv", "Conv2d", "conv"),))


@given(st.integers(2, 2000), st.floats(1, 2000), st.none() | st.integers(1, 16))
def test_nearest_divisor(channels, wanted, round_to):
    usable = [d for d in range(1, channels + 1) if channels % d == 0]
    usable = [d for d in usable if d not in (1, channels) or d == wanted]
    round_toed = [d for d in usable if round_to and d % round_to == 0] or usable
    found = nearest_divisor(channels, wanted, round_to)
    if not round_toed:
        assert found is None
    else:
        assert found in round_toed
        assert abs(found - wanted) == min(abs(d - wanted) for d in round_toed)


@pytest.mark.parametrize(
    ("channels", "wanted"),
    [
        (10, 10),
        ("sqrt", 50**0.5),
        ("tenth", 5),
        (0.2, 10),
        (lambda site: site.in_channels // 2, 25),
        (lambda site: "tenth", 5),
        ({"conv": 5}, 5),
        ({"c*": 0.1}, 5),
        ({"other": 5}, None),
    ],
)
def test_wanted_channels(channels, wanted):
    check_channels_policy(channels)
    assert wanted_channels(channels, SITE, "conv") == wanted


FORMS = (
    "give an int, a float in ]0, 1[, 'sqrt', 'tenth', a function of the site or a mapping of layer "
    "names"
)


@pytest.mark.parametrize(
    ("channels", "message"),
    [
        (0, "channels=0 is not an int of 1 or more"),
        (-4, "channels=-4 is not an int of 1 or more"),
        (True, f"channels=True is a bool; {FORMS}"),
        (None, f"channels=None is a NoneType; {FORMS}"),
        ([4], f"channels=[4] is a list; {FORMS}"),
        ("half", f"channels='half' is not known; {FORMS}"),
        (1.5, "channels=1.5 is not in ]0, 1[; a float is the fraction to keep"),
        (0.0, "channels=0.0 is not in ]0, 1[; a float is the fraction to keep"),
        (float("nan"), "channels=nan is not in ]0, 1[; a float is the fraction to keep"),
        ({"conv": 0}, "channels['conv']=0 is not an int of 1 or more"),
        ({3: 4}, "channels: the key 3 is not the name of a layer"),
    ],
)
def test_channels_out_of_range(channels, message):
    with pytest.raises(LeanError) as caught:
        check_channels_policy(channels)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("channels", "message"),
    [
        (
            60,
            "channels of conv: 60 is above its 50 input channels; give at most 50, skip the layer, "
            "or leave such layers alone with min_channels=60",
        ),
        (lambda site: None, f"channels of conv=None is a NoneType; {FORMS}"),
    ],
)
def test_channels_that_do_not_fit_a_site(channels, message):
    with pytest.raises(LeanError) as caught:
        wanted_channels(channels, SITE, "conv")
    assert str(caught.value) == message


def test_a_policy_is_asked_once_for_each_layer():
    asked = []

    def policy(site):
        asked.append(site.layers)
        return 6 + len(asked)

    plan = lean_fx.plan(nn.Sequential(nn.Linear(4, 64), nn.Linear(64, 4)), channels=policy)
    assert asked == [("1",)]
    assert plan.sites[0].note == "7 wanted, 8 is the nearest divisor"


def test_skip():
    skip = check_skip(["head", "stage?.*", nn.Conv1d])
    assert skipped_by(skip, "head", nn.Linear(1, 1)) == "skip='head'"
    assert skipped_by(skip, "stage2.conv", nn.Linear(1, 1)) == "skip='stage?.*'"
    assert skipped_by(skip, "other", nn.Conv1d(1, 1, 1)) == "skip=Conv1d"
    assert skipped_by(skip, "other", nn.Linear(1, 1)) == ""
    assert check_skip("head") == ("head",)
    with pytest.raises(LeanError, match="^skip: 3 is a int; give names, glob patterns or types$"):
        check_skip([3])
    with pytest.raises(LeanError, match="^skip: no layer is named 'hed'; near it: head$"):
        check_names("skip", ["hed"], ["conv", "head"])
