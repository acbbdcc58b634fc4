// A simulated accelerator for PyTorch, registered as PrivateUse1. Real: torch.Stream, torch.Event, torch.accelerator,
// device tensors, pinned memory, out-of-memory errors, generators, torch.compile with the eager and aot_eager
// backends. Simulated: device memory is host memory; operators run at once on the host thread, by the CPU's kernels;
// copies on a side stream run later, in order, at a set bandwidth, on a thread of their own; with a clock of its own
// (DeviceClock) times are as on a device that runs behind its host. Freed memory is
// poisoned, and a pending copy that touches memory that is gone is a *violation*; an access in an order that only
// luck made right is a *hazard* (simgpu_order.h). Written for PyTorch 2.13.
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/SDPBackend.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/DispatchStub.h>
#include <ATen/native/transformers/attention.h>
#include <ATen/ops/_local_scalar_dense_native.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_cpu_dispatch.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/set_cpu_dispatch.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/extension.h>
#include <torch/library.h>
#include "simgpu_device.h"

namespace sim {
thread_local int in_fallback = 0;  // a CPU fallback's own copies are no transfers

// --------------------------------------------------------------------- hooks
struct Gen final : at::CPUGeneratorImpl {
  explicit Gen(uint64_t seed = c10::default_rng_seed_val) : at::CPUGeneratorImpl(seed) {
    device_ = DevAlloc::device();
    key_set_ = c10::DispatchKeySet(c10::DispatchKey::PrivateUse1);
  }
  Gen* clone_impl() const override {
    auto g = new Gen();
    g->set_state(*get_state());
    return g;
  }
};
struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  at::Allocator* getPinnedMemoryAllocator() const override { return &pin_alloc; }
  bool isPinnedPtr(const void* p) const override { return is_pinned(p); }
  at::Device getDeviceFromPtr(void*) const override { return DevAlloc::device(); }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
    static auto& g = *new at::Generator(at::make_generator<Gen>());
    return g;
  }
  at::Generator getNewGenerator(c10::DeviceIndex) const override { return at::make_generator<Gen>(); }
  void resizePrivateUse1Bytes(const c10::Storage& s, size_t n) const override {
    auto keep = std::min(s.nbytes(), n);
    auto p = dev_alloc.allocate(n);
    if (keep) {
      drain(current_stream);
      order.tick(current_stream);
      order.access(address(s.data()), address(s.data()) + keep, current_stream, false, "resize_");
      order.access(address(p.get()), address(p.get()) + keep, current_stream, true, "resize_");
      std::memcpy(p.get(), s.data(), keep);
    }
    s.unsafeGetStorageImpl()->set_data_ptr_noswap(std::move(p));
    s.unsafeGetStorageImpl()->set_nbytes(n);
  }
};
static Hooks& hooks() { static auto& h = *new Hooks; return h; }

// The host has waited for a stream, or for all: for the checker, and by the device's own clock.
static void host_waits_stream(int64_t st) { order.host_waits_stream(st); device_clock.host_waits_stream(st); }
static void host_waits_all() { order.host_waits_all(); device_clock.host_waits_all(); }

