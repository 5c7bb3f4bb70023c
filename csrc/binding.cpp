// The operators' schemas, and the Python module normfused._C. No logic.
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include "kernels/cpu/kernels.h"
#include "kernels/cuda/traffic.h"
#include "ops/batch_norm.h"
#include "ops/channel_stats.h"
#include "ops/local_response_norm.h"
#include "ops/standardize.h"
#include "ops/sync_moments.h"

TORCH_LIBRARY(normfused, m) {
  m.def(
      "batch_norm_training(Tensor input, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, "
      "Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, float? momentum, float eps, Tensor? residual=None, "
      "str activation=\"identity\", float activation_param=0., bool save_mask=False, int correction=1, "
      "Tensor(d!)? nonfinite_batches=None, bool update_in_backward=True) -> (Tensor output, Tensor statistics, Tensor "
      "mask)");
  m.def(
      "batch_norm_inference(Tensor input, Tensor? weight, Tensor? bias, Tensor running_mean, Tensor running_var, "
      "float eps, Tensor? residual=None, str activation=\"identity\", float activation_param=0., "
      "bool save_mask=False) -> (Tensor output, Tensor statistics, Tensor mask)");
  m.def(
      "batch_norm_training_(Tensor(a!) input, Tensor? weight, Tensor? bias, Tensor(b!)? running_mean, "
      "Tensor(c!)? running_var, Tensor(d!)? num_batches_tracked, float? momentum, float eps, "
      "str activation=\"identity\", float activation_param=0., int correction=1, Tensor(e!)? nonfinite_batches=None, "
      "bool update_in_backward=True) -> Tensor statistics");
  m.def(
      "batch_norm_inference_(Tensor(a!) input, Tensor? weight, Tensor? bias, Tensor running_mean, Tensor running_var, "
      "float eps, str activation=\"identity\", float activation_param=0.) -> Tensor statistics");
  m.def(
      "batch_norm_backward(Tensor grad_output, Tensor input, Tensor? weight, Tensor statistics, bool training, "
      "bool[4] output_mask, Tensor? bias=None, Tensor? residual=None, Tensor? mask=None, "
      "str activation=\"identity\", float activation_param=0., bool from_output=False, Tensor? sums=None, "
      "Tensor? count=None) -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias, Tensor grad_residual)");
  m.def(
      "batch_norm_by_statistics(Tensor input, Tensor statistics, Tensor? weight, Tensor? bias, Tensor? residual=None, "
      "str activation=\"identity\", float activation_param=0., bool save_mask=False) -> (Tensor output, Tensor mask)");
  m.def("pack_moments(Tensor input) -> Tensor words");
  m.def(
      "merge_ranks(Tensor words, int channels, int own_count, Tensor(a!)? running_mean, Tensor(b!)? running_var, "
      "Tensor(c!)? num_batches_tracked, float? momentum, float eps, int correction=1, Tensor(d!)? "
      "nonfinite_batches=None, "
      "bool update_in_backward=True) -> (Tensor statistics, Tensor count)");
  m.def("channel_moments(Tensor input) -> (Tensor mean, Tensor m2, Tensor min, Tensor max)");
  m.def("channel_sums(Tensor input) -> (Tensor sum, Tensor sum_of_squares, Tensor min, Tensor max)");
  m.def(
      "standardize(Tensor input, float[] mean, float[] std, float scale=1., ScalarType? dtype=None, "
      "MemoryFormat? memory_format=None) -> Tensor");
  m.def("standardize_out(Tensor input, float[] mean, float[] std, float scale, Tensor(a!) out) -> ()");
  m.def("standardize_(Tensor(a!) input, float[] mean, float[] std, float scale=1.) -> ()");
  m.def("local_response_norm(Tensor input, int size, float alpha, float beta, float k) -> Tensor");
  m.def(
      "local_response_norm_backward(Tensor grad_output, Tensor input, int size, float alpha, float beta, float k) -> "
      "Tensor");
}

