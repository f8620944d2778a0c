// Forward: out = softmax(scores) v, one tile of queries at a time, over the key tiles they see.
//
// A tile of scores is held transposed, S[key][query], so that queries are lanes: the running maximum, the sum
// and the rescaling are plain vertical vector operations, and both products take their left side as it lies
// in memory:
//   S[key][query]   = K[key][:]   . Q[:][query]        K rows as they are, Q packed once a tile
//   O[d][query]    += Vt[d][key]  . P[key][query]      V transposed once a key/value head
//
// Work is cut into units (document, key/value head, stretch of queries). A stretch is the whole document
// unless segments or a window bound what a query sees: then a unit packs only the keys that its queries can
// see. A wave packs K and V of several units, as many as fit in kWaveBytes, then deals out their (head, query
// tile) items, longest first. Every item writes its own rows: who computes it does not show in the result.
#include "attention/attention.h"
#include "attention/pack.h"
#include "attention/scores.h"
#include "common/parallel.h"
#include "common/workspace.h"

namespace tw {
namespace {

// Queries and keys of a tile. With a matrix unit, products are so quick that reading counts: what a tile
// needs at once (K, V, scores, weights, output: 40 KB for D 128) has to stay in the first cache.
constexpr int kTile = kHasMatrixUnit ? 32 : 64;
constexpr int kMostInTurn = 256 / kTile;      // query tiles that meet a block of keys in turn, while it is in
constexpr int64_t kBlockTiles = 512 / kTile;  // the second cache: so many key tiles
constexpr int64_t kWaveBytes = int64_t{8} << 20;
constexpr int64_t kLeastStretch = 1024 / kTile;  // query tiles: shorter ones pack shared keys too often
constexpr float kLeastGrowth = 8;                // of a score, in powers of two, for a new pivot
constexpr double kSerialFlops = 1e6;             // about 20 microseconds of one core

template <class C>
struct ForwardShape {
  Width<C> qk, v;
  int64_t k_tile, v_tile;  // elements of a packed tile

  explicit ForwardShape(const AttentionCall& call)
      : qk(call.head_dim),
        v(call.value_dim),
        k_tile(int64_t{kTile} * qk.row),
        v_tile(int64_t{kTile} * v.lanes) {}
  int64_t packed_bytes(int64_t key_tiles) const {
    return round_up(key_tiles * (k_tile + v_tile) * static_cast<int64_t>(sizeof(C)), kCacheLine);
  }
};

// A tile of queries of one head on its way over the keys.
template <class C>
struct QueryTile {
  C* q;
  float *o, *pivot, *sum;  // o, sum: of exp(score - pivot)
  int64_t first;           // query
  bool is_new;             // has met no key yet: o holds nothing
  TileIntervals<kTile> see;
};

template <class C>
struct ForwardScratch {  // of one thread
  C *stage, *pairs, *p;
  float *scores, *factor, *rescale;
  QueryTile<C>* tiles;

  // With base nullptr, only measures: returns the bytes needed.
  int64_t lay_out(char* base, const ForwardShape<C>& shape, bool drops) {
    Arena arena{base};
    const int64_t widest = most(shape.qk.row, shape.v.lanes) * kTile;
    stage = arena.take<C>(widest);
    pairs = arena.take<C>(widest);
    p = arena.take<C>(kTile * kTile);
    scores = arena.take<float>(kTile * kTile);
    rescale = arena.take<float>(kTile);
    factor = drops ? arena.take<float>(kTile * kTile) : nullptr;
    tiles = arena.take<QueryTile<C>>(kMostInTurn);
    for (int i = 0; i < kMostInTurn; ++i) {
      QueryTile<C> tile{};
      tile.q = arena.take<C>(int64_t{shape.qk.row} * kTile);
      tile.o = arena.take<float>(int64_t{shape.v.lanes} * kTile);
      tile.pivot = arena.take<float>(kTile);
      tile.sum = arena.take<float>(kTile);
      if (base) tiles[i] = tile;
    }
    return round_up(arena.at - base, 4096);
  }
};

inline int64_t tiles_of(int64_t n) { return (n + kTile - 1) / kTile; }

// Query tiles of a stretch: about as many as the keys that one query sees.
inline int64_t stretch_tiles(const Rule& rule) {
  int64_t span = INT64_MAX;
  if (rule.group_size > 0 && !rule.wraparound) span = rule.group_size;
  if (rule.window_left >= 0 && (rule.is_causal || rule.window_right >= 0))
    span = least(span, rule.window_left + 1 + (rule.window_right > 0 ? rule.window_right : 0));
  return span == INT64_MAX ? span : most(kLeastStretch, span / kTile);
}

// The queries of one unit, and the keys that any of its heads sees from them; all in tiles.
struct Stretch {
  int64_t document;
  int kv_head;
  int64_t first_query, n_queries;
  int64_t first_key, n_keys;
};

// A walk over the units, in order: documents, their key/value heads, the stretches of each.
class Units {
 public:
  explicit Units(const AttentionCall& call) : call_(&call), stretch_(stretch_tiles(call.rule)) {
    skip_empty();
  }

