// Sinkhorn between points without a cost matrix, and plans applied.
#include "exercise.h"

// Points, whose costs are computed block by block, kept or not; and the plan applied.
template <class T>
void sinkhorn_points(const Shape& s, int threads, Metric metric, double epsilon, Gradient gradient, bool stored) {
    std::vector<T> x = uniform<T>(s.batch * s.n * s.d), y = uniform<T>(s.batch * s.m * s.d), grad_x(x.size()), grad_y(y.size());
    std::vector<T> f(s.batch * s.n), g(s.batch * s.m), transport(s.batch), dual(s.batch), error(s.batch), ones(s.batch, T(1));
    SinkhornPointsArgs<T> args{};
    args.x = x.data();
    args.y = y.data();
    args.batch = s.batch;
    args.n = s.n;
    args.m = s.m;
    args.d = s.d;
    args.metric = metric;
    args.stored = stored;
    args.num_iters = 3;
    args.keep = kept_for(gradient);
    args.epsilon = epsilon;
    args.threads = threads;
    std::vector<double> history(s.batch * history_stride(args));
    args.history = history.data();
    args.transport_cost = transport.data();
    args.regularized_cost = dual.data();
    args.f = f.data();
    args.g = g.data();
    args.marginal_error = error.data();
    const auto& run = kernels().of<T>();
    args.need_x = args.need_y = true;
    args.gradient = gradient;
    Workspace forward(run.sinkhorn_points_workspace_bytes(args, false)), backward(run.sinkhorn_points_workspace_bytes(args, true));
    args.workspace = static_cast<unsigned char*>(forward.memory);
    run.sinkhorn_points_fwd(args);
    args.grad_transport_cost = gradient == Gradient::envelope ? nullptr : ones.data();
    args.grad_regularized_cost = gradient == Gradient::detach ? nullptr : ones.data();
    args.grad_x = grad_x.data();
    args.grad_y = grad_y.data();
    args.workspace = static_cast<unsigned char*>(backward.memory);
    run.sinkhorn_points_bwd(args);
    check_finite(transport, "points transport_cost");
    check_finite(grad_x, "points grad_x");
    check_finite(grad_y, "points grad_y");

    const int64_t columns = 3;
    std::vector<T> v = uniform<T>(s.batch * s.m * columns), out(s.batch * s.n * columns), grad_out = uniform<T>(out.size());
    PlanApplyArgs<T> apply{};
    apply.x = x.data();
    apply.y = y.data();
    apply.f = f.data();
    apply.g = g.data();
    apply.v = v.data();
    apply.out = out.data();
    apply.batch = s.batch;
    apply.n = s.n;
    apply.m = s.m;
    apply.d = s.d;
    apply.columns = columns;
    apply.metric = metric;
    apply.epsilon = epsilon;
    apply.threads = threads;
    apply.need_x = apply.need_y = true;
    apply.grad_out = grad_out.data();
    apply.grad_x = grad_x.data();
    apply.grad_y = grad_y.data();
    Workspace applying(run.plan_apply_workspace_bytes(apply, false)), back(run.plan_apply_workspace_bytes(apply, true));
    apply.workspace = static_cast<unsigned char*>(applying.memory);
    run.plan_apply(apply);
    apply.workspace = static_cast<unsigned char*>(back.memory);
    run.plan_apply_bwd(apply);
    check_finite(out, "plan_apply");
    check_finite(grad_x, "plan_apply grad_x");
}

template <class T>
void exercise(int threads) {
    for (const Shape& shape : std::vector<Shape>{{1, 1, 1, 1}, {2, 17, 33, 5}, {1, 130, 67, 20}}) {
        for (Metric metric : {Metric::l1, Metric::l2, Metric::sqeuclidean, Metric::cosine}) {
            const bool all = metric == Metric::l1;  // the ways of solving are the same with every metric
            for (double epsilon : {0.5, 0.0005}) {
                for (Gradient gradient : {Gradient::unroll, Gradient::envelope, Gradient::last_step}) {
                    if (!all && gradient == Gradient::last_step) continue;
                    for (bool stored : {true, false}) sinkhorn_points<T>(shape, threads, metric, epsilon, gradient, stored);
                }
            }
        }
    }
}

int main(int count, char** names) {
    return each_set(count, names, [](int threads) {
        exercise<float>(threads);
        exercise<double>(threads);
    });
}
