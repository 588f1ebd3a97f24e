// Sinkhorn with one cost for a batch of marginals.
#include "exercise.h"

struct Case {
    double epsilon;
    Gradient gradient;
    double tol = 0, relaxation = 1, penalty_a = kNone, penalty_b = kNone;
    bool warm = false, turned = false, uniform_b = false, holes = false;
};

template <class T>
struct Solve {
    std::vector<T> cost, a, b, f, g, initial_f, initial_g, transport, dual, error, ones, grad_cost, grad_a, grad_b, blocks;
    std::vector<double> apart, methods;
    std::vector<int64_t> iterations, left;
    SinkhornSharedArgs<T> args{};

    Solve(const Shape& s, const Case& c, int threads)
        : cost(uniform<T>(s.n * s.m)), a(masses<T>(s.batch, s.n, c.holes)), b(masses<T>(s.batch, s.m, c.holes)), f(a.size()),
          g(b.size()), initial_f(uniform<T>(a.size())), initial_g(uniform<T>(b.size())), transport(s.batch), dual(s.batch),
          error(s.batch), ones(s.batch, T(1)), grad_cost(cost.size()), grad_a(a.size()), grad_b(b.size()),
          methods(s.batch, -1), iterations(s.batch), left(s.batch) {
        args.cost = cost.data();
        args.cost_transposed = c.turned;
        args.a = a.data();
        args.b = c.uniform_b ? nullptr : b.data();
        args.initial_f = c.warm ? initial_f.data() : nullptr;
        args.initial_g = c.warm ? initial_g.data() : nullptr;
        args.batch = args.count = s.batch;
        args.n = s.n;
        args.m = s.m;
        args.num_iters = 5;
        args.keep = kept_for(c.gradient);
        args.epsilon = c.epsilon;
        args.penalty_a = c.penalty_a;
        args.penalty_b = c.penalty_b;
        args.threads = threads;
        const int64_t kept[] = {0, 1, args.num_iters, 2}, scalings = kept[static_cast<int>(args.keep)] * (s.n + s.m);
        blocks.resize((s.batch + kSharedLanes - 1) / kSharedLanes * kSharedLanes * scalings);
        apart.resize(s.batch * (scalings + kHistoryHeader));
        args.blocks = blocks.data();
        args.apart = apart.data();
        args.apart_stride = scalings + kHistoryHeader;
        args.iterations = iterations.data();
        args.methods = methods.data();
    }

    void forward(const Case& c) {
        args.tol = c.tol;
        args.relaxation = c.relaxation;
        args.left = left.data();
        args.transport_cost = transport.data();
        args.regularized_cost = dual.data();
        args.f = f.data();
        args.g = g.data();
        args.marginal_error = error.data();
        std::vector<int64_t> problems;
        for (Method method : {Method::scaling_float, Method::scaling_double}) {
            if (method == Method::scaling_float && sizeof(T) == sizeof(double)) continue;
            args.method = method;
            args.problems = problems.empty() ? nullptr : problems.data();
            std::vector<int64_t> next(args.count);
            args.left = next.data();
            const Workspace workspace(kernels().of<T>().sinkhorn_shared_workspace_bytes(args, false));
            args.workspace = workspace.bytes();
            const std::vector<int64_t> asked = problems;
            const int64_t count = kernels().of<T>().sinkhorn_shared_fwd(args);
            mark(asked, next, count, method);
            if (count == 0) break;
            next.resize(count);
            problems.swap(next);
            args.count = count;
        }
        for (size_t k = 0; k < methods.size(); ++k) {
            if (methods[k] >= 0 && !std::isfinite(transport[k])) std::printf("shared transport_cost: not finite\n"), std::exit(1);
        }
    }

    void mark(const std::vector<int64_t>& asked, const std::vector<int64_t>& left_over, int64_t count, Method method) {
        std::vector<bool> open(methods.size(), false);
        for (int64_t k = 0; k < count; ++k) open[left_over[k]] = true;
        for (size_t k = 0; k < (asked.empty() ? methods.size() : asked.size()); ++k) {
            const int64_t problem = asked.empty() ? static_cast<int64_t>(k) : asked[k];
            if (!open[problem]) methods[problem] = static_cast<int>(method);
        }
    }

    void backward(const Case& c) {
        args.tol = 0;
        args.relaxation = 1;
        args.gradient = c.gradient;
        args.problems = nullptr;
        args.count = args.batch;
        args.grad_transport_cost = c.gradient == Gradient::envelope ? nullptr : ones.data();
        args.grad_regularized_cost = c.gradient == Gradient::detach ? nullptr : ones.data();
        const bool every = (c.gradient == Gradient::unroll || c.gradient == Gradient::last_step) && !c.holes;
        args.grad_f = every ? initial_f.data() : nullptr;
        args.grad_g = every ? initial_g.data() : nullptr;
        args.grad_cost = c.turned ? nullptr : grad_cost.data();
        args.grad_a = c.gradient == Gradient::detach ? nullptr : grad_a.data();
        args.grad_b = c.gradient == Gradient::detach || c.uniform_b ? nullptr : grad_b.data();
        for (Method method : {Method::scaling_float, Method::scaling_double}) {
            if (method == Method::scaling_float && sizeof(T) == sizeof(double)) continue;
            args.method = method;
            const Workspace workspace(kernels().of<T>().sinkhorn_shared_workspace_bytes(args, true));
            args.workspace = workspace.bytes();
            kernels().of<T>().sinkhorn_shared_bwd(args);
        }
        check_finite(grad_cost, "shared grad_cost");
        check_finite(grad_a, "shared grad_a");
        check_finite(grad_b, "shared grad_b");
    }
};

std::vector<Case> cases() {
    std::vector<Case> all;
    for (double epsilon : {0.1, 0.01, 0.0001}) {  // in the type of the data, in double, not at all
        for (Gradient gradient : {Gradient::unroll, Gradient::envelope, Gradient::detach, Gradient::last_step}) {
            all.push_back({epsilon, gradient});
        }
        for (double relaxation : {1.5, 0.0}) all.push_back({epsilon, Gradient::envelope, 1e-3, relaxation});
        Case penalties{epsilon, Gradient::unroll};
        penalties.penalty_a = penalties.penalty_b = 1;
        penalties.uniform_b = true;
        all.push_back(penalties);
        Case holes{epsilon, Gradient::unroll, 1e-3};
        holes.warm = holes.holes = holes.turned = true;
        all.push_back(holes);
    }
    return all;
}

template <class T>
void exercise(int threads) {
    for (const Shape& shape : std::vector<Shape>{{1, 1, 1, 0}, {5, 3, 7, 0}, {37, 17, 33, 0}, {70, 130, 70, 0}}) {
        for (const Case& c : cases()) {
            Solve<T> solve(shape, c, threads);
            solve.forward(c);
            solve.backward(c);
        }
    }
}

int main(int count, char** names) {
    return each_set(count, names, [](int threads) {
        exercise<float>(threads);
        exercise<double>(threads);
    });
}
