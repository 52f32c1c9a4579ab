// Every function of tinybert_fast._native. Addresses and streams arrive as integers: nothing here
// knows torch. tinybert_fast/ops/native.py, the one caller, says who has checked what.
#include <pybind11/pybind11.h>

#include "attention.h"
#include "attention_relation_kl.h"
#include "attention_score_mse.h"
#include "block_mask.h"
#include "cross_entropy.h"
#include "dropout_mask.h"
#include "entries.h"
#include "isa.h"
#include "lists.h"
#include "mlm_mask.h"
#include "parallel.h"
#include "sequence_layout.h"

namespace py = pybind11;
using namespace py::literals;

namespace {

using Address = uintptr_t;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

tbf::Heads heads(Address address, int64_t row, int64_t head) {
  return {at<const void>(address), row, head};
}

tbf::Attention attention(tbf::Heads q, tbf::Heads k, tbf::Heads v, Address cu_seqlens,
                         int64_t sequences, int64_t heads, int64_t width, bool bf16, float scale,
                         int direction, uint64_t seed0, uint64_t seed1, uint32_t site,
                         int threshold) {
  return {q,     k,    v,     at<const int32_t>(cu_seqlens), sequences,           heads,
          width, bf16, scale, direction,                     {seed0, seed1, site}, threshold};
}

tbf::AttentionScoreMse attention_score_mse(tbf::Heads q, tbf::Heads k, tbf::Heads p, tbf::Heads r,
                                           Address cu_seqlens, int64_t sequences, int64_t heads,
                                           int64_t width, int64_t teacher_width, bool bf16,
                                           bool student, int64_t direct_up_to,
                                           bool gradients) {
  return {q,     k,     p,             r,    at<const int32_t>(cu_seqlens), sequences,
          heads, width, teacher_width, bf16, student,                       direct_up_to,
          gradients};
}

tbf::AttentionRelationKl attention_relation_kl(tbf::Heads a, tbf::Heads b, tbf::Heads c,
                                               tbf::Heads d, bool itself, Address cu_seqlens,
                                               int64_t sequences, int64_t tokens, int64_t heads,
                                               int64_t width, int64_t teacher_width, bool bf16,
                                               bool gradients) {
  return {a,         b,      c,     d,     itself,        at<const int32_t>(cu_seqlens),
          sequences, tokens, heads, width, teacher_width, bf16,
          gradients};
}

tbf::CrossEntropy cross_entropy(Address logits, Address bias, Address labels, Address weights,
                                int64_t rows, int64_t words, int64_t row, float smoothing,
                                bool bf16, bool gradients) {
  return {at<void>(logits), at<const float>(bias), at<const int64_t>(labels),
          at<const float>(weights), rows, words, row, smoothing, bf16, gradients};
}

tbf::MlmMask mlm_mask(Address ids, int64_t batch, int64_t width, Address special,
                      int special_bytes, Address attention, int attention_bytes, Address starts,
                      Address examples, Address table, int64_t vocabulary, Address places,
                      int64_t place_count, Address ordinary, int64_t ordinary_count,
                      int64_t mask_id, uint64_t ratio, uint64_t mask_below, uint64_t random_below,
                      uint64_t seed, uint32_t step, int unit, Address dense) {
  return {at<int64_t>(ids),
          batch,
          width,
          {at<const void>(special), special_bytes},
          {at<const void>(attention), attention_bytes},
          {at<const void>(starts), 1},
          at<const int64_t>(examples),
          at<const uint32_t>(table),
          vocabulary,
          at<const uint32_t>(places),
          place_count,
          at<const int64_t>(ordinary),
          ordinary_count,
          mask_id,
          ratio,
          mask_below,
          random_below,
          seed,
          step,
          unit,
          at<int64_t>(dense)};
}

tbf::MaskedRows masked_rows(Address places, Address labels, Address offsets, int64_t capacity) {
  return {at<int64_t>(places), at<int64_t>(labels), at<int32_t>(offsets), capacity};
}

tbf::Padding padding(Address real, int64_t batch, int64_t width) {
  return {at<const uint8_t>(real), batch, width};
}

tbf::PackedRows packed_rows(Address cu_seqlens, Address rows, Address sequences,
                            Address positions, int64_t total) {
  return {at<const int32_t>(cu_seqlens), at<int64_t>(rows), at<int32_t>(sequences),
          at<int32_t>(positions), total};
}

tbf::Pattern pattern(int64_t size, int64_t masks, int64_t side, bool everything, int64_t window,
                     int64_t window_blocks, Address global_words, int64_t random_blocks,
                     uint64_t seed, Address document_first, Address document_stop,
                     Address lengths, Address dense) {
  return {size,
          masks,
          side,
          everything,
          window,
          window_blocks,
          at<const uint32_t>(global_words),
          random_blocks,
          seed,
          at<const int32_t>(document_first),
          at<const int32_t>(document_stop),
          at<const int64_t>(lengths),
          at<const uint8_t>(dense)};
}

tbf::PatternLists pattern_lists(Address kinds, Address tile_of, Address row_offsets,
                                Address row_blocks, Address row_tiles, Address column_offsets,
                                Address column_blocks, Address column_tiles) {
  return {at<const uint8_t>(kinds),    at<int32_t>(tile_of),       at<int32_t>(row_offsets),
          at<int32_t>(row_blocks),     at<int32_t>(row_tiles),     at<int32_t>(column_offsets),
          at<int32_t>(column_blocks),  at<int32_t>(column_tiles)};
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  const auto unlocked = py::call_guard<py::gil_scoped_release>();

  m.def("isa", tbf::isa_name, "The widest instruction set in use on this CPU.");
  m.def("mark_forked", tbf::mark_forked, "This process was forked before it loaded this module.");
  m.def("limit_isa", tbf::limit_isa, "isa"_a,
        "3: AVX-512 with BF16, 2: AVX-512, 1: AVX2, 0: none, -1: the widest. For tests.");
#ifdef TBF_CUDA
  m.attr("cuda_architectures") = TBF_CUDA;
#else
  m.attr("cuda_architectures") = "";
#endif

  m.def(
      "pad_lists",
      [](const py::object& rows, int64_t count, int64_t width, int64_t parts, int64_t fill,
         Address out) { tbf::pad_lists(rows, count, width, parts, fill, at<int64_t>(out)); },
      "rows"_a, "count"_a, "width"_a, "parts"_a, "fill"_a, "out"_a);

  py::class_<tbf::Heads>(m, "Heads").def(py::init(&heads), "at"_a, "row"_a, "head"_a);
  py::class_<tbf::Attention>(m, "Attention")
      .def(py::init(&attention), py::kw_only(), "q"_a, "k"_a, "v"_a, "cu_seqlens"_a, "sequences"_a,
           "heads"_a, "width"_a, "bf16"_a, "scale"_a, "direction"_a, "seed0"_a, "seed1"_a,
           "site"_a, "threshold"_a);
  m.def(
      "attention_forward_cpu",
      [](const tbf::Attention& call, Address out, Address lse, int threads) {
        tbf::attention_forward_cpu(call, at<void>(out), at<float>(lse), threads);
      },
      "call"_a, "out"_a, "lse"_a, "threads"_a, unlocked);
  m.def(
      "attention_backward_cpu",
      [](const tbf::Attention& call, const tbf::Heads& grad, Address out, Address lse, Address dq,
         Address dk, Address dv, int threads) {
        tbf::attention_backward_cpu(call, grad, at<const void>(out), at<const float>(lse),
                                    at<void>(dq), at<void>(dk), at<void>(dv), threads);
      },
      "call"_a, "grad"_a, "out"_a, "lse"_a, "dq"_a, "dk"_a, "dv"_a, "threads"_a, unlocked);
  py::class_<tbf::AttentionScoreMse>(m, "AttentionScoreMse")
      .def(py::init(&attention_score_mse), py::kw_only(), "q"_a, "k"_a, "p"_a, "r"_a,
           "cu_seqlens"_a, "sequences"_a, "heads"_a, "width"_a, "teacher_width"_a, "bf16"_a,
           "student"_a, "direct_up_to"_a, "gradients"_a);
  m.def(
      "attention_score_mse_cpu",
      [](const tbf::AttentionScoreMse& call, Address loss, Address dq, Address dk, int threads) {
        tbf::attention_score_mse_cpu(call, at<float>(loss), at<void>(dq), at<void>(dk), threads);
      },
      "call"_a, "loss"_a, "dq"_a, "dk"_a, "threads"_a, unlocked);
  py::class_<tbf::AttentionRelationKl>(m, "AttentionRelationKl")
      .def(py::init(&attention_relation_kl), py::kw_only(), "a"_a, "b"_a, "c"_a, "d"_a,
           "itself"_a, "cu_seqlens"_a, "sequences"_a, "tokens"_a, "heads"_a, "width"_a,
           "teacher_width"_a, "bf16"_a, "gradients"_a);
  m.def(
      "attention_relation_kl_cpu",
      [](const tbf::AttentionRelationKl& call, Address loss, Address da, Address db, int threads) {
        tbf::attention_relation_kl_cpu(call, at<float>(loss), at<float>(da), at<float>(db),
                                       threads);
      },
      "call"_a, "loss"_a, "da"_a, "db"_a, "threads"_a, unlocked);
  py::class_<tbf::CrossEntropy>(m, "CrossEntropy")
      .def(py::init(&cross_entropy), py::kw_only(), "logits"_a, "bias"_a, "labels"_a, "weights"_a,
           "rows"_a, "words"_a, "row"_a, "smoothing"_a, "bf16"_a, "gradients"_a);
  m.def(
      "cross_entropy_cpu",
      [](const tbf::CrossEntropy& call, Address losses, Address dbias, int threads) {
        tbf::cross_entropy_cpu(call, at<float>(losses), at<float>(dbias), threads);
      },
      "call"_a, "losses"_a, "dbias"_a, "threads"_a, unlocked);
  m.def(
      "exponential_cpu",
      [](Address x, int64_t count, Address out) {
        tbf::exponential_cpu(at<const float>(x), count, at<float>(out));
      },
      "x"_a, "count"_a, "out"_a, "e^x as attention computes it. For tests.", unlocked);

  py::class_<tbf::MlmMask>(m, "MlmMask")
      .def(py::init(&mlm_mask), py::kw_only(), "ids"_a, "batch"_a, "width"_a, "special"_a,
           "special_bytes"_a, "attention"_a, "attention_bytes"_a, "starts"_a, "examples"_a,
           "table"_a, "vocabulary"_a, "places"_a, "place_count"_a, "ordinary"_a,
           "ordinary_count"_a, "mask_id"_a, "ratio"_a, "mask_below"_a, "random_below"_a, "seed"_a,
           "step"_a, "unit"_a, "dense"_a);
  py::class_<tbf::MaskedRows>(m, "MaskedRows")
      .def(py::init(&masked_rows), py::kw_only(), "places"_a, "labels"_a, "offsets"_a,
           "capacity"_a);
  m.def("mlm_mask_cpu", tbf::mlm_mask_cpu, "call"_a, "rows"_a, "allow_empty"_a, "threads"_a,
        unlocked);

  m.def(
      "attention_keep",
      [](uint64_t seed0, uint64_t seed1, uint32_t site, Address sequences, int64_t count,
         int64_t first_head, int64_t heads, int64_t first, int64_t queries, Address tiles,
         int64_t keys, int threshold, Address keep, int threads) {
        tbf::attention_keep_cpu({seed0, seed1, site},
                                {at<const int64_t>(sequences), count, first_head, heads, first,
                                 queries, at<const int64_t>(tiles), keys},
                                threshold, at<float>(keep), threads);
      },
      py::kw_only(), "seed0"_a, "seed1"_a, "site"_a, "sequences"_a, "count"_a, "first_head"_a,
      "heads"_a, "first"_a, "queries"_a, "tiles"_a, "keys"_a, "threshold"_a, "keep"_a, "threads"_a,
      unlocked);
  m.def(
      "hidden_cells",
      [](uint64_t seed0, uint64_t seed1, uint32_t site, Address sequences, Address positions,
         int64_t rows, int64_t columns, Address cells, int threads) {
        tbf::hidden_cells_cpu({seed0, seed1, site}, at<const int32_t>(sequences),
                              at<const int32_t>(positions), rows, columns, at<uint8_t>(cells),
                              threads);
      },
      py::kw_only(), "seed0"_a, "seed1"_a, "site"_a, "sequences"_a, "positions"_a, "rows"_a,
      "columns"_a, "cells"_a, "threads"_a, unlocked);

  py::class_<tbf::Padding>(m, "Padding")
      .def(py::init(&padding), py::kw_only(), "real"_a, "batch"_a, "width"_a);
  py::class_<tbf::PackedRows>(m, "PackedRows")
      .def(py::init(&packed_rows), py::kw_only(), "cu_seqlens"_a, "rows"_a, "sequences"_a,
           "positions"_a, "total"_a);
  m.def(
      "sequence_extents_cpu",
      [](const tbf::Padding& padding, Address extents, int threads) {
        tbf::sequence_extents_cpu(padding, at<int64_t>(extents), threads);
      },
      "padding"_a, "extents"_a, "threads"_a, unlocked);
  m.def("sequence_layout_cpu", tbf::sequence_layout_cpu, "padding"_a, "packed"_a, "threads"_a,
        unlocked);

  py::class_<tbf::Pattern>(m, "Pattern")
      .def(py::init(&pattern), py::kw_only(), "size"_a, "masks"_a, "side"_a, "everything"_a,
           "window"_a, "window_blocks"_a, "global_words"_a, "random_blocks"_a, "seed"_a,
           "document_first"_a, "document_stop"_a, "lengths"_a, "dense"_a);
  py::class_<tbf::PatternLists>(m, "PatternLists")
      .def(py::init(&pattern_lists), py::kw_only(), "kinds"_a, "tile_of"_a, "row_offsets"_a,
           "row_blocks"_a, "row_tiles"_a, "column_offsets"_a, "column_blocks"_a,
           "column_tiles"_a);
  m.def(
      "block_mask_kinds_cpu",
      [](const tbf::Pattern& pattern, Address kinds, int threads) {
        tbf::block_mask_kinds_cpu(pattern, at<uint8_t>(kinds), threads);
      },
      "pattern"_a, "kinds"_a, "threads"_a, unlocked);
  m.def(
      "block_mask_fill_cpu",
      [](const tbf::Pattern& pattern, const tbf::PatternLists& lists, Address cells,
         int threads) {
        tbf::block_mask_fill_cpu(pattern, lists, at<uint32_t>(cells), threads);
      },
      "pattern"_a, "lists"_a, "cells"_a, "threads"_a, unlocked);

#ifdef TBF_CUDA
  m.def(
      "mlm_mask_cuda",
      [](const tbf::MlmMask& call, const tbf::MaskedRows& rows, Address scratch, Address stream) {
        tbf::mlm_mask_cuda(call, rows, at<int32_t>(scratch), at<void>(stream));
      },
      "call"_a, "rows"_a, "scratch"_a, "stream"_a, unlocked);
  m.def(
      "sequence_extents_cuda",
      [](const tbf::Padding& padding, Address extents, Address stream) {
        tbf::sequence_extents_cuda(padding, at<int64_t>(extents), at<void>(stream));
      },
      "padding"_a, "extents"_a, "stream"_a, unlocked);
  m.def(
      "sequence_layout_cuda",
      [](const tbf::Padding& padding, const tbf::PackedRows& packed, Address stream) {
        tbf::sequence_layout_cuda(padding, packed, at<void>(stream));
      },
      "padding"_a, "packed"_a, "stream"_a, unlocked);
  m.def(
      "block_mask_kinds_cuda",
      [](const tbf::Pattern& pattern, Address kinds, Address stream) {
        tbf::block_mask_kinds_cuda(pattern, at<uint8_t>(kinds), at<void>(stream));
      },
      "pattern"_a, "kinds"_a, "stream"_a, unlocked);
  m.def(
      "block_mask_fill_cuda",
      [](const tbf::Pattern& pattern, const tbf::PatternLists& lists, Address cells,
         Address stream) {
        tbf::block_mask_fill_cuda(pattern, lists, at<uint32_t>(cells), at<void>(stream));
      },
      "pattern"_a, "lists"_a, "cells"_a, "stream"_a, unlocked);
#endif
}
