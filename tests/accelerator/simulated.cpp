// A simulated accelerator on PyTorch's PrivateUse1 key: memory of its own, CPU kernels, CUDA's rules.
//
//   1. memory      tensors of the device live in blocks that hold garbage until they are written, as CUDA's do;
//                  pinned host memory is known by its address
//   2. device      two devices, one stream, a generator of their own
//   3. kernels     what a backend must bring: making, copying, viewing and resizing tensors, convolution
//   4. the rest    every other operator: CUDA's device check, then the CPU kernel on the same memory
//
// Whatever would make the host wait, and every copy between host and device, is told to a Python function.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/view_native.h>
#include <c10/core/Allocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/extension.h>

#include <mutex>
#include <set>
#include <unordered_set>

using at::IValue;
using at::Tensor;
using c10::Device;
using c10::DeviceIndex;

namespace {

constexpr auto SIMULATED = c10::DeviceType::PrivateUse1;
constexpr DeviceIndex DEVICES = 2;
thread_local DeviceIndex current_device = 0;

// -- what happened ----------------------------------------------------------------------------------------------------

py::object* listener = nullptr;

void tell(const std::string& kind, const std::string& what) {
  if (!listener) return;
  py::gil_scoped_acquire locked;
  (*listener)(kind, what);
}

// -- 1. memory --------------------------------------------------------------------------------------------------------

struct DeviceMemory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* block = bytes ? malloc(bytes) : nullptr;
    if (block) memset(block, 0xC1, bytes);  // nobody may count on zeros
    return {block, block, &free, Device(SIMULATED, current_device)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &free; }
  void copy_data(void* to, const void* from, size_t bytes) const override { memcpy(to, from, bytes); }
};
DeviceMemory device_memory;
REGISTER_ALLOCATOR(SIMULATED, &device_memory);

std::mutex pinned_lock;
std::unordered_set<const void*> pinned_blocks;

struct PinnedMemory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* block = malloc(bytes ? bytes : 1);
    std::lock_guard<std::mutex> locked(pinned_lock);
    pinned_blocks.insert(block);
    return {block, block, &release, Device(c10::kCPU)};
  }
  static void release(void* block) {
    {
      std::lock_guard<std::mutex> locked(pinned_lock);
      pinned_blocks.erase(block);
    }
    free(block);
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override { memcpy(to, from, bytes); }
};
PinnedMemory pinned_memory;

bool is_pinned(const void* block) {
  std::lock_guard<std::mutex> locked(pinned_lock);
  return pinned_blocks.count(block) > 0;
}

// Another tensor over the same memory: of the CPU for its kernels, or of the device for their results.
Tensor over_memory_of(const Tensor& tensor, Device device) {
  c10::Storage owner = tensor.storage();
  c10::DataPtr data(owner.mutable_data(), new c10::Storage(owner), [](void* kept) { delete static_cast<c10::Storage*>(kept); },
                    device);
  auto* allocator = device.is_cpu() ? c10::GetCPUAllocator() : static_cast<c10::Allocator*>(&device_memory);
  c10::Storage storage(c10::Storage::use_byte_size_t(), owner.nbytes(), std::move(data), allocator, true);
  auto key = device.is_cpu() ? c10::DispatchKey::CPU : c10::DispatchKey::PrivateUse1;
  auto result = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(key), tensor.dtype());
  result.unsafeGetTensorImpl()->set_sizes_and_strides(tensor.sizes(), tensor.strides(), tensor.storage_offset());
  if (tensor.is_conj()) result._set_conj(true);
  if (tensor.is_neg()) result._set_neg(true);
  return result;
}

bool is_ours(const Tensor& tensor) { return tensor.defined() && tensor.device().type() == SIMULATED; }
Tensor on_cpu(const Tensor& tensor) { return is_ours(tensor) ? over_memory_of(tensor, Device(c10::kCPU)) : tensor; }
Tensor on_device(const Tensor& tensor, DeviceIndex index) {
  return tensor.defined() ? over_memory_of(tensor, Device(SIMULATED, index)) : tensor;
}