  bool at_end() const { return document_ == call_->n_documents; }
  void next() {
    const Document& doc = call_->documents[document_];
    if (stretch_ >= tiles_of(doc.n_q) - first_query_) {
      first_query_ = 0;
      ++kv_head_;
    } else {
      first_query_ += stretch_;
    }
    if (kv_head_ == call_->n_kv_heads) {
      kv_head_ = 0;
      ++document_;
      skip_empty();
    }
  }
  Stretch here() const {
    const Document& doc = call_->documents[document_];
    Stretch unit{document_, kv_head_, first_query_, least(stretch_, tiles_of(doc.n_q) - first_query_), 0, 0};
    int64_t begin = 0, end = doc.n_k;
    if (!call_->rule.wraparound) {  // both ends of the interval that a query sees grow with the query
      const int group = call_->n_heads / call_->n_kv_heads;
      const int64_t last = least(doc.n_q, (unit.first_query + unit.n_queries) * kTile) - 1;
      begin = doc.n_k;
      end = 0;
      for (int head = kv_head_ * group; head < (kv_head_ + 1) * group; ++head) {
        begin = least(begin, visible_keys(doc, call_->rule, head, unit.first_query * kTile).lo);
        end = most(end, visible_keys(doc, call_->rule, head, last).hi);
      }
      end = least(end, doc.n_k);
    }
    if (begin >= end) return unit;
    unit.first_key = begin / kTile;
    unit.n_keys = tiles_of(end) - unit.first_key;
    return unit;
  }

 private:
  void skip_empty() {
    while (!at_end() && call_->documents[document_].n_q == 0) ++document_;
  }

  const AttentionCall* call_;
  int64_t stretch_, document_ = 0, first_query_ = 0;
  int kv_head_ = 0;
};

// Packed keys and values of one unit: tile t of K is rows [kTile][qk.row], tile t of Vt is [v.lanes][kTile],
// t counted from the document's first key, though only the unit's own tiles are there.
template <class C>
struct PackedUnit {
  C* k;
  C* vt;
  int64_t first_key;

