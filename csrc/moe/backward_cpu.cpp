// Backward, with da' = W2^T dy for each row, g its gate and a = act(gate) up made again from z:
//
//   dg = <da', a> + <dy, b2>      dz = g da' times the activation's derivatives      dx[t] = sum W1^T dz
//   dW2 = sum (dy) (g a)^T        dW1 = sum dz x^T                                    over an expert's rows
//
// With scale_input the gate stands at x: dz = da' .., dW1 = sum dz (g x)^T, dx[t] = sum g W1^T dz and
// dg = <W1^T dz, x>.
#include "moe/outer.h"

namespace tw {
namespace {

template <class T, class C>
struct Backward {
  const MoeBackwardCall& call;
  const MoeCall& f = call.forward;
  const Weight<T, C> up{f.up, f.experts, lines_of(f), f.features, f.transposed};
  const Weight<T, C> down{f.down, f.experts, f.features, f.width, f.transposed};
  const bool keeps_dz = call.dup || call.dup_bias;
  const bool wants_row_dx = call.dx.data || (call.dgates && f.scale_input);
  const int64_t rows = f.starts[f.experts];
  const int64_t a_panels = (f.width + kPanelLanes - 1) / kPanelLanes;
  const int64_t x_panels = (f.features + kPanelLanes - 1) / kPanelLanes;
  LeftRows<C> dy{f.features}, dz{lines_of(f)}, a{f.width};
  T* dx_rows;   // (rows, H)
  float* dots;  // (panel, row): parts of the gates' gradients

  // Where dz has the row that is `of_pass` in its pass: all rows are kept for the gradient of `up` alone.
  int64_t place(int64_t row, int64_t of_pass) const { return keeps_dz ? row : of_pass; }

  // dz and g a of lanes [i0, i0 + lanes) of a group, whose first row is row `first` of its pass.
  void gated_panel(const Group& g, int64_t first, int64_t i0, const ProductScratch<C>& scratch) const {
    const int64_t lanes = least(kPanelLanes, f.width - i0);
    const int strips = strips_of<C>(lanes);
    const auto build = [&](const PanelRoom<C>& room, int64_t k0, int k) {
      down.inputs(room, g.expert, i0, strips, k0, k);
    };
    group_product(dy, first, g.end - g.begin, strips, scratch, build,
                  [&](const float* sums, int64_t r, int n) {
                    by_gate(f.gate, [&](auto gate) {
                      finish_gated<decltype(gate)::value>(sums, g.begin + r, first + r, n, i0, lanes);
                    });
                  });
  }

  template <Gate GATE>
  void finish_gated(const float* sums, int64_t row, int64_t of_pass, int n_rows, int64_t i0,
                    int64_t lanes) const {
    const int64_t at = place(row, of_pass);
    for (int r = 0; r < n_rows; ++r) {
      const T* z = static_cast<const T*>(f.z) + (row + r) * lines_of(f);
      const vf by = set1(f.scale_input ? 1.0f : gate_of(f, row + r));
      const T* update = static_cast<const T*>(call.da_update);
      if (update) update += (row + r) * f.width + i0;
      T* to = static_cast<T*>(call.dz);
      if (to) to += (row + r) * lines_of(f);
      vf dot = zero();
      for (int64_t n = 0; n < lanes; n += W) {
        const int some = static_cast<int>(least(W, lanes - n));
        const GateAndUp pair = load_pair(z, i0 + n, f.width, some, f.layout);
        const Gated v = gated<GATE>(pair.gate, pair.up, f.alpha, f.limit);
        vf da = load_n(sums + r * kSumsRow + n, some);
        if (update) da = add(da, load_n(update + n, some));
        const vf scaled = mul(da, by), by_gate = mul(scaled, v.by_gate), by_up = mul(scaled, v.by_up);
        dot = fma(da, v.a, dot);
        store_pair(dz.at(at + r), i0 + n, f.width, some, f.layout, by_gate, by_up);
        if (to) store_pair(to, i0 + n, f.width, some, f.layout, by_gate, by_up);
        if (a.data) store_n(a.at(row + r) + i0 + n, mul(v.a, by), some);
      }
      if (i0 + lanes == f.width) dz.pad(at + r);
      if (call.dgates && !f.scale_input) dots[i0 / kPanelLanes * rows + row + r] = sum(dot);
    }
  }

