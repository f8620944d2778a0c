#include "attention/attention.h"
namespace tw {
namespace TW_ISA {
bool attention_decode(const DecodeCall&) { return false; }
}
}
