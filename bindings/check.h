// TW_CHECK(condition, parts...): throws std::invalid_argument with the parts put together.
#pragma once

#include <sstream>
#include <stdexcept>

namespace tw {

template <class... Parts>
[[noreturn]] void fail_check(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

}  // namespace tw

#define TW_CHECK(condition, ...)                       \
  do {                                                 \
    if (!(condition)) ::tw::fail_check(__VA_ARGS__);   \
  } while (0)
