// Roots of semidefinite matrices from eigenvalues and eigenvectors in double, two vectors of matrices at a time (lane_eigen.h):
//
//   A^(1/2) = sum_k s_k v_k v_k^T,   A^(-1/2) = sum v_k v_k^T / s_k over the s_k above rounding (the pseudo-inverse)
//
// In double, because eigenvalues of a float matrix in float are off by its rounding times the largest one. The adjoint divides the gradient in
// the eigenbasis, V G V^T, by s_k + s_l, except between two directions whose eigenvalues are below the rounding of A's entries; indefinite and
// singular matrices are solved as the reference solves them. Composition and adjoint by products on panels, 7 n^3 operations.
#pragma once
#include "lane_eigen.h"
#include "magnitude.h"
#include "otkd_fast/sqrtm.h"
#include "panels.h"
#include "transpose.h"

namespace otkd_fast {
namespace OTKD_ISA {
namespace {

// The root from eigenvalues and eigenvectors, and what the adjoint needs of them.
template <class T>
struct EigenRoot {
    int64_t n;
    Panels<T> factor, root;

    EigenRoot(int64_t size, Arena& memory) : n(size) {
        const int64_t rows = round_up(n, kPanel<T>);
        for (Panels<T>* piece : {&factor, &root}) *piece = {memory.take<T>(rows * rows), rows};
    }

    // Root of matrix `index` and the last row of its aux, from eigenvectors in the rows of `factor` and eigenvalues `step` apart of the matrix over 2^exponent;
    // broken: NaN where that is not finite, else 0.
    void finish(const SqrtmArgs<T>& args, int64_t index, const double* values, int64_t step, int exponent, T broken) const {
        T* roots = args.aux + index * (n + 1) * n + n * n;
        double squares = 0;
        for (int64_t k = 0; k < n; ++k) squares += values[k * step] * values[k * step];
        // reference/sqrtm.py says why the gradient has a level of its own, reference/psd_factor.py what float64 needs more
        const double root_n = std::sqrt(static_cast<double>(n));
        const double share = sizeof(T) == sizeof(double) ? 2 + root_n / 4 : args.inverse ? 1.0 : std::fmin(0.5, 1 / root_n);
        const double level = share * std::numeric_limits<T>::epsilon() * std::sqrt(squares);
        for (int64_t k = 0; k < n; ++k) {
            const double value = values[k * step];
            const bool kept = value > level;
            const double scaled = std::ldexp(value > 0 ? std::sqrt(value) : 0.0, exponent / 2);
            roots[k] = static_cast<T>(kept ? scaled : -scaled) + broken;
            const double weight = args.inverse ? (kept ? 1 / scaled : 0.0) : scaled;
            scale_row(k, static_cast<T>(std::sqrt(weight)) + broken);
        }
        multiply_symmetric(factor, factor, root, n, FullDepth{n}, Team{0, 1, nullptr}, [](Vec<T> sum, int64_t) { return sum; });
        store_panels(root, n, n, false, args.root + index * n * n);
    }

  private:
    void scale_row(int64_t k, T weight) const {
        for (int64_t p = 0; p < panels_of<T>(n); ++p) {
            T* row = factor.data + p * factor.stride() + k * kPanel<T>;
            for (int v = 0; v < kPanel<T>; v += width<T>) store(row + v, load(row + v) * weight);
        }
    }
};

template <class T>
struct TridiagonalRoot {
    // a float matrix does not tell couplings of this size from 0
    static constexpr double kNegligible = sizeof(T) == sizeof(float) ? 1e-13 : std::numeric_limits<double>::epsilon();
    static constexpr int64_t kMatrices = LaneEigen::kMatrices;

    int64_t n;
    LaneEigen eigen;
    T* vectors;  // (n, n, width<double>): eigenvectors in rows
    EigenRoot<T> composer;
    int exponent[kMatrices];
    T broken[kMatrices];  // NaN where the matrix is not finite, else 0

    TridiagonalRoot(int64_t size, Arena& memory)
        : n(size), eigen(size, kNegligible, memory), vectors(memory.take<T>(n * n * width<double>)), composer(size, memory) {}

    // Matrices [begin, begin + count) of the batch.
    void forward(const SqrtmArgs<T>& args, int64_t begin, int64_t count) {
        for (int64_t m = 0; m < kMatrices; ++m) read(m < count ? args.matrix + (begin + m) * n * n : nullptr, m);
        const bool solved = eigen.solve();
        for (int64_t g = 0; g * width<double> < count; ++g) {
            const int64_t first = g * width<double>, left = count - first;
            store_vectors(eigen.groups[g].q, args.aux + (begin + first) * (n + 1) * n, left < width<double> ? left : width<double>);
        }
        for (int64_t m = 0; m < count; ++m) {
            args.unsolved[begin + m] = !solved;
            load_panels(args.aux + (begin + m) * (n + 1) * n, n, n, false, PowerOfTwo<T>(0), composer.factor);
            const double* values = eigen.groups[m / width<double>].diagonal + m % width<double>;
            composer.finish(args, begin + m, values, width<double>, exponent[m], broken[m]);
        }
    }

