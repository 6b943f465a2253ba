// The face for ONNX Runtime: kernels for the nodes LEAN, LEANSimplex and LEANGated of the domain
// lean_fx.
//
// ONNX Runtime takes a registered kernel in place of the function that a file holds. Its C API is a
// table to which functions are only ever appended, so that slots, counted from 0, stay what they
// are; they are written out here, and no header is needed.

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <vector>

#include "halves.h"
#include "walk.h"

namespace {

using lean::Brain;
using lean::Half;
using lean::Options;
using lean::Shape;

constexpr uint32_t API_VERSION = 17;  // has KernelContext_ParallelFor

struct Api {
  void* slots[275];
  template <int SLOT, typename Result, typename... Arguments>
  Result call(Arguments... arguments) const {
    return reinterpret_cast<Result (*)(Arguments...)>(slots[SLOT])(arguments...);
  }
};

struct ApiBase {
  const Api* (*get)(uint32_t version);
  const char* (*version)();
};

struct Status;
struct Value;
struct Info;
struct Context;
struct Attributes;
struct SessionOptions;
struct Domain;

enum Element { FLOAT = 1, HALF = 10, DOUBLE = 11, BRAIN = 16 };

const Api* api = nullptr;

Status* failure(const char* subject, const char* rule) {
  char text[128];
  std::snprintf(text, sizeof text, "lean_fx %s: %s", subject, rule);
  return api->call<0, Status*, int, const char*>(1, text);  // CreateStatus, ORT_FAIL
}

bool ignored(Status* status) {  // an attribute that a node leaves out
  if (status == nullptr) return false;
  api->call<93, void, Status*>(status);  // ReleaseStatus
  return true;
}

int64_t integer(const Attributes* node, const char* name, int64_t otherwise) {
  int64_t value = otherwise;
  // KernelInfoGetAttribute_int64
  const bool absent =
      ignored(api->call<86, Status*, const Attributes*, const char*, int64_t*>(node, name, &value));
  return absent ? otherwise : value;
}

// The shortest decimal that is an attribute's float32: the number that its user wrote, which float64
// takes whole.
double real(const Attributes* node, const char* name) {
  float value = 0;
  // KernelInfoGetAttribute_float
  const bool absent =
      ignored(api->call<85, Status*, const Attributes*, const char*, float*>(node, name, &value));
  if (absent) return 0;
  char text[32];
  for (int digits = 1; digits <= 9; ++digits) {
    std::snprintf(text, sizeof text, "%.*g", digits, static_cast<double>(value));
    if (std::strtof(text, nullptr) == value) break;
  }
  return std::strtod(text, nullptr);
}

struct Word {
  char text[32] = "";
  bool operator==(const char* other) const { return std::strcmp(text, other) == 0; }
};

Word word(const Attributes* node, const char* name) {
  Word found;
  size_t size = sizeof found.text;
  // KernelInfoGetAttribute_string
  if (ignored(api->call<87, Status*, const Attributes*, const char*, char*, size_t*>(
          node, name, found.text, &size)))
    found.text[0] = 0;
  return found;
}

// Reads the attributes of a LEAN node; a text that says what is wrong, or nullptr.
const char* read(const Attributes* node, Options& options) {
  options.iterations = integer(node, "iterations", 1);
  options.nonnegative = integer(node, "nonnegative", 0) != 0;
  options.damping = real(node, "damping");
  options.norm_floor = real(node, "norm_floor");
  const Word normalize = word(node, "normalize"), scale = word(node, "scale");
  const Word layout = word(node, "layout");
  if (normalize == "row") {
    options.normalize = lean::Normalize::row;
  } else if (normalize == "none") {
    options.normalize = lean::Normalize::none;
  } else if (!(normalize == "column")) {
    return "normalize is none of column, row and none; export the model anew";
  }
  if (scale == "mean") {
    options.scale = lean::Scale::mean;
  } else if (scale == "magnitude") {
    options.scale = lean::Scale::magnitude;
  } else if (!(scale == "sum")) {
    return "scale is none of sum, mean and magnitude; export the model anew";
  }
  options.interleaved = layout == "interleaved";
  if (!options.interleaved && !(layout == "contiguous"))
    return "layout is neither contiguous nor interleaved; export the model anew";
  return nullptr;
}

// Operators: the options of a node, the number of parameters behind x, whether they fit the
// channels, and the form that reduces; it may change the parameters. ONNX Runtime chooses a kernel by
// the name alone, whatever other attributes a node has and whatever the version of the domain: an
// option that is added later needs a node of another name, which then runs by its function.
struct Lean {
  static constexpr const char* NAME = "LEAN";
  static constexpr size_t PARAMETERS = 1;
  template <typename W>
  using Form = lean::Walk<W>;
  Options options;

