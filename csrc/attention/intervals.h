// Which keys a row of queries sees: everything structural (causal, window, document, segment, live range) is
// one interval of keys for each query; the wraparound definition of shifted segments adds a second one.
#pragma once

#include "attention/attention.h"
#include "common/extents.h"
#include "common/vec.h"

namespace tw {
namespace {

struct Interval {
  int64_t lo, hi;    // keys [lo, hi)
  int64_t lo2, hi2;  // and [lo2, hi2); empty without wraparound
};

inline int64_t floor_div(int64_t a, int64_t b) { return a >= 0 ? a / b : -((b - 1 - a) / b); }

inline Interval visible_keys(const Document& doc, const Rule& rule, int head, int64_t query) {
  const int64_t at = query + doc.n_k - doc.n_q;
  Interval see{doc.live_begin, doc.live_end, 0, 0};
  if (rule.window_left >= 0) see.lo = most(see.lo, at - rule.window_left);
  if (rule.window_right >= 0) see.hi = least(see.hi, at + rule.window_right + 1);
  const int64_t group = rule.group_size;
  if (rule.is_causal) see.hi = least(see.hi, at + 1);
  if (group == 0) return see;

  const int64_t shift = head >= rule.first_shifted_head ? group / 2 : 0;
  const int64_t position = at - doc.live_begin, length = doc.live_end - doc.live_begin;
  const int64_t g = floor_div(position + shift, group);
  see.lo = most(see.lo, doc.live_begin + g * group - shift);
  see.hi = least(see.hi, doc.live_begin + (g + 1) * group - shift);
  if (rule.wraparound) {
    if (position < 0 || position >= length) return Interval{0, 0, 0, 0};
    if (shift && position < shift) {  // rolled to the end, behind the last positions: sees all of them
      see.lo2 = doc.live_begin + length - shift;
      see.hi2 = doc.live_end;
    } else if (shift && position >= length - shift && !rule.is_causal) {
      see.lo2 = doc.live_begin;
      see.hi2 = doc.live_begin + shift;
    }
  }
  return see;
}

// The intervals of the TILE queries from `first` on; lanes past the document's end repeat its last query. A
// tile has as many keys as queries.
template <int TILE>
struct TileIntervals {
  Interval lane[TILE];
  int64_t lo_min, hi_max, lo2_min, hi2_max;  // unions over the lanes
  int64_t lo_max, hi_min;                    // keys in [lo_max, hi_min) are seen by every lane

  void fill(const Document& doc, const Rule& rule, int head, int64_t first) {
    lo_min = lo2_min = INT64_MAX;
    hi_max = hi2_max = 0;
    lo_max = 0;
    hi_min = INT64_MAX;
    for (int i = 0; i < TILE; ++i) {
      const int64_t query = first + i;
      lane[i] = query < doc.n_q || i == 0 ? visible_keys(doc, rule, head, query) : lane[i - 1];
      const Interval& see = lane[i];
      if (see.lo < see.hi) {
        lo_min = least(lo_min, see.lo);
        hi_max = most(hi_max, see.hi);
      }
      if (see.lo2 < see.hi2) {
        lo2_min = least(lo2_min, see.lo2);
        hi2_max = most(hi2_max, see.hi2);
      }
      lo_max = most(lo_max, see.lo);
      hi_min = least(hi_min, see.hi);
    }
  }
  int64_t first_tile() const { return floor_div(least(lo_min, lo2_min), TILE) * TILE; }
  int64_t end() const { return most(hi_max, hi2_max); }
  bool touches(int64_t j0) const {
    return (j0 < hi_max && j0 + TILE > lo_min) || (j0 < hi2_max && j0 + TILE > lo2_min);
  }
  bool all_see(int64_t j0) const { return lo_max <= j0 && j0 + TILE <= hi_min; }
};

inline bool key_is_live(const Document& doc, int64_t j) {
  return doc.live_begin <= j && j < doc.live_end && (!doc.live || doc.live[j]);
}

template <int TILE>
inline bool tile_is_live(const Document& doc, int64_t j0) {
  if (!doc.live) return true;
  const int64_t end = least(j0 + TILE, doc.n_k);
  for (int64_t j = j0; j < end; ++j)
    if (!doc.live[j]) return false;
  return true;
}

// scores[key j0 + r][lane] = -inf where the lane's query does not see the key.
template <int TILE>
inline void mask_tile(float* scores, const TileIntervals<TILE>& see, const Document& doc, int64_t j0) {
  // keys relative to the tile: small whole numbers, exact in float, so one compare serves every level
  float lo[TILE], hi[TILE], lo2[TILE], hi2[TILE];
  const auto relative = [j0](int64_t j) { return static_cast<float>(least(most(j - j0, -1), TILE + 1)); };
  const bool has_second = see.lo2_min < see.hi2_max;
  for (int i = 0; i < TILE; ++i) {
    lo[i] = relative(see.lane[i].lo);
    hi[i] = relative(see.lane[i].hi);
    lo2[i] = relative(see.lane[i].lo2);
    hi2[i] = relative(see.lane[i].hi2);
  }
  const vf hidden = set1(-__builtin_inff());
  for (int r = 0; r < TILE; ++r) {
    const int64_t j = j0 + r;
    float* row = scores + r * TILE;
    if (!key_is_live(doc, j)) {
      for (int n = 0; n < TILE; n += W) store(row + n, hidden);
      continue;
    }
    const vf key = set1(static_cast<float>(r));
    for (int n = 0; n < TILE; n += W) {
      vm sees = both(le(load(lo + n), key), lt(key, load(hi + n)));
      if (has_second) sees = either(sees, both(le(load(lo2 + n), key), lt(key, load(hi2 + n))));
      store(row + n, select(sees, load(row + n), hidden));
    }
  }
}

}  // namespace
}  // namespace tw
