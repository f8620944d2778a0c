// Forward for many tokens: y = (x W^T + x D^T + bias) out_scale + scale hidden up^T, panel by panel.
#include "common/workspace.h"
#include "linear/delta.h"
#include "linear/update.h"

namespace tw {
namespace {

// y of a block from its base sums, D's, and in `tile` the update's. The block is at token t0 of those packed,
// which begin at `begin`.
template <class T, class C>
inline void finish_block(const LinearCall& call, const Rank<C>& rank, const C* kept, const float* sums,
                         const float* row_scales, int64_t begin, int64_t t0, int rows, int64_t n0, int lanes,
                         const PanelScratch<C>& scratch, const DeltaProduct<T>& delta) {
  const int padded = static_cast<int>(round_up(rows, Unit<C>::kRowStep));
  if (delta.offsets) delta.begin_block(scratch.delta, t0, n0, lanes);
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
        if (delta.offsets) y = add(y, delta.sums_at(scratch.delta, t0 + r, n));
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

// What a thread needs, for an item and for a block of hidden values.
template <class C>
struct HiddenScratch : PanelScratch<C> {
  C* left;             // a block of tokens, where the update reads others than the base product
  float* hidden_sums;  // of a block

  int64_t lay_out(char* base, const Rank<C>& rank, bool reads_apart, bool has_delta) {
    Arena arena{base + PanelScratch<C>::lay_out(base, rank.row, has_delta)};
    left = arena.take<C>(reads_apart ? kBlock * kLeftRow : 0);
    hidden_sums = arena.take<float>(int64_t{kBlock} * rank.lanes);
    return arena.at - base;
  }
};

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
  // the update reads x as it is; where the base product does not, that is another left side
  const bool reads_apart = call.dropout_p > 0 || call.int8_activations;
  C* kept = nullptr;
  float* row_scales = nullptr;
  DeltaProduct<T> delta{call.delta.offsets, nullptr, call.out_features, call.in_features};
  const auto lay_out = [&](char* base) {
    Arena arena{base};
    down.data = arena.take<C>(down.elements(call.in_features));
    left.data = arena.take<C>(left.elements(call.in_features));
    kept = arena.take<C>(left.tokens * rank.row);
    row_scales = arena.take<float>(call.int8_activations ? call.tokens : 0);
    if (delta.offsets) delta.lay_out(arena, call.delta.offsets[call.out_features], call.tokens);
    return arena.at - base;
  };
  HiddenScratch<C> measure;
  const int64_t own_bytes = measure.lay_out(nullptr, rank, reads_apart, delta.offsets);
  char* workspace = take_workspace(lay_out(nullptr) + threads * own_bytes);
  if (!workspace) return false;
  char* const of_threads = workspace + lay_out(workspace);
  if (!call.int8_activations) row_scales = nullptr;

  const Tokens<T, C> tokens{call.x, nullptr, nullptr, row_scales};
  const Tokens<T, C> dropped{call.x, nullptr, &call};
  const LanesAreRows<T, C> down_rows{call.down, call.rank};
  const LanesAreRows<T, C> up_rows{call.up, call.out_features};
  int64_t chunks_taken = 0, pieces_taken = 0, blocks_taken = 0, items_taken = 0, turned_taken = 0;
  run_team(threads, [&](const Team& team) {
    const MatrixUnit unit_is_ready;
    HiddenScratch<C> scratch;
    scratch.lay_out(of_threads + team.id * own_bytes, rank, reads_apart, delta.offsets);
    for (int64_t chunk; rank.r > 0 && (chunk = take_next(&chunks_taken)) * kChunk < call.in_features;)
      pack_chunk(down, down_rows, call.in_features, chunk * kChunk, scratch.staged);
    if (delta.offsets) delta.read(call.delta, team.id, team.size);
    for (int64_t t = team.id; row_scales && t < call.tokens; t += team.size)
      row_scales[t] = eight_bit_scale(row_at<T>(call.x, t, 0), call.in_features);
    team.barrier();
    for (int64_t begin = 0; begin < call.tokens; begin += kTokensAtOnce) {
      const int64_t n_tokens = least(kTokensAtOnce, call.tokens - begin);
      while (pack_left(left, tokens, call.in_features, begin, begin + n_tokens, take_next(&pieces_taken))) {
      }
      while (delta.offsets && delta.turn(call.delta_x, begin, n_tokens, take_next(&turned_taken))) {
      }
      team.barrier();
      if (rank.r > 0) {
        for (int64_t block; (block = take_next(&blocks_taken)) * kBlock < n_tokens;) {
          const int64_t t0 = block * kBlock;
          const int rows = static_cast<int>(least(kBlock, n_tokens - t0));
          if (reads_apart)
            narrow_product(scratch.hidden_sums, dropped, down, call.in_features, begin + t0, rows,
                           scratch.left);
          else
            narrow_product(scratch.hidden_sums, left, down, call.in_features, t0, rows);
          settle_hidden<T>(call, rank, scratch.hidden_sums, down.lanes, begin, t0, rows, kept);
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
                                        scratch, delta);
                      });
      }
      team.barrier();
      if (team.id == 0) pieces_taken = blocks_taken = items_taken = turned_taken = 0;
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