  const char* read_attributes(const Attributes* node) { return read(node, options); }
  static bool fits(const Shape&) { return true; }
  template <typename W>
  Form<W> form(std::vector<W>* parameters) const {
    return {options, parameters[0].data()};
  }
};

struct LeanSimplex {
  static constexpr const char* NAME = "LEANSimplex";
  static constexpr size_t PARAMETERS = 1;
  template <typename W>
  using Form = lean::Simplex<W>;

  const char* read_attributes(const Attributes*) { return nullptr; }
  static bool fits(const Shape& shape) { return !shape.matrix; }
  template <typename W>
  Form<W> form(std::vector<W>* parameters) const {
    std::vector<W>& v = parameters[0];  // the softmax of the logits
    const W greatest = *std::max_element(v.begin(), v.end());
    W sum = 0;
    for (W& value : v) sum += value = std::exp(value - greatest);
    for (W& value : v) value /= sum;
    return {v.data()};
  }
};

struct LeanGated {
  static constexpr const char* NAME = "LEANGated";
  static constexpr size_t PARAMETERS = 2;
  template <typename W>
  using Form = lean::Gated<W>;

  const char* read_attributes(const Attributes*) { return nullptr; }
  static bool fits(const Shape& shape) { return shape.matrix; }
  template <typename W>
  Form<W> form(std::vector<W>* parameters) const {
    return {parameters[0].data(), parameters[1].data()};
  }
};

template <typename Op>
struct Kernel {
  Op op;
  int64_t axis = 1;
};

template <typename Op, typename T, typename W>
struct Work {
  using Pass = lean::Pass<T, W, Op::template Form>;
  Pass pass;
  int64_t blocks_each;
  bool failed;

