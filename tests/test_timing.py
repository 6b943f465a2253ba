import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from lean_fx.errors import ArgumentError, DataError, LeanError
from lean_fx.measure import timing
from lean_fx.measure.machines import machine
from lean_fx.measure.timing import Latency, time_onnx

X = np.zeros((4, 3), dtype=np.float32)


def write_model(path: Path, inputs: tuple[str, ...] = ("x",)) -> Path:
    """Write a model that adds up its inputs, each of shape [N, 3]."""
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N", 3]) for n in inputs]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 3])
    graph = helper.make_graph([helper.make_node("Sum", inputs, ["y"])], "sum", values, [output])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, path)
    return path


def test_every_arm_gets_its_samples(tmp_path: Path) -> None:
    files = {"b": write_model(tmp_path / "b.onnx"), "a": str(write_model(tmp_path / "a.onnx"))}
    done: list[tuple[int, int]] = []
    found = time_onnx(
        files, X, rounds=3, min_round_ms=0.1, progress=lambda i, n: done.append((i, n))
    )
    assert list(found) == ["b", "a"]
    for latency in found.values():
        assert (latency.rounds, latency.batch, latency.threads) == (3, 4, 1)
        assert all(sample > 0 for sample in latency.samples_ms)
    assert done == [(1, 3), (2, 3), (3, 3)]


def test_rounds_are_interleaved_and_start_at_another_arm_each(monkeypatch, tmp_path: Path) -> None:
    order: list[str] = []

    def prepare(name: str, *_: object, **__: object) -> object:
        return lambda: order.append(name)

    monkeypatch.setattr(timing, "onnx_call", prepare)
    monkeypatch.setattr(timing, "_repeats", lambda call, least: 2 if call is not None else 0)
    time_onnx({"a": "a", "b": "b", "c": "c"}, X, rounds=4)
    assert "".join(order) == "aabbcc" + "bbccaa" + "ccaabb" + "aabbcc"


def test_a_round_has_calls_enough_to_last(monkeypatch) -> None:
    monkeypatch.setattr(timing, "_mean_ms", lambda call, repeats: 0.75)
    assert timing._repeats(lambda: None, 5.0) == 8
    assert timing._repeats(lambda: None, 0.5) == 1


def test_denormals_are_flushed_while_timing_and_not_afterwards(tmp_path: Path) -> None:
    seen: list[float] = []
    files = {"arm": write_model(tmp_path / "m.onnx")}
    time_onnx(files, X, rounds=2, min_round_ms=0.1, progress=lambda *_: seen.append(halved()))
    assert seen == [0.0, 0.0]
    assert halved() > 0.0


def halved() -> float:
    """Return half the smallest normal number, which is denormal."""
    return sys.float_info.min / 2


def test_inputs_by_name(tmp_path: Path) -> None:
    files = {"two": write_model(tmp_path / "two.onnx", ("x", "z"))}
    assert time_onnx(files, {"z": X, "x": X}, rounds=2, min_round_ms=0.1)["two"].batch == 4


def test_inputs_by_place_go_by_each_files_own_names(tmp_path: Path) -> None:
    names = {"one": ("x", "z"), "other": ("z", "w")}
    files = {arm: write_model(tmp_path / f"{arm}.onnx", names[arm]) for arm in names}
    found = time_onnx(files, (X, X), rounds=2, min_round_ms=0.1)
    assert [found[arm].batch for arm in names] == [4, 4]


def test_a_wrong_name_is_told_with_the_arm(tmp_path: Path) -> None:
    files = {"arm": write_model(tmp_path / "m.onnx")}
    with pytest.raises(ArgumentError, match=r"^arm: the inputs given are image and the model's"):
        time_onnx(files, {"image": X})


def test_one_array_for_two_inputs_is_told(tmp_path: Path) -> None:
    files = {"arm": write_model(tmp_path / "m.onnx", ("x", "z"))}
    with pytest.raises(
        ArgumentError, match=r"^arm: arrays given: 1; the model has the inputs x, z; "
    ):
        time_onnx(files, X)


@pytest.mark.parametrize("array", [np.zeros((4, 5), np.float32), np.zeros((4, 3), np.float64)])
def test_a_wrong_shape_or_type_is_told_in_one_line(tmp_path: Path, array: np.ndarray) -> None:
    files = {"good": write_model(tmp_path / "m.onnx")}
    with pytest.raises(ArgumentError, match=r"^good: ONNX Runtime rejects x float") as caught:
        time_onnx(files, array)
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith("the model takes x tensor(float)['N', 3]")


def test_a_missing_file_is_told_with_the_arm(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^arm: .*none.onnx is not a file; export"):
        time_onnx({"arm": tmp_path / "none.onnx"}, X)


def test_a_damaged_file_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "bad.onnx").write_bytes(b"no model")
    with pytest.raises(DataError, match=r"^arm: ONNX Runtime cannot load .*bad.onnx") as caught:
        time_onnx({"arm": tmp_path / "bad.onnx"}, X)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"threads": 0}, "time_onnx: threads=0 is not an int of 1 or more"),
        ({"threads": 1.0}, "time_onnx: threads=1.0 is not an int of 1 or more"),
        ({"rounds": 1}, "time_onnx: rounds=1 is not an int of 2 or more"),
        ({"min_round_ms": 0.0}, "min_round_ms=0.0 is not a finite number above 0"),
        ({"files": {}}, "files is empty"),
    ],
)
def test_arguments_out_of_range(arguments: dict, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        time_onnx(**{"files": {"a": "a.onnx"}, "inputs": X, **arguments})


def test_quartiles_agree_with_numpy() -> None:
    samples = (5.0, 1.5, 9.0, 2.0, 7.25, 3.0)
    latency = Latency(samples, batch=1, threads=1)
    expected = np.percentile(samples, [25, 50, 75])
    np.testing.assert_allclose([latency.q1_ms, latency.median_ms, latency.q3_ms], expected)


def test_a_single_sample_is_refused() -> None:
    with pytest.raises(LeanError, match="samples_ms has 1 values and quartiles need 2"):
        Latency((1.0,), batch=1, threads=1)


def test_machine_is_one_line_with_the_versions() -> None:
    import onnxruntime
    import torch

    line = machine()
    assert "\n" not in line
    assert f"torch {torch.__version__}" in line
    assert f"onnxruntime {onnxruntime.__version__}" in line


@pytest.mark.parametrize(
    ("flags", "expected"),
    [("sse avx2 avx512f", "AVX-512"), ("sse avx2", "AVX2"), ("sse", None)],
)
def test_machine_names_the_instruction_set(monkeypatch, flags: str, expected: str | None) -> None:
    monkeypatch.setattr(
        "lean_fx.measure.machines._cpu_facts", lambda: {"model name": "Chip 9", "flags": flags}
    )
    parts = machine().split(", ")
    assert parts[0] == "Chip 9"
    assert [part for part in parts if part.startswith("AVX")] == ([expected] if expected else [])
