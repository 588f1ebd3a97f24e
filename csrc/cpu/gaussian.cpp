// Squared 2-Wasserstein distances between the Gaussians fitted to two samples, and their gradients, in one pass over the problems
// (reference/gaussian.py):
//
//   W2^2 = |mean_x - mean_y|^2 + |X|^2 + |Y|^2 - 2 <K, P>,   dW2^2 / dx_i = 2 (X_i - (P Y)_i) / sqrt(n) + 2 (mean_x - mean_y) / n
//
// X, Y: centred rows over sqrt(n), sqrt(m) (n - 1, m - 1 if unbiased), K = X Y^T (n, m), P = polar(K) (polar_solve.h). Where n and m are both larger
// than d, K = F G^T (d, d) for triangular factors X = Q F, Y = R G (sample_factor.h), and the images are Q (P G), R (P^T F).
// Sums of squares, means and <K, P> in double; rows of a size that squares would overflow or vanish are scaled by a power of two. The mean
// over the rows of P Y is taken out of P: K's rounding gives P a part there that the derivative has not.
// 2 n m d operations for K and for each gradient, about 44 n m min(n, m) for P. A problem a thread; small K as many at a time as a vector has
// lanes; problems that do not come out even by all threads together.
#include "otkd_fast/gaussian.h"

#include "polar_solve.h"
#include "sample_factor.h"

namespace otkd_fast {
namespace OTKD_ISA {
namespace {

constexpr int64_t kParallelWork = 500 * 1000;  // multiply-adds, about 10 us of one thread

template <class T>
struct SamplesPlan {
    const GaussianSamplesArgs<T>& args;
    bool tall;           // K from triangular factors
    int64_t rows, columns, group;  // of K; problems that a thread solves at a time
    PolarArgs<T> polar;

    explicit SamplesPlan(const GaussianSamplesArgs<T>& a)
        : args(a), tall(a.n > a.d && a.m > a.d), rows(tall ? a.d : a.n), columns(tall ? a.d : a.m), polar{} {
        polar.batch = a.batch;
        polar.n = rows;
        polar.m = columns;
        group = PolarShape<T>(polar).in_lanes ? width<T> : 1;
    }
    int threads() const {
        const int64_t small = rows < columns ? rows : columns;
        const int64_t work = args.batch * ((args.n + args.m) * args.d * small + 22 * rows * columns * small);
        return work < kParallelWork ? 1 : args.threads;
    }
};

template <class T>
struct SamplesWork {
    const SamplesPlan<T>& plan;
    PolarShape<T> shape;
    CentredSample<T> x, y;
    T *K, *P, *norm, *centred, *offset;  // (group, rows, columns) both, (group,), (rows, columns), (ld,)
    unsigned char* iteration;
    SampleFactor<T>*left, *right;
    T* image;  // (d, ld)

    SamplesWork(const SamplesPlan<T>& p, Arena& memory, SampleFactor<T>* f, SampleFactor<T>* g)
        : plan(p), shape(p.polar), x(p.args.n, p.args.d, memory), y(p.args.m, p.args.d, memory),
          K(memory.take<T>(p.group * p.rows * p.columns)), P(memory.take<T>(p.group * p.rows * p.columns)),
          norm(memory.take<T>(p.group)), centred(memory.take<T>(p.rows * p.columns)), offset(memory.take<T>(x.ld)),
          iteration(memory.take<unsigned char>(bytes_a_thread(shape))), left(f), right(g),
          image(p.tall ? memory.take<T>(p.args.d * x.ld) : nullptr) {}

    // Problems [begin, begin + count), count > 1 for a single thread only.
    void solve(int64_t begin, int64_t count, const Team& team) {
        const int64_t entries = plan.rows * plan.columns;
        for (int64_t g = 0; g < count; ++g) {
            read(begin + g, team);
            make_K(K + g * entries, team);
        }
        team.barrier();
        factor(count, team);
        for (int64_t g = 0; g < count; ++g) {
            if (count > 1) {
                read(begin + g, team);
                if (plan.tall) factorize(team);
            }
            finish(begin + g, K + g * entries, P + g * entries, team);
        }
        team.barrier();
    }

  private:
    void read(int64_t problem, const Team& team) {
        const GaussianSamplesArgs<T>& args = plan.args;
        if (team.rank == 0) x.read(args.x + problem * args.n * args.d);
        if (team.rank == team.size - 1) y.read(args.y + problem * args.m * args.d);
        team.barrier();
    }

    void make_K(T* out, const Team& team) {
        if (!plan.tall) return times_transposed(x.rows, y.rows, x.ld, out, plan.rows, plan.columns, team);
        factorize(team);
        times_transposed(left->factor, right->factor, x.ld, out, plan.rows, plan.columns, team);
    }

    void factorize(const Team& team) {
        if (team.rank == 0) left->factorize(x);
        if (team.rank == team.size - 1) right->factorize(y);
        team.barrier();
    }

    void factor(int64_t count, const Team& team) {
        PolarArgs<T> polar = plan.polar;
        polar.matrix = K;
        polar.polar = P;
        polar.nuclear_norm = norm;
        const PolarSchedule schedule = polar_schedule<T>(0);
        Arena memory{iteration};
        if (shape.in_lanes) solve_lanes(polar, schedule, shape, lane_iteration(shape, memory), 0, count);
        else solve_panels(polar, schedule, shape, panel_iteration(shape, memory), 0, team);
    }

