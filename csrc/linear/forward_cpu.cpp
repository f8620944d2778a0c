// Forward for many tokens: y = (x W^T + x D^T + bias) out_scale + scale hidden up^T, panel by panel. Several
// layers over the same x share its packed tokens, and their panels are one row of work.
#include "common/workspace.h"
#include "linear/delta.h"
#include "linear/update.h"

namespace tw {
namespace {

// One of the layers.
template <class T, class C>
struct Layer {
  const LinearCall* call = nullptr;
  Rank<C> rank{0};
  PackedRight<C> down{};
  C* kept = nullptr;  // hidden values, rows of rank.row
  DeltaProduct<T> delta{};

  void describe(const LinearCall& c) {
    call = &c;
    rank = Rank<C>(c.rank);
    down = {nullptr, rank.lanes, rank.used};
    delta = {c.delta.offsets, nullptr, c.out_features, c.in_features};
  }

  void lay_out(Arena& arena, int64_t left_tokens) {
    down.data = arena.take<C>(down.elements(call->in_features));
    kept = arena.take<C>(left_tokens * rank.row);
    if (delta.offsets) delta.lay_out(arena, call->delta.offsets[call->out_features], call->tokens);
  }

  int64_t panels() const { return (call->out_features + kPanelLanes - 1) / kPanelLanes; }