namespace {

// The function f, of which Python is to see only the first result: no objects are made of the others.
template <auto f, class R, class... A>
auto output_of(R (*)(A...)) {
  return [](A... arguments) { return std::get<0>(f(arguments...)); };
}
template <auto f>
auto output_of() {
  return output_of<f>(f);
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  namespace py = pybind11;
  using namespace normfused;
  using namespace py::literals;
  // Without it torch's own error types would all arrive as RuntimeError.
  py::register_local_exception_translator([](std::exception_ptr e) {
    if (e) torch::translate_exception_to_python(e);
  });

  // The eager way in: the same operators without the cost of torch.ops' argument matching.
  m.def("batch_norm_training", output_of<&ops::batch_norm_training>(), py::call_guard<py::gil_scoped_release>());
  m.def("batch_norm_inference", output_of<&ops::batch_norm_inference>(), py::call_guard<py::gil_scoped_release>());
  m.def("batch_norm_training_", &ops::batch_norm_training_, py::call_guard<py::gil_scoped_release>());
  m.def("batch_norm_inference_", &ops::batch_norm_inference_, py::call_guard<py::gil_scoped_release>());
  m.def("batch_norm_by_statistics", &ops::batch_norm_by_statistics, py::call_guard<py::gil_scoped_release>());
  m.def("batch_norm_backward", &ops::batch_norm_backward, py::call_guard<py::gil_scoped_release>());
  m.def("pack_moments", &ops::pack_moments, py::call_guard<py::gil_scoped_release>());
  m.def("merge_ranks", &ops::merge_ranks, py::call_guard<py::gil_scoped_release>());
  m.def("channel_moments", &ops::channel_moments, py::call_guard<py::gil_scoped_release>());
  m.def("channel_sums", &ops::channel_sums, py::call_guard<py::gil_scoped_release>());
  using Constants = std::vector<double>;
  m.def(
      "standardize",
      [](const at::Tensor& input, const Constants& mean, const Constants& std, double scale,
         std::optional<at::ScalarType> dtype, std::optional<at::MemoryFormat> memory_format) {
        return ops::standardize(input, mean, std, scale, dtype, memory_format);
      },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "standardize_out",
      [](const at::Tensor& input, const Constants& mean, const Constants& std, double scale, const at::Tensor& out) {
        ops::standardize_out(input, mean, std, scale, out);
      },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "standardize_",
      [](const at::Tensor& input, const Constants& mean, const Constants& std, double scale) {
        ops::standardize_(input, mean, std, scale);
      },
      py::call_guard<py::gil_scoped_release>());
  m.def("local_response_norm", &ops::local_response_norm, py::call_guard<py::gil_scoped_release>());
  m.def("cpu_capability", &cpu::capability);
  // What CUDA kernels would do on some device: for tests and reports, on any machine.
  py::enum_<cuda::Operation>(m, "Operation")
      .value("TRAINING", cuda::Operation::kTraining)
      .value("INFERENCE", cuda::Operation::kInference)
      .value("BACKWARD", cuda::Operation::kBackward)
      .value("INFERENCE_BACKWARD", cuda::Operation::kInferenceBackward)
      .value("MOMENTS", cuda::Operation::kMoments)
      .value("SUMS", cuda::Operation::kSums);
  m.def(
      "cuda_traffic",
      [](cuda::Operation operation, std::array<int64_t, 3> view, int itemsize, int multiprocessors, int64_t l2_bytes,
         std::array<int, 3> resident) {
        const cuda::Traffic t = traffic(operation, {view[0], view[1], view[2]}, itemsize, {multiprocessors, l2_bytes},
                                        {resident[0], resident[1], resident[2]});
        const cuda::ReductionPlan& r = t.reduction;
        return py::dict("single"_a = t.single, "launches"_a = t.launches, "read"_a = t.read, "written"_a = t.written,
                        "by_rows"_a = r.by_rows, "values"_a = r.by_rows ? r.rows.values : r.columns.values,
                        "masked"_a = r.rows.masked, "lanes"_a = r.rows.lanes, "repeat"_a = r.columns.repeat,
                        "folded"_a = !r.by_rows && r.columns.folded(), "width"_a = r.columns.width,
                        "tiles"_a = r.tiles(), "splits"_a = r.splits(), "merged"_a = t.merged,
                        "streaming_stores"_a = t.apply.streaming);
      },
      "operation"_a, "view"_a, "itemsize"_a, "multiprocessors"_a, "l2_bytes"_a,
      "resident"_a = std::array<int, 3>{cuda::kMinBlocks, cuda::kMinBlocks, cuda::kMinBlocks});
  m.def("has_cuda", [] {
#if defined(NORMFUSED_WITH_CUDA)
    return true;
#else
    return false;
#endif
  });
}
