// Sinkhorn on a dense cost: problems by themselves, shared by threads, and many small ones in the lanes of vectors.
#include "exercise.h"

struct Case {
    double epsilon;
    Gradient gradient;
    double tol = 0, relaxation = 1, penalty_a = kNone, penalty_b = kNone;
    bool warm = false, uniform_masses = false, holes = false, forbidden = false;
};

template <class T>
struct Solve {
    std::vector<T> cost, a, b, f, g, initial_f, initial_g, transport, dual, error, grad_cost, grad_a, grad_b;
    std::vector<int64_t> iterations;
    std::vector<double> history;
    SinkhornArgs<T> args{};

    Solve(const Shape& s, const Case& c, int threads)
        : cost(uniform<T>(s.batch * s.n * s.m)), a(masses<T>(s.batch, s.n, c.holes)), b(masses<T>(s.batch, s.m, c.holes)),
          f(a.size()), g(b.size()), initial_f(uniform<T>(a.size())), initial_g(uniform<T>(b.size())), transport(s.batch),
          dual(s.batch), error(s.batch), grad_cost(cost.size()), grad_a(a.size()), grad_b(b.size()), iterations(s.batch) {
        for (size_t k = 1; c.forbidden && k < cost.size(); k += s.m + 1) cost[k] = std::numeric_limits<T>::infinity();
        args.cost = cost.data();
        args.a = c.uniform_masses ? nullptr : a.data();
        args.b = c.uniform_masses ? nullptr : b.data();
        args.initial_f = c.warm ? initial_f.data() : nullptr;
        args.initial_g = c.warm ? initial_g.data() : nullptr;
        args.batch = s.batch;
        args.n = s.n;
        args.m = s.m;
        args.num_iters = c.tol > 0 ? 12 : 5;
        args.keep = kept_for(c.gradient);
        args.epsilon = c.epsilon;
        args.penalty_a = c.penalty_a;
        args.penalty_b = c.penalty_b;
        args.threads = threads;
        args.together = many_small(args);
        history.resize(s.batch * history_stride(args));
        args.history = history.data();
    }

    void forward(const Case& c) {
        args.tol = c.tol;
        args.relaxation = c.relaxation;
        args.transport_cost = transport.data();
        args.regularized_cost = dual.data();
        args.f = f.data();
        args.g = g.data();
        args.marginal_error = error.data();
        args.iterations = iterations.data();
        const Workspace workspace(kernels().of<T>().sinkhorn_workspace_bytes(args, false));
        args.workspace = workspace.bytes();
        kernels().of<T>().sinkhorn_fwd(args);
        check_finite(transport, "transport_cost");
        check_finite(dual, "regularized_cost");
        check_finite(error, "marginal_error");
    }

    void backward(const Case& c) {
        args.tol = 0;
        args.relaxation = 1;
        args.gradient = c.gradient;
        const bool every = c.gradient != Gradient::envelope && c.gradient != Gradient::detach;
        args.grad_transport_cost = c.gradient == Gradient::envelope ? nullptr : transport.data();
        args.grad_regularized_cost = c.gradient == Gradient::detach ? nullptr : transport.data();
        args.grad_f = every && !c.holes ? initial_f.data() : nullptr;
        args.grad_g = every && !c.holes ? initial_g.data() : nullptr;
        args.grad_cost = grad_cost.data();
        args.grad_a = c.gradient == Gradient::detach ? nullptr : grad_a.data();
        args.grad_b = c.gradient == Gradient::detach ? nullptr : grad_b.data();
        const Workspace workspace(kernels().of<T>().sinkhorn_workspace_bytes(args, true));
        args.workspace = workspace.bytes();
        kernels().of<T>().sinkhorn_bwd(args);
        check_finite(grad_cost, "grad_cost");
        check_finite(grad_a, "grad_a");
        check_finite(grad_b, "grad_b");
    }
};

// Every way of solving with every gradient, and every option with one of them.
std::vector<Case> cases() {
    std::vector<Case> all;
    for (double epsilon : {0.1, 0.005, 0.00005}) {  // float scalings, double scalings, log domain
        for (Gradient gradient : {Gradient::unroll, Gradient::envelope, Gradient::last_step}) all.push_back({epsilon, gradient});
        for (double relaxation : {1.5, 0.0}) all.push_back({epsilon, Gradient::envelope, 1e-3, relaxation});
        Case penalties{epsilon, Gradient::unroll};
        penalties.penalty_a = 1;
        all.push_back(penalties);
        Case holes{epsilon, Gradient::unroll, 1e-3};
        holes.warm = holes.holes = holes.forbidden = true;
        all.push_back(holes);
    }
    all.push_back({0.1, Gradient::detach});
    all.push_back({0.1, Gradient::implicit});
    Case even{0.1, Gradient::unroll};
    even.uniform_masses = true;
    all.push_back(even);
    return all;
}

template <class T>
void exercise(int threads) {
    // single entries, tails in every direction, a batch; few and many small problems, in one and in several vectors
    for (const Shape& shape : std::vector<Shape>{{1, 1, 1, 0}, {2, 17, 33, 0}, {1, 90, 64, 0}, {4, 3, 5, 0}, {70, 3, 5, 0}, {18, 16, 17, 0}}) {
        for (const Case& c : cases()) {
            Solve<T> solve(shape, c, threads);
            solve.forward(c);
            solve.backward(c);
        }
    }
    // large enough for threads to share it
    if (threads == 1) return;
    for (const Case& c : {Case{0.1, Gradient::unroll}, Case{0.00005, Gradient::unroll}, Case{0.1, Gradient::implicit}}) {
        Solve<T> solve({1, 513, 515, 0}, c, threads);
        solve.forward(c);
        solve.backward(c);
    }
}

int main(int count, char** names) {
    return each_set(count, names, [](int threads) {
        exercise<float>(threads);
        exercise<double>(threads);
    });
}