  private:
    void read(const T* matrix, int64_t m) {
        const Lanes<double>& q = eigen.groups[m / width<double>].q;
        double* out = q.data + m % width<double>;
        const T largest = matrix ? largest_magnitude(matrix, n * n) : T(0);
        broken[m] = largest - largest;
        exponent[m] = (exponent_of(largest) + 1) / 2 * 2;
        const bool use = matrix && broken[m] == 0;
        const PowerOfTwo<double> scale(-exponent[m]);
        for (int64_t i = 0; i < n; ++i) {
            for (int64_t j = i; j < n; ++j) {
                const double mean = use ? 0.5 * (matrix[i * n + j] * scale.first + matrix[j * n + i] * scale.first) * scale.second : 0.0;
                out[(i * n + j) * width<double>] = mean;
            }
        }
    }

    void store_vectors(const Lanes<double>& q, T* aux, int64_t count) const {
        typedef T Part __attribute__((vector_size(width<double> * sizeof(T))));
        for (int64_t i = 0; i < n; ++i) {
            for (int64_t k = 0; k < n; ++k) {
                const Part entry = __builtin_convertvector(q.get(i, k), Part);
                std::memcpy(vectors + (k * n + i) * width<double>, &entry, sizeof entry);
            }
        }
        transpose(vectors, int64_t{width<double>}, aux, (n + 1) * n, n * n, count);
    }
};

template <class T>
struct TridiagonalAdjoint {
    int64_t n;
    Panels<T> rows, columns, product, result;  // eigenvectors in rows and in columns
    T *roots, *kept;                           // (rows,): scaled roots of the eigenvalues; 1 where they are above rounding, else 0
    int exponent = 0;

    TridiagonalAdjoint(int64_t size, Arena& memory) : n(size) {
        const int64_t padded = round_up(n, kPanel<T>);
        for (Panels<T>* piece : {&rows, &columns, &product, &result}) *piece = {memory.take<T>(padded * padded), padded};
        roots = memory.take<T>(padded);
        kept = memory.take<T>(padded);
    }

    // One matrix by the whole team.
    void solve(const SqrtmArgs<T>& args, int64_t index, const Team& team) {
        const T *aux = args.aux + index * (n + 1) * n, *grad = args.grad_root + index * n * n;
        const auto keep = [](Vec<T> sum, int64_t) { return sum; };
        if (team.rank == 0) {
            args.unsolved[index] = std::isinf(aux[n * n]);
            read(aux, grad);
        }
        team.barrier();
        multiply(result, columns, product, n, n, FullDepth{n}, team, keep);
        team.barrier();
        multiply_symmetric(columns, product, result, n, FullDepth{n}, team, keep);
        team.barrier();
        if (team.rank == 0) divide(args.inverse);
        team.barrier();
        multiply(result, rows, product, n, n, FullDepth{n}, team, keep);
        team.barrier();
        multiply_symmetric(rows, product, result, n, FullDepth{n}, team, keep);
        team.barrier();
        if (team.rank == 0) {
            T* out = args.grad_matrix + index * n * n;
            store_panels(result, n, n, false, out);
            const PowerOfTwo<T> back(args.inverse ? -3 * exponent : -exponent);
            for (int64_t k = 0; k < n * n; ++k) out[k] = out[k] * back.first * back.second;
        }
        team.barrier();
    }

  private:
    void read(const T* aux, const T* grad) {
        for (const Panels<T>& piece : {product, result}) std::memset(piece.data, 0, panels_of<T>(n) * piece.stride() * sizeof(T));
        load_panels(aux, n, n, false, PowerOfTwo<T>(0), rows);
        load_panels(aux, n, n, true, PowerOfTwo<T>(0), columns);
        for (int64_t i = 0; i < n; ++i) {
            for (int64_t j = 0; j <= i; ++j) result.at(i, j) = result.at(j, i) = (grad[i * n + j] + grad[j * n + i]) / 2;
        }
        exponent = exponent_of(largest_magnitude(aux + n * n, n));
        const PowerOfTwo<T> scale(-exponent);
        for (int64_t k = 0; k < rows.rows; ++k) {
            const T root = k < n ? aux[n * n + k] : T(0);
            roots[k] = std::fabs(root) * scale.first * scale.second;
            kept[k] = root > 0;
        }
    }

    // result, in the eigenbasis, over s_k + s_l, or -s_k s_l (s_k + s_l); 0 where that is a rounded 0
    void divide(bool inverse) const {
        for (int64_t p = 0; p < panels_of<T>(n); ++p) {
            for (int64_t k = 0; k < n; ++k) {
                const Vec<T> root = splat(roots[k]), own = splat(kept[k]), zero = {}, one = splat(T(1));
                T* row = result.data + p * result.stride() + k * kPanel<T>;
                for (int v = 0; v < kPanel<T>; v += width<T>) {
                    const Vec<T> other = load(roots + p * kPanel<T> + v), mark = load(kept + p * kPanel<T> + v);
                    const VecInt<T> use = inverse ? own * mark > zero : own + mark > zero;
                    const Vec<T> sum = root + other, divisor = inverse ? -(root * other * sum) : sum;
                    store(row + v, use ? load(row + v) / (use ? divisor : one) : (root + other) * zero);
                }
            }
        }
    }
};

}  // namespace
}  // namespace OTKD_ISA
}  // namespace otkd_fast
