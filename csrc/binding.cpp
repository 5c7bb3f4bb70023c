// The operators' schemas, and the Python module normfused._C. No logic.
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include "kernels/cpu/kernels.h"
#include "ops/batch_norm.h"
#include "ops/channel_stats.h"

TORCH_LIBRARY(normfused, m) {
  m.def(
      "batch_norm_training(Tensor input, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, "
      "Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, float? momentum, float eps) -> "
      "(Tensor output, Tensor statistics)");
  m.def(
      "batch_norm_inference(Tensor input, Tensor? weight, Tensor? bias, Tensor running_mean, Tensor running_var, "
      "float eps) -> (Tensor output, Tensor statistics)");
  m.def(
      "batch_norm_backward(Tensor grad_output, Tensor input, Tensor? weight, Tensor statistics, bool training, "
      "bool[3] output_mask) -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)");
  m.def("channel_moments(Tensor input) -> (Tensor mean, Tensor m2, Tensor min, Tensor max)");
  m.def("channel_sums(Tensor input) -> (Tensor sum, Tensor sum_of_squares)");
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  namespace py = pybind11;
  using namespace normfused;
  // Without it torch's own error types would all arrive as RuntimeError.
  py::register_local_exception_translator([](std::exception_ptr e) {
    if (e) torch::translate_exception_to_python(e);
  });

  // The eager way in: the same operators without the cost of torch.ops' argument matching.
  m.def(
      "batch_norm_training",
      [](const at::Tensor& input, const ops::OptionalTensor& weight, const ops::OptionalTensor& bias,
         const ops::OptionalTensor& running_mean, const ops::OptionalTensor& running_var,
         const ops::OptionalTensor& num_batches_tracked, std::optional<double> momentum, double eps) {
        return std::get<0>(ops::batch_norm_training(input, weight, bias, running_mean, running_var, num_batches_tracked,
                                                    momentum, eps));
      },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "batch_norm_inference",
      [](const at::Tensor& input, const ops::OptionalTensor& weight, const ops::OptionalTensor& bias,
         const at::Tensor& running_mean, const at::Tensor& running_var, double eps) {
        return std::get<0>(ops::batch_norm_inference(input, weight, bias, running_mean, running_var, eps));
      },
      py::call_guard<py::gil_scoped_release>());
  m.def("channel_moments", &ops::channel_moments, py::call_guard<py::gil_scoped_release>());
  m.def("channel_sums", &ops::channel_sums, py::call_guard<py::gil_scoped_release>());
  m.def("cpu_capability", &cpu::capability);
  m.def("has_cuda", [] {
#if defined(NORMFUSED_WITH_CUDA)
    return true;
#else
    return false;
#endif
  });
}