// --------------------------------------------------------------------- guard
struct Guard final : c10::impl::DeviceGuardImplInterface {
  static constexpr auto T = c10::DeviceType::PrivateUse1;
  using Stream = c10::Stream;
  static Stream stream(int64_t id) { return Stream(Stream::UNSAFE, DevAlloc::device(), id); }
  c10::DeviceType type() const override { return T; }
  c10::Device exchangeDevice(c10::Device) const override { return DevAlloc::device(); }
  c10::Device getDevice() const override { return DevAlloc::device(); }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  Stream getStream(c10::Device) const override { return stream(current_stream); }
  Stream getDefaultStream(c10::Device) const override { return stream(0); }
  Stream getStreamFromGlobalPool(c10::Device, bool = false) const override { return stream(next_stream++); }
  Stream getNewStream(c10::Device, int = 0) const override { return stream(next_stream++); }
  Stream exchangeStream(Stream s) const override { return stream(std::exchange(current_stream, s.id())); }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  bool queryStream(const Stream& s) const override {
    if (device_clock.on()) {
      if (!device_clock.past(device_clock.record(s.id()))) return false;
      drain(s.id());
    } else if (s.id() && !worker(s.id()).query()) {
      return false;
    }
    order.host_waits_stream(s.id());
    return true;
  }
  void synchronizeStream(const Stream& s) const override { drain(s.id()); host_waits_stream(s.id()); }
  void synchronizeDevice(c10::DeviceIndex) const override { drain_all(); host_waits_all(); }
  void recordDataPtrOnStream(const c10::DataPtr& p, const Stream& s) const override {
    order.recorded(address(p.get()), s.id());
  }
  static std::shared_ptr<Event>& event(void* e) { return *static_cast<std::shared_ptr<Event>*>(e); }
  void destroyEvent(void* e, c10::DeviceIndex) const noexcept override {
    delete static_cast<std::shared_ptr<Event>*>(e);
  }
  void record(void** e, const Stream& s, c10::DeviceIndex, c10::EventFlag) const override {
    if (!*e) *e = new std::shared_ptr<Event>(std::make_shared<Event>());
    event(*e)->record(s.id(), event(*e));
  }
  void block(void* e, const Stream& s) const override { if (e) event(e)->block(s.id(), event(e)); }
  bool queryEvent(void* e) const override { return !e || event(e)->query(); }
  void synchronizeEvent(void* e) const override { if (e) event(e)->synchronize(); }
  double elapsedTime(void* a, void* b, c10::DeviceIndex) const override {
    synchronizeEvent(a);
    synchronizeEvent(b);
    return 1e3 * event(a)->seconds_until(*event(b));
  }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

// -------------------------------------------------------- what operators share
// The bytes of a tensor's storage, from its start, that its elements reach.
static size_t reach(const at::Tensor& t) {
  int64_t last = t.storage_offset();
  for (int64_t i = 0; i < t.dim(); i++) last += (t.size(i) - 1) * t.stride(i);
  return (last + 1) * t.itemsize();
}
static void touch(const at::Tensor& t, bool write, const std::string& what) {
  if (!t.defined() || t.device().is_cpu() || t.numel() == 0) return;
  auto end = reach(t);
  TORCH_CHECK(end <= t.storage().nbytes(), "simgpu error: illegal memory access: ", what, " reaches byte ", end,
              " of a storage of ", t.storage().nbytes(), " (freed by resize_?)");
  auto base = address(t.storage().data());
  order.access(base + t.storage_offset() * t.itemsize(), base + end, current_stream, write, what);
}
// a CPU tensor over the same memory
static at::Tensor host_view(const at::Tensor& t) {
  if (t.device().is_cpu()) return t;
  auto st = t.storage();
  auto data = at::DataPtr(st.mutable_data(), c10::Device(c10::kCPU));
  auto s = at::Storage(c10::Storage::use_byte_size_t(), st.nbytes(), std::move(data), nullptr, false);
  auto keys = c10::DispatchKeySet(c10::DispatchKey::CPU);
  auto r = at::detail::make_tensor<c10::TensorImpl>(std::move(s), keys, t.dtype());
  r.unsafeGetTensorImpl()->set_sizes_and_strides(t.sizes(), t.strides(), t.storage_offset());
  if (t.is_conj()) r._set_conj(true);
  if (t.is_neg()) r._set_neg(true);
  return r;
}
static at::Tensor to_device(const at::Tensor& h) {
  auto r = at::empty_strided(h.sizes(), h.strides(), h.options().device(DevAlloc::device()));
  host_view(r).copy_(h);
  return r;
}
// An operator is launched: on a side stream it runs after what is queued there. As a kernel launch on CUDA does, it
// raises the error that an earlier call left behind.
static void begin_operator() {
  int e = take_last_error();
  TORCH_CHECK(!e, "simgpu error: an earlier call on this thread was refused with code ", e,
              " and nobody cleared it (cudaGetLastError)");
  drain(current_stream);
  order.tick(current_stream);
  if (current_stream != 0) return;
  auto seconds = 1e-6 * S.op_delay_us;
  device_clock.add(0, seconds);
  if (!device_clock.on()) pace(seconds);
}

// ---------------------------------------------------------------------- copies
static bool dense_alike(const at::Tensor& a, const at::Tensor& b) {
  return a.scalar_type() == b.scalar_type() && a.sizes() == b.sizes() && a.strides() == b.strides() &&
         a.is_non_overlapping_and_dense() && a.is_neg() == b.is_neg() && a.is_conj() == b.is_conj();
}
at::Tensor copy_from(const at::Tensor& self, const at::Tensor& dst, bool non_blocking) {
  if (self.numel() == 0) return dst;
  auto src = self.sizes() == dst.sizes() ? self : self.expand(dst.sizes());
  if (in_fallback) { host_view(dst).copy_(host_view(src)); return dst; }
  auto n = (int64_t)self.nbytes();
  bool sd = !self.device().is_cpu(), dd = !dst.device().is_cpu();
  bool h2d = !sd && dd, d2h = sd && !dd;
  auto& host = h2d ? src : dst;
  bool pinned = (h2d || d2h) && is_pinned(host.data_ptr());
  if (pinned) {
    auto from = static_cast<const char*>(host.data_ptr());
    auto bytes = reach(host) - host.storage_offset() * host.itemsize();
    TORCH_CHECK(is_pinned(from, bytes), "simgpu error: invalid argument: a copy of ", bytes,
                " bytes begins in pinned host memory and ends beyond it");
  }
  auto st = current_stream;
  order.tick(st);
  const char* what = h2d ? "copy to the device" : d2h ? "copy to the host" : "copy on the device";
  touch(src, false, what);
  touch(dst, true, what);
  if (h2d) { C.h2d += n; C.h2d_calls++; (pinned ? C.h2d_pinned : C.h2d_pageable) += n; }
  else if (d2h) { C.d2h += n; (pinned ? C.d2h_pinned : C.d2h_pageable) += n; }
  else C.d2d += n;
  double rate = h2d ? S.h2d_gbps.load() : d2h ? S.d2h_gbps.load() : 0;
  if (non_blocking && st != 0 && dense_alike(src, dst) && (pinned || (sd && dd))) {
    if (h2d) C.h2d_async += n;
    if (d2h) C.d2h_async += n;
    copy_later(st, dst.data_ptr(), src.data_ptr(), n, rate);
    return dst;
  }
  drain(st);
  if ((h2d || d2h) && !pinned && S.pageable_gbps > 0) rate = S.pageable_gbps;
  auto seconds = copy_seconds(n, rate);
  device_clock.add(st, seconds);
  if (!device_clock.on()) pace(seconds);
  if ((h2d || d2h) && (!non_blocking || (d2h && !pinned))) host_waits_stream(st);  // these copies block the host
  host_view(dst).copy_(host_view(src));
  return dst;
}
at::Tensor copy_from_resize(const at::Tensor& self, const at::Tensor& dst) {
  dst.resize_(self.sizes());
  return copy_from(self, dst, false);
}
at::Scalar local_scalar(const at::Tensor& s) {
  order.tick(current_stream);
  touch(s, false, "item");
  host_waits_stream(current_stream);
  drain(current_stream);
  return at::native::_local_scalar_dense_cpu(host_view(s));
}

// ---------------------------------------------------- memory, views and storage
static c10::DispatchKeySet ks() { return c10::DispatchKeySet(c10::DispatchKey::PrivateUse1); }
at::Tensor empty_mf(at::IntArrayRef size, std::optional<at::ScalarType> dt, std::optional<at::Layout>,
                    std::optional<at::Device>, std::optional<bool>, std::optional<at::MemoryFormat> mf) {
  return at::detail::empty_generic(size, &dev_alloc, ks(), c10::dtype_or_default(dt), mf);
}
at::Tensor empty_st(at::IntArrayRef size, at::IntArrayRef stride, std::optional<at::ScalarType> dt,
                    std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(size, stride, &dev_alloc, ks(), c10::dtype_or_default(dt));
}
at::Tensor as_strided_(const at::Tensor& s, c10::IntArrayRef sz, c10::IntArrayRef sr, std::optional<int64_t> o) {
  return at::cpu::as_strided(s, sz, sr, o);
}
at::Tensor view_(const at::Tensor& s, c10::SymIntArrayRef sz) {
  return at::native::view(s, C10_AS_INTARRAYREF_SLOW(sz));
}
at::Tensor reshape_alias_(const at::Tensor& s, c10::SymIntArrayRef sz, c10::SymIntArrayRef sr) {
  return at::native::_reshape_alias(s, C10_AS_INTARRAYREF_SLOW(sz), C10_AS_INTARRAYREF_SLOW(sr));
}
const at::Tensor& resize__(const at::Tensor& s, c10::SymIntArrayRef symbolic, std::optional<at::MemoryFormat> mf) {
  auto sz = C10_AS_INTARRAYREF_SLOW(symbolic);
  auto need = at::detail::computeStorageNbytesContiguous(sz, s.itemsize(), s.storage_offset());
  if (c10::multiply_integers(sz) && need > s.storage().nbytes()) hooks().resizePrivateUse1Bytes(s.storage(), need);
  return at::native::resize_(s, sz, mf);
}
at::Tensor& set_t(at::Tensor& r, const at::Tensor& s) { return at::native::set_tensor_(r, s); }
at::Tensor& set_s(at::Tensor& r, at::Storage s) { return at::native::set_(r, s); }
at::Tensor& set_so(at::Tensor& r, at::Storage s, int64_t o, c10::IntArrayRef sz, c10::IntArrayRef sr) {
  return at::cpu::set_(r, s, o, sz, sr);
}
void record_stream_(at::Tensor& t, c10::Stream s) { order.recorded(address(t.storage().data()), s.id()); }

// ------------------------------------------------------------------- operators
static std::optional<at::Tensor> read(const std::optional<at::Tensor>& t, const char* what) {
  if (!t || !t->defined()) return {};
  touch(*t, false, what);
  return host_view(*t);
}
using Three = std::tuple<at::Tensor, at::Tensor, at::Tensor>;
static Three to_device(const Three& t) {
  auto& [a, b, c] = t;
  return {to_device(a), to_device(b), to_device(c)};
}

at::Tensor convolution(const at::Tensor& x, const at::Tensor& w, const std::optional<at::Tensor>& b,
                       c10::SymIntArrayRef st, c10::SymIntArrayRef pd, c10::SymIntArrayRef dl, bool tr,
                       c10::SymIntArrayRef op, c10::SymInt g) {
  begin_operator();
  // The CPU's kernels for float16 take a hundred times as long as those for float32.
  auto type = x.scalar_type();
  auto single = [&](const at::Tensor& t) { return type == at::kHalf ? t.to(at::kFloat) : t; };
  auto hb = read(b, "convolution");
  return to_device(at::convolution(single(*read(x, "convolution")), single(*read(w, "convolution")),
      hb ? std::optional(single(*hb)) : hb, C10_AS_INTARRAYREF_SLOW(st), C10_AS_INTARRAYREF_SLOW(pd),
      C10_AS_INTARRAYREF_SLOW(dl), tr, C10_AS_INTARRAYREF_SLOW(op), g.expect_int()).to(type));
}
Three layer_norm(const at::Tensor& x, c10::SymIntArrayRef shape, const std::optional<at::Tensor>& w,
                 const std::optional<at::Tensor>& b, double eps) {
  begin_operator();
  auto hx = *read(x, "native_layer_norm");
  auto hw = read(w, "native_layer_norm"), hb = read(b, "native_layer_norm");
  return to_device(at::native_layer_norm(hx.contiguous(), C10_AS_INTARRAYREF_SLOW(shape), hw, hb, eps));
}
Three group_norm(const at::Tensor& x, const std::optional<at::Tensor>& w, const std::optional<at::Tensor>& b,
                 c10::SymInt n, c10::SymInt c, c10::SymInt hxw, int64_t groups, double eps) {
  begin_operator();
  auto hx = *read(x, "native_group_norm");
  auto hw = read(w, "native_group_norm"), hb = read(b, "native_group_norm");
  return to_device(at::native_group_norm(hx.contiguous(), hw, hb, n.expect_int(), c.expect_int(), hxw.expect_int(),
      groups, eps));
}
// Fused, as on a GPU, where nothing but an inference is asked for: written out it takes seven times as long.
using Attention = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, c10::SymInt, c10::SymInt, at::Tensor,
                             at::Tensor, at::Tensor>;
int64_t sdp_choice(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const std::optional<at::Tensor>& bias,
                   double dropout, bool, std::optional<double>, bool grouped) {
  bool learns = at::GradMode::is_enabled() &&
      (q.requires_grad() || k.requires_grad() || v.requires_grad() || (bias && bias->requires_grad()));
  bool fused = dropout == 0 && !grouped && !learns && q.dim() == 4 && k.dim() == 4 && v.dim() == 4;
  return static_cast<int64_t>(fused ? at::SDPBackend::overrideable : at::SDPBackend::math);
}
Attention attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const std::optional<at::Tensor>& bias,
                    double, bool causal, bool, std::optional<double> scale) {
  begin_operator();
  auto of = [](const std::optional<at::Tensor>& t) { return read(t, "scaled_dot_product_attention"); };
  auto out = to_device(at::scaled_dot_product_attention(*of(q), *of(k), *of(v), of(bias), 0.0, causal, scale));
  return {out, {}, {}, {}, q.sym_size(2), k.sym_size(2), {}, {}, {}};  // what only a backward pass wants is not there
}