  void x_panel(const Group& g, int64_t first, int64_t n0, const ProductScratch<C>& scratch) const {
    const int64_t lanes = least(kPanelLanes, f.features - n0);
    const int strips = strips_of<C>(lanes);
    const auto build = [&](const PanelRoom<C>& room, int64_t k0, int k) {
      up.inputs(room, g.expert, n0, strips, k0, k);
    };
    group_product(dz, place(g.begin, first), g.end - g.begin, strips, scratch, build,
                  [&](const float* sums, int64_t begin, int n_rows) {
                    for (int r = 0; r < n_rows; ++r)
                      finish_x(sums + r * kSumsRow, g.begin + begin + r, n0, lanes);
                  });
  }

  void finish_x(const float* sums, int64_t row, int64_t n0, int64_t lanes) const {
    const vf by = set1(f.scale_input ? gate_of(f, row) : 1.0f);
    vf dot = zero();
    for (int64_t n = 0; n < lanes; n += W) {
      const int some = static_cast<int>(least(W, lanes - n));
      const vf dx = load_n(sums + n, some);
      if (f.scale_input) dot = fma(dx, load_n(row_at<T>(f.x, token_of(f, row), n0 + n), some), dot);
      store_n(dx_rows + row * f.features + n0 + n, mul(dx, by), some);
    }
    if (call.dgates && f.scale_input) dots[n0 / kPanelLanes * rows + row] = sum(dot);
  }

