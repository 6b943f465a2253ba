import re
import sys
from functools import partial
from pathlib import Path

import expecttest
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from torch import nn

import lean_fx
import lean_fx.reduction.functional
from cases import slow_unless
from graphs import CHANGED, SPELLINGS, Residual
from lean_fx.errors import ArgumentError, DataError, ExportError, MissingDependencyError, WriteError
from lean_fx.export.nodes import define_functions
from lean_fx.export.parity import first_difference, greatest_difference
from lean_fx.export.program import exported_program
from lean_fx.reduction.registry import reductions
from side_by_side import check_side_by_side, export_side_by_side, run_side_by_side
from support.models import PaperNet


def run(path, inputs):
    session = onnxruntime.InferenceSession(path)
    return session.run(None, {session.get_inputs()[0].name: inputs.numpy()})[0]


def check(model, path, shape):
    """The file gives what the model gives in eval mode, at several batches."""
    model.eval()
    onnx.checker.check_model(str(path), full_check=True)
    for batch in (1, 2, 5):
        inputs = torch.randn(batch, *shape[1:])
        expected = model(inputs)
        expected = expected[0] if isinstance(expected, tuple) else expected
        np.testing.assert_allclose(run(path, inputs), expected.detach().numpy(), 1e-4, 1e-5)


@pytest.mark.parametrize(
    "model", slow_unless(lambda model: model not in SPELLINGS[2:], [(each,) for each in CHANGED])
)
def test_same_numbers_in_onnxruntime(model, tmp_path):
    make, shape = CHANGED[model]
    lean = lean_fx.leanify(make())
    lean_fx.export_onnx(lean, tmp_path / "lean.onnx", torch.rand(shape))
    check(lean, tmp_path / "lean.onnx", shape)


def test_every_reduction_exports(tmp_path):
    nets = [lean_fx.leanify(Residual(), reduction=each).eval() for each in reductions()]
    given, path = [torch.rand(1, 3, 8, 8)] * len(nets), tmp_path / "lean.onnx"
    export_side_by_side(nets, given, path, tolerance=1e-3)
    for batch in (1, 2, 5):
        inputs = [torch.randn(batch, 3, 8, 8)] * len(nets)
        found = run_side_by_side(onnxruntime.InferenceSession(path), inputs)
        for name, net, y in zip(reductions(), nets, found, strict=True):
            np.testing.assert_allclose(y, net(inputs[0]).detach(), 1e-4, 1e-5, err_msg=name)


# Options, the shape of the input, the axis of the channels.
FORMS = [
    ({}, (2, 12, 4, 3), 1),
    ({"layout": "interleaved", "scale": "mean"}, (2, 12, 4, 3), 1),
    ({"seed": "matrix", "scale": "magnitude", "iterations": 3}, (2, 12, 4, 3), 1),
    ({"seed": "matrix", "layout": "interleaved", "normalize": "row"}, (2, 12, 4, 3), 1),
    ({"normalize": "none", "scale": "magnitude"}, (2, 5, 12), -1),
    ({"normalize": "row", "layout": "interleaved", "iterations": 2}, (2, 12), 1),
    ({"seed": "matrix"}, (2, 5, 12), 2),
    ({}, (2, 3, 12, 5), 2),
]


@pytest.mark.parametrize("nonnegative", [True, False], ids=["nonnegative", "signed"])
def test_every_form_of_the_function(nonnegative, tmp_path):
    make = partial(lean_fx.LeanReduction, 12, 4, nonnegative=nonnegative)
    modules = [make(dim, **options) for options, _, dim in FORMS]
    inputs = [torch.rand(each) if nonnegative else torch.randn(each) for _, each, _ in FORMS]
    check_side_by_side(modules, inputs, tmp_path / "lean.onnx")


PAIRS = [
    ({}, (2, 12, 8, 6), 1),
    ({"layout": "interleaved", "normalize": "row", "seed": "matrix"}, (2, 12, 8, 6), 1),
    ({"layout": "interleaved", "iterations": 2, "scale": "magnitude"}, (2, 12, 40), 1),
    ({"normalize": "row", "damping": 0.3, "norm_floor": 0.1}, (2, 3, 12, 32), 2),
    ({"seed": "matrix", "scale": "mean"}, (2, 12, 40), 1),
]


def test_pairs_of_rows_are_multiplied_where_maps_are_large(tmp_path):
    modules = [lean_fx.LeanReduction(12, 4, dim, **options) for options, _, dim in PAIRS]
    modules.append(lean_fx.LeanReduction(12, 4).double())
    inputs = [*(torch.randn(each) for _, each, _ in PAIRS), torch.randn(2, 12, 40).double()]
    check_side_by_side(modules, inputs, tmp_path / "lean.onnx")
    functions = onnx.load(tmp_path / "lean.onnx").functions
    assert len(functions) == len(modules)
    assert all("pairs" in each.overload for each in functions)


