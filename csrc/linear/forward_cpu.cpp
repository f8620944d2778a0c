// Forward for many tokens: y = (x W^T + bias) out_scale + scale hidden up^T, panel by panel.
#include "common/workspace.h"
#include "linear/update.h"

namespace tw {
namespace {

constexpr double kSerialFlops = 2e5;  // below, a second thread costs more than it does

// y of a block from its base sums and, in `tile`, the update's.
template <class T, class C>
inline void finish_block(const LinearCall& call, const Rank<C>& rank, const C* kept, const float* sums,
                         int64_t t0, int rows, int64_t n0, int lanes, const PanelScratch<C>& scratch) {
  const int padded = static_cast<int>(round_up(rows, Unit<C>::kRowStep));
  for (int s = 0; s < lanes; s += kStrip<C>) {
    if (rank.r > 0)
      gemm<C, Start::zero>(padded, kStrip<C>, rank.depth, kept + t0 * rank.row, rank.row,
                           scratch.update + s * rank.row, kStrip<C>, scratch.tile, kStrip<C>);
    const vf scale = set1(call.column_scales ? 1.0f : call.scale);
    for (int r = 0; r < rows; ++r)
      for (int n = s; n < s + kStrip<C> && n < lanes; n += W) {
        const int some = static_cast<int>(least(W, lanes - n));
        vf y = load(sums + r * kPanelLanes + n);
        if (call.bias) y = add(y, load_n(call.bias + n0 + n, some));
        if (call.out_scale) y = mul(y, load_n(call.out_scale + n0 + n, some));
        if (rank.r > 0) y = fma(scale, load(scratch.tile + r * kStrip<C> + (n - s)), y);
        T* to = out_at<T>(call.y, t0 + r, n0 + n);
        if (some == W)
          store(to, y);
        else
          store_n(to, y, some);
      }
  }
}

template <class T, class Right>
bool forward(const LinearCall& call, const Right& right) {
  using C = typename ComputeType<T>::type;
  const Rank<C> rank(call.rank);
  const int64_t panels = (call.out_features + kPanelLanes - 1) / kPanelLanes;
  const int64_t token_items = (call.tokens + kTokensOfItem - 1) / kTokensOfItem;
  const double flops = 2.0 * static_cast<double>(call.tokens) * static_cast<double>(call.in_features) *
                       static_cast<double>(call.out_features + call.rank);
  const int threads = flops < kSerialFlops ? 1 : call.threads;

  PackedRight<C> down{nullptr, rank.lanes, rank.used};
  const int64_t down_bytes = rank.r ? down.bytes(call.in_features) : 0;
  const int64_t kept_rows = round_up(call.tokens, kBlock) + kBlock;
  const int64_t kept_bytes = round_up(kept_rows * rank.row * static_cast<int64_t>(sizeof(C)), 64);
  const int64_t narrow_bytes = round_up(int64_t{kBlock} * down.lanes * 4, 64);
  PanelScratch<C> measure;
  const int64_t scratch_bytes = measure.lay_out(nullptr, rank.row);
  char* workspace = take_workspace(down_bytes + kept_bytes + threads * (scratch_bytes + narrow_bytes));
  if (!workspace) return false;
  down.data = reinterpret_cast<C*>(workspace);
  C* kept = reinterpret_cast<C*>(workspace + down_bytes);

  const Tokens<T, C> tokens{call.x};
  const Tokens<T, C> dropped{call.x, nullptr, &call};
  const LanesAreRows<T, C> down_rows{call.down, call.rank};
  const LanesAreRows<T, C> up_rows{call.up, call.out_features};
  int64_t chunks_taken = 0, blocks_taken = 0, items_taken = 0;
  run_team(threads, [&](const Team& team) {
    const MatrixUnit unit_is_ready;
    char* own = workspace + down_bytes + kept_bytes + team.id * (scratch_bytes + narrow_bytes);
    PanelScratch<C> scratch;
    scratch.lay_out(own, rank.row);
    if (rank.r > 0) {
      for (int64_t chunk; (chunk = take_next(&chunks_taken)) * kChunk < call.in_features;)
        pack_chunk(down, down_rows, call.in_features, chunk * kChunk, scratch.staged);
      team.barrier();
      float* sums = reinterpret_cast<float*>(own + scratch_bytes);
      for (int64_t block; (block = take_next(&blocks_taken)) * kBlock < call.tokens;) {
        const int64_t t0 = block * kBlock;
        const int rows = static_cast<int>(least(kBlock, call.tokens - t0));
        if (call.in_features == 0) memset(sums, 0, static_cast<size_t>(narrow_bytes));
        narrow_product(sums, dropped, down, call.in_features, t0, rows, scratch.left);
        settle_hidden<T>(call, rank, sums, down.lanes, t0, rows, kept);
      }
      team.barrier();
    }
    for (int64_t item; (item = take_next(&items_taken)) < panels * token_items;) {
      const int64_t n0 = item / token_items * kPanelLanes, t0 = item % token_items * kTokensOfItem;
      const int lanes = static_cast<int>(least(kPanelLanes, call.out_features - n0));
      for (int s = 0; rank.r > 0 && s < lanes; s += kStrip<C>)
        for (int64_t r0 = 0; r0 < rank.r; r0 += kChunk)
          up_rows.build(scratch.update + s * rank.row + r0 * kStrip<C>, scratch.staged, n0 + s, r0,
                        static_cast<int>(least(kChunk, rank.r - r0)));
      panel_product(tokens, right, call.in_features, t0, least(t0 + kTokensOfItem, call.tokens), n0, lanes,
                    scratch, [&](const float* sums, int64_t t, int rows) {
                      finish_block<T>(call, rank, kept, sums, t, rows, n0, lanes, scratch);
                    });
    }
  });
  give_workspace(workspace);
  return true;
}

}  // namespace

namespace TW_ISA {

bool linear_forward(const LinearCall& call) {
  return by_dtype(call.dtype, [&](auto x) {
    using T = decltype(x);
    using C = typename ComputeType<T>::type;
    if (call.weight.data) return forward<T>(call, LanesAreRows<T, C>{call.weight, call.out_features});
    bool done = false;
    by_kind(call.packed.kind, [&](auto kind) {
      done = forward<T>(call, PackedLanesAreRows<decltype(kind)::value, C>{call.packed, call.out_features});
    });
    return done;
  });
}

}  // namespace TW_ISA
}  // namespace tw
