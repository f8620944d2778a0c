// Backward: dx = (dy out_scale) (W + D) + drop(dhidden down) panel by panel, and the gradients of the update
// and the bias in one pass over dy.
//
//   dhidden[t][r] = scale f'(hidden[t][r]) sum_o dy[t][o] up[o][r]
//   dup[r][o]     = scale sum_t hidden[t][r] dy[t][o]
//   ddown[r][i]   = sum_t dhidden[t][r] drop(x)[t][i]
//
// Sums over tokens are made slab by slab into buffers of their own and added up in order: neither their
// number nor their order depends on the threads. The dx of several layers over the same x is one sum in
// float.
#include "common/workspace.h"
#include "linear/delta.h"
#include "linear/update.h"

namespace tw {
namespace {

constexpr int kOuter = kHasMatrixUnit ? 128 : 96;  // tokens that an outer product sums up; whole blocks
constexpr int64_t kLineFloats = kCacheLine / 4;
constexpr int64_t kMostSlabs = 8;
constexpr int64_t kSlabBytes = int64_t{64} << 20;  // of all slabs' sums together, if several

// The slabs of tokens that have sums of their own: a matter of the shape alone.
struct Slabs {
  int64_t tokens = 0, count = 0;

  Slabs() = default;
  Slabs(int64_t all_tokens, int64_t bytes_of_one) {
    const int64_t most_slabs = most(1, least(kMostSlabs, kSlabBytes / most(bytes_of_one, 1)));
    tokens = round_up(most((all_tokens + most_slabs - 1) / most_slabs, 1), kOuter);
    count = (all_tokens + tokens - 1) / tokens;
  }
};

// [row][t], kOuter apart: the transpose of `rows` tokens of `width` floats as a left side.
template <class C>
inline void transpose_tokens(C* to, const float* from, int rows, int width, int width_padded) {
  const int padded = depth_of<C>(rows) * Unit<C>::kDepth;
  for (int r = 0; r < width_padded; ++r)
    for (int t = 0; t < padded; ++t)
      to[r * kOuter + t] = from_float<C>(r < width && t < rows ? from[t * width + r] : 0.0f);
}

// One slab's sums, floats.
struct SlabSums {
  float *dup, *ddown, *dbias;
};

template <class C>
struct SlabScratch {
  C *left, *strip, *turned;
  float *sums, *small;

  int64_t lay_out(char* base, const Rank<C>& rank) {
    Arena arena{base};
    left = arena.take<C>(kOuter * kLeftRow);
    strip = arena.take<C>(kStrip<C> * int64_t{kOuter});
    turned = arena.take<C>(rank.rows * int64_t{kOuter});
    sums = arena.take<float>(int64_t{kBlock} * most(rank.lanes, 1));
    small = arena.take<float>(int64_t{kOuter} * most(rank.r, 1));
    return arena.at - base;
  }
};

// sums[r][n] (+)= sum over up to kOuter tokens of turned[r][t] values[t][n]; the first ones set the sums.
template <class T, class C>
inline void add_outer(float* sums, int64_t ld, const Rank<C>& rank, const Tokens<T, C>& values, int64_t width,
                      int64_t t0, int rows, bool is_first, const SlabScratch<C>& scratch) {
  for (int64_t n0 = 0; n0 < width; n0 += kChunk) {
    const int n = static_cast<int>(least(kChunk, width - n0));
    values.fill(scratch.left, t0, rows, n0, n);
    const LanesAreColumns<C, C> lanes{{scratch.left, kLeftRow}, n, rows};
    for (int s = 0; s < n; s += kStrip<C>) {
      lanes.build({scratch.strip, 0, nullptr}, s, 1, 0, rows);
      const int used = static_cast<int>(least(kStrip<C>, round_up(n - s, W)));
      if (is_first)
        gemm<C, Start::zero>(rank.rows, used, depth_of<C>(rows), scratch.turned, kOuter, scratch.strip,
                             kStrip<C>, sums + n0 + s, ld);
      else
        gemm<C, Start::add_to>(rank.rows, used, depth_of<C>(rows), scratch.turned, kOuter, scratch.strip,
                               kStrip<C>, sums + n0 + s, ld);
    }
  }
}

// One of the layers.
template <class T, class C>
struct Backward {
  const LinearBackwardCall* call = nullptr;
  const LinearCall* f = nullptr;
  Rank<C> rank{0};
  bool wants_dhidden = false, wants_delta = false, has_sums = false;
  int64_t dup_row = 0, ddown_row = 0;
  PackedRight<C> up{};      // lanes are the rank, depth is O
  C* kept = nullptr;        // dhidden, rows of rank.row
  DeltaProduct<T> delta{};  // of D's transpose
  Slabs slabs;
  float* all_sums = nullptr;  // of all slabs
  PackedLeft<C> left{};       // dy
  int64_t* transposed_offsets = nullptr;