def test_pairs_of_rows_are_not_multiplied_elsewhere(tmp_path):
    sizes = [(12, 4, 31), (12, 4, 2**21 // 48 + 1), (96, 32, 255)]  # channels in, out, positions
    modules = [lean_fx.LeanReduction(*each[:2]) for each in sizes]
    modules.append(lean_fx.LeanReduction(12, 4, normalize="none"))
    inputs = [torch.randn(1, each[0], each[2]) for each in sizes] + [torch.randn(1, 12, 40)]
    export_side_by_side(modules, inputs, tmp_path / "lean.onnx", tolerance=1e-5)
    functions = onnx.load(tmp_path / "lean.onnx").functions
    assert functions
    assert not any("pairs" in each.overload for each in functions)


@pytest.mark.parametrize("nonnegative", [True, False], ids=["nonnegative", "signed"])
@pytest.mark.parametrize(("dtype", "apart"), [(torch.float64, 1e-12), (torch.float16, 2e-3)])
def test_other_dtypes(dtype, apart, nonnegative, tmp_path):
    module = lean_fx.LeanReduction(12, 4, nonnegative=nonnegative).to(dtype)
    inputs = torch.rand(2, 12, 3).to(dtype)
    inputs[0, :, 1] = 0
    lean_fx.export_onnx(module, tmp_path / "lean.onnx", inputs, tolerance=apart)


@pytest.mark.parametrize("nonnegative", [True, False], ids=["nonnegative", "signed"])
@pytest.mark.parametrize(("shape", "dim", "free"), [((2, 5, 12), 2, 1), ((2, 3, 12, 5), 2, 3)])
def test_two_free_lengths(shape, dim, free, nonnegative):
    module = lean_fx.LeanReduction(12, 4, dim, nonnegative=nonnegative).eval()
    sizes = {0: torch.export.Dim("batch"), free: torch.export.Dim("length")}
    with lean_fx.reduction.onnx_nodes.as_onnx_nodes():
        program = torch.onnx.export(
            module, (torch.rand(shape),), dynamo=True, dynamic_shapes=(sizes,), verbose=False
        )
    define_functions(program.model)
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    longer = list(shape)
    longer[0], longer[free] = 3, 7
    inputs = torch.rand(longer)
    (found,) = session.run(None, {session.get_inputs()[0].name: inputs.numpy()})
    np.testing.assert_allclose(found, module(inputs).detach().numpy(), 1e-4, 1e-5)


def test_each_reduction_is_one_readable_node(tmp_path):
    inputs = torch.rand(1, 3, 32, 32)
    lean = lean_fx.leanify(PaperNet(image_size=32), inputs, channels=10)
    path = tmp_path / "lean.onnx"
    lean_fx.export_onnx(lean, path, inputs)
    nodes = onnx.load(path).graph.node
    assert [node.op_type for node in nodes] == [
        *("Conv", "Relu", "MaxPool", "LEAN") * 3,
        "Reshape",
        "Gemm",
    ]
    leans = [node for node in nodes if node.op_type == "LEAN"]
    assert [node.name for node in leans] == [f"reductions.pool{n}" for n in (1, 2, 3)]
    expecttest.assert_expected_inline(
        onnx.printer.to_text(leans[0]),
        """\
   ["reductions.pool1"] LEAN = lean_fx.LEAN:10x5_nonnegative <axis: int = 1, normalize: string = "column", scale: string = "sum", layout: string = "contiguous", iterations: int = 1, nonnegative: int = 1, matrix_shape: ints = [0, 10, 5, -1], output_shape: ints = [-1, 10, 16, 16]> (max_pool2d, "reductions.pool1.seed")
""",
    )
    functions = {function.overload: function for function in onnx.load(path).functions}
    assert list(functions) == [f"10x{n}_nonnegative" for n in (5, 10, 15)]
    expecttest.assert_expected_inline(
        onnx.printer.to_text(functions["10x5_nonnegative"]),
        """\
<
  domain: "lean_fx",
  overload: "10x5_nonnegative",
  opset_import: ["" : 20]
>
LEAN <axis,normalize,scale,layout,iterations,nonnegative,matrix_shape,output_shape>(x, seed) => (out)
{
   tiny = Constant <value: tensor = float {1e-30}> ()
   matrix_shape = Constant <value_ints: ints = @matrix_shape> ()
   X = Reshape (x, matrix_shape)
   seed_shape = Constant <value_ints: ints = [10, 1, 1]> ()
   V = Reshape (seed, seed_shape)
   ones = Constant <value: tensor = float[1,10] {1,1,1,1,1,1,1,1,1,1}> ()
   flat = Constant <value_ints: ints = [0, 10, -1]> ()
   summed5 = Constant <value_ints: ints = [0, 1, 5, -1]> ()
   X_flat = Reshape (X, flat)
   X_sum = MatMul (ones, X_flat)
   t = Reshape (X_sum, summed5)
   d0X = Mul (X, t)
   axis2 = Constant <value_ints: ints = [2]> ()
   d0 = ReduceSum (d0X, axis2)
   d = Add (d0, tiny)
   r = Div (V, d)
   uX = Mul (X, r)
   uX_flat = Reshape (uX, flat)
   uX_sum = MatMul (ones, uX_flat)
   u = Reshape (uX_sum, summed5)
   yX = Mul (X, u)
   y = ReduceSum (yX, axis2)
   a = Abs (y)
   summed1 = Constant <value_ints: ints = [0, 1, 1, -1]> ()
   a_flat = Reshape (a, flat)
   a_sum = MatMul (ones, a_flat)
   s0 = Reshape (a_sum, summed1)
   s = Add (s0, tiny)
   V1 = Div (y, s)
   output_shape = Constant <value_ints: ints = @output_shape> ()
   out = Reshape (V1, output_shape)
}""",
    )


def test_inlined_functions_leave_standard_operators(tmp_path):
    path = tmp_path / "lean.onnx"
    lean_fx.export_onnx(
        lean_fx.leanify(Residual()), path, torch.rand(2, 3, 8, 8), functions="inline"
    )
    model = onnx.load(path)
    assert not model.functions
    assert {node.domain for node in model.graph.node} == {""}
    assert onnxruntime.InferenceSession(path).get_inputs()[0].shape[1:] == [3, 8, 8]


def test_the_plan_is_in_the_file(tmp_path):
    path = tmp_path / "lean.onnx"
    lean = lean_fx.leanify(Residual(), channels=4)
    lean_fx.export_onnx(lean, path, torch.rand(2, 3, 8, 8))
    assert lean_fx.plan_of(path) == lean.meta["lean_fx.plan"]
    lean_fx.export_onnx(Residual(), path, torch.rand(2, 3, 8, 8))
    for wrong, rule in (
        (path, "holds no plan; give the file of a reduced model"),
        (tmp_path / "no.onnx", "there is no such file; give one that export_onnx wrote"),
        (Path(__file__), "is not an ONNX file; give one that export_onnx wrote"),
    ):
        with pytest.raises(DataError, match=rule):
            lean_fx.plan_of(wrong)


class Frozen(nn.Module):
    """Its exported form keeps what it saw at the export."""

    calls = 0

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        Frozen.calls += 1
        return (self.linear(x) * Frozen.calls).relu()


def test_a_file_that_differs_is_not_written(tmp_path):
    path = tmp_path / "net.onnx"
    with pytest.raises(ExportError) as caught:
        lean_fx.export_onnx(Frozen(), path, torch.rand(2, 4))
    assert re.fullmatch(
        r"export_onnx: at batch \d the file differs from Frozen by [0-9.e+-]+ of the greatest "
        r"output, tolerance=0.001; every node does what was captured, so the model acts otherwise "
        r"from call to call \(state, chance, or a reduction's tol, which a file knows not\); mend it, or give a greater tolerance",
        str(caught.value),
    )
    assert not path.exists()
    lean_fx.export_onnx(Frozen(), path, torch.rand(2, 4), tolerance=None)
    assert path.exists()


def test_the_first_node_that_differs_is_named(tmp_path):
    model = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 4), nn.Sigmoid())
    lean = lean_fx.leanify(model, torch.rand(2, 4), channels=4).eval()
    inputs = (torch.rand(2, 4),)
    program = exported_program(lean, inputs, ({0: "batch"},), None)
    path = tmp_path / "net.onnx"
    program.save(path)
    assert first_difference(program, path, inputs, 1e-4) is None
    for wrong, name in (("2.weight", "node_linear_1 (Gemm)"), ("seed", "reductions._1 (LEAN)")):
        file = onnx.load(path)
        for value in file.graph.initializer:
            if value.name.endswith(wrong):
                changed = numpy_helper.to_array(value)[..., ::-1] + 1
                value.CopyFrom(numpy_helper.from_array(changed, value.name))
        onnx.save(file, tmp_path / "wrong.onnx")
        assert first_difference(program, tmp_path / "wrong.onnx", inputs, 1e-4) == name
        assert greatest_difference(lean, tmp_path / "wrong.onnx", inputs) > 1e-3


