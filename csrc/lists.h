// Python's nested lists of integers as one padded array: what a data loader's batch is made of.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace tbf {

// A list or tuple, itself; any other sequence, copied into a list.
inline pybind11::object items_of(PyObject* rows) {
  PyObject* const items = PySequence_Fast(rows, "expected a sequence of integers");
  if (items == nullptr) throw pybind11::error_already_set();
  return pybind11::reinterpret_steal<pybind11::object>(items);
}

// A Python integer; those below 2^30 without a call.
inline int64_t integer(PyObject* item) {
  if (PyLong_CheckExact(item)) {
#if PY_VERSION_HEX >= 0x030C0000
    auto* const number = reinterpret_cast<PyLongObject*>(item);
    if (PyUnstable_Long_IsCompact(number)) return int64_t(PyUnstable_Long_CompactValue(number));
#else
    const Py_ssize_t digits = Py_SIZE(item);
    if (digits == 0) return 0;
    if (digits == 1) return int64_t(reinterpret_cast<PyLongObject*>(item)->ob_digit[0]);
#endif
  }
  const long long number = PyLong_AsLongLong(item);
  if (number == -1 && PyErr_Occurred()) throw pybind11::error_already_set();
  return number;
}

// use(each item); there may be at most `most`. Returns their number.
template <class Use>
int64_t for_each_item(PyObject* sequence, int64_t most, const Use& use) {
  const pybind11::object items = items_of(sequence);
  int64_t n = 0;  // the size is asked again: an __index__ may change the list that is being read
  for (; n < int64_t(PySequence_Fast_GET_SIZE(items.ptr())); ++n) {
    if (n == most) throw std::invalid_argument("more than " + std::to_string(most) + " items");
    use(PySequence_Fast_GET_ITEM(items.ptr(), n));
  }
  return n;
}

// out (count, width, parts): integers, or sequences of `parts` of them, `fill` behind each row.
inline void pad_lists(const pybind11::object& rows, int64_t count, int64_t width, int64_t parts,
                      int64_t fill, int64_t* out) {
  int64_t* const end = out + count * width * parts;
  for_each_item(rows.ptr(), count, [&](PyObject* row) {
    int64_t* const stop = out + width * parts;
    for_each_item(row, width, [&](PyObject* item) {
      if (parts == 1) {
        *out++ = integer(item);
        return;
      }
      if (PyTuple_CheckExact(item) && PyTuple_GET_SIZE(item) == parts) {
        const auto held = pybind11::reinterpret_borrow<pybind11::object>(item);  // if its list goes
        for (int64_t n = 0; n < parts; ++n) *out++ = integer(PyTuple_GET_ITEM(item, n));
        return;
      }
      const int64_t found =
          for_each_item(item, parts, [&](PyObject* part) { *out++ = integer(part); });
      if (found != parts) {
        throw std::invalid_argument("expected " + std::to_string(parts) + " numbers for a token");
      }
    });
    std::fill(out, stop, fill);
    out = stop;
  });
  std::fill(out, end, fill);
}

}  // namespace tbf