  void describe(const LinearBackwardCall& c, bool wants_dx) {
    call = &c;
    f = &c.forward;
    rank = Rank<C>(f->rank);
    wants_dhidden = f->rank > 0 && (wants_dx || c.ddown);
    wants_delta = f->delta.offsets && wants_dx;
    has_sums = c.dup || c.ddown || c.dbias;
    dup_row = round_up(f->out_features, kChunk);
    ddown_row = round_up(f->in_features, kChunk);
    up = {nullptr, rank.lanes, rank.used};
    delta = {nullptr, f->input_order, f->in_features, f->out_features};
    slabs = Slabs(f->tokens, slab_floats() * 4);
    left = PackedLeft<C>::measure(f->tokens);
  }

  void lay_out(Arena& arena, bool wants_dx) {
    up.data = arena.take<C>(wants_dhidden ? up.elements(f->out_features) : 0);
    kept = arena.take<C>(round_up(f->tokens, kBlock) * rank.row);
    all_sums = arena.take<float>(slabs.count * slab_floats());
    left.data = arena.take<C>(wants_dx ? left.elements(f->out_features) : 0);
    if (wants_delta) {
      transposed_offsets = arena.take<int64_t>(f->in_features + 1);
      delta.offsets = transposed_offsets;
      delta.lay_out(arena, f->delta.offsets[f->out_features], f->tokens);
    }
  }

  int64_t dup_floats() const { return call->dup ? rank.rows * dup_row : 0; }
  int64_t ddown_floats() const { return call->ddown ? rank.rows * ddown_row : 0; }
  int64_t slab_floats() const {
    return dup_floats() + ddown_floats() + (call->dbias ? round_up(f->out_features, kLineFloats) : 0);
  }
  SlabSums sums_at(float* at) const { return {at, at + dup_floats(), at + dup_floats() + ddown_floats()}; }

  float scale_of(int r) const { return f->column_scales ? f->column_scales[r] : f->scale; }

  void slab(int64_t index, const SlabScratch<C>& scratch) const {
    const int64_t begin = index * slabs.tokens, end = least(begin + slabs.tokens, f->tokens);
    const SlabSums sums = sums_at(all_sums + index * slab_floats());
    const Tokens<T, C> dy{call->dy};
    const Tokens<T, C> dropped{f->x, nullptr, f};
    for (int64_t t0 = begin; t0 < end; t0 += kOuter) {
      const int rows = static_cast<int>(least(kOuter, end - t0));
      const bool is_first = t0 == begin;
      if (wants_dhidden) {
        for (int at = 0; at < rows; at += kBlock) {
          const int some = static_cast<int>(least(kBlock, rows - at));
          narrow_product(scratch.sums, dy, up, f->out_features, t0 + at, some, scratch.left);
          settle(t0 + at, some, scratch.sums, scratch.small + at * rank.r);
        }
        if (call->ddown) {
          transpose_tokens(scratch.turned, scratch.small, rows, rank.r, rank.rows);
          add_outer(sums.ddown, ddown_row, rank, dropped, f->in_features, t0, rows, is_first, scratch);
        }
      }
      if (call->dup) {
        for (int i = 0; i < rows; ++i)
          for (int r = 0; r < rank.r; ++r)
            scratch.small[i * rank.r + r] = to_float(*row_at<T>(f->hidden, t0 + i, r));
        transpose_tokens(scratch.turned, scratch.small, rows, rank.r, rank.rows);
        add_outer(sums.dup, dup_row, rank, dy, f->out_features, t0, rows, is_first, scratch);
      }
      if (call->dbias) add_columns(sums.dbias, t0, rows, is_first);
    }
  }

