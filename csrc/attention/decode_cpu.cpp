// Decode: a few queries against a long cache, bound by the time to read it once.
//
// The keys of a batch row are cut into chunks of kChunk positions. A chunk gives, for each of the rows (query
// heads x queries) that share its key/value head, a maximum, a sum and an output; the chunks of a row are
// then merged in order. Chunks do not depend on the number of splits or threads, so neither does the result.
//
// Cache rows are read where they lie (a page table only changes their addresses): scores by dot products
// along the row, the output by scaled additions of rows.
#include "attention/attention.h"
#include "attention/pack.h"
#include "attention/scores.h"
#include "common/parallel.h"
#include "common/workspace.h"

namespace tw {
namespace {

constexpr int kChunk = 256;
constexpr int kAhead = 16;     // rows of the cache that are asked for in advance
constexpr int kRowBlock = 32;  // rows after which the output moves on to the next head
constexpr int kMaxHeads = 8;   // key/value heads that one thread walks through together
constexpr double kSerialBytes = 1e6;

struct Partial {  // of one row over one chunk; `out` is the unnormalised sum
  float max, sum;
};

// Elements of T that one step of a dot product takes.
template <class T>
constexpr int dot_step() {
  return sizeof(typename ComputeType<T>::type) == 2 ? 2 * W : W;
}

// acc + the products of one step
template <class T>
inline vf dot_step_of(vf acc, const T* a, const T* b) {
  using C = typename ComputeType<T>::type;
  if constexpr (sizeof(C) == 2)
    return Unit<C>::mac(acc, Unit<C>::lanes(a), Unit<C>::lanes(b));
  else
    return fma(load(a), load(b), acc);
}

inline void prefetch_row(const void* row, int bytes) {
  for (int i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(row) + i);
}

// Scratch of one thread, for `heads` key/value heads of `n_rows` rows each.
template <class T>
struct DecodeScratch {
  T *q, *rows;        // queries [heads][n][padded]; cache rows [heads][kChunk][padded], staged where needed
  T* zeros;           // a row of zeros in place of a dead position
  const T** address;  // [heads][kAddresses]
  float *scores, *merged;
  static constexpr int kAddresses = kChunk + W + kAhead;  // past the end: the last row again