  // y of a block from its base sums, D's, and in `tile` the update's. The block is at token t0 of those
  // packed, which begin at `begin`.
  void finish_block(const float* sums, const float* row_scales, int64_t begin, int64_t t0, int rows,
                    int64_t n0, int lanes, const PanelScratch<C>& scratch) const {
    const int padded = static_cast<int>(round_up(rows, Unit<C>::kRowStep));
    if (delta.offsets) delta.begin_block(scratch.delta, t0, n0, lanes);
    for (int s = 0; s < lanes; s += kStrip<C>) {
      if (rank.r > 0)
        gemm<C, Start::zero>(padded, kStrip<C>, rank.depth, kept + t0 * rank.row, rank.row,
                             scratch.update + s * rank.row, kStrip<C>, scratch.tile, kStrip<C>);
      const vf scale = set1(call->column_scales ? 1.0f : call->scale);
      for (int r = 0; r < rows; ++r)
        for (int n = s; n < s + kStrip<C> && n < lanes; n += W) {
          const int some = static_cast<int>(least(W, lanes - n));
          vf y = load(sums + r * kSumsRow + n);
          if (row_scales) y = mul(y, set1(row_scales[begin + t0 + r]));
          if (delta.offsets) y = add(y, delta.sums_at(scratch.delta, t0 + r, n));
          if (call->delta_sums) {
            const float* ahead = call->delta_sums + (begin + t0 + r) * call->out_features + n0 + n;
            y = add(y, load_n(ahead, some));
          }
          if (call->bias) y = add(y, load_n(call->bias + n0 + n, some));
          if (call->out_scale) y = mul(y, load_n(call->out_scale + n0 + n, some));
          if (rank.r > 0) y = fma(scale, load(scratch.tile + r * kStrip<C> + (n - s)), y);
          T* to = out_at<T>(call->y, begin + t0 + r, n0 + n);
          if (some == W)
            store(to, y);
          else
            store_n(to, y, some);
        }
    }
  }
};

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

// right_of(call): the weight of a layer as the right side of a product
template <class T, class RightOf>
bool forward(const LinearCall* calls, int n_layers, const RightOf& right_of) {
  using C = typename ComputeType<T>::type;
  const LinearCall& first = calls[0];
  Layer<T, C> layers[kMostLayers];
  Rank<C> widest(0);
  bool reads_apart = false, has_delta = false;
  double outs = 0.0;
  for (int i = 0; i < n_layers; ++i) {
    layers[i].describe(calls[i]);
    if (calls[i].rank > widest.r) widest = layers[i].rank;
    // the update reads x as it is; where the base product does not, that is another left side
    reads_apart = reads_apart || calls[i].dropout_p > 0 || calls[i].int8_activations;
    has_delta = has_delta || calls[i].delta.offsets;
    outs += static_cast<double>(calls[i].out_features + calls[i].rank);
  }
  const double flops =
      2.0 * static_cast<double>(first.tokens) * static_cast<double>(first.in_features) * outs;
  const int threads = flops < kSerialFlops ? 1 : first.threads;

  PackedLeft<C> left = PackedLeft<C>::measure(first.tokens);
  float* row_scales = nullptr;
  const auto lay_out = [&](char* base) {
    Arena arena{base};
    left.data = arena.take<C>(left.elements(first.in_features));
    row_scales = arena.take<float>(first.int8_activations ? first.tokens : 0);
    for (int i = 0; i < n_layers; ++i) layers[i].lay_out(arena, left.tokens);
    return arena.at - base;
  };
  HiddenScratch<C> measure;
  const int64_t own_bytes = measure.lay_out(nullptr, widest, reads_apart, has_delta);
  char* workspace = take_workspace(lay_out(nullptr) + threads * own_bytes);
  if (!workspace) return false;
  char* const of_threads = workspace + lay_out(workspace);
  if (!first.int8_activations) row_scales = nullptr;

  const Tokens<T, C> tokens{first.x, nullptr, nullptr, row_scales};
  Taken chunks, pieces, blocks, items, turned;
  run_team(threads, [&](const Team& team) {
    const MatrixUnit unit_is_ready;
    HiddenScratch<C> scratch;
    scratch.lay_out(of_threads + team.id * own_bytes, widest, reads_apart, has_delta);
    chunks.each(
        n_layers, [&](int i) { return calls[i].rank > 0 ? chunks_of(first.in_features) : 0; },
        [&](int i, int64_t chunk) {
          const LanesAreRows<T, C> down_rows{calls[i].down, calls[i].rank};
          pack_chunk(layers[i].down, down_rows, first.in_features, chunk * kChunk, scratch.staged);
        });
    for (int i = 0; i < n_layers; ++i)
      if (calls[i].delta.offsets) layers[i].delta.read(calls[i].delta, team.id, team.size);
    for (int64_t t = team.id; row_scales && t < first.tokens; t += team.size)
      row_scales[t] = eight_bit_scale(row_at<T>(first.x, t, 0), first.in_features);
    team.barrier();
    for (int64_t begin = 0; begin < first.tokens; begin += kTokensAtOnce) {
      const int64_t n_tokens = least(kTokensAtOnce, first.tokens - begin);
      while (pack_left(left, tokens, first.in_features, begin, begin + n_tokens, pieces.next())) {
      }
      turned.each(
          n_layers, [&](int i) { return layers[i].delta.offsets ? layers[i].delta.pieces(n_tokens) : 0; },
          [&](int i, int64_t piece) { layers[i].delta.turn(calls[i].delta_x, begin, n_tokens, piece); });
      team.barrier();
      if (widest.r > 0) {
        const int64_t n_blocks = (n_tokens + kBlock - 1) / kBlock;
        blocks.each(
            n_layers, [&](int i) { return calls[i].rank > 0 ? n_blocks : 0; },
            [&](int i, int64_t block) {
              const Layer<T, C>& layer = layers[i];
              const int64_t t0 = block * kBlock;
              const int rows = static_cast<int>(least(kBlock, n_tokens - t0));
              if (calls[i].dropout_p > 0 || calls[i].int8_activations)
                narrow_product(scratch.hidden_sums, Tokens<T, C>{first.x, nullptr, &calls[i]}, layer.down,
                               first.in_features, begin + t0, rows, scratch.left);
              else
                narrow_product(scratch.hidden_sums, left, layer.down, first.in_features, t0, rows);
              settle_hidden<T>(calls[i], layer.rank, scratch.hidden_sums, layer.down.lanes, begin, t0, rows,
                               layer.kept);
            });
        team.barrier();
      }
      const int64_t token_items = (n_tokens + kTokensOfItem - 1) / kTokensOfItem;
      items.each(
          n_layers, [&](int i) { return layers[i].panels() * token_items; },
          [&](int i, int64_t item) {
            const Layer<T, C>& layer = layers[i];
            const int64_t n0 = item / token_items * kPanelLanes, t0 = item % token_items * kTokensOfItem;
            const int lanes = static_cast<int>(least(kPanelLanes, calls[i].out_features - n0));
            const int strips = (lanes + kStrip<C> - 1) / kStrip<C>;
            const LanesAreRows<T, C> up_rows{calls[i].up, calls[i].out_features};
            for (int64_t r0 = 0; r0 < calls[i].rank; r0 += kChunk)
              up_rows.build(
                  {scratch.update + r0 * kStrip<C>, int64_t{layer.rank.row} * kStrip<C>, scratch.staged}, n0,
                  strips, r0, static_cast<int>(least(kChunk, calls[i].rank - r0)));
            panel_product(left, right_of(calls[i]), first.in_features, t0,
                          least(t0 + kTokensOfItem, n_tokens), n0, lanes, scratch, true,
                          [&](const float* sums, int64_t t, int rows) {
                            layer.finish_block(sums, row_scales, begin, t, rows, n0, lanes, scratch);
                          });
          });
      team.barrier();
      if (team.id == 0) pieces = blocks = items = turned = Taken{};
      team.barrier();
    }
  });
  give_workspace(workspace);
  return true;
}

}  // namespace

namespace TW_ISA {

bool linear_forward(const LinearCall* calls, int n_calls) {
  return by_dtype(calls->dtype, [&](auto x) {
    using T = decltype(x);
    using C = typename ComputeType<T>::type;
    if (calls->weight.data)
      return forward<T>(calls, n_calls, [](const LinearCall& call) {
        return LanesAreRows<T, C>{call.weight, call.out_features};
      });
    bool done = false;
    by_kind(calls->packed.kind, [&](auto kind) {
      done = forward<T>(calls, n_calls, [](const LinearCall& call) {
        return PackedLanesAreRows<decltype(kind)::value, C>{call.packed, call.out_features};
      });
    });
    return done;
  });
}

}  // namespace TW_ISA
}  // namespace tw