Tensor strided_view(const Tensor& base, c10::IntArrayRef sizes, c10::IntArrayRef strides, std::optional<int64_t> offset) {
  auto view = at::detail::make_tensor<c10::TensorImpl>(c10::TensorImpl::VIEW, c10::Storage(base.storage()), base.key_set(),
                                                       base.dtype());
  view.unsafeGetTensorImpl()->set_sizes_and_strides(sizes, strides, offset.value_or(base.storage_offset()));
  return view;
}

// -- 2. device --------------------------------------------------------------------------------------------------------

struct DeviceGuard final : c10::impl::DeviceGuardImplInterface {
  static constexpr c10::DeviceType static_type = SIMULATED;
  DeviceGuard() = default;
  explicit DeviceGuard(c10::DeviceType) {}
  c10::DeviceType type() const override { return SIMULATED; }
  Device getDevice() const override { return Device(SIMULATED, current_device); }
  void setDevice(Device device) const override { current_device = device.index(); }
  void uncheckedSetDevice(Device device) const noexcept override { current_device = device.index(); }
  Device exchangeDevice(Device device) const override {
    Device before = getDevice();
    if (device.index() >= 0) current_device = device.index();
    return before;
  }
  DeviceIndex deviceCount() const noexcept override { return DEVICES; }
  // One stream: what is queued is done at once.
  c10::Stream getStream(Device device) const noexcept override {
    auto index = device.index() < 0 ? current_device : device.index();
    return c10::Stream(c10::Stream::DEFAULT, Device(SIMULATED, index));
  }
  c10::Stream getDefaultStream(Device device) const override { return getStream(device); }
  c10::Stream getNewStream(Device device, int = 0) const override { return getStream(device); }
  c10::Stream exchangeStream(c10::Stream stream) const noexcept override { return stream; }
  void record(void**, const c10::Stream&, const DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override { tell("wait", "stream"); }
  void synchronizeDevice(const DeviceIndex) const override { tell("wait", "device"); }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, DeviceGuard);

// Draws with a CPU generator, of another seed: noise of the device is not the CPU's, as with CUDA.
struct Generator final : c10::GeneratorImpl {
  static constexpr uint64_t OTHER_NOISE = 0x5EED;
  at::Generator drawing;
  uint64_t seed_ = c10::default_rng_seed_val;

  explicit Generator(DeviceIndex index)
      : c10::GeneratorImpl{Device(SIMULATED, index), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1)},
        drawing(at::detail::createCPUGenerator(c10::default_rng_seed_val ^ OTHER_NOISE)) {}
  void set_current_seed(uint64_t seed) override {
    seed_ = seed;
    drawing.set_current_seed(seed ^ OTHER_NOISE);
  }
  uint64_t current_seed() const override { return seed_; }
  uint64_t seed() override {
    set_current_seed(c10::detail::getNonDeterministicRandom());
    return seed_;
  }
  void set_offset(uint64_t) override {}
  uint64_t get_offset() const override { return 0; }
  void set_state(const c10::TensorImpl& state) override {
    drawing.set_state(Tensor(c10::intrusive_ptr<c10::TensorImpl>::reclaim_copy(const_cast<c10::TensorImpl*>(&state))));
  }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override { return drawing.get_state().getIntrusivePtr(); }
  static c10::DeviceType device_type() { return SIMULATED; }
  GeneratorImpl* clone_impl() const override {
    auto* copy = new Generator(device().index());
    copy->drawing = drawing.clone();
    copy->seed_ = seed_;
    return copy;
  }
};