  void gate_gradient(int64_t row, int64_t e) const {
    float total = 0.0f;
    for (int64_t panel = 0; panel < (f.scale_input ? x_panels : a_panels); ++panel)
      total += dots[panel * rows + row];
    if (f.down_bias && !f.scale_input) {
      vf dot = zero();
      for (int64_t h = 0; h < f.features; h += W) {
        const int some = static_cast<int>(least(W, f.features - h));
        dot = fma(load_n(row_at<T>(call.dy, token_of(f, row), h), some),
                  load_n(f.down_bias + e * f.features + h, some), dot);
      }
      total += sum(dot);
    }
    call.dgates[f.order[row]] = total;
  }
};

template <class T>
bool backward(const MoeBackwardCall& call) {
  using C = typename ComputeType<T>::type;
  const MoeCall& f = call.forward;
  Backward<T, C> b{call};
  const int64_t n_groups = count_groups(f);
  const double flops =
      12.0 * static_cast<double>(b.rows) * static_cast<double>(f.features) * static_cast<double>(f.width);
  const int threads = flops < kSerialFlops ? 1 : f.threads;
  const int64_t rows_at_once = most(kRowsOfGroup, kRowsAtOnce * threads);
  Group* groups = nullptr;
  int32_t* row_of = nullptr;
  const auto lay_out = [&](char* base) {
    Arena arena{base};
    groups = arena.take<Group>(n_groups);
    row_of = arena.take<int32_t>(f.tokens * f.slots);
    b.dy.data = arena.take<C>(b.dy.elements(least(b.rows, rows_at_once)));
    b.dz.data = arena.take<C>(b.dz.elements(b.keeps_dz ? b.rows : least(b.rows, rows_at_once)));
    b.a.data = arena.take<C>(call.ddown ? b.a.elements(b.rows) : 0);
    b.dx_rows = arena.take<T>(b.wants_row_dx ? b.rows * f.features : 0);
    b.dots = arena.take<float>(most(b.a_panels, b.x_panels) * b.rows);
    return arena.at - base;
  };
  ProductScratch<C> measure;
  OuterScratch<C> measure_outer;
  const int64_t own_bytes = most(measure.lay_out(nullptr), measure_outer.lay_out(nullptr));
  char* workspace = take_workspace(lay_out(nullptr) + threads * own_bytes);
  if (!workspace) return false;
  char* const of_threads = workspace + lay_out(workspace);
  if (!call.ddown) b.a.data = nullptr;
  list_groups(f, groups);
  invert(f, row_of);

  const Source<T, C> x{f, nullptr, f.x, f.scale_input}, dy{f, nullptr, call.dy, false};
  const Source<T, C> scaled_dy{f, nullptr, call.dy, !f.scale_input};
  const Source<T, C> dz{f, &b.dz, {}, false}, a{f, &b.a, {}, false};
  using Gradient = OuterSums<T, C>;
  T *const to_up = static_cast<T*>(call.dup), *const to_down = static_cast<T*>(call.ddown);
  const Gradient dup = f.transposed ? Gradient{to_up, x, dz, f.features, lines_of(f)}
                                    : Gradient{to_up, dz, x, lines_of(f), f.features};
  const Gradient ddown = f.transposed ? Gradient{to_down, a, dy, f.width, f.features}
                                      : Gradient{to_down, dy, a, f.features, f.width};
  int64_t blocks_taken = 0, gated_taken = 0, x_taken = 0, dup_taken = 0, ddown_taken = 0;
  int64_t up_sums_taken = 0, down_sums_taken = 0;
  run_team(threads, [&](const Team& team) {
    const MatrixUnit unit_is_ready;
    char* own = of_threads + team.id * own_bytes;
    ProductScratch<C> scratch;
    scratch.lay_out(own);
    for (int64_t from = 0; from < n_groups;) {
      const int64_t to = end_of_pass(groups, n_groups, from, rows_at_once);
      const int64_t begin = groups[from].begin;
      gather_rows<T>(b.dy, f, call.dy, false, begin, groups[to - 1].end, &blocks_taken);
      team.barrier();
      for (int64_t item; (item = take_next(&gated_taken)) < (to - from) * b.a_panels;) {
        const Group& g = groups[from + item / b.a_panels];
        b.gated_panel(g, g.begin - begin, item % b.a_panels * kPanelLanes, scratch);
      }
      team.barrier();
      for (int64_t item; b.wants_row_dx && (item = take_next(&x_taken)) < (to - from) * b.x_panels;) {
        const Group& g = groups[from + item / b.x_panels];
        b.x_panel(g, g.begin - begin, item % b.x_panels * kPanelLanes, scratch);
      }
      team.barrier();
      if (team.id == 0) blocks_taken = gated_taken = x_taken = 0;
      team.barrier();
      from = to;
    }
    if (call.dx.data) add_slots<T>(f, call.dx, b.dx_rows, row_of, team);
    if (call.dgates)
      for (int64_t g = team.id; g < n_groups; g += team.size)
        for (int64_t r = groups[g].begin; r < groups[g].end; ++r) b.gate_gradient(r, groups[g].expert);
    OuterScratch<C> outer;
    outer.lay_out(own);
    for (int64_t item; call.dup && (item = take_next(&dup_taken)) < f.experts * dup.tiles();)
      dup.tile(item / dup.tiles(), item % dup.tiles(), outer);
    for (int64_t item; call.ddown && (item = take_next(&ddown_taken)) < f.experts * ddown.tiles();)
      ddown.tile(item / ddown.tiles(), item % ddown.tiles(), outer);
    if (call.dup_bias) column_sums(call.dup_bias, dz, lines_of(f), &up_sums_taken, outer.copied);
    if (call.ddown_bias) column_sums(call.ddown_bias, scaled_dy, f.features, &down_sums_taken, outer.copied);
  });
  give_workspace(workspace);
  return true;
}

}  // namespace

namespace TW_ISA {

bool moe_backward(const MoeBackwardCall& call) {
  return by_dtype(call.forward.dtype, [&](auto x) { return backward<decltype(x)>(call); });
}

}  // namespace TW_ISA
}  // namespace tw