  PackedUnit(char* at, const ForwardShape<C>& shape, const Stretch& unit)
      : k(reinterpret_cast<C*>(at)), vt(k + unit.n_keys * shape.k_tile), first_key(unit.first_key) {}
  C* k_tile(const ForwardShape<C>& shape, int64_t tile) const {
    return k + (tile - first_key) * shape.k_tile;
  }
  C* v_tile(const ForwardShape<C>& shape, int64_t tile) const {
    return vt + (tile - first_key) * shape.v_tile;
  }
};

template <class T, class C>
void pack_key_tile(const AttentionCall& call, const ForwardShape<C>& shape, const Document& doc, int kv_head,
                   int64_t tile, const PackedUnit<C>& unit, ForwardScratch<C>& scratch) {
  const int64_t j0 = tile * kTile;
  stage_key_rows<kTile, C, T>(unit.k_tile(shape, tile), shape.qk.row, call.k, doc, j0, kv_head,
                              call.head_dim);
  stage_key_rows<kTile, C, T>(scratch.stage, shape.v.lanes, call.v, doc, j0, kv_head, call.value_dim);
  transpose_tile<kTile>(unit.v_tile(shape, tile), scratch.stage, scratch.pairs, shape.v.lanes);
}

// One step of the online softmax over a tile of masked scores: P, exp(score - pivot), and its sums. The pivot
// is a score near the running maximum: it moves, and the sums so far shrink by s.rescale, only where a weight
// would exceed 2^kLeastGrowth. A lane that has seen no key yet keeps pivot -inf and sum 0. Returns whether
// any pivot moved.
template <class C, bool DROPS>
bool softmax_step(const QueryTile<C>& tile, const ForwardScratch<C>& s, float unit) {
  constexpr int kTerms = Unit<C>::kExpTerms;
  const vf none = set1(-__builtin_inff()), to_log2 = set1(unit * kLog2E);
  const vf least_growth = set1(kLeastGrowth / (unit * kLog2E));
  bool moved = false;
  for (int n = 0; n < kTile; n += W) {
    vf top[4] = {none, none, none, none};
    for (int r = 0; r < kTile; r += 4)
      for (int i = 0; i < 4; ++i) top[i] = max(load(s.scores + (r + i) * kTile + n), top[i]);
    const vf top_score = max(max(top[0], top[1]), max(top[2], top[3])), old_pivot = load(tile.pivot + n);
    const vm grows = lt(add(old_pivot, least_growth), top_score);
    vf pivot = old_pivot, sum_a = load(tile.sum + n), sum_b = zero();
    vf shrink = set1(1.0f);
    if (any(grows)) {
      moved = true;
      pivot = select(grows, top_score, old_pivot);
      shrink = select(grows, weight_of<kTerms>(sub(old_pivot, pivot), to_log2), shrink);
      sum_a = mul(sum_a, shrink);
      store(tile.pivot + n, pivot);
    }
    store(s.rescale + n, shrink);
    const vf finite_pivot = select(le(pivot, none), zero(), pivot);
    for (int r = 0; r < kTile; r += 2) {
      vf a = weight_of<kTerms>(sub(load(s.scores + r * kTile + n), finite_pivot), to_log2);
      vf b = weight_of<kTerms>(sub(load(s.scores + (r + 1) * kTile + n), finite_pivot), to_log2);
      sum_a = add(sum_a, a);
      sum_b = add(sum_b, b);
      if constexpr (DROPS) {
        a = mul(a, load(s.factor + r * kTile + n));
        b = mul(b, load(s.factor + (r + 1) * kTile + n));
      }
      if constexpr (Unit<C>::kDepth == 2) {
        store_pairs(s.p + r * kTile + 2 * n, a, b);
      } else {
        store(s.p + r * kTile + n, a);
        store(s.p + (r + 1) * kTile + n, b);
      }
    }
    store(tile.sum + n, add(sum_a, sum_b));
  }
  return moved;
}

template <class T, class C>
void begin_tile(const AttentionCall& call, const ForwardShape<C>& shape, const Document& doc, int head,
                int64_t first, QueryTile<C>& tile, const ForwardScratch<C>& s) {
  stage_rows<kTile, C, T>(s.stage, shape.qk.row, call.q, doc.batch, doc.q_begin, first, doc.n_q, head,
                          call.head_dim);
  pack_lanes_transposed(tile.q, s.stage, shape.qk.words, kTile, shape.qk.words);
  for (int i = 0; i < kTile; ++i) {
    tile.pivot[i] = -__builtin_inff();
    tile.sum[i] = 0.0f;
  }
  tile.first = first;
  tile.is_new = true;
  tile.see.fill(doc, call.rule, head, first);
}

// The tile meets the keys [begin, end), whole key tiles, as far as it sees them.
template <class C>
void meet_keys(const AttentionCall& call, const ForwardShape<C>& shape, int64_t document, int head,
               int64_t begin, int64_t end, const PackedUnit<C>& unit, QueryTile<C>& tile,
               const ForwardScratch<C>& s) {
  const Document& doc = call.documents[document];
  const float unit_of_scores = score_unit(call.rule);
  for (int64_t j0 = begin; j0 < end; j0 += kTile) {
    if (!tile.see.touches(j0)) continue;
    gemm<C, Start::zero>(kTile, kTile, shape.qk.depth, unit.k_tile(shape, j0 / kTile), shape.qk.row, tile.q,
                         kTile, s.scores, kTile);
    settle_scores<kTile>(s.scores, call.rule);
    if (!tile.see.all_see(j0) || !tile_is_live<kTile>(doc, j0)) mask_tile(s.scores, tile.see, doc, j0);
    bool moved;
    if (call.rule.dropout_p > 0) {
      dropout_factors<kTile>(s.factor, call.rule, static_cast<uint32_t>(document * call.n_heads + head),
                             tile.first, j0);
      moved = softmax_step<C, true>(tile, s, unit_of_scores);
    } else {
      moved = softmax_step<C, false>(tile, s, unit_of_scores);
    }
    const C* vt = unit.v_tile(shape, j0 / kTile);
    constexpr int kDepth = kTile / Unit<C>::kDepth;
    if (tile.is_new)
      gemm<C, Start::zero>(shape.v.out_rows, kTile, kDepth, vt, kTile, s.p, kTile, tile.o, kTile);
    else if (moved)
      gemm<C, Start::rescale>(shape.v.out_rows, kTile, kDepth, vt, kTile, s.p, kTile, tile.o, kTile,
                              s.rescale);
    else
      gemm<C, Start::add_to>(shape.v.out_rows, kTile, kDepth, vt, kTile, s.p, kTile, tile.o, kTile);
    tile.is_new = false;
  }
}

// Output and lse; the sink joins the denominator here.
template <class T, class C>
void finish_tile(const AttentionCall& call, const ForwardShape<C>& shape, const Document& doc, int head,
                 const QueryTile<C>& tile, const ForwardScratch<C>& s) {
  const int n = static_cast<int>(least(kTile, doc.n_q - tile.first));
  float* lse = call.lse + (doc.batch * call.n_heads + head) * call.n_rows + doc.q_begin + tile.first;
  const double unit = score_unit(call.rule);
  for (int i = 0; i < kTile; ++i) {
    double top = unit * tile.pivot[i];
    float sum = tile.sum[i], keep = 1.0f;
    if (call.sinks) {
      const double sink = call.sinks[head], new_top = sink > top ? sink : top;
      keep = top == -__builtin_inf() ? 0.0f : __builtin_expf(static_cast<float>(top - new_top));
      sum =
          sum * keep + (sink == -__builtin_inf() ? 0.0f : __builtin_expf(static_cast<float>(sink - new_top)));
      top = new_top;
    }
    const bool sees_nothing = sum == 0.0f;  // but not where it is NaN
    s.rescale[i] = sees_nothing ? 0.0f : keep / sum;
    if (i < n) lse[i] = sees_nothing ? -__builtin_inff() : log_sum_exp(top, sum);
  }
  if (tile.is_new) memset(tile.o, 0, sizeof(float) * static_cast<size_t>(shape.v.lanes) * kTile);
  store_transposed<kTile, T>(call.out, doc.batch, doc.q_begin + tile.first, head, tile.o, s.rescale, n,
                             call.value_dim);
}

// n query tiles from tile number `first` on, block of keys by block: each in the order of a tile alone.
template <class T, class C>
void forward_tiles(const AttentionCall& call, const ForwardShape<C>& shape, int64_t document, int head,
                   int64_t first, int n, const PackedUnit<C>& unit, const ForwardScratch<C>& s) {
  const Document& doc = call.documents[document];
  int64_t begin = INT64_MAX, end = 0;
  for (int i = 0; i < n; ++i) {
    begin_tile<T>(call, shape, doc, head, (first + i) * kTile, s.tiles[i], s);
    if (s.tiles[i].see.end() == 0) continue;
    begin = least(begin, s.tiles[i].see.first_tile());
    end = most(end, s.tiles[i].see.end());
  }
  for (int64_t j0 = begin; j0 < end; j0 += kBlockTiles * kTile)
    for (int i = 0; i < n; ++i)
      meet_keys(call, shape, document, head, j0, least(j0 + kBlockTiles * kTile, end), unit, s.tiles[i], s);
  for (int i = 0; i < n; ++i) finish_tile<T>(call, shape, doc, head, s.tiles[i], s);
}

// The units of one wave: those from `first` on whose packed data fit in kWaveBytes, at least one for each
// thread.
template <class C>
struct Wave {
  Units first;
  int64_t n_units = 0, bytes = 0, n_packs = 0, n_items = 0;