static bool is_generator(const c10::Argument& a) {
  auto t = a.type();
  if (auto o = t->cast<c10::OptionalType>()) t = o->getElementType();
  return t->kind() == c10::TypeKind::GeneratorType;
}
static void move_state(const at::Generator& from, at::Generator& to) {
  auto state = [&] { auto g = from; std::lock_guard<std::mutex> l(g.mutex()); return g.get_state(); }();
  std::lock_guard<std::mutex> l(to.mutex());
  to.set_state(state);
}
void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  begin_operator();
  auto& arguments = op.schema().arguments();
  auto& name = op.schema().name();
  auto first = stack->size() - arguments.size();
  // The operator draws from a CPU twin of a device generator, the default one if none is given, which gets the twin's
  // state back.
  std::vector<std::pair<at::Generator, at::Generator>> twins;
  for (size_t i = 0; i < arguments.size(); i++) {
    auto* alias = arguments[i].alias_info();
    bool write = alias && alias->isWrite();
    auto& v = (*stack)[first + i];
    if (v.isTensor()) {
      touch(v.toTensor(), write, name);
    } else if (v.isTensorList()) {
      for (const auto& t : v.toTensorVector()) touch(t, write, name);
    } else if (v.isOptionalTensorList()) {
      for (const auto& t : v.toOptionalTensorVector()) if (t) touch(*t, write, name);
    } else if (is_generator(arguments[i]) && (v.isNone() || !v.toGenerator().device().is_cpu())) {
      auto g = v.isNone() ? hooks().getDefaultGenerator(0) : v.toGenerator();
      auto twin = at::make_generator<at::CPUGeneratorImpl>();
      move_state(g, twin);
      twins.emplace_back(g, twin);
      v = twin;
    }
  }
  struct In { In() { in_fallback++; } ~In() { in_fallback--; } } in;
  at::native::cpu_fallback(op, stack);
  for (auto& [g, twin] : twins) move_state(twin, g);
}
TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }
TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty_mf);
  m.impl("empty_strided", empty_st);
  m.impl("as_strided", as_strided_);
  m.impl("view", view_);
  m.impl("unfold", TORCH_FN(at::native::unfold));  // `repeat` writes through it
  m.impl("_reshape_alias", reshape_alias_);
  m.impl("resize_", resize__);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_resize);
  m.impl("_local_scalar_dense", local_scalar);
  m.impl("set_.source_Tensor", set_t);
  m.impl("set_.source_Storage", set_s);
  m.impl("set_.source_Storage_storage_offset", set_so);
  m.impl("record_stream", record_stream_);
  m.impl("convolution_overrideable", convolution);
  m.impl("native_layer_norm", layer_norm);
  m.impl("native_group_norm", group_norm);
  m.impl("_fused_sdp_choice", sdp_choice);
  m.impl("_scaled_dot_product_fused_attention_overrideable", attention);
}