    void finish(int64_t problem, const T* k, const T* p, const Team& team) {
        const GaussianSamplesArgs<T>& args = plan.args;
        const double n = args.n - args.unbiased, m = args.m - args.unbiased;
        if (team.rank == 0) {
            double squares = std::ldexp(x.squares(), 2 * x.exponent()) / n + std::ldexp(y.squares(), 2 * y.exponent()) / m;
            for (int64_t c = 0; c < args.d; ++c) squares += (x.mean[c] - y.mean[c]) * (x.mean[c] - y.mean[c]);
            const double norm = inner_product(k, p, plan.rows * plan.columns, 0) / std::sqrt(n * m);
            const double value = squares - 2 * std::ldexp(norm, x.exponent() + y.exponent());
            args.value[problem] = static_cast<T>(value < 0 ? 0 : value);
        }
        if (args.grad_x) gradient(x, y, args.grad_x + problem * args.n * args.d, p, true, left, right, team);
        if (args.grad_y) gradient(y, x, args.grad_y + problem * args.m * args.d, p, false, right, left, team);
    }

    void gradient(const CentredSample<T>& own, const CentredSample<T>& other, T* out, const T* p, bool first,
                  SampleFactor<T>* factor, SampleFactor<T>* other_factor, const Team& team) {
        const double count = own.n - plan.args.unbiased, other_count = other.n - plan.args.unbiased;
        const int64_t d = own.d, ld = own.ld, row_step = first ? plan.columns : 1, depth_step = first ? 1 : plan.columns;
        if (team.rank == 0) {
            for (int64_t k = 0; k < ld; ++k) offset[k] = static_cast<T>(k < d ? 2 / static_cast<double>(own.n) * (own.mean[k] - other.mean[k]) : 0);
            if (!plan.tall) centre(p, first);
        }
        team.barrier();
        const PowerOfTwo<T> unit(own.exponent()), other_unit(other.exponent());
        const Vec<T> weight = splat(static_cast<T>(2 / count)), share = splat(static_cast<T>(-2 / std::sqrt(count * other_count)));
        const auto put = [&](Vec<T> sum, int64_t i, int64_t k) {
            const Vec<T> row = weight * load(own.rows + i * ld + k) * unit.first * unit.second;
            const Vec<T> part = share * sum * other_unit.first * other_unit.second;
            store_up_to(out + i * d + k, row + part + load(offset + k), d - k < width<T> ? d - k : width<T>);
        };
        if (!plan.tall) {
            times_rows(centred, row_step, depth_step, other.rows, ld, own.n, other.n, team, ld, put);
        } else {
            times_rows(p, row_step, depth_step, other_factor->factor, ld, d, d, team, ld,
                       [&](Vec<T> sum, int64_t i, int64_t k) { store(image + i * ld + k, sum); });
            team.barrier();
            if (team.rank == (first ? 0 : team.size - 1)) factor->solve(image);  // who factorized it knows its rank
            team.barrier();
            times_rows(own.rows, ld, int64_t{1}, factor->image, ld, own.n, d, team, ld, put);
        }
        team.barrier();
    }

    // centred = P less the mean of each column (of each row, for the second sample)
    void centre(const T* p, bool columns) {
        const int64_t n = plan.rows, m = plan.columns;
        const int64_t lines = columns ? m : n, length = columns ? n : m, step = columns ? m : 1, apart = columns ? 1 : m;
        for (int64_t line = 0; line < lines; ++line) {
            double total = 0;
            for (int64_t k = 0; k < length; ++k) total += p[line * apart + k * step];
            const T mean = static_cast<T>(total / length);
            for (int64_t k = 0; k < length; ++k) centred[line * apart + k * step] = p[line * apart + k * step] - mean;
        }
    }
};

// Calls body(work) with the work on this memory; with a null base it only counts.
template <class T, class Body>
void with_work(const SamplesPlan<T>& plan, Arena& memory, const Body& body) {
    if (!plan.tall) {
        SamplesWork<T> work(plan, memory, nullptr, nullptr);
        return body(work);
    }
    SampleFactor<T> left(plan.args.d, memory), right(plan.args.d, memory);
    SamplesWork<T> work(plan, memory, &left, &right);
    body(work);
}

template <class T>
int64_t samples_bytes(const SamplesPlan<T>& plan) {
    Arena counter{nullptr};
    with_work(plan, counter, [](SamplesWork<T>&) {});
    return counter.used;
}

template <class T>
void run(const GaussianSamplesArgs<T>& args) {
    const SamplesPlan<T> plan(args);
    const int64_t bytes = samples_bytes(plan);
    parallel(plan.threads(), [&](const Team& team) {
        const int64_t groups = (args.batch + plan.group - 1) / plan.group;
        const int64_t apart = plan.group > 1 ? groups : groups / team.size * team.size;
        Arena own{args.workspace + team.rank * bytes};
        with_work(plan, own, [&](SamplesWork<T>& work) {
            for (int64_t g = team.rank; g < apart; g += team.size) {
                const int64_t begin = g * plan.group, left = args.batch - begin;
                work.solve(begin, left < plan.group ? left : plan.group, Team{0, 1, nullptr});
            }
        });
        team.barrier();
        Arena common{args.workspace};
        with_work(plan, common, [&](SamplesWork<T>& work) {
            for (int64_t g = apart; g < groups; ++g) work.solve(g, 1, team);
        });
    });
}

}  // namespace

void gaussian_samples(const GaussianSamplesArgs<float>& args) { run(args); }
void gaussian_samples(const GaussianSamplesArgs<double>& args) { run(args); }
int64_t gaussian_samples_workspace_bytes(const GaussianSamplesArgs<float>& args) { return args.threads * samples_bytes(SamplesPlan<float>(args)); }
int64_t gaussian_samples_workspace_bytes(const GaussianSamplesArgs<double>& args) { return args.threads * samples_bytes(SamplesPlan<double>(args)); }

}  // namespace OTKD_ISA
}  // namespace otkd_fast
