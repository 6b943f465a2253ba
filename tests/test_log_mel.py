"""Log-mel frames against their formula, written out in float64."""

import cmath
import math

import pytest
import torch

from lean_fx.errors import ArgumentError
from support.log_mel import log_mel, mel_filters


def hertz(mel: float) -> float:
    return 700 * (10 ** (mel / 2595) - 1)


def literal_filter(index: int, channels: int, frequency: float, sample_rate: int) -> float:
    """A triangle over three neighbours of ``channels + 2`` corners at equal steps of mel."""
    top = 2595 * math.log10(1 + sample_rate / 2 / 700)
    left, centre, right = (hertz(top * (index + k) / (channels + 1)) for k in range(3))
    if left <= frequency <= centre:
        return (frequency - left) / (centre - left)
    if centre <= frequency <= right:
        return (right - frequency) / (right - centre)
    return 0.0


def literal_frames(x: list[float], sample_rate: int, channels: int, window: int, hop: int):
    hann = [0.5 - 0.5 * math.cos(2 * math.pi * n / window) for n in range(window)]
    columns = []
    for start in range(0, len(x) - window + 1, hop):
        power = []
        for f in range(window // 2 + 1):
            terms = (
                hann[n] * x[start + n] * cmath.exp(-2j * math.pi * f * n / window)
                for n in range(window)
            )
            power.append(abs(sum(terms)) ** 2)
        column = []
        for m in range(channels):
            weights = (
                literal_filter(m, channels, f * sample_rate / window, sample_rate)
                for f in range(window // 2 + 1)
            )
            column.append(math.log(sum(w * p for w, p in zip(weights, power, strict=True)) + 1e-6))
        columns.append(column)
    return torch.tensor(columns, dtype=torch.float64).T


@pytest.mark.parametrize(
    ("sample_rate", "channels", "window", "hop", "length"),
    [(8000, 6, 32, 16, 100), (16000, 4, 30, 7, 65), (8000, 3, 16, 20, 16)],
)
def test_frames_follow_the_formula(sample_rate, channels, window, hop, length):
    x = torch.randn(length, dtype=torch.float64) * 0.1
    found = log_mel(x, sample_rate, channels=channels, window=window, hop=hop)
    expected = literal_frames(x.tolist(), sample_rate, channels, window, hop)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    single = log_mel(x.float(), sample_rate, channels=channels, window=window, hop=hop)
    torch.testing.assert_close(single.double(), expected, rtol=1e-4, atol=1e-4)


def test_the_filters_follow_the_formula_and_none_is_empty_at_the_defaults():
    found = mel_filters(40, 256, 8000)
    expected = [[literal_filter(m, 40, f * 31.25, 8000) for f in range(129)] for m in range(40)]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))
    assert (found.sum(1) > 0).all()


def test_a_tone_is_loudest_in_the_filter_around_it():
    tone = torch.sin(2 * math.pi * 1000 / 8000 * torch.arange(4000))
    loudest = log_mel(tone).mean(1).argmax()
    assert mel_filters(40, 256, 8000)[loudest, 1000 * 256 // 8000] > 0.5


def test_sounds_in_a_batch_do_not_meet():
    sounds = torch.randn(2, 3, 600)
    frames = log_mel(sounds)
    assert frames.shape == (2, 3, 40, 3)
    torch.testing.assert_close(frames[1, 2], log_mel(sounds[1, 2]))


def test_silence_is_finite():
    assert torch.equal(log_mel(torch.zeros(256)), torch.full((40, 1), math.log(1e-6)))


def test_no_sounds_are_no_frames():
    assert log_mel(torch.zeros(0, 8320)).shape == (0, 40, 64)
    assert log_mel(torch.zeros(3, 0, 8321), window=255, hop=7).shape == (3, 0, 40, 1153)
    assert log_mel(torch.zeros(1, 8321), window=255, hop=7).shape == (1, 40, 1153)


@pytest.mark.parametrize(
    ("samples", "options", "message"),
    [
        (torch.zeros(2, 0), {}, r"log_mel: samples of shape \[2, 0\] are shorter than window=256"),
        (torch.zeros(255), {}, r"log_mel: samples of shape \[255\] are shorter than window=256; p"),
        (torch.full((256,), math.nan), {}, "log_mel: samples hold NaN or infinite values; give f"),
        (torch.zeros(256), {"hop": 0}, "log_mel: hop=0 is not an int of 1 or more"),
        (torch.zeros(256), {"channels": 0}, "mel_filters: channels=0 is not an int of 1 or more"),
        (torch.zeros(256), {"window": 1}, "mel_filters: window=1 is not an int of 2 or more"),
        (
            torch.zeros(256),
            {"sample_rate": 0},
            "mel_filters: sample_rate=0 is not an int of 1 or more",
        ),
        *(
            (
                torch.zeros(256),
                {name: value},
                f"(log_mel|mel_filters): {name}={value} is not an int",
            )
            for name, value in (
                *(("hop", 1.5), ("hop", True), ("window", 256.0), ("channels", 2.5)),
                ("sample_rate", math.nan),
            )
        ),
        *(
            (
                torch.zeros(256, dtype=dtype),
                {},
                f"log_mel: samples of {dtype} are not float32 or fl",
            )
            for dtype in (torch.int16, torch.bool, torch.float16, torch.bfloat16, torch.complex64)
        ),
        ([0.0] * 256, {}, "log_mel: samples of list are not float32 or float64; convert them"),
        (
            torch.zeros(256),
            {"channels": 128},
            "mel_filters: channels=128 leaves filter 0 without a frequency of a window of 256; use",
        ),
    ],
)
def test_what_makes_no_frames_is_refused(samples, options, message):
    with pytest.raises(ArgumentError, match=f"^{message}"):
        log_mel(samples, **options)