// -------------------------------------------------------------- Python's side
static std::map<std::string, int64_t> counters() {
  return {{"allocated", C.allocated}, {"peak", C.peak}, {"high_water", C.high_water}, {"live", C.live},
          {"allocs", C.allocs}, {"capacity", S.capacity}, {"pinned", C.pinned}, {"peak_pinned", C.peak_pinned},
          {"h2d", C.h2d}, {"h2d_pinned", C.h2d_pinned}, {"h2d_pageable", C.h2d_pageable}, {"h2d_async", C.h2d_async},
          {"d2h", C.d2h}, {"d2h_pinned", C.d2h_pinned}, {"d2h_pageable", C.d2h_pageable}, {"d2h_async", C.d2h_async},
          {"d2d", C.d2d}, {"h2d_calls", C.h2d_calls}, {"violations", C.violations}, {"hazards", order.count()}};
}
static void reset() {
  for (auto* c : {&C.h2d, &C.h2d_pinned, &C.h2d_pageable, &C.h2d_async, &C.d2h, &C.d2h_pinned, &C.d2h_pageable,
                  &C.d2h_async, &C.d2d, &C.h2d_calls, &C.violations, &C.allocs}) *c = 0;
  C.peak = C.high_water = C.allocated.load();
  C.peak_pinned = C.pinned.load();
  order.forget_hazards();
}
static void configure(int64_t capacity, double h2d, double d2h, double pageable) {
  if (capacity > 0) S.capacity = capacity;
  S.h2d_gbps = h2d;
  S.d2h_gbps = d2h;
  S.pageable_gbps = pageable;
}
}  // namespace sim