def test_a_static_batch(tmp_path):
    path = tmp_path / "net.onnx"
    lean_fx.export_onnx(nn.Linear(4, 4), path, torch.rand(1, 4), batch="static")
    assert onnxruntime.InferenceSession(path).get_inputs()[0].shape == [1, 4]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 3}, "batch=3 is not known; use dynamic or static"),
        ({"functions": "no"}, "functions='no' is not known; use keep or inline"),
        (
            {"tolerance": 0.0},
            "tolerance=0.0 is not a finite number above 0; give 1e-3, or None for no check",
        ),
        (
            {"opset": 17},
            "opset=17 is not an int of 18 or more",
        ),
    ],
)
def test_wrong_arguments(options, message, tmp_path):
    with pytest.raises(ArgumentError) as caught:
        lean_fx.export_onnx(nn.Linear(4, 4), tmp_path / "net.onnx", torch.rand(2, 4), **options)
    assert str(caught.value) == f"export_onnx: {message}"


def test_zero_positions_are_zero_in_the_file_too(tmp_path):
    module = nn.Sequential(lean_fx.LeanReduction(8, 4))
    lean_fx.export_onnx(module, tmp_path / "lean.onnx", torch.rand(2, 8, 3))
    inputs = torch.randn(2, 8, 3)
    inputs[1, :, 2] = 0
    assert run(tmp_path / "lean.onnx", inputs)[1, :, 2].tolist() == [0, 0, 0, 0]
    np.testing.assert_allclose(
        run(tmp_path / "lean.onnx", inputs), module(inputs).detach().numpy(), 1e-5, 1e-6
    )