  // dhidden of a block from its sums, in float in `exact` (rows of the rank) and rounded in `kept`
  void settle(int64_t t0, int rows, const float* sums, float* exact) const {
    for (int i = 0; i < rows; ++i) {
      C* row = kept + (t0 + i) * rank.row;
      for (int r = 0; r < rank.r; ++r) {
        float d = sums[i * rank.lanes + r] * scale_of(r);
        if (f->relu && !(to_float(*row_at<T>(f->hidden, t0 + i, r)) > 0.0f)) d = 0.0f;
        if (is_of_another(*f, t0 + i, r)) d = 0.0f;
        row[r] = from_float<C>(d);
        exact[i * rank.r + r] = d;
      }
      for (int r = rank.r; r < rank.row; ++r) row[r] = from_float<C>(0.0f);
    }
  }

  void add_columns(float* sums, int64_t t0, int rows, bool is_first) const {
    for (int64_t o = 0; o < f->out_features; o += W) {
      const int some = static_cast<int>(least(W, f->out_features - o));
      vf sum = is_first ? zero() : load_n(sums + o, some);
      for (int i = 0; i < rows; ++i) {
        const T* at = row_at<T>(call->dy, t0 + i, o);
        vf dy = some == W ? load(at) : load_n(at, some);
        if (f->out_scale) dy = mul(dy, load_n(f->out_scale + o, some));
        sum = add(sum, dy);
      }
      store_n(sums + o, sum, some);
    }
  }

  // The slabs' sums in order; `part` of `parts` of each gradient.
  void add_up(int part, int parts) const {
    const int64_t stride = slab_floats(), n_in = f->in_features, n_out = f->out_features;
    const SlabSums first = sums_at(all_sums);
    for (int r = part; r < rank.r; r += parts) {
      if (call->dup) {
        float* to = call->dup + r * n_out;
        add_row(to, first.dup + r * dup_row, n_out, stride, slabs.count);
        for (int64_t o = 0; o < n_out; ++o) to[o] *= scale_of(r);
      }
      if (call->ddown)
        add_row(call->ddown + r * n_in, first.ddown + r * ddown_row, n_in, stride, slabs.count);
    }
    if (call->dbias && part == 0) add_row(call->dbias, first.dbias, n_out, stride, slabs.count);
  }

  static void add_row(float* to, const float* from, int64_t n, int64_t stride, int64_t count) {
    for (int64_t i = 0; i < n; i += W) {
      const int some = static_cast<int>(least(W, n - i));
      vf sum = zero();
      for (int64_t slab = 0; slab < count; ++slab) sum = add(sum, load_n(from + slab * stride + i, some));
      store_n(to + i, sum, some);
    }
  }

