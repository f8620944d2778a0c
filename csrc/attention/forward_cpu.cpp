// Forward: out = softmax(scores) v, one tile of 64 queries at a time, over the key tiles they see.
//
// A tile of scores is held transposed, S[key][query], so that queries are lanes: the running maximum, the sum
// and the rescaling are plain vertical vector operations, and both products take their left side as it lies
// in memory:
//   S[key][query]   = K[key][:]   . Q[:][query]        K rows as they are, Q packed once a tile
//   O[d][query]    += Vt[d][key]  . P[key][query]      V transposed once a key/value head
//
// Work is cut into units (document, key/value head). A wave packs K and V of several units, as many as fit in
// kWaveBytes, then deals out their (head, query tile) items, longest first. Every item writes its own rows,
// so the result does not depend on who computes it.
#include "attention/attention.h"
#include "attention/pack.h"
#include "attention/scores.h"
#include "common/parallel.h"
#include "common/workspace.h"

namespace tw {
namespace {

constexpr int64_t kWaveBytes = int64_t{8} << 20;
constexpr double kSerialFlops = 1e6;  // about 20 microseconds of one core

template <class C>
struct ForwardShape {
  Width<C> qk, v;
  int64_t k_tile, v_tile;  // elements of a packed tile

  explicit ForwardShape(const AttentionCall& call)
      : qk(call.head_dim),
        v(call.value_dim),
        k_tile(int64_t{kTile} * qk.row),
        v_tile(int64_t{kTile} * v.lanes) {}
  int64_t unit_bytes(const Document& doc) const {
    const int64_t tiles = (doc.n_k + kTile - 1) / kTile;
    return round_up(tiles * (k_tile + v_tile) * static_cast<int64_t>(sizeof(C)), 64);
  }
};

template <class C>
struct ForwardScratch {  // of one thread
  C *q, *stage, *pairs, *p;
  float *scores, *o, *factor, *max, *sum, *rescale;