  Wave(const Units& begin, const ForwardShape<C>& shape, int group, int in_turn, int threads) : first(begin) {
    for (Units at = begin; !at.at_end(); at.next(), ++n_units) {
      const Stretch unit = at.here();
      const int64_t more = shape.packed_bytes(unit.n_keys);
      if (n_units >= threads && bytes + more > kWaveBytes) break;
      bytes += more;
      n_packs += unit.n_keys;
      n_items += group * ((unit.n_queries + in_turn - 1) / in_turn);
    }
  }
  Units end() const {
    Units at = first;
    for (int64_t i = 0; i < n_units; ++i) at.next();
    return at;
  }
};

// Which unit of a wave holds item number so-and-so, for items in ascending order.
template <class C, class CountOf>
struct Cursor {
  const ForwardShape<C>& shape;
  CountOf count_of;
  Units at;
  Stretch unit;
  int64_t begin = 0, offset = 0;  // the first item of `unit`; where its packed data starts

  Cursor(const Wave<C>& wave, const ForwardShape<C>& s, CountOf count)
      : shape(s), count_of(count), at(wave.first), unit(at.here()) {}
  void advance_to(int64_t item) {
    for (int64_t n; item >= begin + (n = count_of(unit)); unit = at.here()) {
      begin += n;
      offset += shape.packed_bytes(unit.n_keys);
      at.next();
    }
  }
};

template <class T>
bool forward(const AttentionCall& call) {
  using C = typename ComputeType<T>::type;
  const ForwardShape<C> shape(call);
  const int group = call.n_heads / call.n_kv_heads;
  double flops = 0;
  int64_t query_tiles = 0;
  for (int64_t i = 0; i < call.n_documents; ++i) {
    query_tiles += call.n_heads * tiles_of(call.documents[i].n_q);
    flops += 2.0 * (call.head_dim + call.value_dim) * call.n_heads *
             static_cast<double>(call.documents[i].n_q) * static_cast<double>(call.documents[i].n_k);
  }
  const int threads = flops < kSerialFlops ? 1 : call.threads;

  const auto key_tiles = [](const Stretch& unit) { return unit.n_keys; };
  // query tiles of an item: fewer if there would not be enough items to keep all threads busy to the end
  const int in_turn = static_cast<int>(most(1, least(kMostInTurn, query_tiles / (16 * threads))));
  const auto query_items = [=](const Stretch& unit) {
    return group * ((unit.n_queries + in_turn - 1) / in_turn);
  };
  int64_t pack_bytes = 0;
  for (Units at(call); !at.at_end();) {
    const Wave<C> wave(at, shape, group, in_turn, threads);
    pack_bytes = most(pack_bytes, wave.bytes);
    at = wave.end();
  }
  const bool drops = call.rule.dropout_p > 0;
  ForwardScratch<C> measure;
  const int64_t scratch_bytes = measure.lay_out(nullptr, shape, drops);
  char* workspace = take_workspace(pack_bytes + threads * scratch_bytes);
  if (!workspace) return false;

  int64_t packs_taken = 0, items_taken = 0;
  run_team(threads, [&](const Team& team) {
    const MatrixUnit unit_is_ready;
    ForwardScratch<C> scratch;
    scratch.lay_out(workspace + pack_bytes + team.id * scratch_bytes, shape, drops);
    for (Units next(call); !next.at_end();) {
      const Wave<C> wave(next, shape, group, in_turn, threads);
      Cursor<C, decltype(key_tiles)> pack_at(wave, shape, key_tiles);
      for (int64_t item; (item = take_next(&packs_taken)) < wave.n_packs;) {
        pack_at.advance_to(item);
        const Stretch& unit = pack_at.unit;
        pack_key_tile<T>(call, shape, call.documents[unit.document], unit.kv_head,
                         unit.first_key + item - pack_at.begin,
                         PackedUnit<C>(workspace + pack_at.offset, shape, unit), scratch);
      }
      team.barrier();
      if (team.id == 0) packs_taken = 0;
      Cursor<C, decltype(query_items)> at(wave, shape, query_items);
      for (int64_t item; (item = take_next(&items_taken)) < wave.n_items;) {
        at.advance_to(item);
        const Stretch& unit = at.unit;
        const int64_t within = item - at.begin;
        const int head = unit.kv_head * group + static_cast<int>(within % group);
        // the last tiles see the most keys
        const int64_t end = unit.n_queries - within / group * in_turn, begin = most(0, end - in_turn);
        forward_tiles<T>(call, shape, unit.document, head, unit.first_query + begin,
                         static_cast<int>(end - begin), PackedUnit<C>(workspace + at.offset, shape, unit),
                         scratch);
      }
      team.barrier();
      if (team.id == 0) items_taken = 0;
      team.barrier();
      next = wave.end();
    }
  });
  give_workspace(workspace);
  return true;
}

}  // namespace

namespace TW_ISA {

bool attention_forward(const AttentionCall& call) {
  return by_dtype(call.dtype, [&](auto x) { return forward<decltype(x)>(call); });
}

}  // namespace TW_ISA
}  // namespace tw