def test_modes_are_restored(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.BatchNorm1d(4)).train()
    model[2].eval()
    lean_fx.export_onnx(model, tmp_path / "net.onnx", torch.rand(2, 4))
    assert [module.training for module in model.modules()] == [True, True, True, False]
    check(model, tmp_path / "net.onnx", (2, 4))


def test_random_numbers_are_as_before(tmp_path):
    class Draws(nn.Module):
        def forward(self, x):
            return x + 1e-6 * torch.rand_like(x)

    chance = torch.get_rng_state()
    lean_fx.export_onnx(
        Draws(), tmp_path / "net.onnx", torch.rand(2, 4, generator=torch.Generator())
    )
    assert torch.equal(torch.get_rng_state(), chance)


def test_the_exporter_says_nothing(tmp_path, capfd):
    lean_fx.export_onnx(nn.Linear(4, 4), tmp_path / "net.onnx", torch.rand(2, 4))
    assert capfd.readouterr() == ("", "")


class OneBatch(nn.Module):
    def forward(self, x):
        return x + torch.zeros(6, 3)


def test_a_size_that_is_frozen_is_refused_even_unchecked(tmp_path):
    with pytest.raises(
        ExportError, match=r"inferred a static shape of 6 for dimension .*shape\[0\]"
    ):
        lean_fx.export_onnx(OneBatch(), tmp_path / "net.onnx", torch.rand(6, 3), tolerance=None)


class Unexportable(nn.Module):
    def forward(self, x):
        return x if x.sum().item() > 0 else -x


def test_a_failure_leaves_the_old_file_whole(tmp_path):
    path = tmp_path / "net.onnx"
    path.write_bytes(b"old")
    with pytest.raises(
        ExportError, match="^export_onnx: Unexportable cannot be exported"
    ) as caught:
        lean_fx.export_onnx(Unexportable(), path, torch.rand(2, 4))
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_paths_that_cannot_be_written(tmp_path):
    with pytest.raises(
        WriteError, match="cannot be written .No such file or directory.; give a path"
    ):
        lean_fx.export_onnx(nn.Linear(4, 4), tmp_path / "no" / "net.onnx", torch.rand(2, 4))
    with pytest.raises(WriteError, match="is a folder; give the name of a file"):
        lean_fx.export_onnx(nn.Linear(4, 4), tmp_path, torch.rand(2, 4))


def test_inputs_that_are_no_batch(tmp_path):
    for inputs in (torch.tensor(3.0), ("x",)):
        with pytest.raises(ArgumentError, match="^example_inputs: "):
            lean_fx.export_onnx(nn.Linear(4, 4), tmp_path / "net.onnx", inputs)


