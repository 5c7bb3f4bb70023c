// oneDNN's batch norm behind a C interface, for library.py. If oneDNN throws, a function returns null or false, and
// norm_error the message. Tensors are dense; statistics and parameters are float32.

#include <initializer_list>
#include <memory>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <utility>

#include "oneapi/dnnl/dnnl.hpp"

namespace {

using dnnl::batch_normalization_backward;
using dnnl::batch_normalization_forward;
using dnnl::memory;
using dnnl::normalization_flags;

thread_local std::string last_error;

dnnl::engine& engine() {
  static dnnl::engine cpu(dnnl::engine::kind::cpu, 0);
  return cpu;
}

dnnl::stream& stream() {
  static dnnl::stream in_order(engine());
  return in_order;
}

// Runs `body` and returns its result. After an exception: a default value, and the message is saved for norm_error.
template <class Body>
auto guarded(Body body) -> decltype(body()) {
  try {
    return body();
  } catch (const std::exception& error) {
    last_error = error.what();
    return {};
  }
}

memory::format_tag layout_tag(const std::string& name) {
  static const std::unordered_map<std::string, memory::format_tag> tags{
      {"nchw", memory::format_tag::nchw},
      {"nhwc", memory::format_tag::nhwc},
      {"nChw8c", memory::format_tag::nChw8c},
      {"nChw16c", memory::format_tag::nChw16c},
  };
  return tags.at(name);
}

// A primitive and its arguments. They are made once: a call only replaces the pointers.
struct Pass {
  dnnl::primitive primitive;
  std::unordered_map<int, memory> arguments;

  void add(const memory::desc& description, std::initializer_list<int> names) {
    for (int name : names) arguments.emplace(name, memory(description, engine(), DNNL_MEMORY_NONE));
  }

  // Ignores pointers to arguments that the primitive does not have.
  void run(std::initializer_list<std::pair<int, void*>> pointers) {
    for (auto [name, pointer] : pointers) {
      auto found = arguments.find(name);
      if (found != arguments.end()) found->second.set_data_handle(pointer);
    }
    primitive.execute(stream(), arguments);
    stream().wait();
  }
};

}  // namespace

// A batch norm for one shape, dtype and layout, with or without a ReLU. In inference it has no backward pass.
struct Norm {
  memory::desc plain, tensor, workspace;
  Pass forward, backward;
  std::string implementation;
};

// The arrays of a call. Those that the call does not use are null.
struct Arrays {
  void *src, *scale, *shift, *mean, *variance, *dst, *workspace;
  void *diff_dst, *diff_src, *diff_scale, *diff_shift;
};

