// The operands of a student's and a teacher's scores of one (sequence, head), as products of tiles
// take them. Included by bodies of each_isa.h, hence no include guard.

#include "tiles.h"

// How products of operands with each other take them: as fp32, times a factor; or in pairs as they
// are, and their sums get the factors. What is a sum itself is multiplied in fp32.
template <class Number>
struct TermsOf {
  using Type = Single;
};
#if TBF_DOTS
template <>
struct TermsOf<BFloat16> {
  using Type = Paired;
};
#endif

// One side of the scores, queries or keys, of student and teacher, each with its factor.
struct Side {
  Heads student, teacher;
  float a, b;
};

// `count` tokens of a side from `first` on -> the student's as fp32 rows (rows, padded), and both
// as columns. Zeros that fill up the student's last vector are overwritten by the teacher's. A
// workspace has the sizes of student and teacher, and r_rows for rows that become columns.
template <class Number, class Workspace>
void gather_columns(Single, const Side& side, const Pair& at, int64_t first, int64_t count,
                    int64_t rows, const Workspace& w, float* student, float* columns,
                    int64_t stride) {
  const int64_t C = w.student.padded, Ct = w.teacher.padded;
  gather<Number>(side.student, at, first, count, rows, w.student, side.a, student);
  transpose(student, C, rows, C, columns, stride);
  gather<Number>(side.teacher, at, first, count, rows, w.teacher, side.b, w.r_rows);
  transpose(w.r_rows, Ct, rows, Ct, columns + w.student.width * stride, stride);
}

#if TBF_DOTS
template <class Number, class Workspace>
void gather_columns(Paired, const Side& side, const Pair& at, int64_t first, int64_t count,
                    int64_t rows, const Workspace& w, float* student, float* columns,
                    int64_t stride) {
  const int64_t D = w.student.width, Dt = w.teacher.width;
  const int64_t C = whole_vectors(Paired::lanes(D)), Ct = whole_vectors(Paired::lanes(Dt));
  gather_pairs(side.student, at, first, count, rows, D, C, w.r_rows);
  gather<Number>({w.r_rows, 2 * C, 0}, {}, 0, count, rows, w.student, 1.0f, student);
  transpose(w.r_rows, C, rows, C, columns, stride);
  gather_pairs(side.teacher, at, first, count, rows, Dt, Ct, w.r_rows);
  transpose(w.r_rows, Ct, rows, Ct, columns + Paired::lanes(D) * stride, stride);
}
#endif