namespace at::native {
REGISTER_PRIVATEUSE1_DISPATCH(_fused_sdp_choice_stub, &sim::sdp_choice)
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using namespace sim;
  m.def("register", [] {
    at::RegisterPrivateUse1HooksInterface(&hooks());
    at::globalContext().lazyInitDevice(at::kPrivateUse1);  // is_pinned() is false for a device that is not initialised
  }, "Make PyTorch know the device. Once per process.");
  m.def("default_generator", [] { return hooks().getDefaultGenerator(0); });
  m.def("configure", &configure, py::arg("capacity_bytes"), py::arg("h2d_GBps"), py::arg("d2h_GBps"),
        py::arg("pageable_GBps"),
        "Set the device memory in bytes (-1: as it is) and the bandwidths in GB/s (0: unpaced).");
  m.def("counters", &counters, "All counters, in bytes or numbers, since the last reset().");
  m.def("reset", &reset,
        "Start the counters anew; settings stay. `peak`, `high_water` and `peak_pinned` restart at what is held now.");
  m.def("hazards", [] { return order.messages(); }, "The first 50 hazards since the last reset(), one sentence each.");
  m.def("drain", [] { drain_all(); host_waits_all(); }, py::call_guard<py::gil_scoped_release>(),
        "Wait on the host for all streams.");
  m.def("fail_allocation", &DevAlloc::fail, py::arg("index"), py::arg("times") = 1,
        "Refuse device allocation number `index` counted from now (0: the next) and the `times` - 1 after it, with an "
        "OutOfMemoryError; -1 turns it off.");
  m.def("op_delay_us", [](int64_t us) { S.op_delay_us = us; }, py::arg("us"),
        "Make every operator on the default stream take `us` microseconds longer (0: off). A copy is no operator.");
  m.def("device_clock", [](bool on) { device_clock.run(on); }, py::arg("on"),
        "Let the device have a clock of its own: operators and copies then take no real time; they advance that "
        "clock, by which events are timed and queried. The host costs nothing and runs ahead until it waits for the device.");
  m.def("device_seconds", [] { return device_clock.now(); },
        "What the device's own clock says, as far as the host has waited for it.");
  m.def("pin_limit", [](int64_t n) { S.pin_limit = n; }, py::arg("nbytes"),
        "Refuse to hold more host memory pinned or registered than this, in bytes; -1: no limit.");
  m.def("host_register", &host_register, py::arg("ptr"), py::arg("nbytes"),
        "Page-lock a host range. Returns 0 or CUDA's error code, which is also the thread's last error: 1 for an empty "
        "range, 2 over the pin limit, 712 where it overlaps pinned or registered memory.");
  m.def("host_unregister", &host_unregister, py::arg("ptr"),
        "Undo host_register. Returns 0, or 713 for no such range. Copies pending on it are violations and do not run.");
  m.def("last_error", &take_last_error,
        "The error that a refused call left on this thread, or 0; clears it. The next operator would have raised it.");
}
