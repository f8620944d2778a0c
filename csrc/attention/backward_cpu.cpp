// Backward: recompute P from lse, tile by tile, and accumulate dq, dk, dv. Five products a pair of tiles.
//
//   S[key][query]  = K . Qt           P = exp(S - lse)
//   dP[key][query] = V . dOt          dS = P * (dP - delta),  delta[query] = dO . O - dlse
//   dV[key][:]    += P  . dO          dK[key][:] += dS . Q          dQt[:][query] += Kt . dS
//
// A unit is (document, key/value head). One thread walks a query head alone, key tile by key tile, so every
// sum has a fixed order and needs no atomics; dK and dV of a unit's query heads are added up in the order of
// the heads. With fewer units than threads, the threads take the query heads of one unit and the sums are
// made afterwards, in the same order: the result is bitwise the same either way.
#include "attention/attention.h"
#include "attention/pack.h"
#include "attention/scores.h"
#include "common/parallel.h"
#include "common/workspace.h"

namespace tw {
namespace {

constexpr int kTile = 64;  // queries and keys of a tile
constexpr double kSerialFlops = 1e6;
// Key tiles that meet a query tile in turn, while it is in the second cache: for each of them alone all of
// the query side would pass by, more than that cache holds.
constexpr int kKeysInTurn = 256 / kTile;

inline int64_t tiles_of(int64_t n) { return (n + kTile - 1) / kTile; }

template <class C>
struct BackwardShape {
  Width<C> qk, v;
  int64_t key_tiles, query_tiles;                                        // of the longest document
  int64_t k_rows, v_rows, kt, q_lanes_t, do_lanes_t, q_lanes, do_lanes;  // elements of a packed tile
  int64_t dq, dk, dv;                                                    // floats of a tile

  explicit BackwardShape(const AttentionCall& call)
      : qk(call.head_dim), v(call.value_dim), key_tiles(0), query_tiles(0) {
    for (int64_t i = 0; i < call.n_documents; ++i) {
      key_tiles = most(key_tiles, tiles_of(call.documents[i].n_k));
      query_tiles = most(query_tiles, tiles_of(call.documents[i].n_q));
    }
    k_rows = q_lanes_t = int64_t{kTile} * qk.row;
    v_rows = do_lanes_t = int64_t{kTile} * v.row;
    kt = q_lanes = dq = dk = int64_t{kTile} * qk.lanes;
    do_lanes = dv = int64_t{kTile} * v.lanes;
  }
  int64_t grad_row() const { return qk.lanes + v.lanes; }  // floats of a row of summed dK and dV
};

// Everything of one thread. K side: tiles of the item's keys. Q side: tiles of one query head.
template <class C>
struct BackwardScratch {
  C *k, *v, *kt;
  C *q_t, *do_t, *q, *dout;
  float *dq, *lse, *delta;
  TileIntervals<kTile>* see;
  C *stage, *pairs, *p, *ds, *ds_lanes;
  float *scores, *dp, *factor, *dk_tiles, *dv_tiles, *sums;

