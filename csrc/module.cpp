// The Python module, empty: loading it registers the kernels of all files beside it with the dispatcher.
#include <torch/extension.h>

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.doc() = "Kernels of sap_fast for one capability of the processor; registered with torch's dispatcher.";
}
