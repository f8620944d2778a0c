// Forward for many tokens: y = (x W^T + bias) out_scale + scale hidden up^T, panel by panel.
#include "common/workspace.h"
#include "linear/update.h"

namespace tw {
namespace {

// y of a block from its base sums and, in `tile`, the update's. The block is at token t0 of those packed,
// which begin at `begin`.
template <class T, class C>
inline void finish_block(const LinearCall& call, const Rank<C>& rank, const C* kept, const float* sums,
                         const float* row_scales, int64_t begin, int64_t t0, int rows, int64_t n0, int lanes,
                         const PanelScratch<C>& scratch) {
  const int padded = static_cast<int>(round_up(rows, Unit<C>::kRowStep));
  for (int s = 0; s < lanes; s += kStrip<C>) {
    if (rank.r > 0)
      gemm<C, Start::zero>(padded, kStrip<C>, rank.depth, kept + t0 * rank.row, rank.row,
                           scratch.update + s * rank.row, kStrip<C>, scratch.tile, kStrip<C>);
    const vf scale = set1(call.column_scales ? 1.0f : call.scale);
    for (int r = 0; r < rows; ++r)
      for (int n = s; n < s + kStrip<C> && n < lanes; n += W) {
        const int some = static_cast<int>(least(W, lanes - n));
        vf y = load(sums + r * kSumsRow + n);
        if (row_scales) y = mul(y, set1(row_scales[begin + t0 + r]));
        if (call.bias) y = add(y, load_n(call.bias + n0 + n, some));
        if (call.out_scale) y = mul(y, load_n(call.out_scale + n0 + n, some));
        if (rank.r > 0) y = fma(scale, load(scratch.tile + r * kStrip<C> + (n - s)), y);
        T* to = out_at<T>(call.y, begin + t0 + r, n0 + n);
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
  const double flops = 2.0 * static_cast<double>(call.tokens) * static_cast<double>(call.in_features) *
                       static_cast<double>(call.out_features + call.rank);
  const int threads = flops < kSerialFlops ? 1 : call.threads;

  PackedRight<C> down{nullptr, rank.lanes, rank.used};
  PackedLeft<C> left = PackedLeft<C>::measure(call.tokens);
  const int64_t down_bytes = rank.r ? down.bytes(call.in_features) : 0;
  const int64_t left_bytes = left.bytes(call.in_features);
  const int64_t kept_bytes = round_up(left.tokens * rank.row * static_cast<int64_t>(sizeof(C)), kCacheLine);
  const int64_t dropped_bytes =
      call.dropout_p > 0 || call.int8_activations ? kBlock * kLeftRow * static_cast<int64_t>(sizeof(C)) : 0;
  const int64_t narrow_bytes = dropped_bytes + round_up(int64_t{kBlock} * down.lanes * 4, kCacheLine);
  const int64_t scales_bytes = call.int8_activations ? round_up(call.tokens * 4, kCacheLine) : 0;
  PanelScratch<C> measure;
  const int64_t scratch_bytes = measure.lay_out(nullptr, rank.row);
  const int64_t shared_bytes = down_bytes + left_bytes + kept_bytes + scales_bytes;
  char* workspace = take_workspace(shared_bytes + threads * (scratch_bytes + narrow_bytes));
  if (!workspace) return false;
  down.data = reinterpret_cast<C*>(workspace);
  left.data = reinterpret_cast<C*>(workspace + down_bytes);
  C* kept = reinterpret_cast<C*>(workspace + down_bytes + left_bytes);
  float* row_scales = call.int8_activations
                          ? reinterpret_cast<float*>(workspace + down_bytes + left_bytes + kept_bytes)
                          : nullptr;

  const Tokens<T, C> tokens{call.x, nullptr, nullptr, row_scales};
  const Tokens<T, C> dropped{call.x, nullptr, &call};
  const LanesAreRows<T, C> down_rows{call.down, call.rank};
  const LanesAreRows<T, C> up_rows{call.up, call.out_features};
  int64_t chunks_taken = 0, pieces_taken = 0, blocks_taken = 0, items_taken = 0;
  run_team(threads, [&](const Team& team) {
    const MatrixUnit unit_is_ready;
    char* own = workspace + shared_bytes + team.id * (scratch_bytes + narrow_bytes);
    PanelScratch<C> scratch;
    scratch.lay_out(own, rank.row);
    float* hidden_sums = reinterpret_cast<float*>(own + scratch_bytes + dropped_bytes);
    for (int64_t chunk; rank.r > 0 && (chunk = take_next(&chunks_taken)) * kChunk < call.in_features;)
      pack_chunk(down, down_rows, call.in_features, chunk * kChunk, scratch.staged);
    for (int64_t t = team.id; row_scales && t < call.tokens; t += team.size)
      row_scales[t] = eight_bit_scale(row_at<T>(call.x, t, 0), call.in_features);
    team.barrier();
    for (int64_t begin = 0; begin < call.tokens; begin += kTokensAtOnce) {
      const int64_t n_tokens = least(kTokensAtOnce, call.tokens - begin);
      while (pack_left(left, tokens, call.in_features, begin, begin + n_tokens, take_next(&pieces_taken))) {
      }
      team.barrier();
      if (rank.r > 0) {
        for (int64_t block; (block = take_next(&blocks_taken)) * kBlock < n_tokens;) {
          const int64_t t0 = block * kBlock;
          const int rows = static_cast<int>(least(kBlock, n_tokens - t0));
          if (call.dropout_p > 0 || row_scales)
            narrow_product(hidden_sums, dropped, down, call.in_features, begin + t0, rows,
                           reinterpret_cast<C*>(own + scratch_bytes));
          else
            narrow_product(hidden_sums, left, down, call.in_features, t0, rows);
          settle_hidden<T>(call, rank, hidden_sums, down.lanes, begin, t0, rows, kept);
        }
        team.barrier();
      }
      const int64_t token_items = (n_tokens + kTokensOfItem - 1) / kTokensOfItem;
      for (int64_t item; (item = take_next(&items_taken)) < panels * token_items;) {
        const int64_t n0 = item / token_items * kPanelLanes, t0 = item % token_items * kTokensOfItem;
        const int lanes = static_cast<int>(least(kPanelLanes, call.out_features - n0));
        const int strips = (lanes + kStrip<C> - 1) / kStrip<C>;
        for (int64_t r0 = 0; r0 < rank.r; r0 += kChunk)
          up_rows.build({scratch.update + r0 * kStrip<C>, int64_t{rank.row} * kStrip<C>, scratch.staged}, n0,
                        strips, r0, static_cast<int>(least(kChunk, rank.r - r0)));
        panel_product(left, right, call.in_features, t0, least(t0 + kTokensOfItem, n_tokens), n0, lanes,
                      scratch, [&](const float* sums, int64_t t, int rows) {
                        finish_block<T>(call, rank, kept, sums, row_scales, begin, t, rows, n0, lanes,
                                        scratch);
                      });
      }
      team.barrier();
      if (team.id == 0) pieces_taken = blocks_taken = items_taken = 0;
      team.barrier();
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
