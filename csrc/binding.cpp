// The Python module normfused._C.
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>

#include "kernels/cpu/kernels.h"
#include "kernels/cuda/traffic.h"
#include "ops/batch_norm.h"
#include "ops/call.h"
#include "ops/channel_stats.h"
#include "ops/group_norm.h"
#include "ops/layer_norm.h"
#include "ops/local_response_norm.h"
#include "ops/output_memory.h"
#include "ops/parallel.h"
#include "ops/standardize.h"
#include "ops/sync_moments.h"
#include "ops/value_counts.h"

namespace {

namespace py = pybind11;
using namespace normfused;
using namespace py::literals;

// `function`, returning only the first of its results: no Python objects are made for the others.
template <auto function, class R, class... A>
auto first_result_of(R (*)(A...)) {
  return [](A... arguments) { return std::get<0>(function(arguments...)); };
}
template <auto function>
auto first_result_of() {
  return first_result_of<function>(function);
}

// The operators for eager mode, without the cost of torch.ops' argument matching.
void bind_operators(py::module_& m) {
  const auto define = [&](const char* name, auto function) {
    m.def(name, function, py::call_guard<py::gil_scoped_release>());
  };
  using ops::call_object;
  define("batch_norm_training", first_result_of<call_object<ops::batch_norm_training>()>());
  define("batch_norm_inference", first_result_of<call_object<ops::batch_norm_inference>()>());
  define("batch_norm_training_", call_object<ops::batch_norm_training_>());
  define("batch_norm_inference_", call_object<ops::batch_norm_inference_>());
  define("batch_norm_by_statistics", call_object<ops::batch_norm_by_statistics>());
  define("batch_norm_backward", call_object<ops::batch_norm_backward>());
  define("group_norm", first_result_of<call_object<ops::group_norm>()>());
  define("layer_norm", first_result_of<call_object<ops::layer_norm>()>());
  define("pack_moments", &ops::pack_moments);
  define("merge_ranks", call_object<ops::merge_ranks>());
  define("channel_moments", &ops::channel_moments);
  define("channel_sums", &ops::channel_sums);
  define("integer_sums", &ops::integer_sums);
  define("value_counts", &ops::value_counts);
  using Constants = std::vector<double>;
  define("standardize", [](const at::Tensor& input, const Constants& mean, const Constants& std, double scale,
                           std::optional<at::ScalarType> dtype, std::optional<at::MemoryFormat> memory_format) {
    return ops::standardize(input, mean, std, scale, dtype, memory_format);
  });
  define("standardize_out", [](const at::Tensor& input, const Constants& mean, const Constants& std, double scale,
                               const at::Tensor& out) { ops::standardize_out(input, mean, std, scale, out); });
  define("standardize_", [](const at::Tensor& input, const Constants& mean, const Constants& std, double scale) {
    ops::standardize_(input, mean, std, scale);
  });
  define("local_response_norm", &ops::local_response_norm);
}

// The plans of CUDA operations on a given device, for tests and reports. They need no GPU. Each function ends with the
// limits of the device.

py::dict channel_plan(cuda::Operation operation, std::array<int64_t, 3> view, int itemsize, bool fused,
                      int multiprocessors, int64_t l2_bytes, int64_t shared_bytes, int max_cluster,
                      std::array<int, 3> resident) {
  const cuda::DeviceLimits limits{multiprocessors, l2_bytes, false, shared_bytes, max_cluster};
  const cuda::Traffic t = cuda::traffic(operation, {view[0], view[1], view[2]}, itemsize, fused, limits,
                                        {resident[0], resident[1], resident[2]});
  const cuda::ReductionPlan& r = t.reduction;
  return py::dict("single"_a = t.single, "pipelined"_a = t.pipelined, "persistent"_a = t.persistent, "kept"_a = t.kept,
                  "blocks"_a = r.by_rows ? r.rows.blocks : r.columns.blocks, "window"_a = r.rows.window,
                  "launches"_a = t.launches, "read"_a = t.read, "written"_a = t.written, "by_rows"_a = r.by_rows,
                  "values"_a = r.by_rows ? r.rows.values : r.columns.values, "masked"_a = r.rows.masked,
                  "lanes"_a = r.rows.lanes, "repeat"_a = r.columns.repeat,
                  "folded"_a = !r.by_rows && r.columns.folded(), "width"_a = r.columns.width, "tiles"_a = r.tiles(),
                  "splits"_a = r.splits(), "merged"_a = t.merged, "staged_bytes"_a = r.single() ? r.staged().bytes : 0,
                  "streaming_stores"_a = t.apply.streaming);
}

py::dict group_norm_plan(std::array<int64_t, 4> view, bool channels_last, int itemsize, bool backward,
                         int multiprocessors, int64_t l2_bytes, int64_t shared_bytes, int max_cluster) {
  const GroupView group_view{view[0], view[1], view[2], view[3], channels_last};
  const cuda::DeviceLimits limits{multiprocessors, l2_bytes, false, shared_bytes, max_cluster};
  const auto t = cuda::group_norm_traffic(group_view, itemsize, backward, limits);
  const cuda::ReductionPlan& r = t.reduction;
  return py::dict("launches"_a = t.launches, "read"_a = t.read, "written"_a = t.written, "by_rows"_a = r.by_rows,
                  "is_staged"_a = t.rows.is_staged, "chunks"_a = t.rows.chunks,
                  "values"_a = r.by_rows ? r.rows.values : r.columns.values, "lanes"_a = r.rows.lanes,
                  "width"_a = r.columns.width, "tiles"_a = r.tiles(), "splits"_a = r.splits(),
                  "chunk"_a = r.by_rows ? r.rows.chunk : r.columns.chunk);
}

py::dict layer_norm_plan(std::array<int64_t, 3> view, int64_t samples, int itemsize, bool backward, int multiprocessors,
                         int64_t l2_bytes, int64_t shared_bytes, int max_cluster) {
  const ChannelView v{view[0], view[1], view[2]};
  const cuda::DeviceLimits limits{multiprocessors, l2_bytes, false, shared_bytes, max_cluster};
  const auto t = cuda::layer_norm_traffic(v, itemsize, backward, limits);
  py::dict plan("launches"_a = t.launches, "read"_a = t.read, "written"_a = t.written);
  if (v.inner == 1) {
    const auto p = cuda::plan_resident_rows(cuda::rows_of(v, samples, itemsize, true, !backward), backward, limits);
    plan.attr("update")(py::dict("values"_a = p.values, "vectors"_a = p.vectors, "lanes"_a = p.lanes,
                                 "threads"_a = p.threads, "staged_bytes"_a = p.is_staged ? p.staged.bytes : 0,
                                 "chunk"_a = p.chunk, "chunks"_a = p.chunks, "blocks"_a = p.blocks,
                                 "streaming_stores"_a = p.streaming));
  } else {
    const auto p = cuda::plan_layer_columns(v, samples, itemsize, true, limits);
    plan.attr("update")(py::dict("values"_a = p.values, "width"_a = p.width, "height"_a = p.height, "tiles"_a = p.tiles,
                                 "blocks"_a = p.blocks, "streaming_stores"_a = p.streaming));
  }
  return plan;
}

void bind_cuda_plans(py::module_& m) {
  py::enum_<cuda::Operation>(m, "Operation")
      .value("TRAINING", cuda::Operation::kTraining)
      .value("INFERENCE", cuda::Operation::kInference)
      .value("BACKWARD", cuda::Operation::kBackward)
      .value("INFERENCE_BACKWARD", cuda::Operation::kInferenceBackward)
      .value("MOMENTS", cuda::Operation::kMoments)
      .value("SUMS", cuda::Operation::kSums);
  m.def("cuda_traffic", channel_plan, "operation"_a, "view"_a, "itemsize"_a, "fused"_a, "multiprocessors"_a,
        "l2_bytes"_a, "shared_bytes"_a, "max_cluster"_a,
        "resident"_a = std::array<int, 3>{cuda::kMinBlocks, cuda::kMinBlocks, cuda::kMinBlocks});
  m.def("cuda_group_norm_plan", group_norm_plan, "view"_a, "channels_last"_a, "itemsize"_a, "backward"_a,
        "multiprocessors"_a, "l2_bytes"_a, "shared_bytes"_a, "max_cluster"_a);
  m.def("cuda_layer_norm_plan", layer_norm_plan, "view"_a, "samples"_a, "itemsize"_a, "backward"_a, "multiprocessors"_a,
        "l2_bytes"_a, "shared_bytes"_a, "max_cluster"_a);
}

}  // namespace