  // With base nullptr, only measures: returns the bytes needed.
  int64_t lay_out(char* base, const BackwardShape<C>& shape, bool drops, bool sums_heads) {
    Arena arena{base};
    const int64_t n_k = shape.key_tiles, n_q = shape.query_tiles;
    const int64_t widest = most(most(shape.qk.row, shape.qk.lanes), most(shape.v.row, shape.v.lanes)) * kTile;
    k = arena.take<C>(n_k * shape.k_rows);
    v = arena.take<C>(n_k * shape.v_rows);
    kt = arena.take<C>(n_k * shape.kt);
    q_t = arena.take<C>(n_q * shape.q_lanes_t);
    do_t = arena.take<C>(n_q * shape.do_lanes_t);
    q = arena.take<C>(n_q * shape.q_lanes);
    dout = arena.take<C>(n_q * shape.do_lanes);
    dq = arena.take<float>(n_q * shape.dq);
    lse = arena.take<float>(n_q * kTile);
    delta = arena.take<float>(n_q * kTile);
    see = arena.take<TileIntervals<kTile>>(n_q);
    stage = arena.take<C>(widest);
    pairs = arena.take<C>(widest);
    p = arena.take<C>(kTile * kTile);
    ds = arena.take<C>(kTile * kTile);
    ds_lanes = Unit<C>::kDepth == 2 ? arena.take<C>(kTile * kTile) : ds;
    scores = arena.take<float>(kTile * kTile);
    dp = arena.take<float>(kTile * kTile);
    factor = drops ? arena.take<float>(kTile * kTile) : nullptr;
    dk_tiles = arena.take<float>(kKeysInTurn * shape.dk);
    dv_tiles = arena.take<float>(kKeysInTurn * shape.dv);
    sums = sums_heads ? arena.take<float>(n_k * kTile * shape.grad_row()) : nullptr;
    return round_up(arena.at - base, 4096);
  }
};

template <class T, class C>
void pack_keys(const AttentionCall& call, const BackwardShape<C>& shape, const Document& doc, int kv_head,
               BackwardScratch<C>& s) {
  for (int64_t t = 0; t < tiles_of(doc.n_k); ++t) {
    const int64_t j0 = t * kTile;
    stage_key_rows<kTile, C, T>(s.k + t * shape.k_rows, shape.qk.row, call.k, doc, j0, kv_head,
                                call.head_dim);
    stage_key_rows<kTile, C, T>(s.v + t * shape.v_rows, shape.v.row, call.v, doc, j0, kv_head,
                                call.value_dim);
    stage_key_rows<kTile, C, T>(s.stage, shape.qk.lanes, call.k, doc, j0, kv_head, call.head_dim);
    transpose_tile<kTile>(s.kt + t * shape.kt, s.stage, s.pairs, shape.qk.lanes);
  }
}

// a[row] . b[row], the same sum for every stride
template <class T, class C>
float dot_rows(const View& a, const View& b, int64_t batch, int64_t row, int head, int n,
               BackwardScratch<C>& s) {
  const auto contiguous = [&](const View& t, float* scratch) {
    const T* at = row_of<T>(t, batch, row, head);
    if (t.lane == 1) return at;
    T* staged = reinterpret_cast<T*>(scratch);
    copy_row(staged, at, t.lane, n, n);
    return static_cast<const T*>(staged);
  };
  const T* x = contiguous(a, s.scores);
  const T* y = contiguous(b, s.dp);
  vf acc = zero();
  int i = 0;
  for (; i + W <= n; i += W) acc = fma(load(x + i), load(y + i), acc);
  if (i < n) acc = fma(load_n(x + i, n - i), load_n(y + i, n - i), acc);
  return sum(acc);
}

// Both packings of q and dO, the row terms and the intervals of every query tile of one head; dq starts at 0.
template <class T, class C>
void pack_queries(const BackwardCall& call, const BackwardShape<C>& shape, const Document& doc, int head,
                  BackwardScratch<C>& s) {
  const AttentionCall& fwd = call.forward;
  for (int64_t t = 0; t < tiles_of(doc.n_q); ++t) {
    const int64_t first = t * kTile;
    const auto pack = [&](const View& tensor, const Width<C>& width, C* transposed, C* lanes) {
      stage_rows<kTile, C, T>(s.stage, width.row, tensor, doc.batch, doc.q_begin, first, doc.n_q, head,
                              width.d);
      pack_lanes_transposed(transposed, s.stage, width.words, kTile, width.words);
      stage_rows<kTile, C, T>(s.stage, width.lanes, tensor, doc.batch, doc.q_begin, first, doc.n_q, head,
                              width.d);
      pack_lanes(lanes, s.stage, width.lanes, kTile, width.lanes);
    };
    pack(fwd.q, shape.qk, s.q_t + t * shape.q_lanes_t, s.q + t * shape.q_lanes);
    pack(call.dout, shape.v, s.do_t + t * shape.do_lanes_t, s.dout + t * shape.do_lanes);
    s.see[t].fill(doc, fwd.rule, head, first);

    const float* lse = fwd.lse + (doc.batch * fwd.n_heads + head) * fwd.n_rows + doc.q_begin + first;
    for (int i = 0; i < kTile; ++i) {
      float* delta = s.delta + first + i;
      s.lse[first + i] = __builtin_inff();  // P = 0 for rows that see nothing and for lanes past the end
      *delta = 0.0f;
      if (first + i >= doc.n_q || lse[i] == -__builtin_inff()) continue;
      const int64_t row = doc.q_begin + first + i;
      s.lse[first + i] = lse[i];
      *delta = dot_rows<T>(call.dout, fwd.out, doc.batch, row, head, fwd.value_dim, s);
      if (call.dlse) *delta -= call.dlse[lse + i - fwd.lse];
    }
  }
  memset(s.dq, 0, sizeof(float) * static_cast<size_t>(tiles_of(doc.n_q) * shape.dq));
}

// From scores and dP to P and dS, in the layouts of the three products that follow.
template <class C, bool CAPS, bool DROPS>
void weights_step(const Rule& rule, BackwardScratch<C>& s, int64_t first) {
  const vf one = set1(1.0f), unit = set1(score_unit(rule)), to_log2 = set1(kLog2E);
  const vf per_cap = set1(CAPS ? 1.0f / rule.softcap : 0.0f);
  for (int n = 0; n < kTile; n += W) {
    const vf minus_lse = sub(zero(), load(s.lse + first + n)), row_delta = load(s.delta + first + n);
    const auto pair = [&](int at, vf& p, vf& ds) {
      const vf score = load(s.scores + at);
      p = weight_of<Unit<C>::kExpTerms>(fma(score, unit, minus_lse), to_log2);
      vf dp = load(s.dp + at);
      if constexpr (DROPS) dp = mul(dp, load(s.factor + at));
      ds = mul(p, sub(dp, row_delta));
      if constexpr (CAPS) {  // a hidden score is -inf: its weight is 0, its slope only has to be finite
        const vf tanh = max(set1(-1.0f), mul(score, per_cap));
        ds = mul(ds, sub(one, mul(tanh, tanh)));
      }
      if constexpr (DROPS) p = mul(p, load(s.factor + at));
    };
    for (int r = 0; r < kTile; r += 2) {
      vf p0, p1, ds0, ds1;
      const int at = r * kTile + n;
      pair(at, p0, ds0);
      pair(at + kTile, p1, ds1);
      store(s.p + at, p0);
      store(s.p + at + kTile, p1);
      store(s.ds + at, ds0);
      store(s.ds + at + kTile, ds1);
      if constexpr (Unit<C>::kDepth == 2) store_pairs(s.ds_lanes + r * kTile + 2 * n, ds0, ds1);
    }
  }
}

template <class C>
void backward_pair(const BackwardCall& call, const BackwardShape<C>& shape, int64_t document, int head,
                   int64_t key_tile, int64_t query_tile, float* dk, float* dv, BackwardScratch<C>& s) {
  const AttentionCall& fwd = call.forward;
  const Document& doc = fwd.documents[document];
  const Rule& rule = fwd.rule;
  const TileIntervals<kTile>& see = s.see[query_tile];
  const int64_t j0 = key_tile * kTile, first = query_tile * kTile;
  constexpr int kDepth = kTile / Unit<C>::kDepth;

  gemm<C, Start::zero>(kTile, kTile, shape.qk.depth, s.k + key_tile * shape.k_rows, shape.qk.row,
                       s.q_t + query_tile * shape.q_lanes_t, kTile, s.scores, kTile);
  settle_scores<kTile>(s.scores, rule);
  if (!see.all_see(j0) || !tile_is_live<kTile>(doc, j0)) mask_tile<kTile>(s.scores, see, doc, j0);
  gemm<C, Start::zero>(kTile, kTile, shape.v.depth, s.v + key_tile * shape.v_rows, shape.v.row,
                       s.do_t + query_tile * shape.do_lanes_t, kTile, s.dp, kTile);
  const bool drops = rule.dropout_p > 0, caps = rule.softcap > 0;
  if (drops)
    dropout_factors<kTile>(s.factor, rule, static_cast<uint32_t>(document * fwd.n_heads + head), first, j0);
  const auto step = caps ? (drops ? weights_step<C, true, true> : weights_step<C, true, false>)
                         : (drops ? weights_step<C, false, true> : weights_step<C, false, false>);
  step(rule, s, first);

  if (call.dv.data) {
    gemm<C, Start::add_to>(kTile, shape.v.lanes, kDepth, s.p, kTile, s.dout + query_tile * shape.do_lanes,
                           shape.v.lanes, dv, shape.v.lanes);
    gemm<C, Start::add_to>(kTile, shape.qk.lanes, kDepth, s.ds, kTile, s.q + query_tile * shape.q_lanes,
                           shape.qk.lanes, dk, shape.qk.lanes);
  }
  if (call.dq.data)
    gemm<C, Start::add_to>(shape.qk.out_rows, kTile, kDepth, s.kt + key_tile * shape.kt, kTile, s.ds_lanes,
                           kTile, s.dq + query_tile * shape.dq, kTile);
}

// tile[kTile][lanes] * factor -> the first n rows of dk or dv
template <class T>
void store_rows(const View& t, int64_t batch, int64_t row, int head, const float* tile, int64_t lanes, int n,
                int d, float factor) {
  const vf scale = set1(factor);
  for (int i = 0; i < n; ++i) {
    T* to = static_cast<T*>(t.data) + batch * t.batch + (row + i) * t.row + head * t.head;
    const float* from = tile + i * lanes;
    for (int c = 0; c < d; c += W) {
      const vf x = mul(load(from + c), scale);
      if (d - c >= W)
        store(to + c, x);
      else
        store_n(to + c, x, d - c);
    }
  }
}

// sum = tile, or sum += tile; `stride` is sum's, tile's rows are `lanes` apart
inline void add_tile(float* sum, int64_t stride, const float* tile, int lanes, bool is_first) {
  for (int i = 0; i < kTile; ++i)
    for (int c = 0; c < lanes; c += W) {
      const vf x = load(tile + int64_t{i} * lanes + c);
      store(sum + i * stride + c, is_first ? x : add(load(sum + i * stride + c), x));
    }
}

template <class T, class C>
void store_key_tile(const BackwardCall& call, const BackwardShape<C>& shape, const Document& doc, int kv_head,
                    int64_t key_tile, const float* dk, const float* dv, int64_t dk_stride,
                    int64_t dv_stride) {
  const int64_t row = doc.k_begin + key_tile * kTile;
  const int n = static_cast<int>(least(kTile, doc.n_k - key_tile * kTile));
  store_rows<T>(call.dk, doc.batch, row, kv_head, dk, dk_stride, n, call.forward.head_dim,
                call.forward.rule.scale);
  store_rows<T>(call.dv, doc.batch, row, kv_head, dv, dv_stride, n, call.forward.value_dim, 1.0f);
}

// One query head against the packed keys. dK and dV go to `sums` (set or added to) if there is one, else out.
template <class T, class C>
void backward_head(const BackwardCall& call, const BackwardShape<C>& shape, int64_t document, int head,
                   float* sums, bool is_first, BackwardScratch<C>& s) {
  const AttentionCall& fwd = call.forward;
  const Document& doc = fwd.documents[document];
  pack_queries<T>(call, shape, doc, head, s);
  const int64_t n_tiles = tiles_of(doc.n_k);
  for (int64_t first = 0; first < n_tiles; first += kKeysInTurn) {
    const int64_t end = least(first + kKeysInTurn, n_tiles);
    memset(s.dk_tiles, 0, sizeof(float) * static_cast<size_t>(kKeysInTurn * shape.dk));
    memset(s.dv_tiles, 0, sizeof(float) * static_cast<size_t>(kKeysInTurn * shape.dv));
    for (int64_t qt = 0; qt < tiles_of(doc.n_q); ++qt)
      for (int64_t kt = first; kt < end; ++kt)
        if (s.see[qt].touches(kt * kTile))
          backward_pair(call, shape, document, head, kt, qt, s.dk_tiles + (kt - first) * shape.dk,
                        s.dv_tiles + (kt - first) * shape.dv, s);
    for (int64_t kt = first; kt < end && call.dv.data; ++kt) {
      const float *dk = s.dk_tiles + (kt - first) * shape.dk, *dv = s.dv_tiles + (kt - first) * shape.dv;
      if (sums) {
        float* sum = sums + kt * kTile * shape.grad_row();
        add_tile(sum, shape.grad_row(), dk, shape.qk.lanes, is_first);
        add_tile(sum + shape.qk.lanes, shape.grad_row(), dv, shape.v.lanes, is_first);
      } else {
        store_key_tile<T>(call, shape, doc, head, kt, dk, dv, shape.qk.lanes, shape.v.lanes);
      }
    }
  }
  if (!call.dq.data) return;
  float to_dq[kTile];
  for (float& x : to_dq) x = fwd.rule.scale;
  for (int64_t qt = 0; qt < tiles_of(doc.n_q); ++qt)
    store_transposed<kTile, T>(call.dq, doc.batch, doc.q_begin + qt * kTile, head, s.dq + qt * shape.dq,
                               to_dq, static_cast<int>(least(kTile, doc.n_q - qt * kTile)), fwd.head_dim);
}

template <class T>
bool backward(const BackwardCall& call) {
  using C = typename ComputeType<T>::type;
  const AttentionCall& fwd = call.forward;
  const BackwardShape<C> shape(fwd);
  const int group = fwd.n_heads / fwd.n_kv_heads;
  const int64_t n_units = fwd.n_documents * fwd.n_kv_heads;
  double flops = 0;
  for (int64_t i = 0; i < fwd.n_documents; ++i)
    flops += 10.0 * fwd.head_dim * fwd.n_heads * static_cast<double>(fwd.documents[i].n_q) *
             static_cast<double>(fwd.documents[i].n_k);
  const int threads = flops < kSerialFlops ? 1 : fwd.threads;

  const bool drops = fwd.rule.dropout_p > 0, sums_heads = group > 1,
             shares_units = sums_heads && n_units < threads;
  BackwardScratch<C> measure;
  const int64_t scratch_bytes = measure.lay_out(nullptr, shape, drops, sums_heads);
  const int64_t tile_floats = kTile * shape.grad_row();
  const int64_t sum_bytes = shares_units ? shape.key_tiles * tile_floats * int64_t{sizeof(float)} : 0;
  char* workspace = take_workspace(threads * scratch_bytes + sum_bytes);
  if (!workspace) return false;
  float* shared_sums = reinterpret_cast<float*>(workspace + threads * scratch_bytes);

  const auto store_sums = [&](int64_t unit, int64_t kt, const float* sums) {
    const float* dk = sums + kt * tile_floats;
    store_key_tile<T>(call, shape, fwd.documents[unit / fwd.n_kv_heads],
                      static_cast<int>(unit % fwd.n_kv_heads), kt, dk, dk + shape.qk.lanes, shape.grad_row(),
                      shape.grad_row());
  };
  // one thread, all query heads of the unit
  const auto walk_unit = [&](int64_t unit, BackwardScratch<C>& s) {
    const int64_t document = unit / fwd.n_kv_heads;
    const int kv_head = static_cast<int>(unit % fwd.n_kv_heads);
    pack_keys<T>(fwd, shape, fwd.documents[document], kv_head, s);
    for (int i = 0; i < group; ++i)
      backward_head<T>(call, shape, document, kv_head * group + i, sums_heads ? s.sums : nullptr, i == 0, s);
    if (sums_heads && call.dv.data)
      for (int64_t kt = 0; kt < tiles_of(fwd.documents[document].n_k); ++kt) store_sums(unit, kt, s.sums);
  };
  // all threads, a query head each at a time; then every thread adds up its own key tiles
  const auto share_unit = [&](int64_t unit, const Team& team, BackwardScratch<C>& s) {
    const int64_t document = unit / fwd.n_kv_heads, n_tiles = tiles_of(fwd.documents[document].n_k);
    const int kv_head = static_cast<int>(unit % fwd.n_kv_heads);
    pack_keys<T>(fwd, shape, fwd.documents[document], kv_head, s);
    for (int begin = 0; begin < group; begin += team.size) {
      const int mine = begin + team.id;
      if (mine < group) backward_head<T>(call, shape, document, kv_head * group + mine, s.sums, true, s);
      team.barrier();
      const int n = group - begin < team.size ? group - begin : team.size;
      for (int64_t kt = team.id; kt < n_tiles && call.dv.data; kt += team.size)
        for (int other = 0; other < n; ++other) {
          BackwardScratch<C> theirs;
          theirs.lay_out(workspace + other * scratch_bytes, shape, drops, sums_heads);
          add_tile(shared_sums + kt * tile_floats, shape.grad_row(), theirs.sums + kt * tile_floats,
                   static_cast<int>(shape.grad_row()), begin + other == 0);
        }
      team.barrier();
    }
    for (int64_t kt = team.id; kt < n_tiles && call.dv.data; kt += team.size)
      store_sums(unit, kt, shared_sums);
    team.barrier();
  };

  int64_t units_taken = 0;
  run_team(threads, [&](const Team& team) {
    const MatrixUnit unit_is_ready;
    BackwardScratch<C> s;
    s.lay_out(workspace + team.id * scratch_bytes, shape, drops, sums_heads);
    if (shares_units)
      for (int64_t unit = 0; unit < n_units; ++unit) share_unit(unit, team, s);
    else
      for (int64_t unit; (unit = take_next(&units_taken)) < n_units;) walk_unit(unit, s);
  });
  give_workspace(workspace);
  return true;
}

}  // namespace

namespace TW_ISA {

bool attention_backward(const BackwardCall& call) {
  return by_dtype(call.forward.dtype, [&](auto x) { return backward<decltype(x)>(call); });
}

}  // namespace TW_ISA
}  // namespace tw