extern "C" {

const char* norm_error() { return last_error.c_str(); }

// The version of the loaded library. Null if it differs from that of the headers: libtorch contains oneDNN too.
const char* norm_version() {
  return guarded([]() -> const char* {
    static std::string text;
    const dnnl_version_t* version = dnnl_version();
    text = std::to_string(version->major) + "." + std::to_string(version->minor) + "." + std::to_string(version->patch);
    if (version->major != DNNL_VERSION_MAJOR || version->minor != DNNL_VERSION_MINOR) {
      throw std::runtime_error("oneDNN " + text + " was loaded, which is not the version of the headers");
    }
    return text.c_str();
  });
}

// `layout`: nchw, nhwc, nChw8c or nChw16c.
Norm* norm_new(const int64_t shape[4], bool bfloat16, const char* layout, bool relu, float eps, bool training) {
  return guarded([&]() -> Norm* {
    const memory::dims dims(shape, shape + 4);
    const auto type = bfloat16 ? memory::data_type::bf16 : memory::data_type::f32;
    auto norm = std::make_unique<Norm>();
    const auto tensor = norm->tensor = memory::desc(dims, type, layout_tag(layout));
    norm->plain = memory::desc(dims, type, memory::format_tag::nchw);

    auto flags = normalization_flags::use_scale | normalization_flags::use_shift;
    if (relu) flags |= normalization_flags::fuse_norm_relu;
    if (!training) flags |= normalization_flags::use_global_stats;
    const auto kind = training ? dnnl::prop_kind::forward_training : dnnl::prop_kind::forward_inference;
    const batch_normalization_forward::primitive_desc forward(engine(), kind, tensor, tensor, eps, flags);
    const auto channels = forward.mean_desc();
    norm->implementation = forward.impl_info_str();
    norm->workspace = forward.workspace_desc();
    norm->forward.primitive = batch_normalization_forward(forward);
    norm->forward.add(tensor, {DNNL_ARG_SRC, DNNL_ARG_DST});
    norm->forward.add(channels, {DNNL_ARG_SCALE, DNNL_ARG_SHIFT, DNNL_ARG_MEAN, DNNL_ARG_VARIANCE});
    norm->forward.add(norm->workspace, {DNNL_ARG_WORKSPACE});
    if (training) {
      const batch_normalization_backward::primitive_desc backward(engine(), dnnl::prop_kind::backward, tensor, tensor,
                                                                  tensor, eps, flags, forward);
      norm->backward.primitive = batch_normalization_backward(backward);
      norm->backward.add(tensor, {DNNL_ARG_SRC, DNNL_ARG_DIFF_DST, DNNL_ARG_DIFF_SRC});
      norm->backward.add(channels,
                         {DNNL_ARG_SCALE, DNNL_ARG_MEAN, DNNL_ARG_VARIANCE, DNNL_ARG_DIFF_SCALE, DNNL_ARG_DIFF_SHIFT});
      norm->backward.add(norm->workspace, {DNNL_ARG_WORKSPACE});
    }
    return norm.release();
  });
}

void norm_delete(Norm* norm) { delete norm; }

// The name of oneDNN's kernel.
const char* norm_implementation(const Norm* norm) { return norm->implementation.c_str(); }

// Bytes that the forward pass saves for the backward pass of a fused ReLU.
size_t norm_workspace_bytes(const Norm* norm) { return norm->workspace.get_size(); }

// Copies an nchw tensor into the layout of `norm`, or back with `to_plain`.
bool norm_reorder(const Norm* norm, void* from, void* to, bool to_plain) {
  return guarded([&] {
    memory source(to_plain ? norm->tensor : norm->plain, engine(), from);
    memory target(to_plain ? norm->plain : norm->tensor, engine(), to);
    dnnl::reorder(source, target).execute(stream(), source, target);
    stream().wait();
    return true;
  });
}

// Writes dst, and in training mean, variance and workspace.
bool norm_forward(Norm* norm, const Arrays* a) {
  return guarded([&] {
    norm->forward.run({{DNNL_ARG_SRC, a->src},
                       {DNNL_ARG_SCALE, a->scale},
                       {DNNL_ARG_SHIFT, a->shift},
                       {DNNL_ARG_MEAN, a->mean},
                       {DNNL_ARG_VARIANCE, a->variance},
                       {DNNL_ARG_DST, a->dst},
                       {DNNL_ARG_WORKSPACE, a->workspace}});
    return true;
  });
}

// Writes diff_src, diff_scale and diff_shift.
bool norm_backward(Norm* norm, const Arrays* a) {
  return guarded([&] {
    norm->backward.run({{DNNL_ARG_SRC, a->src},
                        {DNNL_ARG_SCALE, a->scale},
                        {DNNL_ARG_MEAN, a->mean},
                        {DNNL_ARG_VARIANCE, a->variance},
                        {DNNL_ARG_WORKSPACE, a->workspace},
                        {DNNL_ARG_DIFF_DST, a->diff_dst},
                        {DNNL_ARG_DIFF_SRC, a->diff_src},
                        {DNNL_ARG_DIFF_SCALE, a->diff_scale},
                        {DNNL_ARG_DIFF_SHIFT, a->diff_shift}});
    return true;
  });
}

}  // extern "C"