const at::Generator& default_generator(DeviceIndex index) {
  static const std::vector<at::Generator> all = {at::make_generator<Generator>(DeviceIndex(0)),
                                                 at::make_generator<Generator>(DeviceIndex(1))};
  return all.at(index < 0 ? current_device : index);
}

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return DEVICES; }
  DeviceIndex getCurrentDevice() const override { return current_device; }
  void setCurrentDevice(DeviceIndex index) const override { current_device = index; }
  DeviceIndex exchangeDevice(DeviceIndex index) const override { return std::exchange(current_device, index); }
  DeviceIndex maybeExchangeDevice(DeviceIndex index) const override { return std::exchange(current_device, index); }
  const at::Generator& getDefaultGenerator(DeviceIndex index) const override { return default_generator(index); }
  at::Generator getNewGenerator(DeviceIndex index) const override {
    return at::make_generator<Generator>(index < 0 ? current_device : index);
  }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned_memory; }
  bool isPinnedPtr(const void* block) const override { return is_pinned(block); }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    auto larger = device_memory.allocate(bytes);
    memcpy(larger.get(), storage.data(), std::min(bytes, storage.nbytes()));
    storage.unsafeGetStorageImpl()->set_data_ptr_noswap(std::move(larger));
    storage.unsafeGetStorageImpl()->set_nbytes(bytes);
  }
};

// -- 3. kernels -------------------------------------------------------------------------------------------------------

using Dtype = std::optional<at::ScalarType>;
using Layout = std::optional<at::Layout>;
using AtDevice = std::optional<Device>;
using Flag = std::optional<bool>;
using Format = std::optional<at::MemoryFormat>;