// The module runs without the GIL: no function has mutable state of its own, except for the memory pool and the CUDA
// tickets, which have mutexes, and constants that are computed in the first call.
#if PYBIND11_VERSION_HEX >= 0x020D0000
#define NF_MODULE(name, variable) PYBIND11_MODULE(name, variable, py::mod_gil_not_used())
#else
#define NF_MODULE(name, variable) PYBIND11_MODULE(name, variable)
#endif

NF_MODULE(TORCH_EXTENSION_NAME, m) {
  // Otherwise torch's error types would all become RuntimeError.
  py::register_local_exception_translator([](std::exception_ptr e) {
    if (e) torch::translate_exception_to_python(e);
  });
  bind_operators(m);
  bind_cuda_plans(m);
  m.def("memory_stats", [] {
    const memory::PoolStats stats = ops::memory_stats();
    return py::dict("allocated_bytes"_a = stats.allocated_bytes, "peak_allocated_bytes"_a = stats.peak_allocated_bytes,
                    "cached_bytes"_a = stats.cached_bytes, "max_cached_bytes"_a = stats.max_cached_bytes,
                    "allocations"_a = stats.allocations, "reuses"_a = stats.reuses);
  });
  m.def("empty_cache", &ops::empty_cache);
  m.def("has_memory_pool", &ops::has_memory_pool);
  m.def("uses_threads", [] { return ops::kUsesThreads; });
  m.def("cpu_capability", &cpu::capability);
  m.def("has_cuda", [] {
#if defined(NORMFUSED_WITH_CUDA)
    return true;
#else
    return false;
#endif
  });
}
