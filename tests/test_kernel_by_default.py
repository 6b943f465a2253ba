"""What times ONNX files runs LEAN nodes by the kernel where it is built, and says so."""

import dataclasses

import pytest
import torch
from torch import nn

import lean_fx
from lean_fx import kernel
from lean_fx.errors import ArgumentError, DataError, MissingDependencyError
from lean_fx.measure.timing import Latency, time_onnx

X = torch.rand(2, 32)


def mlp():
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 4))


@pytest.fixture(scope="module")
def lean_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("kernel") / "net.onnx"
    lean_fx.export_onnx(lean_fx.leanify(mlp(), X), file, X)
    return file


@pytest.fixture
def built():
    if not kernel.uses_kernel(None):
        pytest.skip("lean_fx was installed without a compiler of C++")


@pytest.fixture
def not_built(monkeypatch):
    monkeypatch.setattr(kernel, "EXTENSION_SUFFIXES", [".absent"])


def timed(file, **options):
    return time_onnx({"net": file}, X.numpy(), rounds=2, min_round_ms=0.01, **options)["net"]


def test_it_runs_where_it_is_built(lean_file, built):
    assert [timed(lean_file, kernel=each).kernel for each in (None, True, False)] == [
        *(True, True),
        False,
    ]


def test_it_is_left_out_where_it_is_not(lean_file, not_built):
    assert not timed(lean_file).kernel
    assert not timed(lean_file, kernel=False).kernel
    with pytest.raises(MissingDependencyError, match="^onnx_kernel: lean_fx was installed without"):
        timed(lean_file, kernel=True)


def test_the_session_has_what_is_said(lean_file, built, monkeypatch):
    registered = []
    import onnxruntime

    real = onnxruntime.SessionOptions.register_custom_ops_library
    monkeypatch.setattr(
        onnxruntime.SessionOptions,
        "register_custom_ops_library",
        lambda self, path: (registered.append(path), real(self, path))[1],
    )
    timed(lean_file, kernel=False)
    assert registered == []
    timed(lean_file)
    assert registered == [lean_fx.onnx_kernel()]


def test_a_library_that_cannot_be_loaded(lean_file, monkeypatch, tmp_path):
    broken = tmp_path / "_onnx.so"
    broken.write_bytes(b"no library")
    monkeypatch.setattr("lean_fx.export.sessions.onnx_kernel", lambda: str(broken))
    monkeypatch.setattr(kernel, "library_path", lambda: broken)
    with pytest.raises(DataError, match="^net: ONNX Runtime cannot load .*; install lean_fx again"):
        timed(lean_file)
    assert not timed(lean_file, kernel=False).kernel


@pytest.mark.filterwarnings("ignore::lean_fx.LeanWarning")
def test_a_comparison_says_which(built):
    models = {"baseline": mlp(), "lean": lean_fx.leanify(mlp(), X)}
    for wanted, text in ((None, "by lean_fx's kernel"), (False, "by the function in the file")):
        compared = lean_fx.compare(models, X, batches=(1,), rounds=2, kernel=wanted)
        assert f"LEAN nodes in ONNX Runtime: {text}." in compared.footnotes()
        stored = [model.latencies[0].kernel for model in compared.models]
        assert stored == [wanted is None] * 2


def test_measured_plans_say_which(built):
    model = nn.Sequential(nn.Linear(32, 512), nn.ReLU(), nn.Linear(512, 256))
    for wanted, text in ((None, "ms with it by the kernel, "), (False, "ms with it, ")):
        made = lean_fx.plan(model, X, keep="measured", kernel=wanted)
        notes = [site.note for site in made.sites]
        notes += [each.reason.text for each in made.left_alone if each.layer == "2"]
        assert any(text in note for note in notes)


def test_words():
    latency = Latency((1.0, 2.0), batch=1, threads=1)
    assert latency.lean_nodes == "by the function in the file"
    assert dataclasses.replace(latency, kernel=True).lean_nodes == "by lean_fx's kernel"


def test_what_is_no_choice_of_kernel_is_refused():
    with pytest.raises(ArgumentError, match="^kernel='x' is not True, False or None$"):
        kernel.uses_kernel("x")
    with pytest.raises(ArgumentError, match="^kernel='x' is not known; use True, False or None$"):
        lean_fx.plan(mlp(), X, kernel="x")
