// The matrix kernels: polar factors, square roots and their adjoint, Gaussian distances from samples.
#include "exercise.h"

// Symmetric (batch, d, d) of rank `rank`, as products of rows.
template <class T>
std::vector<T> semidefinite(int64_t batch, int64_t d, int64_t rank) {
    std::vector<T> rows = uniform<T>(batch * rank * d), result(batch * d * d);
    for (int64_t b = 0; b < batch; ++b) {
        for (int64_t i = 0; i < d; ++i) {
            for (int64_t j = 0; j <= i; ++j) {
                T sum = 0;
                for (int64_t k = 0; k < rank; ++k) sum += rows[(b * rank + k) * d + i] * rows[(b * rank + k) * d + j];
                result[(b * d + i) * d + j] = result[(b * d + j) * d + i] = sum;
            }
        }
    }
    return result;
}

template <class T>
void polar(int64_t batch, int64_t n, int64_t m, int threads) {
    std::vector<T> matrix = uniform<T>(batch * n * m), factor(matrix.size()), norm(batch);
    PolarArgs<T> args{};
    args.matrix = matrix.data();
    args.polar = factor.data();
    args.nuclear_norm = norm.data();
    args.batch = batch;
    args.n = n;
    args.m = m;
    args.threads = threads;
    Workspace workspace(kernels().of<T>().polar_workspace_bytes(args));
    args.workspace = static_cast<unsigned char*>(workspace.memory);
    kernels().of<T>().polar_fwd(args);
    check_finite(factor, "polar");
    check_finite(norm, "nuclear_norm");
}

template <class T>
void sqrtm(int64_t batch, int64_t d, int64_t rank, bool inverse, SqrtmAlgorithm algorithm, int threads) {
    std::vector<T> matrix = semidefinite<T>(batch, d, rank), root(matrix.size()), grad = uniform<T>(matrix.size());
    std::vector<T> grad_matrix(matrix.size()), aux(batch * sqrtm_aux_size(algorithm, d));
    std::vector<unsigned char> unsolved(batch);
    SqrtmArgs<T> args{};
    args.matrix = matrix.data();
    args.root = root.data();
    args.aux = aux.data();
    args.unsolved = unsolved.data();
    args.batch = batch;
    args.d = d;
    args.inverse = inverse;
    args.algorithm = algorithm;
    args.threads = threads;
    SqrtmArgs<T> asked = args;  // as the bindings ask, which know neither
    asked.batch = 1;
    asked.inverse = false;
    Workspace forward(kernels().of<T>().sqrtm_workspace_bytes(asked, false));
    Workspace backward(kernels().of<T>().sqrtm_workspace_bytes(asked, true));
    args.workspace = static_cast<unsigned char*>(forward.memory);
    kernels().of<T>().sqrtm_fwd(args);
    bool solved = true;
    for (unsigned char mark : unsolved) solved &= mark == 0;
    if (solved) check_finite(root, "root");
    args.grad_root = grad.data();
    args.grad_matrix = grad_matrix.data();
    args.workspace = static_cast<unsigned char*>(backward.memory);
    kernels().of<T>().sqrtm_bwd(args);
    for (unsigned char mark : unsolved) solved &= mark == 0;
    if (solved) check_finite(grad_matrix, "grad_matrix");
}

template <class T>
void gaussian_samples(const Shape& s, int threads) {
    std::vector<T> x = uniform<T>(s.batch * s.n * s.d), y = uniform<T>(s.batch * s.m * s.d), value(s.batch);
    std::vector<T> grad_x(x.size()), grad_y(y.size());
    GaussianSamplesArgs<T> args{};
    args.x = x.data();
    args.y = y.data();
    args.value = value.data();
    args.grad_x = grad_x.data();
    args.grad_y = grad_y.data();
    args.batch = s.batch;
    args.n = s.n;
    args.m = s.m;
    args.d = s.d;
    args.threads = threads;
    Workspace workspace(kernels().of<T>().gaussian_samples_workspace_bytes(args));
    args.workspace = static_cast<unsigned char*>(workspace.memory);
    kernels().of<T>().gaussian_samples(args);
    check_finite(value, "gaussian value");
    check_finite(grad_x, "gaussian grad_x");
    check_finite(grad_y, "gaussian grad_y");
}

template <class T>
void exercise(int threads) {
    for (int64_t batch : {1, 3, 20}) {
        polar<T>(batch, 7, 5, threads);
        polar<T>(batch, 5, 33, threads);
        if (batch < 20) polar<T>(batch, 49, 49, threads);
        for (int64_t d : {1, 5, 17, 50}) {
            if (batch == 20 && d == 50) continue;
            for (int64_t rank : {d + 3, (d + 1) / 2}) {
                for (bool inverse : {false, true}) {
                    if (d <= 17) sqrtm<T>(batch, d, rank, inverse, SqrtmAlgorithm::jacobi, threads);
                    sqrtm<T>(batch, d, rank, inverse, SqrtmAlgorithm::polar, threads);
                    sqrtm<T>(batch, d, rank, inverse, SqrtmAlgorithm::tridiagonal, threads);
                }
            }
        }
    }
    for (int64_t d : {97, 130}) sqrtm<T>(3, d, d == 97 ? d + 3 : d / 2, false, SqrtmAlgorithm::tridiagonal, threads);
    // one row, few rows, more rows than features, small problems side by side, large ones
    for (const Shape& shape : std::vector<Shape>{{1, 1, 1, 1}, {2, 1, 4, 3}, {3, 9, 7, 2}, {20, 16, 15, 37}, {2, 49, 33, 70}, {2, 90, 70, 40}, {20, 30, 20, 5}}) {
        gaussian_samples<T>(shape, threads);
    }
}

int main(int count, char** names) {
    return each_set(count, names, [](int threads) {
        exercise<float>(threads);
        exercise<double>(threads);
    });
}
