// tensors as (pointer, strides) -> csrc/attention: builds the document table, checks what pointers cannot
// say.
#include "attention/attention.h"

#include <pybind11/pybind11.h>

#include <array>
#include <cstring>
#include <string>
#include <vector>

#include "check.h"
#include "recording.h"

namespace py = pybind11;

namespace {

// (data pointer, stride of batch, row, head, lane), strides in elements
using PyView = std::array<int64_t, 5>;

tw::View view(const PyView& v) { return tw::View{reinterpret_cast<void*>(v[0]), v[1], v[2], v[3], v[4]}; }

tw::View view_of(const py::tuple& t) {
  PyView v;
  for (int i = 0; i < 5; ++i) v[i] = t[i].cast<int64_t>();
  return view(v);
}

template <class T>
T* pointer(int64_t address) {
  return reinterpret_cast<T*>(address);
}

tw::DType dtype_of(const std::string& name) {
  if (name == "float32") return tw::DType::f32;
  if (name == "bfloat16") return tw::DType::bf16;
  if (name == "float16") return tw::DType::f16;
  tw::fail_check("attention: dtype ", name, ", need float32, bfloat16 or float16");
}

// (scale, softcap, is_causal, wraparound, window_left, window_right, group_size, first_shifted_head,
//  dropout_p, dropout_seed)
tw::Rule rule_of(const py::tuple& t) {
  tw::Rule rule;
  rule.scale = t[0].cast<float>();
  rule.softcap = t[1].cast<float>();
  rule.is_causal = t[2].cast<bool>();
  rule.wraparound = t[3].cast<bool>();
  rule.window_left = t[4].cast<int64_t>();
  rule.window_right = t[5].cast<int64_t>();
  rule.group_size = t[6].cast<int64_t>();
  rule.first_shifted_head = t[7].cast<int>();
  rule.dropout_p = t[8].cast<float>();
  rule.dropout_seed = static_cast<uint64_t>(t[9].cast<int64_t>());
  return rule;
}

void check_cu_seqlens(const char* name, const int32_t* cu, int64_t n, int64_t tokens) {
  TW_CHECK(cu[0] >= 0, "flash_attention: ", name, " starts at ", cu[0], ", need at least 0");
  for (int64_t i = 0; i < n; ++i)
    TW_CHECK(cu[i] <= cu[i + 1], "flash_attention: ", name, "[", i + 1, "] is ", cu[i + 1],
             ", need at least ", name, "[", i, "] = ", cu[i]);
  TW_CHECK(cu[n] <= tokens, "flash_attention: ", name, " ends at ", cu[n], ", past the ", tokens,
           " tokens given");
}

struct Extents {
  int64_t batch, n_q, n_k;
  int n_heads, n_kv_heads, head_dim, value_dim;
};

// (batch, n_q, n_k, n_heads, n_kv_heads, head_dim, value_dim)
Extents extents_of(const py::tuple& t) {
  return {t[0].cast<int64_t>(), t[1].cast<int64_t>(), t[2].cast<int64_t>(), t[3].cast<int>(),
          t[4].cast<int>(),     t[5].cast<int>(),     t[6].cast<int>()};
}

void check_extents(const Extents& e) {
  TW_CHECK(e.batch >= 0 && e.n_q >= 0 && e.n_k >= 0, "attention: negative extent");
  TW_CHECK(e.n_kv_heads > 0 && e.n_heads % e.n_kv_heads == 0, "attention: ", e.n_heads,
           " heads, need a multiple of ", e.n_kv_heads);
  TW_CHECK(e.head_dim >= 1 && e.head_dim <= 256 && e.value_dim >= 1 && e.value_dim <= 256,
           "attention: head_dim ", e.head_dim, ", value_dim ", e.value_dim, ", need 1 to 256");
}

// One document a batch row, or the packed documents; (cu_q, cu_k, n_documents) and mask are addresses or 0.
std::vector<tw::Document> documents_of(const Extents& e, const tw::Rule& rule, const py::tuple& packed,
                                       int64_t key_mask) {
  std::vector<tw::Document> documents;
  const int32_t* cu_q = pointer<const int32_t>(packed[0].cast<int64_t>());
  if (cu_q) {
    const int32_t* cu_k = pointer<const int32_t>(packed[1].cast<int64_t>());
    const int64_t n = packed[2].cast<int64_t>();
    TW_CHECK(e.batch == 1, "flash_attention: cu_seqlens with batch ", e.batch, ", need 1");
    check_cu_seqlens("cu_seqlens", cu_q, n, e.n_q);
    check_cu_seqlens("cu_seqlens_k", cu_k, n, e.n_k);
    for (int64_t i = 0; i < n; ++i) {
      const int64_t n_k = cu_k[i + 1] - cu_k[i];
      documents.push_back({0, cu_q[i], cu_q[i + 1] - cu_q[i], cu_k[i], n_k, 0, n_k, nullptr});
    }
  } else {
    for (int64_t b = 0; b < e.batch; ++b) documents.push_back({b, 0, e.n_q, 0, e.n_k, 0, e.n_k, nullptr});
  }
  if (key_mask) {
    const uint8_t* mask = pointer<const uint8_t>(key_mask);
    for (tw::Document& doc : documents) {
      const uint8_t* live = mask + doc.batch * e.n_k;
      int64_t begin = 0, end = e.n_k;
      while (begin < end && !live[begin]) ++begin;
      while (end > begin && !live[end - 1]) --end;
      doc.live_begin = begin;
      doc.live_end = end;
      if (end > begin && std::memchr(live + begin, 0, static_cast<size_t>(end - begin))) doc.live = live;
    }
  }
  if (rule.wraparound)
    for (const tw::Document& doc : documents) {
      const int64_t length = doc.live_end - doc.live_begin;
      TW_CHECK(doc.n_q == doc.n_k && length % rule.group_size == 0,
               "flash_attention: wraparound needs group_size ", rule.group_size,
               " to divide every length, and as many queries as keys; got ", doc.n_q, " queries and ", length,
               " live keys");
    }
  return documents;
}

tw::AttentionCall call_of(const std::string& dtype, const py::tuple& q, const py::tuple& k,
                          const py::tuple& v, const py::tuple& out, int64_t lse, const Extents& e,
                          const tw::Rule& rule, const std::vector<tw::Document>& documents, int64_t sinks,
                          int threads) {
  tw::AttentionCall call;
  call.dtype = dtype_of(dtype);
  call.q = view_of(q);
  call.k = view_of(k);
  call.v = view_of(v);
  call.out = view_of(out);
  call.lse = pointer<float>(lse);
  call.n_rows = e.n_q;
  call.n_heads = e.n_heads;
  call.n_kv_heads = e.n_kv_heads;
  call.head_dim = e.head_dim;
  call.value_dim = e.value_dim;
  call.documents = documents.data();
  call.n_documents = static_cast<int64_t>(documents.size());
  call.rule = rule;
  call.sinks = pointer<const float>(sinks);
  call.threads = threads;
  return call;
}

void expect_memory(bool had, const char* what) {
  if (!had) throw std::runtime_error(std::string(what) + ": no memory for scratch");
}

void forward(const std::string& dtype, const py::tuple& q, const py::tuple& k, const py::tuple& v,
             const py::tuple& out, int64_t lse, const py::tuple& extents, const py::tuple& rule_values,
             const py::tuple& packed, int64_t key_mask, int64_t sinks, int threads) {
  const Extents e = extents_of(extents);
  check_extents(e);
  const tw::Rule rule = rule_of(rule_values);
  const std::vector<tw::Document> documents = documents_of(e, rule, packed, key_mask);
  const tw::AttentionCall call = call_of(dtype, q, k, v, out, lse, e, rule, documents, sinks, threads);
  py::gil_scoped_release release;
  expect_memory(tw::attention_forward(call), "flash_attention");
}

void backward(const std::string& dtype, const py::tuple& dout, int64_t dlse, const py::tuple& q,
              const py::tuple& k, const py::tuple& v, const py::tuple& out, int64_t lse, const py::tuple& dq,
              const py::tuple& dk, const py::tuple& dv, const py::tuple& extents,
              const py::tuple& rule_values, const py::tuple& packed, int64_t key_mask, int threads) {
  const Extents e = extents_of(extents);
  check_extents(e);
  const tw::Rule rule = rule_of(rule_values);
  const std::vector<tw::Document> documents = documents_of(e, rule, packed, key_mask);
  tw::BackwardCall call;
  call.forward = call_of(dtype, q, k, v, out, lse, e, rule, documents, 0, threads);
  call.dout = view_of(dout);
  call.dlse = pointer<const float>(dlse);
  call.dq = view_of(dq);
  call.dk = view_of(dk);
  call.dv = view_of(dv);
  py::gil_scoped_release release;
  expect_memory(tw::attention_backward(call), "flash_attention_backward");
}

void check_lengths(const char* op, const int32_t* lengths, int64_t batch, int64_t least, int64_t slots) {
  for (int64_t b = 0; b < batch; ++b)
    TW_CHECK(least <= lengths[b] && lengths[b] <= slots, op, ": key_lengths[", b, "] is ", lengths[b],
             ", need ", least, " to ", slots, ", the slots of a row");
}

// of the pages that hold a row's positions, where there are pages
template <class Call>
void check_pages(const char* op, const Call& call, int64_t n_pages) {
  for (int64_t b = 0; call.page_table && b < call.batch; ++b)
    for (int64_t p = 0; p * call.page_size < call.key_lengths[b]; ++p) {
      const int32_t page = call.page_table[b * call.pages_per_row + p];
      TW_CHECK(0 <= page && page < n_pages, op, ": page_table[", b, ", ", p, "] is ", page, ", need 0 to ",
               n_pages - 1);
    }
}

// (pages_per_row, page_size, n_pages): n_pages bounds the table's entries
void decode(const std::string& dtype, const py::tuple& q, const py::tuple& k, const py::tuple& v,
            const py::tuple& out, int64_t lse, const py::tuple& extents, const py::tuple& rule_values,
            int64_t page_table, const py::tuple& pages, int64_t key_starts, int64_t key_lengths,
            int64_t key_mask, int64_t sinks, int splits, int threads) {
  const Extents e = extents_of(extents);
  check_extents(e);
  tw::DecodeCall call;
  call.dtype = dtype_of(dtype);
  call.q = view_of(q);
  call.k = view_of(k);
  call.v = view_of(v);
  call.out = view_of(out);
  call.lse = pointer<float>(lse);
  call.n_rows = e.n_q;
  call.batch = e.batch;
  call.n_heads = e.n_heads;
  call.n_kv_heads = e.n_kv_heads;
  call.head_dim = e.head_dim;
  call.value_dim = e.value_dim;
  call.page_table = pointer<const int32_t>(page_table);
  call.pages_per_row = pages[0].cast<int64_t>();
  call.page_size = pages[1].cast<int64_t>();
  const int64_t n_pages = pages[2].cast<int64_t>();
  call.key_starts = pointer<const int32_t>(key_starts);
  call.key_lengths = pointer<const int32_t>(key_lengths);
  call.live = pointer<const uint8_t>(key_mask);
  call.rule = rule_of(rule_values);
  call.sinks = pointer<const float>(sinks);
  call.splits = splits;
  call.threads = threads;
  check_lengths("flash_decode", call.key_lengths, e.batch, 0, call.pages_per_row * call.page_size);
  for (int64_t b = 0; b < e.batch; ++b)
    TW_CHECK(call.key_starts[b] >= 0, "flash_decode: key_starts[", b, "] is ", call.key_starts[b],
             ", need at least 0");
  check_pages("flash_decode", call, n_pages);
  tw::make_or_record([call] { expect_memory(tw::attention_decode(call), "flash_decode"); });
}

// pages as in decode
void append(const py::tuple& k, const py::tuple& v, const py::tuple& k_cache, const py::tuple& v_cache,
            const py::tuple& extents, int64_t itemsize, int64_t page_table, const py::tuple& pages,
            int64_t key_lengths) {
  const Extents e = extents_of(extents);
  check_extents(e);
  tw::AppendCall call;
  call.itemsize = itemsize;
  call.k = view_of(k);
  call.v = view_of(v);
  call.k_cache = view_of(k_cache);
  call.v_cache = view_of(v_cache);
  call.batch = e.batch;
  call.n_tokens = e.n_q;
  call.n_heads = e.n_kv_heads;
  call.head_dim = e.head_dim;
  call.value_dim = e.value_dim;
  call.page_table = pointer<const int32_t>(page_table);
  call.pages_per_row = pages[0].cast<int64_t>();
  call.page_size = pages[1].cast<int64_t>();
  const int64_t n_pages = pages[2].cast<int64_t>();
  call.key_lengths = pointer<const int32_t>(key_lengths);
  check_lengths("append_to_cache", call.key_lengths, e.batch, e.n_q, call.pages_per_row * call.page_size);
  check_pages("append_to_cache", call, n_pages);
  tw::make_or_record([call] { tw::attention_append(call); });
}

}  // namespace

void register_attention(py::module_& m) {
  m.def("attention_forward", &forward);
  m.def("attention_backward", &backward);
  m.def("attention_decode", &decode);
  m.def("attention_append", &append);
}