  int64_t lay_out(char* base, int heads, int n_rows, int padded, bool stages) {
    Arena arena{base};
    q = arena.take<T>(int64_t{heads} * n_rows * padded);
    rows = arena.take<T>(stages ? int64_t{heads} * kChunk * padded : 0);
    zeros = arena.take<T>(padded);
    address = arena.take<const T*>(int64_t{heads} * kAddresses);
    scores = arena.take<float>(int64_t{heads} * n_rows * kChunk);
    merged = arena.take<float>(padded + 2 * W);
    return round_up(arena.at - base, 4096);
  }
};

// A row can be read where it lies if it is contiguous and a whole number of steps wide.
inline bool in_place(const View& cache, int width, int step) { return cache.lane == 1 && width % step == 0; }

// Addresses of cache positions [begin, begin + n) of one head; staged, zero padded, if not read in place.
template <class T>
void find_rows(const DecodeCall& call, const View& cache, int64_t b, int kv_head, int slot_of_head,
               int64_t begin, int n, int width, int step, DecodeScratch<T>& s) {
  const int padded = static_cast<int>(round_up(width, step));
  const bool stays = in_place(cache, width, step);
  const T** address = s.address + int64_t{slot_of_head} * s.kAddresses;
  for (int i = 0; i < n;) {  // runs of rows that lie at one stride: the whole chunk, or the rest of a page
    const int64_t position = begin + i;
    int64_t page = b, slot = position, run = n - i;
    if (call.page_table) {
      page = call.page_table[b * call.pages_per_row + position / call.page_size];
      slot = position % call.page_size;
      run = least(run, call.page_size - slot);
    }
    const T* row = row_of<T>(cache, page, slot, kv_head);
    for (const int end = i + static_cast<int>(run); i < end; ++i, row += cache.row) {
      address[i] = row;
      if (stays) continue;
      T* staged = s.rows + (int64_t{slot_of_head} * kChunk + i) * padded;
      copy_row(staged, row, cache.lane, width, padded);
      address[i] = staged;
    }
  }
  // a row of zeros in place of a dead one, so that nothing in it can reach a result (0 * NaN)
  for (int64_t i = 0; i < least(call.key_starts[b] - begin, n); ++i) address[i] = s.zeros;
  if (call.live)
    for (int i = 0; i < n; ++i)
      if (!call.live[b * call.page_size + begin + i]) address[i] = s.zeros;
  for (int i = n; i < s.kAddresses; ++i) address[i] = address[n - 1];
}

// scores[r][i] = scale q[r] . row[i] for cache rows [i0, i0 + W): W sums side by side, whose lanes are added
// at once. STEPS is the width in dot steps, or 0 for any.
template <class T, int STEPS>
inline void score_rows(const T* const* address, const T* q, float* scores, int n_rows, int padded,
                       float scale) {
  constexpr int kStep = dot_step<T>();
  const int steps = STEPS ? STEPS : padded / kStep;
  for (int r = 0; r < n_rows; ++r) {
    vf acc[W];
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) {
      acc[i] = zero();
#pragma GCC unroll 8
      for (int c = 0; c < steps; ++c)
        acc[i] = dot_step_of(acc[i], q + int64_t{r} * padded + c * kStep, address[i] + c * kStep);
    }
    store(scores + int64_t{r} * kChunk, mul(sum_each(acc), set1(scale)));
  }
}

template <class T>
void score_chunk(const DecodeScratch<T>& s, int heads, int n_rows, int n, int padded, float scale) {
  const int steps = padded / dot_step<T>(), bytes = padded * static_cast<int>(sizeof(T));
  const auto score = steps == 2   ? score_rows<T, 2>
                     : steps == 4 ? score_rows<T, 4>
                     : steps == 8 ? score_rows<T, 8>
                                  : score_rows<T, 0>;
  for (int i0 = 0; i0 < n; i0 += W)
    for (int h = 0; h < heads; ++h) {
      const T* const* address = s.address + int64_t{h} * s.kAddresses + i0;
      for (int i = 0; i < W; ++i) prefetch_row(address[i + kAhead], bytes);
      score(address, s.q + int64_t{h} * n_rows * padded, s.scores + int64_t{h} * n_rows * kChunk + i0, n_rows,
            padded, scale);
    }
}

// out[r][c] (+)= sum_i weights[r][i] row[i][c] for ROWS rows r and 2 PAIRS W columns from c on; columns stay
// in the order of load_wide
template <class T, int ROWS, int PAIRS>
inline void add_rows(const T* const* address, const float* weights, int n, int c, float* out, int64_t stride,
                     bool is_first) {
  vf acc[ROWS][2 * PAIRS];
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < 2 * PAIRS; ++v) acc[r][v] = is_first ? zero() : load(out + r * stride + c + v * W);
  for (int i = 0; i < n; ++i) {
    const T* row = address[i] + c;
    prefetch_row(address[i + kAhead] + c, 2 * PAIRS * W * static_cast<int>(sizeof(T)));
#pragma GCC unroll 8
    for (int pair = 0; pair < PAIRS; ++pair) {
      vf first, second;
      load_wide(row + 2 * pair * W, first, second);
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; ++r) {
        const vf weight = set1(weights[int64_t{r} * kChunk + i]);
        acc[r][2 * pair] = fma(weight, first, acc[r][2 * pair]);
        acc[r][2 * pair + 1] = fma(weight, second, acc[r][2 * pair + 1]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < 2 * PAIRS; ++v) store(out + r * stride + c + v * W, acc[r][v]);
}

// As many columns at once as the registers hold beside ROWS.
template <class T, int ROWS>
inline void add_row_block(const T* const* address, const float* weights, int n, int padded, float* out,
                          bool is_first) {
  constexpr int kPairs = (ROWS == 4 ? 1 : 2) * kMicroVectors / 2;
  int c = 0;
  for (; c + 2 * kPairs * W <= padded; c += 2 * kPairs * W)
    add_rows<T, ROWS, kPairs>(address, weights, n, c, out, padded, is_first);
  for (; c < padded; c += 2 * W) add_rows<T, ROWS, 1>(address, weights, n, c, out, padded, is_first);
}

// outs[h]: where the unnormalised output of head h goes, [n_rows][padded]
template <class T>
void output_chunk(const DecodeScratch<T>& s, int heads, int n_rows, int n, int padded, float* const* outs) {
  for (int i0 = 0; i0 < n; i0 += kRowBlock)
    for (int h = 0; h < heads; ++h) {
      const T* const* address = s.address + int64_t{h} * s.kAddresses + i0;
      const float* weights = s.scores + int64_t{h} * n_rows * kChunk + i0;
      const int rows = n - i0 < kRowBlock ? n - i0 : kRowBlock;
      for (int r = 0; r < n_rows;) {
        const float* w = weights + int64_t{r} * kChunk;
        float* out = outs[h] + int64_t{r} * padded;
        if (n_rows - r >= 4) {
          add_row_block<T, 4>(address, w, rows, padded, out, i0 == 0);
          r += 4;
        } else if (n_rows - r >= 2) {
          add_row_block<T, 2>(address, w, rows, padded, out, i0 == 0);
          r += 2;
        } else {
          add_row_block<T, 1>(address, w, rows, padded, out, i0 == 0);
          r += 1;
        }
      }
    }
}

// Hide what a row does not see, then scores -> weights; returns maximum and sum of each row.
inline void weigh_chunk(const DecodeCall& call, int64_t b, int64_t begin, int n, int n_rows, float* scores,
                        Partial* partial) {
  const float hidden = -__builtin_inff();
  const int64_t length = call.key_lengths[b];
  for (int r = 0; r < n_rows; ++r) {
    const int64_t at = length - call.n_rows + r % call.n_rows;  // where this row's query stands
    int64_t lo = call.key_starts[b], hi = length;
    if (call.rule.is_causal) hi = least(hi, at + 1);
    if (call.rule.window_right >= 0) hi = least(hi, at + call.rule.window_right + 1);
    if (call.rule.window_left >= 0) lo = most(lo, at - call.rule.window_left);
    float* row = scores + int64_t{r} * kChunk;
    if (call.rule.softcap > 0) apply_softcap(row, static_cast<int>(round_up(n, W)), call.rule.softcap, 1.0f);
    for (int64_t i = 0; i < least(lo - begin, n); ++i) row[i] = hidden;
    for (int64_t i = most(hi - begin, 0); i < round_up(n, W); ++i) row[i] = hidden;
    if (call.live)
      for (int i = 0; i < n; ++i)
        if (!call.live[b * call.page_size + begin + i]) row[i] = hidden;

    vf top = set1(hidden);
    for (int i = 0; i < n; i += W) top = max(load(row + i), top);
    float lanes[W], best = hidden;
    store(lanes, top);
    for (const float x : lanes) best = x > best || x != x ? x : best;
    const vf pivot = set1(best == hidden ? 0.0f : best);
    vf total = zero();
    for (int i = 0; i < n; i += W) {
      const vf weight = weight_of<6>(sub(load(row + i), pivot), set1(kLog2E));
      total = add(total, weight);
      store(row + i, weight);
    }
    partial[r] = {best, sum(total)};
  }
}

template <class T>
bool decode(const DecodeCall& call) {
  constexpr int kStep = dot_step<T>();
  const int group = call.n_heads / call.n_kv_heads;
  const int n_rows = group * static_cast<int>(call.n_rows);
  const int qk_padded = static_cast<int>(round_up(call.head_dim, kStep));
  const int v_padded = static_cast<int>(round_up(call.value_dim, 2 * W));
  const int widest = qk_padded > v_padded ? qk_padded : v_padded;
  int64_t chunks = 1;
  double bytes = 0;
  for (int64_t b = 0; b < call.batch; ++b) {
    chunks = most(chunks, (call.key_lengths[b] + kChunk - 1) / kChunk);
    bytes += static_cast<double>(call.key_lengths[b]) * call.n_kv_heads * (call.head_dim + call.value_dim) *
             sizeof(T);
  }
  const int threads = bytes * n_rows < kSerialBytes ? 1 : call.threads;

  // A share is a run of chunks of one batch row and one or more key/value heads: all of them where their rows
  // lie side by side in memory, as long as there are shares enough to go round.
  const int64_t splits = call.splits > 0 ? least(call.splits, chunks) : chunks;
  const int64_t per_share = (chunks + splits - 1) / splits;
  const bool stages = !in_place(call.k, call.head_dim, kStep) || !in_place(call.v, call.value_dim, 2 * W);
  int heads = 1;
  if (!stages && call.k.head < call.k.row)
    while (2 * heads <= kMaxHeads && call.n_kv_heads % (2 * heads) == 0 &&
           call.batch * splits * call.n_kv_heads >= 8 * heads * int64_t{threads})
      heads *= 2;
  const int64_t head_groups = call.n_kv_heads / heads;
  const int64_t n_shares = call.batch * splits * head_groups;
  const int64_t out_floats = int64_t{n_rows} * v_padded;

  DecodeScratch<T> measure;
  const int64_t scratch_bytes = measure.lay_out(nullptr, heads, n_rows, widest, stages);
  const int64_t n_partials = call.batch * call.n_kv_heads * chunks;
  const int64_t partial_bytes = round_up(n_partials * n_rows * int64_t{sizeof(Partial)}, kCacheLine);
  char* workspace = take_workspace(threads * scratch_bytes + partial_bytes +
                                   n_partials * out_floats * int64_t{sizeof(float)});
  if (!workspace) return false;
  Partial* partials = reinterpret_cast<Partial*>(workspace + threads * scratch_bytes);
  float* outs = reinterpret_cast<float*>(workspace + threads * scratch_bytes + partial_bytes);
  const float scale = call.rule.softcap > 0 ? call.rule.scale / call.rule.softcap : call.rule.scale;

  int64_t shares_taken = 0, rows_taken = 0;
  run_team(threads, [&](const Team& team) {
    DecodeScratch<T> s;
    s.lay_out(workspace + team.id * scratch_bytes, heads, n_rows, widest, stages);
    memset(static_cast<void*>(s.zeros), 0, sizeof(T) * static_cast<size_t>(widest));
    for (int64_t share; (share = take_next(&shares_taken)) < n_shares;) {
      const int first_head = static_cast<int>(share % head_groups) * heads;
      const int64_t split = share / head_groups % splits, b = share / head_groups / splits;
      for (int h = 0; h < heads; ++h)
        for (int r = 0; r < n_rows; ++r)
          copy_row(s.q + (int64_t{h} * n_rows + r) * qk_padded,
                   row_of<T>(call.q, b, r % call.n_rows,
                             (first_head + h) * group + r / static_cast<int>(call.n_rows)),
                   call.q.lane, call.head_dim, qk_padded);
      for (int64_t chunk = split * per_share; chunk < least((split + 1) * per_share, chunks); ++chunk) {
        const int64_t begin = chunk * kChunk;
        const int n = static_cast<int>(least(kChunk, call.key_lengths[b] - begin));
        if (n <= 0) break;
        float* out_of[kMaxHeads];
        for (int h = 0; h < heads; ++h)
          find_rows(call, call.k, b, first_head + h, h, begin, n, call.head_dim, kStep, s);
        score_chunk(s, heads, n_rows, n, qk_padded, scale);
        for (int h = 0; h < heads; ++h) {
          find_rows(call, call.v, b, first_head + h, h, begin, n, call.value_dim, 2 * W, s);
          for (int i = 0; i < kAhead; ++i)  // on their way while the weights are computed
            prefetch_row(s.address[int64_t{h} * s.kAddresses + i], v_padded * static_cast<int>(sizeof(T)));
        }
        for (int h = 0; h < heads; ++h) {
          const int64_t at = (b * call.n_kv_heads + first_head + h) * chunks + chunk;
          weigh_chunk(call, b, begin, n, n_rows, s.scores + int64_t{h} * n_rows * kChunk,
                      partials + at * n_rows);
          out_of[h] = outs + at * out_floats;
        }
        output_chunk(s, heads, n_rows, n, v_padded, out_of);
      }
    }
    team.barrier();
    for (int64_t row; (row = take_next(&rows_taken)) < call.batch * call.n_heads * call.n_rows;) {
      const int64_t query = row % call.n_rows, b = row / call.n_rows / call.n_heads;
      const int head = static_cast<int>(row / call.n_rows % call.n_heads);
      const int64_t first = (b * call.n_kv_heads + head / group) * chunks;
      const int64_t r = head % group * call.n_rows + query;
      const int64_t used = (call.key_lengths[b] + kChunk - 1) / kChunk;
      float top = call.sinks ? call.sinks[head] : -__builtin_inff();
      for (int64_t c = 0; c < used; ++c) {
        const float x = partials[(first + c) * n_rows + r].max;
        if (x > top || x != x) top = x;
      }
      const bool sees_nothing = top == -__builtin_inff();
      float total = call.sinks && !sees_nothing ? __builtin_expf(call.sinks[head] - top) : 0.0f;
      for (int c = 0; c < v_padded; c += W) store(s.merged + c, zero());
      for (int64_t c = 0; c < used && !sees_nothing; ++c) {
        const Partial& part = partials[(first + c) * n_rows + r];
        const float weight = __builtin_expf(part.max - top);
        total += part.sum * weight;
        const float* out = outs + (first + c) * out_floats + r * v_padded;
        for (int d = 0; d < v_padded; d += W)
          store(s.merged + d, fma(set1(weight), load(out + d), load(s.merged + d)));
      }
      const vf inverse = set1(sees_nothing ? 0.0f : 1.0f / total);
      T* to =
          static_cast<T*>(call.out.data) + b * call.out.batch + query * call.out.row + head * call.out.head;
      for (int d = 0; d < v_padded; d += W) store(s.merged + d, mul(load(s.merged + d), inverse));
      for (int d = 0; d < call.value_dim; ++d) to[d] = from_float<T>(s.merged[wide_place<T>(d)]);
      call.lse[(b * call.n_heads + head) * call.n_rows + query] =
          sees_nothing ? top : log_sum_exp(top, total);
    }
  });
  give_workspace(workspace);
  return true;
}

}  // namespace

namespace TW_ISA {

bool attention_decode(const DecodeCall& call) {
  return by_dtype(call.dtype, [&](auto x) { return decode<decltype(x)>(call); });
}

}  // namespace TW_ISA
}  // namespace tw
