// What low-rank updates of experts are made of: the rows of each expert times its matrix, and the sums of
// outer products of two sets of rows.
#include "moe/outer.h"

namespace tw {
namespace {

template <class T>
bool grouped(const GroupedCall& call) {
  using C = typename ComputeType<T>::type;
  const MoeCall of_rows = rows_alone(call.experts, call.starts, call.from);
  const ExpertWeight matrices = {call.weight, call.weight_expert, {}};
  const Weight<T, C> weight{matrices, call.experts, call.n_out, call.n_in, call.transposed};
  LeftRows<C> left{call.n_in};
  const int64_t rows = call.starts[call.experts], n_groups = count_groups(of_rows);
  const double flops =
      2.0 * static_cast<double>(rows) * static_cast<double>(call.n_in) * static_cast<double>(call.n_out);
  const int threads = flops < kSerialFlops ? 1 : call.threads;
  const int64_t rows_at_once = most(kRowsOfGroup, kRowsAtOnce * threads);
  Group* groups = nullptr;
  const auto lay_out = [&](char* base) {
    Arena arena{base};
    groups = arena.take<Group>(n_groups);
    left.data = arena.take<C>(left.elements(least(rows, rows_at_once)));
    return arena.at - base;
  };
  ProductScratch<C> measure;
  const int64_t own_bytes = measure.lay_out(nullptr);
  char* workspace = take_workspace(lay_out(nullptr) + threads * own_bytes);
  if (!workspace) return false;
  char* const of_threads = workspace + lay_out(workspace);
  list_groups(of_rows, groups);
  const int64_t panels = (call.n_out + kPanelLanes - 1) / kPanelLanes;

  const auto panel = [&](const Group& g, int64_t first, int64_t n0, const ProductScratch<C>& scratch) {
    const int64_t lanes = least(kPanelLanes, call.n_out - n0);
    const int strips = strips_of<C>(lanes);
    const auto build = [&](const PanelRoom<C>& room, int64_t k0, int k) {
      weight.outputs(room, g.expert, n0, strips, k0, k);
    };
    group_product(left, first, g.end - g.begin, strips, scratch, build,
                  [&](const float* sums, int64_t begin, int n_rows) {
                    for (int r = 0; r < n_rows; ++r)
                      for (int64_t n = 0; n < lanes; n += W)
                        store_n(out_at<T>(call.to, g.begin + begin + r, n0 + n),
                                load(sums + r * kSumsRow + n), static_cast<int>(least(W, lanes - n)));
                  });
  };
  int64_t blocks_taken = 0, panels_taken = 0;
  run_team(threads, [&](const Team& team) {
    const MatrixUnit unit_is_ready;
    ProductScratch<C> scratch;
    scratch.lay_out(of_threads + team.id * own_bytes);
    for (int64_t from = 0; from < n_groups;) {
      const int64_t to = end_of_pass(groups, n_groups, from, rows_at_once);
      const int64_t begin = groups[from].begin;
      gather_rows<T>(left, of_rows, call.from.rows, false, begin, groups[to - 1].end, &blocks_taken);
      team.barrier();
      for (int64_t item; (item = take_next(&panels_taken)) < (to - from) * panels;) {
        const Group& g = groups[from + item / panels];
        panel(g, g.begin - begin, item % panels * kPanelLanes, scratch);
      }
      team.barrier();
      if (team.id == 0) blocks_taken = panels_taken = 0;
      team.barrier();
      from = to;
    }
  });
  give_workspace(workspace);
  return true;
}

template <class T>
bool outer(const OuterCall& call) {
  using C = typename ComputeType<T>::type;
  const MoeCall of_left = rows_alone(call.experts, call.starts, call.left);
  const MoeCall of_right = rows_alone(call.experts, call.starts, call.right);
  const OuterSums<T, C> sums{static_cast<T*>(call.to),
                             {of_left, nullptr, call.left.rows, false},
                             {of_right, nullptr, call.right.rows, false},
                             call.n_left,
                             call.n_right};
  const double flops = 2.0 * static_cast<double>(call.starts[call.experts]) *
                       static_cast<double>(call.n_left) * static_cast<double>(call.n_right);
  const int threads = flops < kSerialFlops ? 1 : call.threads;
  OuterScratch<C> measure;
  const int64_t own_bytes = measure.lay_out(nullptr);
  char* workspace = take_workspace(threads * own_bytes);
  if (!workspace) return false;
  int64_t taken = 0;
  run_team(threads, [&](const Team& team) {
    const MatrixUnit unit_is_ready;
    OuterScratch<C> scratch;
    scratch.lay_out(workspace + team.id * own_bytes);
    for (int64_t item; (item = take_next(&taken)) < call.experts * sums.tiles();)
      sums.tile(item / sums.tiles(), item % sums.tiles(), scratch);
  });
  give_workspace(workspace);
  return true;
}

}  // namespace

namespace TW_ISA {

bool moe_grouped(const GroupedCall& call) {
  return by_dtype(call.dtype, [&](auto x) { return grouped<decltype(x)>(call); });
}
bool moe_outer(const OuterCall& call) {
  return by_dtype(call.dtype, [&](auto x) { return outer<decltype(x)>(call); });
}

}  // namespace TW_ISA
}  // namespace tw