def test_without_onnx(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(MissingDependencyError) as caught:
        lean_fx.export_onnx(nn.Linear(4, 4), tmp_path / "net.onnx", torch.rand(2, 4))
    assert str(caught.value) == "onnx is not installed and export needs it; run: pip install onnx"


class Echo(nn.Module):
    def forward(self, x):
        y = x + 1
        return x, y, y


class AsksByLen(nn.Module):
    """Asks for its batch by ``len``."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(32, 32), nn.Linear(32, 4)

    def forward(self, x):
        x = torch.relu(self.a(x))
        return self.b(x.reshape(len(x), -1, 32)).sum(1)


@pytest.mark.parametrize("form", ["graph", "module"])
def test_len_leaves_the_batch_free(form, tmp_path):
    model, x = AsksByLen(), torch.rand(6, 5, 32)
    lean = lean_fx.leanify(model, x, channels=4, form=form)
    exported = lean_fx.export_onnx(lean.eval(), tmp_path / "net.onnx", x)
    other = torch.rand(3, 5, 32)
    np.testing.assert_allclose(
        run(exported.path, other), lean(other).detach().numpy(), rtol=1e-4, atol=1e-5
    )
    assert "len" not in globals()


def test_outputs_that_are_one_value(tmp_path):
    path = tmp_path / "net.onnx"
    lean_fx.export_onnx(Echo(), path, torch.rand(2, 3))
    outputs = onnxruntime.InferenceSession(path).run(None, {"input": np.ones((4, 3), np.float32)})
    assert [float(value.max()) for value in outputs] == [1, 2, 2]


class Twice(nn.Module):
    """One reduction called twice, and names that the file wants too."""

    def __init__(self):
        super().__init__()
        self.node_relu = lean_fx.LeanReduction(16, 4)
        self.input = nn.Parameter(torch.ones(4))
        self.register_buffer("LEAN", torch.ones(4))

    def forward(self, a, b):
        return self.node_relu(a.relu()) * self.LEAN + self.node_relu(b) * self.input


def test_names_stay_apart(tmp_path):
    path = tmp_path / "net.onnx"
    lean_fx.export_onnx(Twice(), path, (torch.randn(2, 16), torch.randn(2, 16)))
    names = [node.name for node in onnx.load(path).graph.node]
    assert len(set(names)) == len(names)
    assert sum(node.op_type == "LEAN" for node in onnx.load(path).graph.node) == 2


class Counts(nn.Module):
    """Changes a buffer, and its input, in forward."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        self.calls += 1
        return self.linear(x.add_(1)) + self.calls


def test_the_model_and_its_inputs_stay_as_they_are(tmp_path):
    model, inputs = Counts(), torch.randn(2, 4)
    before = inputs.clone()
    lean_fx.export_onnx(model, tmp_path / "net.onnx", inputs)
    assert model.calls == 0
    assert torch.equal(inputs, before)


def test_no_rows_and_no_path(tmp_path):
    with pytest.raises(ArgumentError, match="example_inputs have no rows; give one or more"):
        lean_fx.export_onnx(nn.Linear(4, 4), tmp_path / "net.onnx", torch.rand(0, 4))
    with pytest.raises(WriteError, match=r"is not a path \(.*embedded null .*\); give another"):
        lean_fx.export_onnx(nn.Linear(4, 4), "a\0.onnx", torch.rand(2, 4))
    with pytest.raises(WriteError, match="cannot be written .File name too long"):
        lean_fx.export_onnx(nn.Linear(4, 4), tmp_path / ("a" * 300), torch.rand(2, 4))


def test_the_cause_of_a_failed_export_is_told(tmp_path):
    with pytest.raises(ExportError, match="Could not guard|data-dependent"):
        lean_fx.export_onnx(Unexportable(), tmp_path / "net.onnx", torch.rand(2, 4))


def test_a_model_that_was_not_reduced_holds_no_plan():
    text = "plan_of: Linear object holds no plan; give what leanify gave, not a pickle of it"
    with pytest.raises(ArgumentError, match=f"^{text}$"):
        lean_fx.plan_of(nn.Linear(2, 2))


class Doubles(nn.Module):
    """Branches on its batch."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(16, 8)

    def forward(self, x):
        h = self.a(x)
        return h * 2 if x.shape[0] > 2 else h


def test_a_branch_on_the_batch_is_told(tmp_path):
    message = "^export_onnx: Doubles takes another branch at batch 1 than for the example inputs"
    with pytest.raises(ExportError, match=message):
        lean_fx.export_onnx(Doubles(), tmp_path / "net.onnx", torch.rand(4, 16))
    assert list(tmp_path.iterdir()) == []
    lean_fx.export_onnx(Doubles(), tmp_path / "net.onnx", torch.rand(4, 16), batch="static")
