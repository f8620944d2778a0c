// How the products of many tokens are cut.
//
// A panel is kPanelLanes outputs and kChunk inputs deep, and stays in the second-level cache while blocks of
// tokens pass by. Depth is cut at the same places whatever the number of tokens and threads, so that a sum's
// order does not depend on them.
#pragma once

#include "common/vec.h"

namespace tw {
namespace {

constexpr int kChunk = 512;  // depth of a panel, elements
constexpr int kPanelLanes = kHasMatrixUnit ? 512 : 256;
constexpr int kBlock = kHasMatrixUnit ? 32 : 48;  // tokens of a block
constexpr int kTokensOfItem = 512;                // that a thread takes with one panel
constexpr int64_t kTokensAtOnce = 1024;           // whose left side is packed ahead
static_assert(kTokensAtOnce % kTokensOfItem == 0, "an item's tokens are packed by one pass");

constexpr int kDeltaTokens = kHasMatrixUnit ? 64 : 48;  // that a value of D meets at once; whole blocks
static_assert(kDeltaTokens % kBlock == 0, "sums of D are there when a block's are whole");

constexpr int64_t kSumsRow = kPanelLanes + 16;  // floats: rows of sums start in different cache sets

}  // namespace
}  // namespace tw