  // Adds D's part and, by way of `tile`, the update's to the sums of a block of dx, and if nothing else is to
  // come writes them to dx. The block is at token t0 of those packed, which begin at `begin`.
  void finish_block(float* sums, const Rows* dx, int64_t begin, int64_t t0, int rows, int64_t n0, int lanes,
                    const PanelScratch<C>& scratch) const {
    const int padded = static_cast<int>(round_up(rows, Unit<C>::kRowStep));
    if (wants_delta) delta.begin_block(scratch.delta, t0, n0, lanes);
    for (int s = 0; s < lanes; s += kStrip<C>) {
      const int used = static_cast<int>(least(kStrip<C>, lanes - s));
      if (rank.r > 0) {
        gemm<C, Start::zero>(padded, kStrip<C>, rank.depth, kept + (begin + t0) * rank.row, rank.row,
                             scratch.update + s * rank.row, kStrip<C>, scratch.tile, kStrip<C>);
        if (f->dropout_p > 0)
          for (int r = 0; r < rows; ++r)
            drop_row(scratch.tile + r * kStrip<C>, *f, begin + t0 + r, n0 + s, used);
      }
      for (int r = 0; r < rows; ++r)
        for (int n = 0; n < used; n += W) {
          const int some = static_cast<int>(least(W, used - n));
          float* at = sums + r * kSumsRow + s + n;
          vf sum = load(at);
          if (wants_delta) sum = add(sum, delta.sums_at(scratch.delta, t0 + r, s + n));
          if (rank.r > 0) sum = add(sum, load(scratch.tile + r * kStrip<C> + n));
          if (!dx)
            store(at, sum);
          else if (some == W)
            store(out_at<T>(*dx, begin + t0 + r, n0 + s + n), sum);
          else
            store_n(out_at<T>(*dx, begin + t0 + r, n0 + s + n), sum, some);
        }
    }
  }
};

// right_of(call): the weight of a layer as the right side of a product
template <class T, class RightOf>
bool backward(const LinearBackwardCall* calls, int n_layers, const RightOf& right_of) {
  using C = typename ComputeType<T>::type;
  const LinearCall& first = calls[0].forward;
  const Rows& dx = calls[0].dx;
  Backward<T, C> layers[kMostLayers];
  Rank<C> widest(0);
  bool has_delta = false, has_sums = false;
  double outs = 0.0;
  for (int i = 0; i < n_layers; ++i) {
    layers[i].describe(calls[i], dx.data);
    if (layers[i].rank.r > widest.r) widest = layers[i].rank;
    has_delta = has_delta || layers[i].wants_delta;
    has_sums = has_sums || layers[i].wants_dhidden || layers[i].has_sums;
    outs += static_cast<double>(calls[i].forward.out_features + calls[i].forward.rank);
  }
  const double flops =
      2.0 * static_cast<double>(first.tokens) * static_cast<double>(first.in_features + widest.r) * outs;
  const int threads = flops < kSerialFlops ? 1 : first.threads;
  const auto lay_out = [&](char* base) {
    Arena arena{base};
    for (int i = 0; i < n_layers; ++i) layers[i].lay_out(arena, dx.data);
    return arena.at - base;
  };
  PanelScratch<C> measure;
  SlabScratch<C> measure_slab;
  // a thread is done with its slabs when its panels begin
  const int64_t own_bytes =
      most(measure.lay_out(nullptr, widest.row, has_delta), measure_slab.lay_out(nullptr, widest));
  char* workspace = take_workspace(lay_out(nullptr) + threads * own_bytes);
  if (!workspace) return false;
  char* const of_threads = workspace + lay_out(workspace);

  const int64_t panels = dx.data ? (first.in_features + kPanelLanes - 1) / kPanelLanes : 0;
  Taken chunks, slabs, pieces, items, turned;
  run_team(threads, [&](const Team& team) {
    const MatrixUnit unit_is_ready;
    char* own = of_threads + team.id * own_bytes;
    PanelScratch<C> scratch;
    scratch.lay_out(own, widest.row, has_delta);
    chunks.each(
        n_layers, [&](int i) { return layers[i].wants_dhidden ? chunks_of(layers[i].f->out_features) : 0; },
        [&](int i, int64_t chunk) {
          const LinearCall& f = *layers[i].f;
          const LanesAreColumns<T, C> up_lanes{f.up, f.rank, f.out_features};
          pack_chunk(layers[i].up, up_lanes, f.out_features, chunk * kChunk, static_cast<C*>(nullptr));
        });
    for (int i = 0; i < n_layers; ++i) {
      const LinearCall& f = *layers[i].f;
      if (layers[i].wants_delta && (team.id + i) % team.size == team.size - 1)
        transpose_delta(f.delta, f.out_scale, f.out_features, f.in_features, layers[i].transposed_offsets,
                        layers[i].delta.entries);
    }
    team.barrier();
    if (has_sums) {
      slabs.each(
          n_layers,
          [&](int i) { return layers[i].wants_dhidden || layers[i].has_sums ? layers[i].slabs.count : 0; },
          [&](int i, int64_t slab) {
            SlabScratch<C> slab_scratch;
            slab_scratch.lay_out(own, layers[i].rank);
            layers[i].slab(slab, slab_scratch);
          });
      team.barrier();
      for (int i = 0; i < n_layers; ++i)
        if (layers[i].has_sums) layers[i].add_up(team.id, team.size);
    }
    for (int64_t begin = 0; panels > 0 && begin < first.tokens; begin += kTokensAtOnce) {
      const int64_t n_tokens = least(kTokensAtOnce, first.tokens - begin);
      const int64_t n_blocks = (n_tokens + kBlock - 1) / kBlock;
      pieces.each(
          n_layers, [&](int i) { return chunks_of(layers[i].f->out_features) * n_blocks; },
          [&](int i, int64_t piece) {
            const LinearCall& f = *layers[i].f;
            pack_left(layers[i].left, Tokens<T, C>{calls[i].dy, f.out_scale}, f.out_features, begin,
                      begin + n_tokens, piece);
          });
      turned.each(
          n_layers, [&](int i) { return layers[i].wants_delta ? layers[i].delta.pieces(n_tokens) : 0; },
          [&](int i, int64_t piece) { layers[i].delta.turn(calls[i].dy, begin, n_tokens, piece); });
      team.barrier();
      const int64_t token_items = (n_tokens + kTokensOfItem - 1) / kTokensOfItem;
      for (int64_t item; (item = items.next()) < panels * token_items;) {
        const int64_t n0 = item / token_items * kPanelLanes, t0 = item % token_items * kTokensOfItem;
        const int lanes = static_cast<int>(least(kPanelLanes, first.in_features - n0));
        const int strips = (lanes + kStrip<C> - 1) / kStrip<C>;
        for (int i = 0; i < n_layers; ++i) {
          const Backward<T, C>& layer = layers[i];
          const LinearCall& f = *layer.f;
          const LanesAreColumns<T, C> down_lanes{f.down, f.in_features, f.rank};
          for (int64_t r0 = 0; r0 < f.rank; r0 += kChunk)
            down_lanes.build({scratch.update + r0 * kStrip<C>, int64_t{layer.rank.row} * kStrip<C>, nullptr},
                             n0, strips, r0, static_cast<int>(least(kChunk, f.rank - r0)));
          const Rows* to = i == n_layers - 1 ? &dx : nullptr;
          panel_product(layer.left, right_of(f), f.out_features, t0, least(t0 + kTokensOfItem, n_tokens), n0,
                        lanes, scratch, i == 0, [&](float* block, int64_t t, int rows) {
                          layer.finish_block(block, to, begin, t, rows, n0, lanes, scratch);
                        });
        }
      }
      team.barrier();
      if (team.id == 0) pieces = items = turned = Taken{};
      team.barrier();
    }
  });
  give_workspace(workspace);
  return true;
}

}  // namespace

namespace TW_ISA {

bool linear_backward(const LinearBackwardCall* calls, int n_calls) {
  const LinearCall& first = calls->forward;
  return by_dtype(first.dtype, [&](auto x) {
    using T = decltype(x);
    using C = typename ComputeType<T>::type;
    if (first.weight.data)
      return backward<T>(calls, n_calls, [](const LinearCall& f) {
        return LanesAreColumns<T, C>{f.weight, f.in_features, f.out_features};
      });
    bool done = false;
    by_kind(first.packed.kind, [&](auto kind) {
      done = backward<T>(calls, n_calls, [](const LinearCall& f) {
        return PackedLanesAreColumns<decltype(kind)::value, C>{f.packed, f.in_features, f.out_features};
      });
    });
    return done;
  });
}

}  // namespace TW_ISA
}  // namespace tw
