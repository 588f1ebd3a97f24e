// Roots of larger semidefinite matrices, one at a time, from eigenvalues in double and eigenvectors in T: tridiagonal form (tridiagonal_form.h), its
// eigenvectors by halves (divide_conquer.h), the way back, V^T s V. The tridiagonal form and all that decides eigenvalues is in double, for
// sqrtm_tridiagonal.h's reason; vectors of T are orthogonal to its rounding, which moves the root by no more than that. 4 n^3 / 3 operations in double,
// about 6 n^3 in T, all of these in products on panels.
#pragma once
#include "divide_conquer.h"
#include "sqrtm_tridiagonal.h"
#include "tridiagonal_form.h"

namespace otkd_fast {
namespace OTKD_ISA {
namespace {

template <class T>
struct HalvesRoot {
    int64_t n, rows;
    MatrixForm form;
    EigenRoot<T> composer;
    Panels<T> weights, reflectors, small, share, weighted;
    double* triangle;
    DivideConquer<T> halves;

    HalvesRoot(int64_t size, Arena& memory)
        : n(size), rows(round_up(n, kPanel<T>)), form(size, memory), composer(size, memory),
          weights(panels(n + 2 * DivideConquer<T>::kUnit, memory)), reflectors(panels(WayBack<T>::kWide, memory)),
          small(panels(WayBack<T>::kWide, memory)), share(panels(WayBack<T>::kWide, memory)), weighted(panels(WayBack<T>::kWide, memory)),
          triangle(memory.take<double>(WayBack<T>::kWide * WayBack<T>::kWide)),
          halves(size, composer.factor, composer.root, weights, memory) {}

    void forward(const SqrtmArgs<T>& args, int64_t index) {
        const T* matrix = args.matrix + index * n * n;
        const T largest = largest_magnitude(matrix, n * n), broken = largest - largest;
        const int exponent = (exponent_of(largest) + 1) / 2 * 2;
        read(matrix, broken == 0, exponent);
        form.reduce();
        args.unsolved[index] = !halves.solve(form.diagonal, form.coupling);
        WayBack<T>{form, composer.root, reflectors, small, share, weighted, triangle}.run(composer.factor);
        store_panels(composer.factor, n, n, false, args.aux + index * (n + 1) * n);
        composer.finish(args, index, halves.values, 1, exponent, broken);
    }

  private:
    Panels<T> panels(int64_t columns, Arena& memory) const { return {memory.take<T>(rows * round_up(columns, kPanel<T>)), rows}; }

    // The symmetric part over 2^exponent, or 0
    void read(const T* matrix, bool use, int exponent) const {
        const PowerOfTwo<double> scale(-exponent);
        std::memset(form.a, 0, form.size * form.ld * sizeof(double));
        for (int64_t i = 0; use && i < n; ++i) {
            for (int64_t j = 0; j <= i; ++j) {
                const double mean = 0.5 * (matrix[i * n + j] * scale.first + matrix[j * n + i] * scale.first) * scale.second;
                form.a[i * form.ld + j] = form.a[j * form.ld + i] = mean;
            }
        }
    }
};

}  // namespace
}  // namespace OTKD_ISA
}  // namespace otkd_fast
