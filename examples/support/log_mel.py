"""Log-mel frames of a sound: what an ear-like filter bank hears, window by window.

    power[f, t] = |sum_n hann[n] x[t hop + n] exp(-2 pi i f n / window)|^2
    frames[m, t] = log(sum_f filters[m, f] power[f, t] + 1e-6)

The filters are triangles of height 1, whose corners lie at equal steps on the HTK mel scale, from
0 Hz to half the sample rate:  mel = 2595 log10(1 + hz / 700).

Sources: S. S. Stevens, J. Volkmann, E. B. Newman, "A Scale for the Measurement of the
Psychological Magnitude Pitch", JASA 8, 1937; S. Young et al., "The HTK Book", section 5.4.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lean_fx.checks import check_int
from lean_fx.errors import ArgumentError

_FLOOR = 1e-6  # keeps the logarithm of silence finite; full scale is 1


def log_mel(
    samples: Tensor,
    sample_rate: int = 8000,
    *,
    channels: int = 40,
    window: int = 256,
    hop: int = 128,
) -> Tensor:
    """Return the log-mel frames of sounds of equal length.

    Frames lie wholly inside the sound: nothing is padded, and the samples that are left at the end
    are not used.

    Args:
        samples: the sounds, full scale 1.
        sample_rate: samples a second, 1 or more.
        channels: mel filters, 1 or more.
        window: samples a frame, 2 or more.
        hop: samples from one frame to the next, 1 or more.

    Shape:
        - samples: ``[..., L]``, float32 or float64, ``L >= window``
        - output: ``[..., channels, 1 + (L - window) // hop]``, of the same type

    Raises:
        ArgumentError: a sound is shorter than a frame, not finite or of another type, or a number
            is out of range.

    Example:
        >>> log_mel(torch.zeros(2, 8320)).shape
        torch.Size([2, 40, 64])
    """
    hop = check_int("log_mel: hop", hop, 1)
    filters = mel_filters(channels, window, sample_rate)
    if not isinstance(samples, Tensor) or samples.dtype not in (torch.float32, torch.float64):
        kind = samples.dtype if isinstance(samples, Tensor) else type(samples).__name__
        raise ArgumentError(
            f"log_mel: samples of {kind} are not float32 or float64; convert them, full scale 1"
        )
    if samples.ndim < 1 or samples.shape[-1] < window:
        raise ArgumentError(
            f"log_mel: samples of shape {list(samples.shape)} are shorter than window={window}; "
            "pad them with zeros"
        )
    if not samples.isfinite().all():
        raise ArgumentError("log_mel: samples hold NaN or infinite values; give finite ones")
    if samples.numel() == 0:  # which the transform refuses
        count = 1 + (samples.shape[-1] - window) // hop
        return samples.new_empty(*samples.shape[:-1], channels, count)
    spectrum = torch.stft(
        samples.reshape(-1, samples.shape[-1]),
        n_fft=window,
        hop_length=hop,
        window=torch.hann_window(window, dtype=samples.dtype, device=samples.device),
        center=False,
        return_complex=True,
    )
    power = spectrum.real.square() + spectrum.imag.square()
    frames = (filters.to(samples) @ power + _FLOOR).log()
    return frames.reshape(*samples.shape[:-1], *frames.shape[1:])


def mel_filters(channels: int, window: int, sample_rate: int) -> Tensor:
    """Return the weight of each frequency of a window in each mel channel.

    Args:
        channels: filters, 1 or more.
        window: samples a frame, 2 or more.
        sample_rate: samples a second, 1 or more.

    Shape:
        - output: ``[channels, window // 2 + 1]``, float64, in [0, 1]

    Raises:
        ArgumentError: a number is out of range, or a filter so narrow that it meets no frequency.

    Example:
        >>> mel_filters(2, window=8, sample_rate=8000).round(decimals=2)
        tensor([[0.0000, 0.6800, 0.0000, 0.0000, 0.0000],
                [0.0000, 0.3200, 0.9100, 0.4500, 0.0000]], dtype=torch.float64)
    """
    channels = check_int("mel_filters: channels", channels, 1)
    window = check_int("mel_filters: window", window, 2)
    sample_rate = check_int("mel_filters: sample_rate", sample_rate, 1)
    top = 2595 * torch.tensor(1 + sample_rate / 2 / 700, dtype=torch.float64).log10()
    mels = torch.linspace(0, 1, channels + 2, dtype=torch.float64) * top
    corners = 700 * (10 ** (mels / 2595) - 1)
    hertz = torch.arange(window // 2 + 1, dtype=torch.float64) * sample_rate / window
    left, centre, right = (corners[k : k + channels, None] for k in range(3))
    rising, falling = (hertz - left) / (centre - left), (right - hertz) / (right - centre)
    filters = torch.minimum(rising, falling).clamp(min=0)
    empty = (filters.sum(1) == 0).nonzero().flatten()
    if len(empty):
        raise ArgumentError(
            f"mel_filters: channels={channels} leaves filter {int(empty[0])} without a frequency "
            f"of a window of {window}; use fewer channels or a longer window"
        )
    return filters
