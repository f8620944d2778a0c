// Hands calls to the kernels of the level in use, with the corrections for each tensor's age.
#include "optim/optim.h"

#include <math.h>

#include <vector>

#include "common/arena.h"
#include "common/at_level.h"
#include "common/workspace.h"
#include "optim/chunks.h"

namespace tw {
namespace {

constexpr int64_t kMostAges = 1 << 15;  // of the table; later corrections are computed one by one
constexpr double kSettled = 0x1p-27;    // what 1 - beta^age may miss 1 by without a float seeing it

void adamw_at_level(const AdamwCall& call, const AdamwPlan& plan) {
  TW_AT_LEVEL(isa_for(call.dtype), adamw, call, plan)
}

void squares_at_level(const SquaresCall& call, const int64_t* first_chunks, double* sums) {
  TW_AT_LEVEL(isa_for(call.dtype), sum_of_squares, call, first_chunks, sums)
}

void sm3_at_level(const Sm3Call& call, float* largest) {
  TW_AT_LEVEL(isa_for(call.dtype), sm3, call, largest)
}

template <class Sizes>
void count_chunks(const Sizes& size_of, int64_t n_items, int64_t* first_chunks) {
  first_chunks[0] = 0;
  for (int64_t i = 0; i < n_items; ++i) first_chunks[i + 1] = first_chunks[i] + chunks_of(size_of(i));
}

// (numerator / (1 - beta1^age), 1 / sqrt(1 - beta2^age))
void correct(const AdamwCall& call, double numerator, double age, float* both) {
  both[0] = static_cast<float>(numerator / (1.0 - pow(call.beta1, age)));
  both[1] = static_cast<float>(1.0 / sqrt(1.0 - pow(call.beta2, age)));
}

// The corrections of each age, kept from call to call: powers cost more than a pass over a few entries.
struct AgeTable {
  double beta1 = -1.0, beta2 = -1.0;
  std::vector<float> both;
  bool is_settled = false;
};

const AgeTable& table_for(const AdamwCall& call) {
  thread_local AgeTable table;
  if (table.beta1 == call.beta1 && table.beta2 == call.beta2) return table;
  const double slower = call.beta1 > call.beta2 ? call.beta1 : call.beta2;
  const double settled_age = slower > 0.0 ? ceil(log(kSettled) / log(slower)) : 1.0;
  table.is_settled = settled_age < static_cast<double>(kMostAges);
  const int64_t n_ages = table.is_settled ? static_cast<int64_t>(settled_age) + 1 : kMostAges;
  table.both.assign(static_cast<size_t>(2 * n_ages), 0.0f);
  for (int64_t age = 0; age < n_ages; ++age)  // an entry is at least one step old when it is corrected
    correct(call, 1.0, static_cast<double>(most(age, 1)), &table.both[static_cast<size_t>(2 * age)]);
  table.beta1 = call.beta1;
  table.beta2 = call.beta2;
  return table;
}

}  // namespace

bool adamw(const AdamwCall& call) {
  bool has_ages = false;
  for (int64_t i = 0; i < call.n_items; ++i) has_ages = has_ages || call.items[i].ages;
  int64_t* first_chunks;
  float* corrections;
  const auto lay_out = [&](Arena& arena) {
    first_chunks = arena.take<int64_t>(call.n_items + 1);
    corrections = arena.take<float>(2 * call.n_items);
  };
  Arena measured{nullptr};
  lay_out(measured);
  char* block = take_workspace(reinterpret_cast<int64_t>(measured.at));
  if (!block) return false;
  Arena arena{block};
  lay_out(arena);

  count_chunks([&](int64_t i) { return call.items[i].n; }, call.n_items, first_chunks);
  for (int64_t i = 0; i < call.n_items; ++i)
    if (call.items[i].step) correct(call, call.lr, *call.items[i].step += 1.0f, corrections + 2 * i);
  AdamwPlan plan = {first_chunks, corrections, nullptr, 0, false};
  if (has_ages) {
    const AgeTable& table = table_for(call);
    plan.by_age = table.both.data();
    plan.n_ages = static_cast<int64_t>(table.both.size() / 2);
    plan.is_settled = table.is_settled;
  }
  adamw_at_level(call, plan);
  give_workspace(block);
  return true;
}

bool sum_of_squares(const SquaresCall& call, double* sum) {
  *sum = 0.0;
  int64_t n_chunks = 0;
  for (int64_t i = 0; i < call.n_items; ++i) n_chunks += chunks_of(call.items[i].n);
  const auto lay_out = [&](Arena& arena, int64_t*& first_chunks, double*& sums) {
    first_chunks = arena.take<int64_t>(call.n_items + 1);
    sums = arena.take<double>(n_chunks);
  };
  int64_t* first_chunks;
  double* sums;
  Arena measured{nullptr};
  lay_out(measured, first_chunks, sums);
  char* block = take_workspace(reinterpret_cast<int64_t>(measured.at));
  if (!block) return false;
  Arena arena{block};
  lay_out(arena, first_chunks, sums);
  count_chunks([&](int64_t i) { return call.items[i].n; }, call.n_items, first_chunks);
  squares_at_level(call, first_chunks, sums);
  for (int64_t c = 0; c < n_chunks; ++c) *sum += sums[c];
  give_workspace(block);
  return true;
}

bool sm3(const Sm3Call& call) {
  Arena measured{nullptr};
  for (int i = 0; i < call.threads; ++i) measured.take<float>(call.n_columns);
  char* block = take_workspace(reinterpret_cast<int64_t>(measured.at));
  if (!block) return false;
  sm3_at_level(call, reinterpret_cast<float*>(block));
  give_workspace(block);
  return true;
}

}  // namespace tw
