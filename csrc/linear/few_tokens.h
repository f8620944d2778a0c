// What the kernels for a few tokens share: the update, and the way out.
#pragma once

#include "common/arena.h"
#include "common/packed_lines.h"
#include "common/parallel.h"
#include "common/workspace.h"
#include "linear/linear.h"

namespace tw {
namespace {

constexpr int64_t kRowUnit = 64;  // elements that rows of tokens are padded to: whole lines, whole vectors

// y of W outputs from `o` on, of token t, from their base sums.
template <class T>
void finish_outputs(const LinearCall& call, const float* all_hidden, int t, int64_t o, vf y) {
  const int some = static_cast<int>(least(W, call.out_features - o));
  if (some <= 0) return;
  if (call.delta_sums) y = add(y, load_n(call.delta_sums + t * call.out_features + o, some));
  if (call.bias) y = add(y, load_n(call.bias + o, some));
  if (call.out_scale) y = mul(y, load_n(call.out_scale + o, some));
  if (call.rank > 0) {
    const float* hidden = all_hidden + t * call.rank;
    float update[W];
    for (int i = 0; i < W; ++i) {
      vf dot = zero();
      const T* up = static_cast<const T*>(call.up.data) + (o + (i < some ? i : 0)) * call.up.row;
      for (int r = 0; r < call.rank; r += W) {
        const int n = static_cast<int>(least(W, call.rank - r));
        dot = fma(load_n(up + r, n), load_n(hidden + r, n), dot);
      }
      update[i] = sum(dot);
    }
    y = add(y, load(update));
  }
  T* to = static_cast<T*>(call.y.data) + t * call.y.row + o;
  if (some == W)
    store(to, y);
  else
    store_n(to, y, some);
}

// hidden[t][r], rounded into call.hidden and scaled into `kept`
template <class T>
void hidden_value(const LinearCall& call, float* kept, int t, int r) {
  const T* x = static_cast<const T*>(call.x.data) + t * call.x.row;
  const T* down = static_cast<const T*>(call.down.data) + r * call.down.row;
  vf dot[2] = {zero(), zero()};
  int64_t i = 0;
  for (; i + 2 * W <= call.in_features; i += 2 * W)
    for (int half = 0; half < 2; ++half)
      dot[half] = fma(load(x + i + half * W), load(down + i + half * W), dot[half]);
  for (; i < call.in_features; i += W) {
    const int n = static_cast<int>(least(W, call.in_features - i));
    dot[0] = fma(load_n(x + i, n), load_n(down + i, n), dot[0]);
  }
  float h = sum(add(dot[0], dot[1]));
  if (call.relu && h < 0.0f) h = 0.0f;
  if (call.row_adapters && call.row_adapters[t] != call.column_adapters[r]) h = 0.0f;
  T* hidden = static_cast<T*>(call.hidden.data) + t * call.hidden.row + r;
  *hidden = from_float<T>(h);
  kept[t * call.rank + r] = to_float(*hidden) * (call.column_scales ? call.column_scales[r] : call.scale);
}

// f(tokens, hidden (T, R), team) on all threads, once `tokens`, which knows how to lay itself out and to pack
// x, and hidden are there.
template <class T, class Tokens, class F>
bool with_few_tokens(const LinearCall& call, Tokens tokens, const F& f) {
  const double weights = static_cast<double>(call.in_features) * static_cast<double>(call.out_features);
  float* hidden;
  const auto lay_out = [&](char* base) {
    Arena arena{base};
    tokens.lay_out(arena, call);
    hidden = arena.take<float>(call.tokens * call.rank);
    return arena.at - base;
  };
  char* workspace = take_workspace(lay_out(nullptr));
  if (!workspace) return false;
  lay_out(workspace);
  for (int t = 0; t < tokens.count; ++t)
    tokens.pack(call, t, t < call.tokens ? static_cast<const T*>(call.x.data) + t * call.x.row : nullptr);
  run_team(weights < kSerialWeights ? 1 : call.threads, [&](const Team& team) {
    if (call.rank > 0) {
      for (int64_t i = team.id; i < call.tokens * call.rank; i += team.size)
        hidden_value<T>(call, hidden, static_cast<int>(i / call.rank), static_cast<int>(i % call.rank));
      team.barrier();
    }
    f(tokens, hidden, team);
  });
  give_workspace(workspace);
  return true;
}

// f(Index<n>{}, block) for runs of n row blocks, BLOCKS or 1, a thread's share of them. Neighbours go to one
// thread: it reads one stretch of memory.
template <int BLOCKS, class F>
void share_blocks(const LinearCall& call, const Team& team, const F& f) {
  const int64_t blocks = (call.out_features + kLineRows - 1) / kLineRows;
  int64_t block = blocks * team.id / team.size;
  const int64_t end = blocks * (team.id + 1) / team.size;
  for (; block + BLOCKS <= end; block += BLOCKS) f(Index<BLOCKS>{}, block);
  for (; block < end; ++block) f(Index<1>{}, block);
}

}  // namespace
}  // namespace tw