Tensor empty(c10::IntArrayRef sizes, Dtype dtype, Layout, AtDevice device, Flag, Format format) {
  c10::DeviceGuard there(device.value_or(Device(SIMULATED, current_device)));
  return at::detail::empty_generic(sizes, &device_memory, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                   c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(c10::IntArrayRef sizes, c10::IntArrayRef strides, Dtype dtype, Layout, AtDevice device, Flag) {
  c10::DeviceGuard there(device.value_or(Device(SIMULATED, current_device)));
  return at::detail::empty_strided_generic(sizes, strides, &device_memory, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                           c10::dtype_or_default(dtype));
}

Tensor copy_from(const Tensor& from, const Tensor& to, bool non_blocking) {
  const auto what = std::to_string(from.numel()) + " " + c10::toString(from.scalar_type());
  if (from.is_cpu() && !to.is_cpu()) {
    // As on CUDA, only pinned memory is read while the host goes on.
    const bool free_running = non_blocking && is_pinned(from.storage().data());
    tell(free_running ? "asynchronous copy" : "copy to device", what + (non_blocking && !free_running ? ", not pinned" : ""));
  } else if (to.is_cpu() && !from.is_cpu()) {
    const bool free_running = non_blocking && is_pinned(to.storage().data());
    tell(free_running ? "asynchronous copy" : "copy to host", what + (non_blocking && !free_running ? ", not pinned" : ""));
  }
  on_cpu(to).copy_(on_cpu(from));
  return to;
}

Tensor copy_and_resize(const Tensor& from, const Tensor& to) {
  at::native::resize_output(to, from.sizes());
  return copy_from(from, to, false);
}

at::Scalar local_scalar(const Tensor& tensor) {
  tell("wait", "item");
  return on_cpu(tensor).item();
}

Tensor view(const Tensor& tensor, c10::SymIntArrayRef sizes) { return at::native::view(tensor, C10_AS_INTARRAYREF_SLOW(sizes)); }

Tensor reshape_alias(const Tensor& tensor, c10::SymIntArrayRef sizes, c10::SymIntArrayRef strides) {
  return strided_view(tensor, C10_AS_INTARRAYREF_SLOW(sizes), C10_AS_INTARRAYREF_SLOW(strides), std::nullopt);
}

const Tensor& resize(const Tensor& tensor, c10::SymIntArrayRef symbolic, Format format) {
  auto* impl = tensor.unsafeGetTensorImpl();
  impl->set_sizes_contiguous(C10_AS_INTARRAYREF_SLOW(symbolic));
  if (format && *format != at::MemoryFormat::Contiguous && *format != at::MemoryFormat::Preserve)
    impl->empty_tensor_restride(*format);
  const size_t bytes = (tensor.storage_offset() + tensor.numel()) * tensor.itemsize();
  if (bytes > tensor.storage().nbytes()) at::detail::getPrivateUse1Hooks().resizePrivateUse1Bytes(tensor.storage(), bytes);
  return tensor;
}

Tensor& set_storage(Tensor& tensor, c10::Storage storage, int64_t offset, c10::IntArrayRef sizes, c10::IntArrayRef strides) {
  auto* impl = tensor.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(storage));
  if (strides.empty() && !sizes.empty()) {
    impl->set_storage_offset(offset);
    impl->set_sizes_contiguous(sizes);
  } else {
    impl->set_sizes_and_strides(sizes, strides, offset);
  }
  return tensor;
}

Tensor& set_whole_storage(Tensor& tensor, c10::Storage storage) {
  const auto items = static_cast<int64_t>(storage.nbytes() / tensor.itemsize());
  return set_storage(tensor, std::move(storage), 0, {items}, {});
}

void check_same_device(const char* op, std::initializer_list<Tensor> tensors) {
  for (const auto& tensor : tensors)
    TORCH_CHECK(!tensor.defined() || is_ours(tensor), "Expected all tensors to be on the same device, but found at least two "
                "devices, sim:", static_cast<int>(current_device), " and ", tensor.device(), "! (", op, ")");
}

Tensor convolution(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, c10::SymIntArrayRef stride,
                   c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation, bool transposed, c10::SymIntArrayRef out_padding,
                   c10::SymInt groups) {
  const Tensor shift = bias.value_or(Tensor());
  check_same_device("convolution", {x, weight, shift});
  const auto shift_on_cpu = shift.defined() ? std::optional<Tensor>(on_cpu(shift)) : std::nullopt;
  return on_device(at::convolution_symint(on_cpu(x), on_cpu(weight), shift_on_cpu, stride, padding, dilation, transposed,
                                          out_padding, groups), x.device().index());
}

std::tuple<Tensor, Tensor, Tensor> convolution_backward(
    const Tensor& grad, const Tensor& x, const Tensor& weight, c10::SymIntArrayRef stride, c10::SymIntArrayRef padding,
    c10::SymIntArrayRef dilation, bool transposed, c10::SymIntArrayRef out_padding, c10::SymInt groups,
    std::array<bool, 3> wanted) {
  check_same_device("convolution_backward", {grad, x, weight});
  const std::vector<c10::SymInt> bias_sizes = {weight.sym_size(transposed ? 1 : 0)};
  const auto [dx, dweight, dbias] = at::convolution_backward_symint(
      on_cpu(grad), on_cpu(x), on_cpu(weight), c10::SymIntArrayRef(bias_sizes), stride, padding, dilation, transposed,
      out_padding, groups, wanted);
  const auto index = x.device().index();
  return {on_device(dx, index), on_device(dweight, index), on_device(dbias, index)};
}

int64_t plain_attention(const Tensor&, const Tensor&, const Tensor&, const std::optional<Tensor>&, double, bool,
                        std::optional<double>, bool) {
  return 0;  // of SDPBackend: math, which is made of other operators
}

// -- 4. the rest ------------------------------------------------------------------------------------------------------

// Their result's size depends on values, so CUDA's host waits for them.
const std::set<std::string> WAITING = {"aten::nonzero",     "aten::masked_select",      "aten::_unique2", "aten::unique_dim",
                                       "aten::equal",       "aten::unique_consecutive", "aten::is_nonzero",
                                       "aten::repeat_interleave.Tensor"};
// CUDA takes CPU indices, and copies them.
const std::set<std::string> TAKES_CPU_INDEX = {"aten::index", "aten::index_put_", "aten::_index_put_impl_"};

class CpuCall {
 public:
  CpuCall(const c10::OperatorHandle& op, torch::jit::Stack* stack) : op_(op), schema_(op.schema()), stack_(stack) {}

  void run() {
    const auto& name = schema_.name();
    if (WAITING.count(name) || WAITING.count(name + "." + schema_.overload_name())) tell("wait", name);
    const auto count = schema_.arguments().size();
    const auto given = torch::jit::last(*stack_, count);
    for (size_t i = 0; i < count; i++) look_at(given[i], schema_.arguments()[i].name());
    check_devices();
    std::vector<IValue> converted;
    for (size_t i = 0; i < count; i++) converted.push_back(to_cpu(given[i], schema_.arguments()[i]));
    torch::jit::drop(*stack_, count);
    for (auto& value : converted) torch::jit::push(*stack_, value);
    op_.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack_);

    const auto results = schema_.returns().size();
    std::vector<IValue> back;
    for (const auto& value : torch::jit::last(*stack_, results)) back.push_back(to_device(value));
    for (const auto& [cpu, ours] : replaced_) follow(cpu, ours);  // out= arguments that were resized
    torch::jit::drop(*stack_, results);
    for (auto& value : back) torch::jit::push(*stack_, value);
  }

 private:
  const c10::OperatorHandle& op_;
  const c10::FunctionSchema& schema_;
  torch::jit::Stack* stack_;
  std::optional<Device> device_;     // of the tensors given
  std::optional<Device> asked_for_;  // of a factory
  std::string on_host_;              // the name of an argument that is a CPU tensor with dimensions
  std::vector<std::pair<Tensor, Tensor>> replaced_;  // (for the CPU's kernel, ours) over the same memory

  void look_at(const IValue& value, const std::string& argument) {
    if (value.isTensor()) {
      look_at_tensor(value.toTensor(), argument);
    } else if (value.isTensorList()) {
      for (const Tensor& tensor : value.toTensorList()) look_at_tensor(tensor, argument);
    } else if (value.isOptionalTensorList()) {
      for (const std::optional<Tensor> tensor : value.toOptionalTensorList())
        if (tensor) {
          look_at_tensor(*tensor, argument);
          if (tensor->scalar_type() == at::kBool || tensor->scalar_type() == at::kByte) tell("wait", "index by a mask");
        }
    } else if (value.isDevice()) {
      asked_for_ = value.toDevice();
    }
  }

  void look_at_tensor(const Tensor& tensor, const std::string& argument) {
    if (is_ours(tensor)) {
      TORCH_CHECK(!device_ || *device_ == tensor.device(), "Expected all tensors to be on the same device, but found at least "
                  "two devices, ", *device_, " and ", tensor.device(), "! (", schema_.name(), ")");
      device_ = tensor.device();
    } else if (tensor.defined() && tensor.is_cpu() && tensor.dim() > 0) {
      on_host_ = argument;
    }
  }

  void check_devices() const {
    if (!device_ || on_host_.empty()) return;
    TORCH_CHECK(TAKES_CPU_INDEX.count(schema_.name()), "Expected all tensors to be on the same device, but found at least two "
                "devices, ", *device_, " and cpu! (argument ", on_host_, " of ", schema_.name(), ")");
    tell("copy to device", schema_.name() + " takes a CPU index");
  }

  DeviceIndex index() const {
    const auto device = asked_for_ ? *asked_for_ : device_.value_or(Device(SIMULATED, current_device));
    return device.index() < 0 ? current_device : device.index();
  }

  Tensor replace(const Tensor& tensor) {
    const Tensor cpu = on_cpu(tensor);
    if (is_ours(tensor)) replaced_.emplace_back(cpu, tensor);
    return cpu;
  }

  IValue to_cpu(const IValue& value, const c10::Argument& argument) {
    if (value.isTensor()) return replace(value.toTensor());
    if (value.isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor& tensor : value.toTensorList()) list.push_back(replace(tensor));
      return list;
    }
    if (value.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> list;
      for (const std::optional<Tensor> tensor : value.toOptionalTensorList())
        list.push_back(tensor ? std::optional<Tensor>(replace(*tensor)) : std::nullopt);
      return list;
    }
    if (value.isGenerator()) {
      const auto generator = value.toGenerator();
      TORCH_CHECK(generator.device().type() == SIMULATED, "Expected a 'sim' device type for generator but found '",
                  generator.device().type(), "'");
      return generator.get<Generator>()->drawing;
    }
    if (value.isDevice()) return Device(c10::kCPU);
    if (value.isNone() && argument.type()->repr_str().find("Generator") != std::string::npos)
      return default_generator(index()).get<Generator>()->drawing;
    return value;
  }

  IValue to_device(const IValue& value) {
    if (value.isTensor()) return result_of(value.toTensor());
    if (value.isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor& tensor : value.toTensorList()) list.push_back(result_of(tensor));
      return list;
    }
    return value;
  }

  // An argument returned is that argument, a view of one is a view of it, all else is new.
  Tensor result_of(const Tensor& result) {
    if (!result.defined()) return result;
    for (const auto& [cpu, ours] : replaced_)
      if (cpu.is_same(result)) {
        follow(cpu, ours);
        return ours;
      }
    for (const auto& [cpu, ours] : replaced_)
      if (cpu.has_storage() && result.has_storage() && cpu.storage().data() && cpu.storage().data() == result.storage().data())
        return strided_view(ours, result.sizes(), result.strides(), result.storage_offset());
    return on_device(result, index());
  }

  // Give ours the shape and memory that the kernel gave its stand-in.
  void follow(const Tensor& cpu, const Tensor& ours) const {
    if (!cpu.has_storage()) return;
    if (cpu.sizes() == ours.sizes() && cpu.strides() == ours.strides() && cpu.storage().data() == ours.storage().data()) return;
    const Tensor moved = on_device(cpu, index());
    ours.unsafeGetTensorImpl()->set_storage_keep_dtype(moved.storage());
    ours.unsafeGetTensorImpl()->set_sizes_and_strides(moved.sizes(), moved.strides(), moved.storage_offset());
  }
};

