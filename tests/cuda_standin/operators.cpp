// Every operator of "cuda" by the CPU's kernel, on CPU tensors over the same memory: device memory is host memory here.
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/SDPBackend.h>
#include <ATen/cuda/CUDAGeneratorImpl.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/ops/copy_native.h>
#include <ATen/native/DispatchStub.h>
#include <ATen/native/transformers/attention.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/extension.h>
#include <torch/library.h>

#include <set>

#include "state.h"

namespace {
void* stream() { return c10::cuda::getCurrentCUDAStream().stream(); }
void begin_operator() {
  C10_CUDA_CHECK(cudaGetLastError());  // as a kernel's launch does: an error that nobody cleared
  standin::drain(stream());
}
at::Tensor host(const at::Tensor& t) {
  if (!t.defined() || !t.is_cuda()) return t;
  auto st = t.storage();
  auto data = at::DataPtr(st.mutable_data(), c10::Device(c10::kCPU));
  auto s = at::Storage(c10::Storage::use_byte_size_t(), st.nbytes(), std::move(data), nullptr, false);
  auto r = at::detail::make_tensor<c10::TensorImpl>(std::move(s), c10::DispatchKeySet(c10::DispatchKey::CPU), t.dtype());
  r.unsafeGetTensorImpl()->set_sizes_and_strides(t.sizes(), t.strides(), t.storage_offset());
  if (t.is_conj()) r._set_conj(true);
  if (t.is_neg()) r._set_neg(true);
  if (t.unsafeGetTensorImpl()->is_wrapped_number()) r.unsafeGetTensorImpl()->set_wrapped_number(true);
  return r;
}
at::Tensor device(const at::Tensor& h) {
  if (!h.defined() || h.is_cuda()) return h;
  auto r = at::empty_strided(h.sizes(), h.strides(), h.options().device(at::kCUDA));
  host(r).copy_(h);
  if (h.unsafeGetTensorImpl()->is_wrapped_number()) r.unsafeGetTensorImpl()->set_wrapped_number(true);
  return r;
}
// A CPU generator that goes on where the device's is, which moves on.
at::Generator twin(at::Generator g) {
  auto* c = at::check_generator<at::CUDAGeneratorImpl>(g);
  std::lock_guard<std::mutex> held(c->mutex_);
  auto offset = c->philox_offset_per_thread();
  auto t = at::detail::createCPUGenerator(c->current_seed() * 1000003 + offset);
  c->set_philox_offset_per_thread(offset + 4);
  return t;
}
bool is_generator(const c10::Argument& a) {
  auto t = a.type();
  if (auto o = t->cast<c10::OptionalType>()) t = o->getElementType();
  return t->kind() == c10::TypeKind::GeneratorType;
}
bool writes(const c10::Argument& a) { return a.alias_info() && a.alias_info()->isWrite(); }

// STANDIN_IDLE: large operators only give tensors of the right sizes, as meta tensors say, so that models of full size run.
const bool idle = getenv("STANDIN_IDLE");
at::Tensor meta(const at::Tensor& t) {
  return t.defined() ? at::empty_strided(t.sizes(), t.strides(), t.options().device(at::kMeta)) : t;
}
at::Tensor blank(const at::Tensor& t) { return at::empty_strided(t.sizes(), t.strides(), t.options().device(at::kCUDA)); }
bool idled(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  auto& schema = op.schema();
  auto& returns = schema.returns();
  auto n = schema.arguments().size(), first = stack->size() - n;
  torch::jit::Stack s(stack->begin() + first, stack->end());
  int64_t most = 0;
  bool plain = false;
  for (auto& v : s) {
    if (v.isTensor() && v.toTensor().defined()) most = std::max(most, v.toTensor().numel()), plain |= !v.toTensor().is_cuda() && v.toTensor().dim() > 0;
    else if (v.isTensorList()) for (const at::Tensor& t : v.toTensorVector()) most = std::max(most, t.numel());
  }
  for (auto& r : returns) if (r.type()->kind() != c10::TypeKind::TensorType) return false;
  if (most < 20000 || plain || returns.empty()) return false;
  std::optional<at::Tensor> written;
  for (size_t i = 0; i < n; i++) if (writes(schema.arguments()[i])) {
    if (!s[i].isTensor() || s[i].toTensor().numel() == 0) return false;
    written = s[i].toTensor();
  }
  if (written) {
    if (returns.size() != 1) return false;
    stack->resize(first);
    stack->push_back(*written);
    return true;
  }
  for (auto& v : s) {
    if (v.isTensor()) v = meta(v.toTensor());
    else if (v.isTensorList()) { c10::List<at::Tensor> l; for (const at::Tensor& t : v.toTensorVector()) l.push_back(meta(t)); v = l; }
    else if (v.isOptionalTensorList()) return false;
    else if (v.isDevice()) v = c10::Device(c10::kMeta);
  }
  try { op.callBoxed(&s); } catch (const c10::Error&) { return false; }
  stack->resize(first);
  for (auto& v : s) stack->push_back(v.toTensor().defined() ? c10::IValue(blank(v.toTensor())) : v);
  return true;
}

void boxed(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  begin_operator();
  if (idle && idled(op, stack)) return;
  auto& schema = op.schema();
  auto& arguments = schema.arguments();
  auto& returns = schema.returns();
  auto n = arguments.size(), first = stack->size() - n;
  std::vector<c10::IValue> given(stack->begin() + first, stack->end());
  std::vector<std::pair<at::Tensor, at::Tensor>> fresh;  // empty outputs, which may be given another size
  for (size_t i = 0; i < n; i++) {
    auto& v = (*stack)[first + i];
    if (v.isTensor()) {
      auto t = v.toTensor();
      if (t.defined() && t.is_cuda() && writes(arguments[i]) && t.numel() == 0) {
        v = at::empty_strided(t.sizes(), t.strides(), t.options().device(at::kCPU));
        fresh.emplace_back(t, v.toTensor());
      } else v = host(t);
    } else if (v.isTensorList()) {
      c10::List<at::Tensor> l;
      for (const at::Tensor& t : v.toTensorVector()) l.push_back(host(t));
      v = l;
    } else if (v.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> l;
      for (const auto& t : v.toOptionalTensorVector()) l.push_back(t ? std::optional(host(*t)) : t);
      v = l;
    } else if (v.isDevice()) {
      v = c10::Device(c10::kCPU);
    } else if (is_generator(arguments[i]) && (v.isNone() || !v.toGenerator().device().is_cpu())) {
      TORCH_CHECK(!standin::capturing(stream()), "stand-in: random numbers in a graph");
      v = twin(v.isNone() ? at::globalContext().defaultGenerator(c10::Device(c10::kCUDA, 0)) : v.toGenerator());
    }
  }
  bool graph = standin::capturing(stream());
  torch::jit::Stack again(stack->begin() + first, stack->end());
  op.callBoxed(stack);
  for (auto& [t, h] : fresh) {
    if (h.sizes() != t.sizes()) t.resize_(h.sizes());
    host(t).copy_(h);
  }
  std::vector<at::Tensor> made;  // over the memory of what is returned, in order
  auto back = stack->size() - returns.size();
  for (size_t i = 0; i < returns.size(); i++) {
    auto& v = (*stack)[back + i];
    bool found = false;
    if (auto* alias = returns[i].alias_info())
      for (size_t j = 0; j < n && !found; j++)
        if (auto* a = arguments[j].alias_info(); a && a->isWrite() && *a == *alias) v = given[j], found = true;
    if (found) continue;
    if (v.isTensor()) {
      v = device(v.toTensor());
      made.push_back(host(v.toTensor()));
    } else if (v.isTensorList()) {
      c10::List<at::Tensor> l;
      for (const at::Tensor& t : v.toTensorVector()) { l.push_back(device(t)); made.push_back(host(l.get(l.size() - 1))); }
      v = l;
    }
  }
  if (graph) standin::node(stream(), [op, again, made, returns = returns.size()] {
    c10::InferenceMode mode;
    c10::impl::ExcludeDispatchKeyGuard below(c10::autograd_dispatch_keyset);
    torch::jit::Stack s = again;
    op.callBoxed(&s);
    size_t k = 0;
    auto put = [&](const at::Tensor& t) { if (k < made.size() && t.defined()) made[k].copy_(t); k++; };
    if (!made.empty()) for (auto& v : s) {
      if (v.isTensor()) put(v.toTensor());
      else if (v.isTensorList()) for (const at::Tensor& t : v.toTensorVector()) put(t);
    }
  });
}

bool alike(const at::Tensor& a, const at::Tensor& b) {
  return a.scalar_type() == b.scalar_type() && a.sizes() == b.sizes() && a.strides() == b.strides() &&
         a.is_non_overlapping_and_dense() && a.is_neg() == b.is_neg() && a.is_conj() == b.is_conj();
}
at::Tensor& copy_(at::Tensor& self, const at::Tensor& src, bool non_blocking) {
  if (!self.is_cuda() || !src.is_cuda() || alike(self, src)) return at::native::copy_(self, src, non_blocking);
  begin_operator();
  if (idle && self.numel() > 20000) return self;
  auto d = host(self), s = host(src);
  d.copy_(s);
  standin::node(stream(), [=] { at::Tensor t = d; t.copy_(s); });
  return self;
}
at::Tensor convolution(const at::Tensor& x, const at::Tensor& w, const std::optional<at::Tensor>& b, c10::SymIntArrayRef st,
                       c10::SymIntArrayRef pd, c10::SymIntArrayRef dl, bool tr, c10::SymIntArrayRef op, c10::SymInt g) {
  begin_operator();
  if (idle && x.numel() + w.numel() > 20000)
    return blank(at::convolution_symint(meta(x), meta(w), b ? std::optional(meta(*b)) : b, st, pd, dl, tr, op, g));
  auto type = x.scalar_type();
  auto hx = host(x), hw = host(w), hb = b ? host(*b) : at::Tensor();
  auto s = st.vec(), p = pd.vec(), d = dl.vec(), o = op.vec();
  auto run = [=] {  // the CPU's kernels for float16 take a hundred times as long
    auto single = [&](const at::Tensor& t) { return t.defined() && type == at::kHalf ? t.to(at::kFloat) : t; };
    return at::convolution_symint(single(hx), single(hw), hb.defined() ? std::optional(single(hb)) : std::nullopt, s, p, d, tr, o, g).to(type);
  };
  auto r = device(run());
  standin::node(stream(), [=, out = host(r)] { at::Tensor t = out; t.copy_(run()); });
  return r;
}
// Attention written out: everything else of CUDA's is a kernel of its own.
int64_t choice(const at::Tensor&, const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&, double, bool,
               std::optional<double>, bool) { return (int64_t)at::SDPBackend::math; }

torch::Library& library() { static auto& l = *new torch::Library(torch::Library::IMPL, "aten", c10::DispatchKey::CUDA, __FILE__, __LINE__); return l; }
int install() {
  static const std::set<std::string> native{
      "aten::empty", "aten::empty_strided", "aten::as_strided", "aten::as_strided_", "aten::view", "aten::_reshape_alias", "aten::unfold",
      "aten::resize_", "aten::resize_as_", "aten::set_", "aten::record_stream", "aten::is_set_to", "aten::_local_scalar_dense",
      "aten::_use_cudnn_ctc_loss", "aten::_efficientzerotensor", "aten::copy_", "aten::convolution", "aten::_fused_sdp_choice",
      "aten::_pin_memory", "aten::is_pinned", "aten::view_as_real", "aten::view_as_complex", "aten::_copy_from_and_resize"};
  int count = 0;
  for (auto& name : c10::Dispatcher::singleton().getAllOpNames()) {
    auto op = c10::Dispatcher::singleton().findOp(name);
    if (!op || !op->hasSchema() || name.name.rfind("aten::", 0) || native.count(name.name)) continue;
    if (!op->hasKernelForDispatchKey(c10::DispatchKey::CUDA)) continue;
    bool view = false;
    for (auto& r : op->schema().returns()) view |= r.alias_info() && !r.alias_info()->isWrite();
    if (view) continue;
    auto full = name.name.substr(6) + (name.overload_name.empty() ? "" : "." + name.overload_name);
    library().impl(full.c_str(), torch::CppFunction::makeFromBoxedFunction<&boxed>());
    count++;
  }
  library().impl("copy_", torch::CppFunction::makeFromUnboxedFunction(&copy_));
  library().impl("convolution", torch::CppFunction::makeFromUnboxedFunction(&convolution));
  library().impl("_fused_sdp_choice", torch::CppFunction::makeFromUnboxedFunction(&choice));
  at::native::_fused_sdp_choice_stub.set_cuda_dispatch_ptr(&choice);
  return count;
}
}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("install", &install, "Take over every operator. Returns how many.");
}
