// Forward: rows are gathered pass by pass, met by the panels of `up`, gated where the sums are whole, met by
// the panels of `down`, and added up token by token.
#include "moe/experts.h"

namespace tw {
namespace {

template <class T, class C>
struct Forward {
  const MoeCall& call;
  const Weight<T, C> up{call.up, call.experts, lines_of(call), call.features, call.transposed};
  const Weight<T, C> down{call.down, call.experts, call.features, call.width, call.transposed};
  LeftRows<C> x{call.features}, a{call.width};
  T* out;  // (rows, H)

  int64_t gates_of_panel() const { return call.layout == Layout::alone ? kPanelLanes : kHalf; }

  // Gates and ups [i0, i0 + lanes) of a group, whose first row is row `first` of x and a.
  void gated_panel(const Group& g, int64_t first, int64_t i0, const ProductScratch<C>& scratch) const {
    const int64_t lanes = least(gates_of_panel(), call.width - i0);
    const int gates = strips_of<C>(lanes);
    const int strips = call.layout == Layout::alternating ? strips_of<C>(2 * lanes)
                       : call.layout == Layout::halves    ? kHalf / kStrip<C> + gates
                                                          : gates;
    const auto build = [&](const PanelRoom<C>& room, int64_t k0, int k) {
      if (call.layout == Layout::alternating) return up.outputs(room, g.expert, 2 * i0, strips, k0, k);
      up.outputs(room, g.expert, i0, gates, k0, k);
      if (call.layout == Layout::alone) return;
      const PanelRoom<C> second{room.strip(kHalf / kStrip<C>), room.strip_elements, room.staged};
      up.outputs(second, g.expert, call.width + i0, gates, k0, k);
    };
    group_product(
        x, first, g.end - g.begin, strips, scratch, build, [&](const float* sums, int64_t r, int rows) {
          by_gate(call.gate, [&](auto gate) {
            finish_gated<decltype(gate)::value>(sums, g.expert, g.begin + r, first + r, rows, i0, lanes);
          });
        });
  }

  template <Gate GATE>
  void finish_gated(const float* sums, int64_t e, int64_t row, int64_t of_pass, int rows, int64_t i0,
                    int64_t lanes) const {
    const float* bias = call.up_bias ? call.up_bias + e * lines_of(call) : nullptr;
    for (int r = 0; r < rows; ++r) {
      T* z = call.z ? static_cast<T*>(call.z) + (row + r) * lines_of(call) : nullptr;
      const T* update = update_of<T>(call, row + r);
      for (int64_t n = 0; n < lanes; n += W) {
        const int some = static_cast<int>(least(W, lanes - n));
        GateAndUp pair = load_pair(sums + r * kSumsRow, n, kHalf, some, call.layout);
        if (bias) pair = plus_pair(pair, bias, i0 + n, call.width, some, call.layout);
        if (update) pair = plus_pair(pair, update, i0 + n, call.width, some, call.layout);
        if (z) store_pair(z, i0 + n, call.width, some, call.layout, pair.gate, pair.up);
        store_n(a.at(of_pass + r) + i0 + n, gated<GATE>(pair.gate, pair.up, call.alpha, call.limit).a, some);
      }
      if (i0 + lanes == call.width) a.pad(of_pass + r);
    }
  }

  void down_panel(const Group& g, int64_t first, int64_t n0, const ProductScratch<C>& scratch) const {
    const int64_t lanes = least(kPanelLanes, call.features - n0);
    const int strips = strips_of<C>(lanes);
    const auto build = [&](const PanelRoom<C>& room, int64_t k0, int k) {
      down.outputs(room, g.expert, n0, strips, k0, k);
    };
    const float* bias = call.down_bias ? call.down_bias + g.expert * call.features + n0 : nullptr;
    group_product(a, first, g.end - g.begin, strips, scratch, build,
                  [&](const float* sums, int64_t begin, int rows) {
                    for (int r = 0; r < rows; ++r) {
                      const int64_t row = g.begin + begin + r;
                      const vf by = set1(call.scale_input ? 1.0f : gate_of(call, row));
                      for (int64_t n = 0; n < lanes; n += W) {
                        const int some = static_cast<int>(least(W, lanes - n));
                        vf y = load(sums + r * kSumsRow + n);
                        if (bias) y = add(y, load_n(bias + n, some));
                        store_n(out + row * call.features + n0 + n, mul(y, by), some);
                      }
                    }
                  });
  }
};

template <class T>
bool forward(const MoeCall& call) {
  using C = typename ComputeType<T>::type;
  Forward<T, C> f{call};
  const int64_t rows = call.starts[call.experts], n_groups = count_groups(call);
  const double flops =
      6.0 * static_cast<double>(rows) * static_cast<double>(call.features) * static_cast<double>(call.width);
  const int threads = flops < kSerialFlops ? 1 : call.threads;
  const int64_t rows_at_once = most(kRowsOfGroup, kRowsAtOnce * threads);
  Group* groups = nullptr;
  int32_t* row_of = nullptr;
  const auto lay_out = [&](char* base) {
    Arena arena{base};
    groups = arena.take<Group>(n_groups);
    row_of = arena.take<int32_t>(call.tokens * call.slots);
    f.x.data = arena.take<C>(f.x.elements(least(rows, rows_at_once)));
    f.a.data = arena.take<C>(f.a.elements(least(rows, rows_at_once)));
    f.out = arena.take<T>(rows * call.features);
    return arena.at - base;
  };
  ProductScratch<C> measure;
  const int64_t own_bytes = measure.lay_out(nullptr);
  char* workspace = take_workspace(lay_out(nullptr) + threads * own_bytes);
  if (!workspace) return false;
  char* const of_threads = workspace + lay_out(workspace);
  list_groups(call, groups);
  invert(call, row_of);

  const int64_t up_panels = (call.width + f.gates_of_panel() - 1) / f.gates_of_panel();
  const int64_t down_panels = (call.features + kPanelLanes - 1) / kPanelLanes;
  int64_t blocks_taken = 0, ups_taken = 0, downs_taken = 0;
  run_team(threads, [&](const Team& team) {
    const MatrixUnit unit_is_ready;
    ProductScratch<C> scratch;
    scratch.lay_out(of_threads + team.id * own_bytes);
    for (int64_t from = 0; from < n_groups;) {
      const int64_t to = end_of_pass(groups, n_groups, from, rows_at_once);
      const int64_t begin = groups[from].begin;
      gather_rows<T>(f.x, call, call.x, call.scale_input, begin, groups[to - 1].end, &blocks_taken);
      team.barrier();
      for (int64_t item; (item = take_next(&ups_taken)) < (to - from) * up_panels;) {
        const Group& g = groups[from + item / up_panels];
        f.gated_panel(g, g.begin - begin, item % up_panels * f.gates_of_panel(), scratch);
      }
      team.barrier();
      for (int64_t item; (item = take_next(&downs_taken)) < (to - from) * down_panels;) {
        const Group& g = groups[from + item / down_panels];
        f.down_panel(g, g.begin - begin, item % down_panels * kPanelLanes, scratch);
      }
      team.barrier();
      if (team.id == 0) blocks_taken = ups_taken = downs_taken = 0;
      team.barrier();
      from = to;
    }
    add_slots<T>(call, call.y, f.out, row_of, team);
  });
  give_workspace(workspace);
  return true;
}

}  // namespace

namespace TW_ISA {

bool moe_forward(const MoeCall& call) {
  return by_dtype(call.dtype, [&](auto x) { return forward<decltype(x)>(call); });
}

}  // namespace TW_ISA
}  // namespace tw