  static void run(void* user, size_t part) {
    Work& work = *static_cast<Work*>(user);
    Pass own = work.pass;
    own.first = work.blocks_each * static_cast<int64_t>(part);
    own.last = std::min(own.first + work.blocks_each, own.shape.blocks());
    const lean::Scratch<W> scratch(own.form.rows(own.shape) * lean::LANES);
    own.scratch = scratch.get();
    if (own.scratch == nullptr) {
      work.failed = true;
      return;
    }
    own.run();
  }
};

Status* dimensions(const Value* value, std::vector<int64_t>& sizes) {
  Info* info = nullptr;
  // GetTensorTypeAndShape, GetDimensionsCount, GetDimensions, ReleaseTensorTypeAndShapeInfo
  Status* status = api->call<65, Status*, const Value*, Info**>(value, &info);
  if (status != nullptr) return status;
  size_t count = 0;
  status = api->call<61, Status*, const Info*, size_t*>(info, &count);
  if (status == nullptr) {
    sizes.resize(count);
    status = api->call<62, Status*, const Info*, int64_t*, size_t>(info, sizes.data(), count);
  }
  api->call<99, void, Info*>(info);
  return status;
}

// How x is laid out before and behind its axis of channels, of which the parameters keep some.
// False if these do not fit.
template <typename Op>
bool describe(const std::vector<int64_t>& x, int64_t axis,
              const std::vector<int64_t> (&parameters)[Op::PARAMETERS], Shape& shape) {
  const std::vector<int64_t>& first = parameters[0];
  if (first.empty() || first.size() > 2 || first[0] < 1 || x[axis] % first[0] != 0) return false;
  shape = {1, 1, first[0], x[axis] / first[0], first.size() == 2};
  if (!Op::fits(shape) || (shape.matrix && first[1] != shape.reducible)) return false;
  for (const std::vector<int64_t>& other : parameters)
    if (other != first) return false;
  for (int64_t i = 0; i < axis; ++i) shape.before *= x[i];
  for (size_t i = axis + 1; i < x.size(); ++i) shape.behind *= x[i];
  return true;
}

template <typename Op, typename T, typename W>
Status* compute(const Kernel<Op>& kernel, Context* context) {
  constexpr size_t PARAMETERS = Op::PARAMETERS;
  const void* inputs[1 + PARAMETERS];
  std::vector<int64_t> sizes, parameter_sizes[PARAMETERS];
  for (size_t index = 0; index <= PARAMETERS; ++index) {
    const Value* value = nullptr;
    void* data = nullptr;
    // KernelContext_GetInput, GetTensorMutableData
    Status* status =
        api->call<90, Status*, const Context*, size_t, const Value**>(context, index, &value);
    if (status == nullptr)
      status = dimensions(value, index == 0 ? sizes : parameter_sizes[index - 1]);
    if (status == nullptr) status = api->call<51, Status*, const Value*, void**>(value, &data);
    if (status != nullptr) return status;
    inputs[index] = data;
  }
  const int64_t rank = static_cast<int64_t>(sizes.size());
  const int64_t axis = kernel.axis < 0 ? kernel.axis + rank : kernel.axis;
  if (axis < 0 || axis >= rank) return failure(Op::NAME, "axis is no axis of x");
  Shape shape{};
  if (!describe<Op>(sizes, axis, parameter_sizes, shape))
    return failure(Op::NAME, "the parameters do not fit the channels of x");
  sizes[axis] = shape.preserved;
  Value* out = nullptr;
  void* to = nullptr;
  // KernelContext_GetOutput
  Status* status = api->call<91, Status*, Context*, size_t, const int64_t*, size_t, Value**>(
      context, 0, sizes.data(), sizes.size(), &out);
  if (status == nullptr) status = api->call<51, Status*, Value*, void**>(out, &to);
  if (status != nullptr) return status;
  if (shape.blocks() == 0 || shape.reducible == 0) return nullptr;

  std::vector<W> wide[PARAMETERS];
  for (size_t index = 0; index < PARAMETERS; ++index) {
    const T* const given = static_cast<const T*>(inputs[1 + index]);
    wide[index].assign(given, given + shape.preserved * (shape.matrix ? shape.reducible : 1));
  }
  // A part is worth a thread's while: some 32,000 numbers.
  const int64_t each = 1 + 1000 / shape.channels();
  Work<Op, T, W> work{{shape, kernel.op.template form<W>(wide), static_cast<const T*>(inputs[0]),
                       static_cast<T*>(to), nullptr, 0, 0},
                      each,
                      false};
  const size_t parts = static_cast<size_t>((shape.blocks() + each - 1) / each);
  if (parts == 1) {
    Work<Op, T, W>::run(&work, 0);
  } else {
    // KernelContext_ParallelFor
    status = api->call<274, Status*, const Context*, void (*)(void*, size_t), size_t, size_t, void*>(
        context, &Work<Op, T, W>::run, parts, 0, &work);
  }
  if (status == nullptr && work.failed) return failure(Op::NAME, "out of memory");
  return status;
}

// OrtCustomOp, of version 17.
struct CustomOp {
  uint32_t version;
  void* create;
  const char* (*name)(const CustomOp*);
  const char* (*provider)(const CustomOp*);
  int (*input_type)(const CustomOp*, size_t);
  size_t (*input_count)(const CustomOp*);
  int (*output_type)(const CustomOp*, size_t);
  size_t (*output_count)(const CustomOp*);
  void* compute;
  void (*destroy)(void*);
  int (*input_characteristic)(const CustomOp*, size_t);
  int (*output_characteristic)(const CustomOp*, size_t);
  int (*input_memory)(const CustomOp*, size_t);
  int (*least_inputs)(const CustomOp*);
  int (*same_inputs)(const CustomOp*);
  int (*least_outputs)(const CustomOp*);
  int (*same_outputs)(const CustomOp*);
  Status* (*create_v2)(const CustomOp*, const Api*, const Attributes*, void**);
  Status* (*compute_v2)(void*, Context*);
  void* infer_shape;
  int (*first_version)(const CustomOp*);
  int (*last_version)(const CustomOp*);
  void* rest[4];
};

template <typename Op>
Status* create(const CustomOp*, const Api*, const Attributes* node, void** made) {
  Kernel<Op>* const kernel = new (std::nothrow) Kernel<Op>;
  if (kernel == nullptr) return failure(Op::NAME, "out of memory");
  kernel->axis = integer(node, "axis", 1);
  if (const char* wrong = kernel->op.read_attributes(node)) {
    delete kernel;
    return failure(Op::NAME, wrong);
  }
  *made = kernel;
  return nullptr;
}

template <typename Op, typename T, typename W>
Status* run(void* kernel, Context* context) {
  try {
    return compute<Op, T, W>(*static_cast<Kernel<Op>*>(kernel), context);
  } catch (const std::bad_alloc&) {
    return failure(Op::NAME, "out of memory");
  }
}

template <typename Op, typename T, typename W, Element ELEMENT>
const CustomOp* custom_op() {
  static const CustomOp op = [] {
    CustomOp made{};
    made.version = API_VERSION;
    made.name = [](const CustomOp*) { return Op::NAME; };
    made.provider = [](const CustomOp*) -> const char* { return "CPUExecutionProvider"; };
    made.input_type = [](const CustomOp*, size_t) { return static_cast<int>(ELEMENT); };
    made.output_type = made.input_type;
    made.input_count = [](const CustomOp*) -> size_t { return 1 + Op::PARAMETERS; };
    made.output_count = [](const CustomOp*) -> size_t { return 1; };
    made.destroy = [](void* kernel) { delete static_cast<Kernel<Op>*>(kernel); };
    made.input_characteristic = [](const CustomOp*, size_t) { return 0; };
    made.output_characteristic = made.input_characteristic;
    made.input_memory = [](const CustomOp*, size_t) { return 0; };
    made.least_inputs = [](const CustomOp*) { return 1; };
    made.least_outputs = made.least_inputs;
    made.same_inputs = [](const CustomOp*) { return 1; };
    made.same_outputs = made.same_inputs;
    made.create_v2 = create<Op>;
    made.compute_v2 = run<Op, T, W>;
    made.first_version = [](const CustomOp*) { return 1; };
    made.last_version = [](const CustomOp*) { return 0x7fffffff; };
    return made;
  }();
  return &op;
}

// Adds an operator, for every type of numbers.
template <typename Op>
Status* add(Domain* domain) {
  for (const CustomOp* op :
       {custom_op<Op, float, float, FLOAT>(), custom_op<Op, double, double, DOUBLE>(),
        custom_op<Op, Half, float, HALF>(), custom_op<Op, Brain, float, BRAIN>()}) {
    // CustomOpDomain_Add
    Status* status = api->call<27, Status*, Domain*, const CustomOp*>(domain, op);
    if (status != nullptr) return status;
  }
  return nullptr;
}

}  // namespace

// What session_options.register_custom_ops_library(path) calls.
LEAN_EXPORT Status* RegisterCustomOps(SessionOptions* options, const ApiBase* base) {
  api = base->get(API_VERSION);
  if (api == nullptr) {
    // Without a table no error can be made; with that of version 1 one can.
    api = base->get(1);
    return api == nullptr ? nullptr
                          : failure("kernel", "needs ONNX Runtime 1.17 or later");
  }
  Domain* domain = nullptr;
  // CreateCustomOpDomain, AddCustomOpDomain
  Status* status = api->call<26, Status*, const char*, Domain**>("lean_fx", &domain);
  if (status == nullptr) status = add<Lean>(domain);
  if (status == nullptr) status = add<LeanSimplex>(domain);
  if (status == nullptr) status = add<LeanGated>(domain);
  if (status == nullptr)
    status = api->call<28, Status*, SessionOptions*, Domain*>(options, domain);
  return status;
}
