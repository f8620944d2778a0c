// tensors as pointers -> csrc/quant
#include "quant/quant.h"

#include "packed.h"

namespace {

void decode(const std::string& dtype, const py::tuple& packed, int64_t n_out, int64_t n_in, int64_t to,
            int64_t row, int threads) {
  tw::DecodeWeightCall call = {};
  call.dtype = dtype_of("dequantize_weight", dtype);
  call.weight = packed_of("dequantize_weight", packed, n_in);
  call.out_features = n_out;
  call.in_features = n_in;
  call.to = reinterpret_cast<void*>(to);
  call.row = row;
  call.threads = threads;
  TW_CHECK(n_out >= 0 && n_in >= 0 && threads >= 1, "dequantize_weight: negative extent, or no thread");
  TW_CHECK(n_out * n_in == 0 || (call.to && call.weight.codes && call.weight.scales),
           "dequantize_weight: null pointer to ", n_out * n_in, " weights");
  py::gil_scoped_release release;
  tw::decode_weight(call);
}

}  // namespace

void register_quant(py::module_& m) { m.def("decode_weight", &decode); }