  ForwardScratch(Arena arena, const ForwardShape<C>& shape, bool drops) {
    const int64_t widest = most(shape.qk.row, shape.v.lanes) * kTile;
    q = arena.take<C>(int64_t{shape.qk.row} * kTile);
    stage = arena.take<C>(widest);
    pairs = arena.take<C>(widest);
    p = arena.take<C>(kTile * kTile);
    scores = arena.take<float>(kTile * kTile);
    o = arena.take<float>(int64_t{shape.v.lanes} * kTile);
    max = arena.take<float>(kTile);
    sum = arena.take<float>(kTile);
    rescale = arena.take<float>(kTile);
    factor = drops ? arena.take<float>(kTile * kTile) : nullptr;
  }
  static int64_t bytes(const ForwardShape<C>& shape) {
    const int64_t widest = most(shape.qk.row, shape.v.lanes) * kTile;
    return (3 * widest + kTile * kTile) * static_cast<int64_t>(sizeof(C)) +
           (2 * kTile * kTile + int64_t{shape.v.lanes} * kTile + 3 * kTile) *
               static_cast<int64_t>(sizeof(float)) +
           16 * 64;
  }
};

// Packed keys and values of one unit: tile t of K is rows [kTile][qk.row], tile t of Vt is [v.lanes][kTile].
template <class C>
struct PackedUnit {
  C* k;
  C* vt;
};

template <class T, class C>
void pack_key_tile(const AttentionCall& call, const ForwardShape<C>& shape, const Document& doc, int kv_head,
                   int64_t tile, const PackedUnit<C>& unit, ForwardScratch<C>& scratch) {
  const int64_t j0 = tile * kTile;
  stage_key_rows<C, T>(unit.k + tile * shape.k_tile, shape.qk.row, call.k, doc, j0, kv_head, call.head_dim);
  stage_key_rows<C, T>(scratch.stage, shape.v.lanes, call.v, doc, j0, kv_head, call.value_dim);
  transpose_tile(unit.vt + tile * shape.v_tile, scratch.stage, scratch.pairs, shape.v.lanes);
}

// One step of the online softmax over a tile of masked scores: new running maximum and sum, the factor by
// which the accumulated output shrinks, and P. A lane that has seen no key yet keeps maximum -inf and sum 0.
template <class C, bool DROPS>
void softmax_step(ForwardScratch<C>& s) {
  constexpr int kTerms = Unit<C>::kExpTerms;
  const vf none = set1(-__builtin_inff());
  for (int n = 0; n < kTile; n += W) {
    const vf old_max = load(s.max + n);
    vf max_a = old_max, max_b = none;
    for (int r = 0; r < kTile; r += 2) {
      max_a = max(load(s.scores + r * kTile + n), max_a);
      max_b = max(load(s.scores + (r + 1) * kTile + n), max_b);
    }
    const vf new_max = max(max_a, max_b);
    const vf pivot = select(le(new_max, none), zero(), new_max);
    const vf shrink = weight_of<kTerms>(old_max, pivot);
    vf sum_a = mul(load(s.sum + n), shrink), sum_b = zero();
    for (int r = 0; r < kTile; r += 2) {
      vf a = weight_of<kTerms>(load(s.scores + r * kTile + n), pivot);
      vf b = weight_of<kTerms>(load(s.scores + (r + 1) * kTile + n), pivot);
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
    store(s.max + n, new_max);
    store(s.sum + n, add(sum_a, sum_b));
    store(s.rescale + n, shrink);
  }
}

// lse and the output's last factor, from the running maximum and sum; the sink joins the denominator here.
template <class C>
void finish_rows(const AttentionCall& call, ForwardScratch<C>& s, int head, int n, float* lse) {
  for (int i = 0; i < kTile; ++i) {
    float top = s.max[i], sum = s.sum[i], keep = 1.0f;
    if (call.sinks) {
      const float sink = call.sinks[head], new_top = sink > top ? sink : top;
      keep = top == -__builtin_inff() ? 0.0f : __builtin_expf(top - new_top);
      sum = sum * keep + (sink == -__builtin_inff() ? 0.0f : __builtin_expf(sink - new_top));
      top = new_top;
    }
    const bool sees_nothing = sum == 0.0f;  // but not where it is NaN
    s.rescale[i] = sees_nothing ? 0.0f : keep / sum;
    if (i < n) lse[i] = sees_nothing ? -__builtin_inff() : log_sum_exp(top, sum);
  }
}

template <class T, class C>
void forward_tile(const AttentionCall& call, const ForwardShape<C>& shape, int64_t document, int head,
                  int64_t first, const PackedUnit<C>& unit, ForwardScratch<C>& s) {
  const Document& doc = call.documents[document];
  const int n = static_cast<int>(least(kTile, doc.n_q - first));
  stage_rows<C, T>(s.stage, shape.qk.row, call.q, doc.batch, doc.q_begin, first, doc.n_q, head,
                   call.head_dim);
  pack_lanes_transposed(s.q, s.stage, shape.qk.words, kTile, shape.qk.words);
  for (int i = 0; i < kTile; ++i) {
    s.max[i] = -__builtin_inff();
    s.sum[i] = 0.0f;
  }
  TileIntervals see;
  see.fill(doc, call.rule, head, first);

  bool is_first = true;
  const int64_t end = see.end();
  for (int64_t j0 = end > 0 ? see.first_tile() : 0; j0 < end; j0 += kTile) {
    if (!see.touches(j0)) continue;
    const int64_t tile = j0 / kTile;
    gemm<C, Start::zero>(kTile, kTile, shape.qk.depth, unit.k + tile * shape.k_tile, shape.qk.row, s.q, kTile,
                         s.scores, kTile, nullptr, score_scale(call.rule));
    if (call.rule.softcap > 0) apply_softcap(s.scores, kTile * kTile, call.rule.softcap);
    if (!see.all_see(j0) || !tile_is_live(doc, j0)) mask_tile(s.scores, see, doc, j0);
    if (call.rule.dropout_p > 0) {
      dropout_factors(s.factor, call.rule, static_cast<uint32_t>(document * call.n_heads + head), first, j0);
      softmax_step<C, true>(s);
    } else {
      softmax_step<C, false>(s);
    }
    const C* vt = unit.vt + tile * shape.v_tile;
    constexpr int kDepth = kTile / Unit<C>::kDepth;
    if (is_first)
      gemm<C, Start::zero>(shape.v.out_rows, kTile, kDepth, vt, kTile, s.p, kTile, s.o, kTile);
    else
      gemm<C, Start::rescale>(shape.v.out_rows, kTile, kDepth, vt, kTile, s.p, kTile, s.o, kTile, s.rescale);
    is_first = false;
  }
  if (is_first) memset(s.o, 0, sizeof(float) * static_cast<size_t>(shape.v.lanes) * kTile);

  float* lse = call.lse + (doc.batch * call.n_heads + head) * call.n_rows + doc.q_begin + first;
  finish_rows(call, s, head, n, lse);
  store_transposed<T>(call.out, doc.batch, doc.q_begin + first, head, s.o, s.rescale, n, call.value_dim);
}

// A walk over the units of a wave, in order: which one holds the given item.
template <class ItemsOf>
struct Cursor {
  const AttentionCall& call;
  ItemsOf items_of;
  int64_t unit, begin, bytes;  // begin: the first item of `unit`; bytes: where its packed data starts

  template <class BytesOf>
  void advance_to(int64_t item, const BytesOf& bytes_of) {
    for (int64_t n; item >= begin + (n = items_of(call.documents[unit / call.n_kv_heads])); ++unit) {
      begin += n;
      bytes += bytes_of(call.documents[unit / call.n_kv_heads]);
    }
  }
};

inline int64_t tiles_of(int64_t n) { return (n + kTile - 1) / kTile; }

template <class T>
bool forward(const AttentionCall& call) {
  using C = typename ComputeType<T>::type;
  const ForwardShape<C> shape(call);
  const int group = call.n_heads / call.n_kv_heads;
  const int64_t n_units = call.n_documents * call.n_kv_heads;
  double flops = 0;
  for (int64_t i = 0; i < call.n_documents; ++i)
    flops += 2.0 * (call.head_dim + call.value_dim) * call.n_heads *
             static_cast<double>(call.documents[i].n_q) * static_cast<double>(call.documents[i].n_k);
  const int threads = flops < kSerialFlops ? 1 : call.threads;

  const auto unit_bytes = [&](const Document& doc) { return shape.unit_bytes(doc); };
  const auto key_tiles = [](const Document& doc) { return tiles_of(doc.n_k); };
  const auto query_items = [group](const Document& doc) { return group * tiles_of(doc.n_q); };
  // waves: units [begin, end) whose packed data fit in kWaveBytes, at least one for each thread
  const auto wave_end = [&](int64_t begin, int64_t* bytes) {
    int64_t end = begin;
    *bytes = 0;
    for (; end < n_units; ++end) {
      const int64_t next = unit_bytes(call.documents[end / call.n_kv_heads]);
      if (end - begin >= threads && *bytes + next > kWaveBytes) break;
      *bytes += next;
    }
    return end;
  };
  int64_t pack_bytes = 0;
  for (int64_t begin = 0, bytes; begin < n_units;) {
    begin = wave_end(begin, &bytes);
    pack_bytes = most(pack_bytes, bytes);
  }
  const int64_t scratch_bytes = round_up(ForwardScratch<C>::bytes(shape), 4096);
  char* workspace = take_workspace(pack_bytes + threads * scratch_bytes);
  if (!workspace) return false;

  int64_t packs_taken = 0, items_taken = 0;
  run_team(threads, [&](const Team& team) {
    ForwardScratch<C> scratch(Arena{workspace + pack_bytes + team.id * scratch_bytes}, shape,
                              call.rule.dropout_p > 0);
    const auto packed = [&](int64_t offset, const Document& doc) {
      C* k = reinterpret_cast<C*>(workspace + offset);
      return PackedUnit<C>{k, k + tiles_of(doc.n_k) * shape.k_tile};
    };
    for (int64_t begin = 0, unused; begin < n_units;) {
      const int64_t end = wave_end(begin, &unused);
      int64_t n_packs = 0, n_items = 0;
      for (int64_t unit = begin; unit < end; ++unit) {
        n_packs += key_tiles(call.documents[unit / call.n_kv_heads]);
        n_items += query_items(call.documents[unit / call.n_kv_heads]);
      }
      Cursor<decltype(key_tiles)> pack_at{call, key_tiles, begin, 0, 0};
      for (int64_t item; (item = take_next(&packs_taken)) < n_packs;) {
        pack_at.advance_to(item, unit_bytes);
        const Document& doc = call.documents[pack_at.unit / call.n_kv_heads];
        pack_key_tile<T>(call, shape, doc, static_cast<int>(pack_at.unit % call.n_kv_heads),
                         item - pack_at.begin, packed(pack_at.bytes, doc), scratch);
      }
      team.barrier();
      if (team.id == 0) packs_taken = 0;
      Cursor<decltype(query_items)> at{call, query_items, begin, 0, 0};
      for (int64_t item; (item = take_next(&items_taken)) < n_items;) {
        at.advance_to(item, unit_bytes);
        const int64_t document = at.unit / call.n_kv_heads;
        const Document& doc = call.documents[document];
        const int64_t within = item - at.begin;
        const int head =
            static_cast<int>(at.unit % call.n_kv_heads) * group + static_cast<int>(within % group);
        const int64_t tile = tiles_of(doc.n_q) - 1 - within / group;  // the last tiles see the most keys
        forward_tile<T>(call, shape, document, head, tile * kTile, packed(at.bytes, doc), scratch);
      }
      team.barrier();
      if (team.id == 0) items_taken = 0;
      team.barrier();
      begin = end;
    }
  });
  give_workspace(workspace);
  return true;
}

}  // namespace

namespace TW_ISA {

bool attention_forward(const AttentionCall& call) {
  switch (call.dtype) {
    case DType::f32:
      return forward<float>(call);
    case DType::bf16:
      return forward<bf16>(call);
    default:
      return forward<f16>(call);
  }
}

}  // namespace TW_ISA
}  // namespace tw
