// The largest entries of dy^T x, tile by tile: a tile is made, looked through and forgotten.
//
// Each thread keeps a pool of entries not smaller than a threshold. When the pool is full its k largest stay,
// and the smallest of them is the new threshold: of random entries each k more in the pool let half as many
// through.
#include "common/arena.h"
#include "common/by_dtype.h"
#include "common/gemm_tile.h"
#include "common/parallel.h"
#include "common/workspace.h"
#include "sparse/sparse.h"

namespace tw {
namespace {

constexpr int kTileRows = kHasMatrixUnit ? 64 : 48;
constexpr int kTileLanes = 256;
constexpr int64_t kTileEntries = int64_t{kTileRows} * kTileLanes;
constexpr int64_t kRowsOfItem = 16 * kTileRows;  // that a thread takes with one panel of inputs
constexpr int64_t kChunk = 512;                  // tokens whose sums are made apart
constexpr int64_t kColumnsAtOnce = 64;
constexpr int64_t kPadding = 32;  // elements: rows start in different cache sets
constexpr double kSerialFlops = 2e5;

template <class C>
struct Scratch {
  C *panel, *staged;
  float* tile;
  LargeEntry* pool;

  int64_t lay_out(char* base, int64_t depth, int64_t pool_entries) {
    Arena arena{base};
    panel = arena.take<C>(depth * kTileLanes);
    staged = arena.take<C>(int64_t{Unit<C>::kDepth} * kTileLanes);
    tile = arena.take<float>(kTileEntries);
    pool = arena.take<LargeEntry>(pool_entries);
    return arena.at - base;
  }
};

// x[t][n0 ..] as lanes: [depth][lane], zeros past the last token and lane
template <class T, class C>
void pack_panel(const LargestCall& call, int64_t n0, int64_t depth, const Scratch<C>& scratch) {
  const int lanes = static_cast<int>(least(kTileLanes, call.in_features - n0));
  for (int64_t t = 0; t < depth; t += Unit<C>::kDepth) {
    for (int i = 0; i < Unit<C>::kDepth; ++i) {
      const bool exists = t + i < call.tokens;
      const T* from = static_cast<const T*>(call.x) + (exists ? (t + i) * call.x_row + n0 : 0);
      copy_row(scratch.staged + i * kTileLanes, from, 1, exists ? lanes : 0, kTileLanes);
    }
    pack_lanes(scratch.panel + t * kTileLanes, scratch.staged, kTileLanes, Unit<C>::kDepth, kTileLanes);
  }
}

// Puts a tile's entries of at least this size into the pool; NaN is of no size.
inline int64_t look_through(const float* tile, int64_t row, int rows, int64_t column, int lanes,
                            float least_size, LargeEntry* pool, int64_t n) {
  const vf least_of = set1(least_size);
  for (int r = 0; r < rows; ++r)
    for (int c = 0; c < lanes; c += W) {
      const vf sizes = abs(load(tile + r * kTileLanes + c));
      if (!any(le(least_of, sizes))) continue;
      float size[W];
      store(size, sizes);
      for (int i = 0; i < W && c + i < lanes; ++i)
        if (size[i] >= least_size)
          pool[n++] = {size[i], static_cast<int32_t>(row + r), static_cast<int32_t>(column + c + i)};
    }
  return n;
}

template <class T>
bool largest(const LargestCall& call) {
  using C = typename ComputeType<T>::type;
  constexpr int64_t kStep = most(W, Unit<C>::kDepth * Unit<C>::kDepthStep);
  const int64_t depth = round_up(call.tokens, kStep), ld = depth + kPadding;
  const int64_t n_rows = round_up(call.out_features, kTileRows), pool_entries = 2 * call.k + kTileEntries;
  const double flops = 2.0 * static_cast<double>(call.tokens) * static_cast<double>(call.in_features) *
                       static_cast<double>(call.out_features);
  const int threads = flops < kSerialFlops ? 1 : call.threads;
  C* turned = nullptr;  // [output][token]
  int64_t* counts = nullptr;
  const auto lay_out = [&](char* base) {
    Arena arena{base};
    turned = arena.take<C>(n_rows * ld);
    counts = arena.take<int64_t>(threads);
    return arena.at - base;
  };
  Scratch<C> measure;
  const int64_t own_bytes = measure.lay_out(nullptr, depth, pool_entries);
  char* workspace = take_workspace(lay_out(nullptr) + threads * own_bytes);
  if (!workspace) return false;
  char* const of_threads = workspace + lay_out(workspace);
  for (int i = 0; i < threads; ++i) counts[i] = 0;
  const int64_t panels = (call.in_features + kTileLanes - 1) / kTileLanes;
  const int64_t row_items = (call.out_features + kRowsOfItem - 1) / kRowsOfItem;
  int64_t columns_taken = 0, items_taken = 0;
  run_team(threads, [&](const Team& team) {
    const MatrixUnit unit_is_ready;
    Scratch<C> scratch;
    scratch.lay_out(of_threads + team.id * own_bytes, depth, pool_entries);
    for (int64_t o; (o = take_next(&columns_taken) * kColumnsAtOnce) < n_rows;) {
      const int64_t some = most(0, least(kColumnsAtOnce, call.out_features - o));
      if (some > 0)
        turn_rows(turned + o * ld, ld, static_cast<const T*>(call.dy) + o, call.dy_row, call.tokens, some);
      for (int64_t r = o + some; r < least(o + kColumnsAtOnce, n_rows); ++r)
        memset(static_cast<void*>(turned + r * ld), 0, sizeof(C) * static_cast<size_t>(ld));
    }
    team.barrier();
    int64_t n = 0;
    float least_size = 0.0f;
    for (int64_t item; (item = take_next(&items_taken)) < panels * row_items;) {
      const int64_t n0 = item / row_items * kTileLanes, begin = item % row_items * kRowsOfItem;
      const int lanes = static_cast<int>(least(kTileLanes, call.in_features - n0));
      pack_panel<T>(call, n0, depth, scratch);
      for (int64_t row = begin; row < least(begin + kRowsOfItem, call.out_features); row += kTileRows) {
        for (int64_t t = 0; t < depth; t += kChunk) {
          const int units = static_cast<int>(least(kChunk, depth - t) / Unit<C>::kDepth);
          const C *a = turned + row * ld + t, *b = scratch.panel + t * kTileLanes;
          if (t == 0)
            gemm<C, Start::zero>(kTileRows, kTileLanes, units, a, ld, b, kTileLanes, scratch.tile,
                                 kTileLanes);
          else
            gemm<C, Start::add_to>(kTileRows, kTileLanes, units, a, ld, b, kTileLanes, scratch.tile,
                                   kTileLanes);
        }
        const int rows = static_cast<int>(least(kTileRows, call.out_features - row));
        n = look_through(scratch.tile, row, rows, n0, lanes, least_size, scratch.pool, n);
        if (n > 2 * call.k) n = keep_largest(scratch.pool, n, call.k, &least_size);
      }
    }
    counts[team.id] = keep_largest(scratch.pool, n, call.k, &least_size);
  });
  Scratch<C> all;
  all.lay_out(of_threads, depth, pool_entries);
  int64_t n = counts[0];
  for (int i = 1; i < threads; ++i) {
    Scratch<C> other;
    other.lay_out(of_threads + i * own_bytes, depth, pool_entries);
    memcpy(all.pool + n, other.pool, static_cast<size_t>(counts[i]) * sizeof(LargeEntry));
    float least_size;
    n = keep_largest(all.pool, n + counts[i], call.k, &least_size);
  }
  write_places(all.pool, n, call.in_features, call.places);
  *call.found = n;
  give_workspace(workspace);
  return true;
}

}  // namespace

namespace TW_ISA {

bool sparse_largest(const LargestCall& call) {
  return by_dtype(call.dtype, [&](auto x) { return largest<decltype(x)>(call); });
}

}  // namespace TW_ISA
}  // namespace tw
