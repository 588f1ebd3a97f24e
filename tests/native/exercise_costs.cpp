// Cost matrices and feature moments.
#include "exercise.h"

template <class T>
void cost_matrix(const Shape& s, int threads, Metric metric, double temperature) {
    std::vector<T> x = uniform<T>(s.batch * s.n * s.d), y = uniform<T>(s.batch * s.m * s.d), cost(s.batch * s.n * s.m);
    std::vector<T> grad = uniform<T>(cost.size()), grad_x(x.size()), grad_y(y.size());
    CostMatrixArgs<T> args{};
    args.x = x.data();
    args.y = y.data();
    args.cost = cost.data();
    args.batch = s.batch;
    args.n = s.n;
    args.m = s.m;
    args.d = s.d;
    args.x_batch_stride = s.n * s.d;
    args.y_batch_stride = s.m * s.d;
    args.metric = metric;
    args.temperature_x = args.temperature_y = temperature;
    args.threads = threads;
    Workspace forward(cost_matrix_workspace(args, false) * sizeof(T)), backward(cost_matrix_workspace(args, true) * sizeof(T));
    args.workspace = static_cast<T*>(forward.memory);
    kernels().of<T>().cost_matrix_fwd(args);
    args.workspace = static_cast<T*>(backward.memory);
    args.grad_cost = grad.data();
    args.grad_x = grad_x.data();
    args.grad_y = grad_y.data();
    kernels().of<T>().cost_matrix_bwd(args);
    check_finite(cost, "cost");
    check_finite(grad_x, "grad_x");
    check_finite(grad_y, "grad_y");
}

#include "exercise_moments.h"

template <class T>
void exercise(int threads) {
    // single entries, tails in every direction, a batch, one problem large enough for the threads to share
    const std::vector<Shape> shapes{{1, 1, 1, 1}, {1, 3, 5, 2}, {2, 17, 33, 100}, {3, 9, 64, 300}, {1, 130, 135, 20}, {18, 16, 16, 3}};
    for (const Shape& shape : shapes) {
        for (Metric metric : {Metric::l1, Metric::l2, Metric::sqeuclidean, Metric::cosine}) {
            for (double temperature : {0.0, 2.0}) cost_matrix<T>(shape, threads, metric, temperature);
        }
    }
    for (int64_t inner : {1, 3, 40}) {
        feature_moments<T>(1, 1, 1, inner, 1, threads);
        feature_moments<T>(37, 7, 9, inner, 4, threads);
        feature_moments<T>(2, 100, 70, inner, 1, threads);
        feature_moments<T>(21, 7, 7, inner, 1, threads);
    }
}

int main(int count, char** names) {
    return each_set(count, names, [](int threads) {
        exercise<float>(threads);
        exercise<double>(threads);
    });
}