void any_other_operator(const c10::OperatorHandle& op, torch::jit::Stack* stack) { CpuCall(op, stack).run(); }

}  // namespace

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&any_other_operator>()); }
TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }
TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_and_resize);
  m.impl("_local_scalar_dense", local_scalar);
  m.impl("as_strided", strided_view);
  m.impl("view", view);
  m.impl("_reshape_alias", reshape_alias);
  m.impl("resize_", resize);
  m.impl("set_.source_Storage_storage_offset", set_storage);
  m.impl("set_.source_Storage", set_whole_storage);
  m.impl("convolution_overrideable", convolution);
  m.impl("convolution_backward_overrideable", convolution_backward);
  m.impl("_fused_sdp_choice", plain_attention);
  // These have a kernel for every backend, made of other operators; CUDA has its own of them, and so has the CPU.
  for (const auto* op : {"native_group_norm", "native_layer_norm", "silu_backward", "_foreach_norm.Scalar", "linalg_vector_norm"})
    m.impl(op, torch::CppFunction::makeFromBoxedFunction<&any_other_operator>());
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  at::RegisterPrivateUse1HooksInterface(new Hooks());
  m.def("listen", [](py::object function) {
    delete listener;
    listener = function.is_none() ? nullptr : new py::object(std::move(function));
  });
  m.def("device_count", [] { return static_cast<int>(DEVICES); });
  m.def("current_device", [] { return static_cast<int>(current_device); });
  m.def("set_device", [](int index) { current_device = static_cast<DeviceIndex>(index); });
  m.def("default_generator", [](int index) { return default_generator(static_cast<DeviceIndex>(index)); });
}
