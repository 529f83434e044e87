// The CUDA library: registers the operators' kernels for CUDA tensors through torch's stable ABI. It is a library of its
// own, so that the CPU kernels load beside a torch without CUDA. It has no kernels yet.

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_IMPL(hetero_kernels, CUDA, library) { (void)library; }
