// Rows shared out among threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>

namespace tbf {

// This process was forked: the threads of the OpenMP runtime are its parent's.
void mark_forked();

// part(0), ..., part(parts - 1), each once, by as many threads; an error is thrown.
void run_parts(int parts, const std::function<void(int)>& part);

// body(from, to, n) on equal parts n of 0..rows, at most `threads` of them.
template <class Body>
void parallel_rows(int64_t rows, int threads, const Body& body) {
  const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(threads, rows));
  run_parts(int(parts), [&](int n) { body(rows * n / parts, rows * (n + 1) / parts, n); });
}

}  // namespace tbf
