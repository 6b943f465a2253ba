// The face for ONNX Runtime: a kernel for the nodes LEAN of the domain lean_fx.
//
// ONNX Runtime takes a registered kernel in place of the function that a file holds. Its C API is a
// table to which functions are only ever appended, so that slots, counted from 0, stay what they
// are; they are written out here, and no header is needed.

#include <cstddef>
#include <cstdint>
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

Status* failure(const char* text) {
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

float real(const Attributes* node, const char* name) {
  float value = 0;
  // KernelInfoGetAttribute_float
  const bool absent =
      ignored(api->call<85, Status*, const Attributes*, const char*, float*>(node, name, &value));
  return absent ? 0 : value;
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

struct Kernel {
  Options options;
  int64_t axis = 1;
};

// Reads the attributes of a node; a text that says what is wrong, or nullptr.
const char* read(const Attributes* node, Kernel& kernel) {
  Options& options = kernel.options;
  kernel.axis = integer(node, "axis", 1);
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
    return "lean_fx LEAN: normalize is none of column, row and none; export the model anew";
  }
  if (scale == "mean") {
    options.scale = lean::Scale::mean;
  } else if (scale == "magnitude") {
    options.scale = lean::Scale::magnitude;
  } else if (!(scale == "sum")) {
    return "lean_fx LEAN: scale is none of sum, mean and magnitude; export the model anew";
  }
  options.interleaved = layout == "interleaved";
  if (!options.interleaved && !(layout == "contiguous"))
    return "lean_fx LEAN: layout is neither contiguous nor interleaved; export the model anew";
  return nullptr;
}

template <typename T, typename W>
struct Work {
  Shape shape;
  const Options* options;
  const T* x;
  const W* seed;
  T* out;
  int64_t blocks_each;
  bool failed;

  static void run(void* user, size_t part) {
    Work& work = *static_cast<Work*>(user);
    const int64_t blocks = work.shape.blocks(), first = work.blocks_each * static_cast<int64_t>(part);
    const int64_t last = first + work.blocks_each < blocks ? first + work.blocks_each : blocks;
    const lean::Scratch<W> scratch(work.shape.walk_rows() * lean::LANES);
    if (scratch.get() == nullptr) {
      work.failed = true;
      return;
    }
    lean::Walk<T, W>{work.shape, *work.options, work.x,  work.seed,
                     work.out,   scratch.get(), first, last}
        .run();
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

template <typename T, typename W>
Status* compute(const Kernel& kernel, Context* context) {
  const Value *x = nullptr, *seed = nullptr;
  // KernelContext_GetInput
  Status* status = api->call<90, Status*, const Context*, size_t, const Value**>(context, 0, &x);
  if (status == nullptr)
    status = api->call<90, Status*, const Context*, size_t, const Value**>(context, 1, &seed);
  std::vector<int64_t> sizes, seeds;
  if (status == nullptr) status = dimensions(x, sizes);
  if (status == nullptr) status = dimensions(seed, seeds);
  if (status != nullptr) return status;

  const int64_t rank = static_cast<int64_t>(sizes.size());
  const int64_t axis = kernel.axis < 0 ? kernel.axis + rank : kernel.axis;
  if (axis < 0 || axis >= rank) return failure("lean_fx LEAN: axis is no axis of x");
  if (seeds.empty() || seeds[0] < 1 || sizes[axis] % seeds[0] != 0)
    return failure("lean_fx LEAN: the seed does not fit the channels of x");
  Shape shape{1, 1, seeds[0], sizes[axis] / seeds[0], seeds.size() == 2};
  if (seeds.size() > 2 || (shape.matrix && seeds[1] != shape.reducible))
    return failure("lean_fx LEAN: the seed does not fit the channels of x");
  for (int64_t i = 0; i < axis; ++i) shape.before *= sizes[i];
  for (int64_t i = axis + 1; i < rank; ++i) shape.behind *= sizes[i];
  sizes[axis] = shape.preserved;
  Value* out = nullptr;
  // KernelContext_GetOutput
  status = api->call<91, Status*, Context*, size_t, const int64_t*, size_t, Value**>(
      context, 0, sizes.data(), sizes.size(), &out);
  void *from = nullptr, *start = nullptr, *to = nullptr;
  // GetTensorMutableData
  if (status == nullptr) status = api->call<51, Status*, const Value*, void**>(x, &from);
  if (status == nullptr) status = api->call<51, Status*, const Value*, void**>(seed, &start);
  if (status == nullptr) status = api->call<51, Status*, Value*, void**>(out, &to);
  if (status != nullptr) return status;
  if (shape.blocks() == 0 || shape.reducible == 0) return nullptr;

  const T* const given = static_cast<const T*>(start);
  const std::vector<W> wide(given, given + shape.preserved * (shape.matrix ? shape.reducible : 1));
  // A part is worth a thread's while: about 16,000 numbers.
  const int64_t each = 1 + 1000 / shape.channels();
  Work<T, W> work{shape, &kernel.options, static_cast<const T*>(from), wide.data(),
                  static_cast<T*>(to), each, false};
  const size_t parts = static_cast<size_t>((shape.blocks() + each - 1) / each);
  if (parts == 1) {
    Work<T, W>::run(&work, 0);
  } else {
    // KernelContext_ParallelFor
    status = api->call<274, Status*, const Context*, void (*)(void*, size_t), size_t, size_t, void*>(
        context, &Work<T, W>::run, parts, 0, &work);
  }
  if (status == nullptr && work.failed) return failure("lean_fx LEAN: out of memory");
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

Status* create(const CustomOp*, const Api*, const Attributes* node, void** made) {
  Kernel* const kernel = new (std::nothrow) Kernel;
  if (kernel == nullptr) return failure("lean_fx LEAN: out of memory");
  if (const char* wrong = read(node, *kernel)) {
    delete kernel;
    return failure(wrong);
  }
  *made = kernel;
  return nullptr;
}

template <typename T, typename W>
Status* run(void* kernel, Context* context) {
  try {
    return compute<T, W>(*static_cast<Kernel*>(kernel), context);
  } catch (const std::bad_alloc&) {
    return failure("lean_fx LEAN: out of memory");
  }
}

template <typename T, typename W, Element ELEMENT>
const CustomOp* custom_op() {
  static const CustomOp op = [] {
    CustomOp made{};
    made.version = API_VERSION;
    made.name = [](const CustomOp*) { return "LEAN"; };
    made.provider = [](const CustomOp*) -> const char* { return "CPUExecutionProvider"; };
    made.input_type = [](const CustomOp*, size_t) { return static_cast<int>(ELEMENT); };
    made.output_type = made.input_type;
    made.input_count = [](const CustomOp*) -> size_t { return 2; };
    made.output_count = [](const CustomOp*) -> size_t { return 1; };
    made.destroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
    made.input_characteristic = [](const CustomOp*, size_t) { return 0; };
    made.output_characteristic = made.input_characteristic;
    made.input_memory = [](const CustomOp*, size_t) { return 0; };
    made.least_inputs = [](const CustomOp*) { return 1; };
    made.least_outputs = made.least_inputs;
    made.same_inputs = [](const CustomOp*) { return 1; };
    made.same_outputs = made.same_inputs;
    made.create_v2 = create;
    made.compute_v2 = run<T, W>;
    made.first_version = [](const CustomOp*) { return 1; };
    made.last_version = [](const CustomOp*) { return 0x7fffffff; };
    return made;
  }();
  return &op;
}

}  // namespace

// What session_options.register_custom_ops_library(path) calls.
LEAN_EXPORT Status* RegisterCustomOps(SessionOptions* options, const ApiBase* base) {
  api = base->get(API_VERSION);
  if (api == nullptr) {
    // Without a table no error can be made; with that of version 1 one can.
    api = base->get(1);
    return api == nullptr ? nullptr
                          : failure("lean_fx: the kernel needs ONNX Runtime 1.17 or later");
  }
  Domain* domain = nullptr;
  // CreateCustomOpDomain, CustomOpDomain_Add, AddCustomOpDomain
  Status* status = api->call<26, Status*, const char*, Domain**>("lean_fx", &domain);
  for (const CustomOp* op :
       {custom_op<float, float, FLOAT>(), custom_op<double, double, DOUBLE>(),
        custom_op<Half, float, HALF>(), custom_op<Brain, float, BRAIN>()}) {
    if (status == nullptr) status = api->call<27, Status*, Domain*, const CustomOp*>(domain, op);
  }
  if (status == nullptr)
    status = api->call<28, Status*, SessionOptions*, Domain*>(options, domain);
  return status;
}
